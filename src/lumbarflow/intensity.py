"""Intensity normalisation of one series: clip at percentiles, then z-score."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np


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
    def of(cls, array: np.ndarray, percentiles: tuple[float, float]) -> Normalisation:
        """Take the figures from a whole series, (n, rows, columns), any real dtype.

        Raises:
            ValueError: values that aren't finite, or nothing left between the percentiles.
        """
        if not np.all(np.isfinite(array)):
            raise ValueError("intensities that aren't finite cannot be normalised; expected finite numbers")
        lower, upper = (float(value) for value in np.percentile(array, percentiles))
        if not lower < upper:
            raise ValueError(
                f"intensities are constant ({lower:g}) between percentiles {percentiles[0]:g} and {percentiles[1]:g}; "
                "expected an image with contrast there"
            )
        clipped = np.clip(array, lower, upper).astype(np.float32)
        mean = float(clipped.mean(dtype=np.float64))
        std = float(clipped.std(dtype=np.float64))
        return cls(lower, upper, mean, std)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Any shape, native intensities -> float32 of the same shape."""
        return (np.clip(array, self.lower, self.upper).astype(np.float32) - np.float32(self.mean)) / np.float32(
            self.std
        )

    @property
    def darkest(self) -> float:
        """The normalised value of air: what padding around a slice is filled with."""
        return (self.lower - self.mean) / self.std

    def to_dict(self) -> dict:
        return asdict(self)
