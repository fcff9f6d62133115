"""What the tests share: volumes whose every axis differs in size, spacing and direction, and hypothesis's settings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings

from lumbarflow.imaging import LabelMap, Volume

# Derandomized: a property that fails here fails on every machine. No deadline: machines are shared.
settings.register_profile("lumbarflow", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("lumbarflow")

# Half a turn of every axis into the next but one, so that no column or row can be taken for another.
OBLIQUE = np.array([[2.0, -1.0, 2.0], [2.0, 2.0, -1.0], [-1.0, 2.0, 2.0]]) / 3


@pytest.fixture(scope="session")
def make_volume() -> Callable[..., Volume]:
    """Factory of small volumes. Every voxel has its own value (up to the dtype's limit), in a scrambled order."""

    def make(shape=(4, 6, 5), *, kind=Volume, dtype=np.int16, direction=OBLIQUE, values=None, **geometry) -> Volume:
        if values is None:
            values = np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape)
        geometry = {"spacing_mm": (0.75, 1.3, 3.9), "origin_mm": (-12.5, 30.25, 7.125)} | geometry
        return kind(np.asarray(values).astype(dtype), direction=direction, **geometry)

    return make


@pytest.fixture(scope="session")
def make_pair(make_volume) -> Callable[..., tuple[Volume, LabelMap]]:
    """Factory of an image and its mask in raw SPIDER ids: a vertebra, the canal and a disc on background."""

    def make(shape=(4, 6, 5), **geometry) -> tuple[Volume, LabelMap]:
        ids = np.zeros(shape, np.uint8)
        ids[:, 0], ids[:, 1], ids[:, 2] = 1, 100, 201
        return make_volume(shape, **geometry), make_volume(shape, kind=LabelMap, dtype=np.uint8, values=ids, **geometry)

    return make
