"""What is written down beside a trained net; no Keras, and nothing but small helpers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumbarflow.files import array_digest


def weights_digest(model: Any) -> str:
    """Hex digest of a Keras model's weights: tells whether figures or predictions are of this very net."""
    return array_digest(*model.get_weights())


def describe_training(result: Any, manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a net was trained on and how, how that went, and which net it is.

    Args:
        result: a `training.TrainingResult`.
        manifest: of the model input it was trained on.
        settings: sections of `training.fit`.
    """
    return {
        "settings": dict(settings),
        "content_hash": manifest["content_hash"],
        "weights": weights_digest(result.model),
        "parameters": int(result.model.count_params()),
        "best_epoch": result.best_epoch,
        "epochs": len(result.history),
        "seconds": sum(row["seconds"] for row in result.history),
        "startup_seconds": result.startup_seconds,
        "stopped_by": result.stopped_by,
        "hardware": result.hardware,
    }
