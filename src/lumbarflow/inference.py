"""From the raw intensities of a series to its label map, by one path for evaluation, prediction and the registry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumbarflow.augmentation import Augmentation, _source_coordinates
from lumbarflow.imaging import LabelMap, Volume, to_sagittal
from lumbarflow.intensity import Normalisation, normalisation_of
from lumbarflow.model_input import PREDICTION, PREPARATION, neighbour_indices
from lumbarflow.parameters import check_names
from lumbarflow.resampling import InPlaneGrid

# What a Segmenter needs to know beside the net; saved with every registered model.
SETTINGS = (*PREPARATION, *PREDICTION)
# The setting `test_time_augmentation`; 0 is off.
OFF = {"shift": 0.0, "rotation_degrees": 0.0}
# What models that were registered before a setting came to be lack in their record, and what was done then.
EARLIER = {"test_time_augmentation": OFF}

# Coordinates nearer than this to a pixel's centre, in pixels, mean that pixel: they were computed in float32.
_SNAP = 1e-3


def neighbours_of(model: Any) -> int:
    """How many slices on each side a net takes as channels, see `model_input.neighbour_indices`.

    Raises:
        ValueError: an even number of channels, none of which is in the middle.
    """
    channels = model.input_shape[-1]
    if channels % 2 == 0:
        raise ValueError(
            f"the net takes {channels} channels; expected an odd number, the slice itself between its neighbours. "
            "Build it with 2 * neighbours + 1 channels."
        )
    return (channels - 1) // 2


class Segmenter:
    """A net together with the preprocessing that it was trained with.

    Args:
        model: Keras model, float (n, H, W, 2 * neighbours + 1) -> probabilities (n, H, W, classes).
        settings: `size` [H, W], `keep_aspect`, `normalisation` and `percentiles` [lower, upper] as in preprocessing,
            `batch_size` (slices per forward pass) and `test_time_augmentation`: `shift`, a fraction of height and
            width, in whole pixels, and `rotation_degrees`, of the pixel grid. With either above 0 the probabilities are
            averaged over the slice as it is and shifted up, down, to the left and to the right, or turned both ways;
            turning blurs by its interpolation. Without
            `test_time_augmentation` there is none: models registered earlier do not have it in their record.
    Attributes:
        neighbours: slices on each side that the net sees as channels.
    Raises:
        ValueError: a missing or impossible setting, or a net with an even number of channels.
    """

    def __init__(self, model: Any, settings: Mapping[str, Any]):
        settings = {**EARLIER, **settings}
        missing = [name for name in SETTINGS if name not in settings]
        if missing:
            raise ValueError(f"a Segmenter needs the settings {list(SETTINGS)}; {missing} are missing")
        self.model = model
        self.size = tuple(settings["size"])
        self.keep_aspect = bool(settings["keep_aspect"])
        self.normalisation = settings["normalisation"]
        self.percentiles = tuple(settings["percentiles"])
        self.batch_size = int(settings["batch_size"])
        self.neighbours = neighbours_of(model)
        self._moves = _moves(self.size, settings["test_time_augmentation"])

    def probabilities(self, slices: np.ndarray, pixel_spacing_mm: tuple[float, float]) -> np.ndarray:
        """Class probabilities on the slices' own grid.

        Args:
            slices: (n, rows, columns), all sagittal slices of one series (normalisation is over the series), from the
                patient's left to right (nets that take neighbouring slices depend on it), superior up and anterior
                left, raw intensities of any real dtype.
            pixel_spacing_mm: (row, column) pixel size.
        Returns:
            float32 (n, rows, columns, classes).
        """
        return np.concatenate(list(self.batches(slices, pixel_spacing_mm)))

    def labels(self, slices: np.ndarray, pixel_spacing_mm: tuple[float, float]) -> np.ndarray:
        """uint8 (n, rows, columns) classes on the slices' own grid: probabilities are mapped back, then decided.

        Arguments as for `probabilities`; memory stays that of one batch.
        """
        decided = [batch.argmax(axis=-1).astype(np.uint8) for batch in self.batches(slices, pixel_spacing_mm)]
        return np.concatenate(decided)

    def segment(self, volume: Volume) -> LabelMap:
        """A volume in any orientation -> its uint8 label map in the same storage order and geometry."""
        sagittal, orientation = to_sagittal(volume)
        column, row, _ = sagittal.spacing_mm
        labels = self.labels(sagittal.array, (row, column))
        return LabelMap(orientation.restore(labels), volume.spacing_mm, volume.origin_mm, volume.direction)

    def batches(self, slices: np.ndarray, pixel_spacing_mm: tuple[float, float]) -> Iterator[np.ndarray]:
        """The same as `probabilities`, `batch_size` slices at a time: those of a whole series may not fit in memory."""
        if slices.ndim != 3 or 0 in slices.shape:
            raise ValueError(f"slices of shape {slices.shape}; expected (n, rows, columns), none of them 0")
        if len(pixel_spacing_mm) != 2 or not all(np.isfinite(v) and v > 0 for v in pixel_spacing_mm):
            raise ValueError(f"pixel spacing {pixel_spacing_mm}; expected two positive lengths in mm, (row, column)")
        normalisation = normalisation_of(slices, self.normalisation, self.percentiles)
        grid = InPlaneGrid(slices.shape[1:], tuple(pixel_spacing_mm), self.size, self.keep_aspect)
        for net_input in self._net_inputs(slices, normalisation, grid):
            yield grid.probabilities_to_native(self.predict(net_input))

    def predict(self, net_input: np.ndarray) -> np.ndarray:
        """Class probabilities at the net's size, with test-time augmentation if it is on.

        Where a moved slice does not show a pixel, the average is over the others; the slice as it is shows all.

        Args:
            net_input: float32 (n, H, W, 2 * neighbours + 1), prepared as for training.
        Returns:
            float32 (n, H, W, classes).
        """
        total = self._forward(net_input)
        if not self._moves:
            return total
        count = np.ones((*self.size, 1), np.float32)
        for there, back in self._moves:
            total = total + back.shown * back.apply(self._forward(there.apply_over_air(net_input)))
            count += back.shown
        return total / count

    def _forward(self, net_input: np.ndarray) -> np.ndarray:
        return np.asarray(self.model.predict(net_input, batch_size=self.batch_size, verbose=0), np.float32)

    def _net_inputs(self, slices: np.ndarray, normalisation: Normalisation, grid: InPlaneGrid) -> Iterator[np.ndarray]:
        """What `predict` takes, `batch_size` slices at a time; each slice is prepared once, for all that show it."""
        window, first = np.empty((0, *self.size), np.float16), 0  # prepared slices, and the first one's index
        for start in range(0, len(slices), self.batch_size):
            batch = np.arange(start, min(start + self.batch_size, len(slices)))
            channels = neighbour_indices(batch, len(slices), self.neighbours)
            fresh = normalisation.apply(slices[first + len(window) : channels.max() + 1])
            fresh = normalisation.finish(grid.to_model(fresh, outside=normalisation.outside))
            # The manifest's arrays are float16: the net sees the same rounding here as in training.
            window = np.concatenate([window[channels.min() - first :], fresh.astype(np.float16)])
            first = channels.min()
            yield np.moveaxis(window[channels - first], 1, -1).astype(np.float32, order="C")


@dataclass(frozen=True)
class _Move:
    """A move within the plane, bilinear, worked out once and applied to all slices and channels at once.

    Attributes:
        taps: at most four pairs (indices, weights), (H * W,) and float32 (H * W, 1): the flat input pixels that each
            output pixel is a sum of. Those outside the input are left out.
        air: float32 (H * W, 1), what the weights lack to 1: the part that comes in from outside.
        shown: float32 (H, W, 1): 1 where the output pixel's centre lies between centres of the input, else 0.
    """

    taps: list[tuple[np.ndarray, np.ndarray]]
    air: np.ndarray
    shown: np.ndarray

    @classmethod
    def of(cls, size: tuple[int, int], augmentation: Augmentation) -> _Move:
        rows, columns = (
            np.where(np.abs(source - np.rint(source)) < _SNAP, np.rint(source), source)
            for source in _source_coordinates(size, augmentation)
        )
        taps, air = [], np.ones((size[0] * size[1], 1), np.float32)
        for row, row_weight in _neighbouring(rows, size[0]):
            for column, column_weight in _neighbouring(columns, size[1]):
                weights = (row_weight * column_weight).reshape(-1, 1)
                if weights.any():  # whole pixels have one tap, straight shifts two
                    taps.append(((row * size[1] + column).ravel(), weights))
                    air -= weights
        shown = (rows >= 0) & (rows <= size[0] - 1) & (columns >= 0) & (columns <= size[1] - 1)
        return cls(taps, air, shown[..., None].astype(np.float32))

    def apply(self, planes: np.ndarray) -> np.ndarray:
        """float32 (n, H, W, channels) -> the same shape; 0 comes in from outside."""
        flat = planes.reshape(len(planes), -1, planes.shape[-1])
        moved = np.zeros_like(flat)
        for indices, weights in self.taps:
            moved += flat.take(indices, axis=1) * weights
        return moved.reshape(planes.shape)

    def apply_over_air(self, planes: np.ndarray) -> np.ndarray:
        """The same; the minimum over each slice and its neighbours comes in from outside: `apply_augmentation`."""
        return self.apply(planes) + self.air.reshape(*planes.shape[1:3], 1) * planes.min(axis=(1, 2, 3), keepdims=True)


def _neighbouring(source: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The samples of one axis before and after each coordinate, and float32 weights, 0 for samples outside."""
    before = np.floor(source).astype(np.intp)
    after_weight = source - before
    for sample, weight in ((before, 1 - after_weight), (before + 1, after_weight)):
        inside = (sample >= 0) & (sample < count)
        yield np.clip(sample, 0, count - 1), np.where(inside, weight, 0).astype(np.float32)


