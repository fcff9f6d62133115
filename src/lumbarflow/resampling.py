"""Between a sagittal slice as it was scanned and the net's fixed input size, and back.

Interpolation is written as one matrix of weights per axis, so that borders and antialiasing are explicit numbers, and
the way back uses the very same coordinates as the way there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lumbarflow.labels import FOREGROUND

# A probability of background above which nothing else can be decided; above a half by more than rounding.
_SURELY = 0.51


def axis_weights(n_in: int, n_out: int, step: float) -> np.ndarray:
    """Weights that resample one axis, the centres of both grids held together.

    Output sample i lies at input coordinate (i - (n_out - 1) / 2) * step + (n_in - 1) / 2. Its weights are a triangle
    of half-width max(1, step): linear interpolation when sampling finer, a low-pass (antialiased) when coarser.

    Args:
        n_in, n_out: number of samples. step: input samples per output sample.
    Returns:
        float32 (n_out, n_in). Rows sum to 1; rows of samples that lie outside the input's extent are all 0.
    """
    position = (np.arange(n_out) - (n_out - 1) / 2) * step + (n_in - 1) / 2
    # Positions between the outermost centre and the pixel's edge belong to the outermost pixel.
    inside = (position >= -0.5 - 1e-6) & (position <= n_in - 0.5 + 1e-6)
    held = np.clip(position, 0, n_in - 1)
    distance = np.abs(held[:, None] - np.arange(n_in)[None, :])
    weights = np.maximum(0.0, 1.0 - distance / max(1.0, step))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.where(inside[:, None], weights, 0.0).astype(np.float32)


@dataclass(frozen=True)
class InPlaneGrid:
    """The pair of grids: native sagittal slices and the net's input.

    Attributes:
        native_shape: (rows, columns). native_spacing_mm: (row, column) pixel size.
        size: (rows, columns) of the net's input.
        keep_aspect: True pads so that a millimetre is equally long both ways; False stretches each axis (the paper).
    """

    native_shape: tuple[int, int]
    native_spacing_mm: tuple[float, float]
    size: tuple[int, int]
    keep_aspect: bool = True

    @cached_property
    def model_spacing_mm(self) -> tuple[float, float]:
        """(row, column) pixel size of the net's input."""
        extent = [n * spacing for n, spacing in zip(self.native_shape, self.native_spacing_mm, strict=True)]
        spacing = [length / n for length, n in zip(extent, self.size, strict=True)]
        return (max(spacing), max(spacing)) if self.keep_aspect else tuple(spacing)

    @cached_property
    def _steps(self) -> tuple[float, float]:
        return tuple(
            model / native for model, native in zip(self.model_spacing_mm, self.native_spacing_mm, strict=True)
        )

    @cached_property
    def _forward(self) -> tuple[_Taps, _Taps]:
        return tuple(_Taps.of(*args) for args in zip(self.native_shape, self.size, self._steps, strict=True))

    @cached_property
    def _backward(self) -> tuple[_Taps, _Taps]:
        return tuple(
            _Taps.of(n_in, n_out, 1 / step)
            for n_in, n_out, step in zip(self.size, self.native_shape, self._steps, strict=True)
        )

    @cached_property
    def _outside(self) -> np.ndarray:
        """float32 (H, W): 1 where the net's input lies outside the scan (padding), else 0."""
        rows, columns = (taps.weights.sum(axis=1) > 0 for taps in self._forward)
        return 1.0 - np.outer(rows, columns).astype(np.float32)

    def to_model(self, slices: np.ndarray, outside: float = 0.0) -> np.ndarray:
        """(n, rows, columns) -> float32 (n, H, W); padding gets the value `outside`."""
        self._check(slices, self.native_shape)
        resampled = _resample(slices, *self._forward)
        return resampled + self._outside * np.float32(outside)

    def to_native(self, slices: np.ndarray) -> np.ndarray:
        """(n, H, W) -> float32 (n, rows, columns), e.g. the probabilities of one class."""
        self._check(slices, self.size)
        return _resample(slices, *self._backward)

    def probabilities_to_native(self, probabilities: np.ndarray) -> np.ndarray:
        """(n, H, W, classes) -> float32 (n, rows, columns, classes)."""
        planes = [self.to_native(probabilities[..., channel]) for channel in range(probabilities.shape[-1])]
        return np.stack(planes, axis=-1)

    def foreground_to_native(self, probabilities: np.ndarray) -> tuple[slice, slice, np.ndarray]:
        """Of one slice the part of `probabilities_to_native` that can be anything but background, bit for bit.

        An average of pixels that are all more likely background than anything else is background too; and a spine is a
        third of its slice.

        Args:
            probabilities: (H, W, classes).
        Returns:
            The native rows and columns of that part, empty if there is none, and float32 (rows, columns, classes).
        """
        self._check(probabilities[None, ..., 0], self.size)
        unsure = probabilities[..., 0] <= _SURELY
        rows, columns = (taps.within(unsure.any(axis=axis)) for taps, axis in zip(self._backward, (1, 0), strict=True))
        part = [taps.part(where) for taps, where in zip(self._backward, (rows, columns), strict=True)]
        planes = [_resample(plane[None], *part)[0] for plane in np.moveaxis(probabilities, -1, 0)]
        return rows, columns, np.stack(planes, axis=-1)

    def labels_to_model(self, labels: np.ndarray) -> np.ndarray:
        """uint8 (n, rows, columns) -> uint8 (n, H, W): the class with the largest share of each pixel."""
        self._check(labels, self.native_shape)
        return _resample_labels(labels, self._forward)

    def labels_to_native(self, labels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W) -> uint8 (n, rows, columns), the class shares resampled, then decided."""
        self._check(labels, self.size)
        return _resample_labels(labels, self._backward)

    def labels_there_and_back(self, labels: np.ndarray) -> np.ndarray:
        """uint8 (n, rows, columns) -> the same: what is left of labels that only the resampling has touched.

        The class shares go to the net's size and back as probabilities do, and are decided once, at the end.
        """
        self._check(labels, self.native_shape)
        decided = np.empty_like(labels)
        for index, plane in enumerate(labels):
            shares = _resample(plane == _foreground(), *self._forward)
            decided[index] = _decide(_resample(shares, *self._backward))
        return decided

    @staticmethod
    def _check(slices: np.ndarray, shape: tuple[int, int]) -> None:
        if slices.ndim != 3 or slices.shape[1:] != tuple(shape):
            raise ValueError(f"this grid takes slices of shape (n, {shape[0]}, {shape[1]}), not {slices.shape}")


@dataclass(frozen=True)
class _Taps:
    """The few weights of `axis_weights` that aren't 0: a dense product would multiply zeros for most of its time.

    Attributes:
        indices: (n_out, taps) input samples. weights: float32 (n_out, taps).
    """

    indices: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, n_in: int, n_out: int, step: float) -> _Taps:
        dense = axis_weights(n_in, n_out, step)
        first = (dense > 0).argmax(axis=1)
        taps = np.arange(int((dense > 0).sum(axis=1).max()))
        # A tap beyond the last sample repeats it with weight 0.
        indices = np.minimum(first[:, None] + taps, n_in - 1)
        within = first[:, None] + taps <= n_in - 1
        return cls(indices, np.where(within, np.take_along_axis(dense, indices, axis=1), np.float32(0)))

    def within(self, wanted: np.ndarray) -> slice:
        """The output samples, from the first to the last, with weight in any of the wanted inputs, bool (n_in,)."""
        reached = np.flatnonzero((wanted[self.indices] & (self.weights > 0)).any(axis=1))
        return slice(int(reached[0]), int(reached[-1]) + 1) if len(reached) else slice(0, 0)

    def part(self, samples: slice) -> _Taps:
        """Those of some output samples."""
        return _Taps(self.indices[samples], self.weights[samples])


def _resample(planes: np.ndarray, rows: _Taps, columns: _Taps) -> np.ndarray:
    """(n, r, c) -> float32 (n, rows, columns), one plane at a time: memory stays that of one plane."""
    resampled = np.empty((len(planes), len(rows.weights), len(columns.weights)), np.float32)
    for index, plane in enumerate(planes):
        half = _along_rows(plane.astype(np.float32, copy=False), rows)
        resampled[index] = _along_rows(np.ascontiguousarray(half.T), columns).T
    return resampled


def _along_rows(plane: np.ndarray, taps: _Taps) -> np.ndarray:
    """float32 (r, c) -> (n_out, c)."""
    result = np.zeros((len(taps.weights), plane.shape[1]), np.float32)
    for indices, weights in zip(taps.indices.T, taps.weights.T, strict=True):
        result += plane[indices] * weights[:, None]
    return result


def _foreground() -> np.ndarray:
    """uint8 (classes - 1, 1, 1): compared with a plane, one mask per foreground class."""
    return np.array(FOREGROUND, np.uint8)[:, None, None]


def _resample_labels(labels: np.ndarray, taps: tuple[_Taps, _Taps]) -> np.ndarray:
    # Shares are resampled and then decided; averaging ids 1 and 3 would invent a canal between bone and disc.
    decided = np.empty((len(labels), len(taps[0].weights), len(taps[1].weights)), np.uint8)
    for index, plane in enumerate(labels):
        decided[index] = _decide(_resample(plane == _foreground(), *taps))
    return decided


def _decide(shares: np.ndarray) -> np.ndarray:
    """float32 (classes - 1, r, c) shares of the foreground -> uint8 (r, c); ties go to the lower class."""
    background = 1.0 - shares.sum(axis=0, keepdims=True)  # padding included: nothing else is there
    return np.concatenate([background, shares]).argmax(axis=0).astype(np.uint8)
