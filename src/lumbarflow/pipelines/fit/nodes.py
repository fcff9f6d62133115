"""Training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lumbarflow import tracking
from lumbarflow.model_input import ModelInput
from lumbarflow.training_record import describe_training
from lumbarflow.training_settings import training_key


def train_model(
    model_input: ModelInput,
    model: dict[str, Any],
    loss: dict[str, Any],
    training: dict[str, Any],
    augmentation: dict[str, Any],
    folder: Path,
) -> tuple[Any, dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """Train the net and keep the weights of the best epoch; one that was interrupted goes on from its checkpoint.

    Returns the net, what it was trained on and how, and the history (twice: for machines and for people).
    """
    from lumbarflow.training import fit, keep_record

    tracking.tag_manifest(model_input.manifest)
    settings = {"model": model, "loss": loss, "training": training, "augmentation": augmentation}
    # A folder for each training: one with other settings doesn't end what another has begun.
    output = folder / training_key(model_input.manifest, settings)[:16]
    result = fit(model_input, settings, output=output, on_epoch=tracking.log_epoch)
    record = keep_record(describe_training(result, model_input.manifest, settings) | tracking.git_commit("."), output)
    history = pd.DataFrame(result.history)
    return result.model, record, history, history
