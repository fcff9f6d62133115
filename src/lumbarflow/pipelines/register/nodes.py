"""Registration of the trained model in MLflow."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from lumbarflow import registry, tracking
from lumbarflow.inference import weights_digest
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.provenance import check_evaluation


def register_model(
    model: Any,
    model_input: ModelInput,
    metrics_by_class: pd.DataFrame,
    summary: dict[str, Any],
    evaluation: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Make a new version of the registered model, and move the champion's alias to it if it has earned it."""
    from lumbarflow.training import save_model

    check_names(settings, ("name", "alias"), "registration")
    check_evaluation(summary, weights_digest(model), model_input.manifest)
    tracking.tag_manifest(model_input.manifest)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        save_model(model, path)
        return registry.register(
            path,
            model_input.manifest,
            metrics_by_class.to_dict("records"),
            model_input.segmenter_settings(evaluation["batch_size"]),
            settings,
        )
