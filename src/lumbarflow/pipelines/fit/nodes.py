"""Training."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lumbarflow import tracking
from lumbarflow.model_input import ModelInput


def train_model(
    model_input: ModelInput,
    model: dict[str, Any],
    loss: dict[str, Any],
    training: dict[str, Any],
    augmentation: dict[str, Any],
) -> tuple[Any, pd.DataFrame, pd.DataFrame]:
    """Train the net and keep the weights of the best epoch; the history is returned for machines and for people."""
    from lumbarflow.training import fit

    settings = {"model": model, "loss": loss, "training": training, "augmentation": augmentation}
    result = fit(model_input, settings, on_epoch=tracking.log_epoch)
    history = pd.DataFrame(result.history)
    return result.model, history, history
