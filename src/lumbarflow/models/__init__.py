"""The nets, by name. A new one is a function with `modified_unet`'s first four arguments, and a line in MODELS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lumbarflow.models.unet import modified_unet

if TYPE_CHECKING:
    import keras

MODELS = {"modified_unet": modified_unet}


def build(name: str, size: Sequence[int], channels: int, classes: int, **settings) -> keras.Model:
    """A net of the registry with random weights, uncompiled: (n, H, W, channels) -> probabilities (n, H, W, classes).

    Args:
        name: one of MODELS.
        size: (H, W) of its input.
        settings: the keyword arguments of that net's function.
    Raises:
        ValueError: no net of that name, or the net refuses its settings.
    """
    return find(name)(size, channels, classes, **settings)


def find(name: str):
    """The function that builds the net `name`. Raises ValueError if there is none."""
    if name not in MODELS:
        raise ValueError(f"model.name is {name!r}; expected one of {sorted(MODELS)}.")
    return MODELS[name]
