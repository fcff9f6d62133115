"""Registration of the trained model in MLflow."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from lumbarflow import registry, tracking
from lumbarflow.inference import EARLIER
from lumbarflow.model_input import ModelInput
from lumbarflow.provenance import check_evaluation
from lumbarflow.training_record import weights_digest


def register_model(
    model: Any,
    model_input: ModelInput,
    metrics_by_class: pd.DataFrame,
    metrics_by_case: pd.DataFrame,
    metrics_intervals: pd.DataFrame,
    summary: dict[str, Any],
    evaluation: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Make a new version of the registered model, and move the champion's alias to it if it has earned it."""
    from lumbarflow.networks import save_model

    registry.check_settings(settings)
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
    tables = (metrics_by_class, metrics_by_case, metrics_intervals)
    figures = registry.Figures(*(table.to_dict("records") for table in tables), weights=summary["weights"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        save_model(model, path)
        return registry.register(
            path,
            model_input.manifest,
            figures,
            model_input.segmenter_settings(evaluation),
            settings,
        )