def check_test_time_augmentation(settings: Mapping[str, float]) -> dict[str, float]:
    """The settings with what they leave out. Raises ValueError for one that is unknown or out of range."""
    check_names(settings, OFF, "evaluation.test_time_augmentation")
    settings = {**OFF, **settings}
    for name, below in (("shift", 1), ("rotation_degrees", 180)):
        if not (math.isfinite(settings[name]) and 0 <= settings[name] < below):
            raise ValueError(
                f"evaluation.test_time_augmentation.{name} is {settings[name]}; expected 0 or more, below {below}; "
                "0 is off."
            )
    return settings


def _moves(size: tuple[int, int], settings: Mapping[str, float]) -> list[tuple[_Move, _Move]]:
    """Every change of test-time augmentation, and the one that takes it back."""
    settings = check_test_time_augmentation(settings)
    # Whole pixels, which shift without any interpolation; a rotation is interpolated both ways, and blurs a little.
    rows, columns = (round(settings["shift"] * length) for length in size)
    widths = {"shift_rows": rows, "shift_columns": columns, "rotation_degrees": settings["rotation_degrees"]}
    moves = []
    for name, width in widths.items():
        if width > 0:
            # Each of the two takes the other back.
            one, other = (_Move.of(size, Augmentation(**{name: sign * width})) for sign in (1, -1))
            moves += [(one, other), (other, one)]
    return moves
