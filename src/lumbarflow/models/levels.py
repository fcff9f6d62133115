"""What the U-Nets share: normalisation, and the checks of their levels against each other and the size."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lumbarflow.backend import load_keras

if TYPE_CHECKING:
    import keras


def check_size(model: str, size: Sequence[int], stride: int) -> None:
    """Raise ValueError unless (H, W) can be halved down to `stride`, that of the model's coarsest level."""
    if any(length < stride or length % stride for length in size):
        raise ValueError(
            f"{model}: size {list(size)} is not divisible by {stride}, the stride of the coarsest level. "
            f"Set preprocess.size to multiples of {stride} and preprocess again."
        )


def check_dropouts(model: str, widths: Sequence[int], dropouts: Sequence[float], prefix: str = "") -> None:
    """Raise ValueError unless every level has its dropout. `prefix` is that of both settings' names."""
    if len(widths) != len(dropouts):
        raise ValueError(
            f"{model}: {prefix}widths has {len(widths)} levels and {prefix}dropouts {len(dropouts)}; "
            "expected one dropout for each width."
        )


def check_groups(model: str, groups: int, widths: Sequence[int], prefix: str = "") -> None:
    """Raise ValueError unless the channels of every level fall into `groups` equal groups. `prefix` as above."""
    for width in widths:
        if groups < 1 or width % groups:
            raise ValueError(
                f"{model}: groups is {groups}, which does not divide the width {width} of {prefix}widths "
                f"{list(widths)}; expected a divisor of every width. Change groups or the widths."
            )


def batch_normalisation(name: str, *, momentum: float, dtype: str) -> keras.layers.Layer:
    """Keras's batch normalisation, over the batch of all devices together where the net is built for several.

    On TensorFlow the layer has to be told so; the arrays of JAX are whole. With one device the layer stays plain, since
    other backends refuse to load a synchronised one.

    Args:
        momentum: share of the moving averages kept at each step.
    """
    keras = load_keras()
    several = False
    if keras.config.backend() == "tensorflow":
        several = importlib.import_module("tensorflow").distribute.get_strategy().num_replicas_in_sync > 1
    return keras.layers.BatchNormalization(momentum=momentum, synchronized=several, name=name, dtype=dtype)
