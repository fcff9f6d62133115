"""Training."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lumbarflow import tracking
from lumbarflow.model_input import ModelInput
from lumbarflow.provenance import describe_training


def train_model(
    model_input: ModelInput,
    model: dict[str, Any],
    loss: dict[str, Any],
    training: dict[str, Any],
    augmentation: dict[str, Any],
) -> tuple[Any, dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """Train the net and keep the weights of the best epoch.

    Returns the net, what it was trained on and how, and the history (twice: for machines and for people).
    """
    from lumbarflow.training import fit

    tracking.tag_manifest(model_input.manifest)
    settings = {"model": model, "loss": loss, "training": training, "augmentation": augmentation}
    result = fit(model_input, settings, on_epoch=tracking.log_epoch)
    record = describe_training(result, model_input.manifest, settings) | tracking.git_commit(".")
    history = pd.DataFrame(result.history)
    return result.model, record, history, history
