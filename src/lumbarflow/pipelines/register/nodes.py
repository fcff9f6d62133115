"""Registration of the trained model in MLflow."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from lumbarflow import registry, tracking
from lumbarflow.inference import EARLIER
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.provenance import check_evaluation
from lumbarflow.training_record import weights_digest


def register_model(
    model: Any,
    model_input: ModelInput,
    metrics_by_class: pd.DataFrame,
    summary: dict[str, Any],
    evaluation: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Make a new version of the registered model, and move the champion's alias to it if it has earned it."""
    from lumbarflow.networks import save_model

    check_names(settings, ("name", "alias"), "registration")
    check_evaluation(summary, weights_digest(model), model_input.manifest)
    # It would be served otherwise than its figures say.
    name = "test_time_augmentation"
    evaluated = {**EARLIER, **summary["settings"]["evaluation"]}[name]
    if evaluated != evaluation[name]:
        raise ValueError(
            f"evaluation_summary: its figures were made with {name} {evaluated}, and the parameters say "
            f"{evaluation[name]}; expected the same. Run: kedro run --pipeline=evaluate"
        )
    tracking.tag_manifest(model_input.manifest)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        save_model(model, path)
        return registry.register(
            path,
            model_input.manifest,
            metrics_by_class.to_dict("records"),
            model_input.segmenter_settings(evaluation),
            settings,
        )
