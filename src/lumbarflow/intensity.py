"""From raw intensities to what the net sees: two normalisations by name, ours and the paper's.

Each works in two steps, because the paper's needs both grids: `apply` before the slices are resampled to the net's
size, `finish` after it; `outside` is what padding around a slice holds between the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

# Values that an integer array may span to be counted one by one.
_MOST_GREYS = 2**20


@dataclass(frozen=True)
class Normalisation:
    """Clip to [lower, upper], subtract the mean, divide by the standard deviation (all of the clipped series).

    MRI intensities have no unit and change with the scanner, so the figures come from the series itself and are the
    same for all of its slices.
    """

    lower: float
    upper: float
    mean: float
    std: float

    @classmethod
    def of(cls, array: np.ndarray, percentiles: Sequence[float]) -> Normalisation:
        """Take the figures from a whole series, (n, rows, columns), any real dtype.

        Raises:
            ValueError: values that aren't finite, no such percentiles, or nothing left between them.
        """
        check_percentiles(percentiles)
        _check_finite(array)
        # A scan has few greys: counted, they need no sorting of millions of voxels.
        values, counts = _greys(array) if _has_greys(array) else (array, None)
        lower, upper = _percentiles(values, counts, percentiles)
        if not lower < upper:
            raise ValueError(
                f"intensities are constant ({lower:g}) between percentiles {percentiles[0]:g} and {percentiles[1]:g}; "
                "expected an image with contrast there"
            )
        clipped = np.clip(values, lower, upper).astype(np.float32)
        if counts is None:
            mean, std = clipped.mean(dtype=np.float64), clipped.std(dtype=np.float64)
        else:
            mean = np.average(clipped, weights=counts)
            std = np.sqrt(np.average(np.square(clipped - mean), weights=counts))
        return cls(lower, upper, float(mean), float(std))

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Any shape, native intensities -> float32 of the same shape."""
        return (np.clip(array, self.lower, self.upper).astype(np.float32) - np.float32(self.mean)) / np.float32(
            self.std
        )

    @property
    def outside(self) -> float:
        """The normalised value of air: what padding around a slice is filled with."""
        return (self.lower - self.mean) / self.std

    def finish(self, resampled: np.ndarray) -> np.ndarray:
        """Nothing is left to do at the net's size."""
        return resampled

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class ColumnNormalisation:
    """The paper's: 8-bit greys of each slice, later each column of the net's input divided by its L2 norm.

    A slice's darkest and brightest pixel become 0 and 255, whatever its neighbours hold, and every column of the image
    (all rows at one place from front to back) has length 1 in the end, whatever it shows: anatomy in front of and
    behind the spine is as bright as the spine.

    Source: arXiv 2409.06018 and the authors' code (per-slice conversion to 8 bit; `normalize(axis=1)` of the stack).
    """

    @classmethod
    def of(cls, array: np.ndarray, percentiles: Sequence[float]) -> ColumnNormalisation:
        """Takes no figures from the series and ignores the percentiles. Raises ValueError if values aren't finite."""
        _check_finite(array)
        return cls()

    def apply(self, array: np.ndarray) -> np.ndarray:
        """(n, rows, columns) native intensities -> float32 whole numbers 0..255, each slice by itself."""
        array = array.astype(np.float64)
        lowest = array.min(axis=(1, 2), keepdims=True)
        extent = array.max(axis=(1, 2), keepdims=True) - lowest
        share = np.divide(array - lowest, extent, out=np.zeros_like(array), where=extent > 0)
        return (255 * share).astype(np.uint8).astype(np.float32)  # cut off, as their cast to 8 bit does

    outside = 0.0

    def finish(self, resampled: np.ndarray) -> np.ndarray:
        """float32 (n, H, W) -> the same, the rows of each column having the L2 norm 1 (0 where all of them are 0)."""
        norm = np.sqrt(np.square(resampled, dtype=np.float64).sum(axis=1, keepdims=True))
        return np.divide(resampled, norm, out=np.zeros_like(resampled), where=norm > 0, casting="same_kind")

    def to_dict(self) -> dict:
        return {}


NORMALISATIONS = {"z_score": Normalisation, "column_l2": ColumnNormalisation}


def check_percentiles(percentiles: Sequence[float]) -> None:
    """Raises ValueError if these are not two numbers from 0 to 100, the lower first."""
    if len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise ValueError(
            f"preprocess.percentiles is {list(percentiles)}; expected two numbers from 0 to 100, the lower first"
        )


def normalisation_of(array: np.ndarray, name: str, percentiles: Sequence[float]) -> Normalisation | ColumnNormalisation:
    """The normalisation `name` for one series, (n, rows, columns).

    Raises:
        ValueError: no such normalisation, or the series cannot be normalised.
    """
    if name not in NORMALISATIONS:
        raise ValueError(f"preprocess.normalisation is {name!r}; expected one of {', '.join(NORMALISATIONS)}")
    return NORMALISATIONS[name].of(array, percentiles)


def _has_greys(array: np.ndarray) -> bool:
    return array.dtype.kind in "iu" and array.itemsize < 8 and int(array.max()) - int(array.min()) < _MOST_GREYS


def _greys(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values of an integer array, ascending, as float64, and how often each is there."""
    lowest = int(array.min())
    counts = np.bincount((array.astype(np.int64) - lowest).ravel())
    there = np.flatnonzero(counts)
    return there + float(lowest), counts[there]


def _percentiles(values: np.ndarray, counts: np.ndarray | None, percentiles: Sequence[float]) -> tuple[float, ...]:
    """Linear between the two nearest of the sorted voxels, as np.percentile, which they are left to if not counted."""
    if counts is None:
        return tuple(float(value) for value in np.percentile(values, percentiles))
    last = np.cumsum(counts) - 1  # rank of the last voxel of each value
    found = []
    for percentile in percentiles:
        rank = percentile / 100 * last[-1]
        below, above = values[np.searchsorted(last, [math.floor(rank), math.ceil(rank)])]
        found.append(float(below + (above - below) * (rank - math.floor(rank))))
    return tuple(found)


def _check_finite(array: np.ndarray) -> None:
    if not np.all(np.isfinite(array)):
        raise ValueError("intensities that aren't finite cannot be normalised; expected finite numbers")
