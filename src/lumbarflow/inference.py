"""From the raw intensities of a series to its label map, by one path for evaluation, prediction and the registry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumbarflow.augmentation import Augmentation, _source_coordinates
from lumbarflow.imaging import LabelMap, Volume, to_sagittal
from lumbarflow.intensity import Normalisation, normalisation_of
from lumbarflow.labels import CLASS_COUNT, CLASSES
from lumbarflow.model_input import PREDICTION, PREPARATION, neighbour_indices
from lumbarflow.parameters import check_names
from lumbarflow.resampling import InPlaneGrid
from lumbarflow.uncertainty import entropy_sums, mean_entropy

# What a Segmenter needs to know beside the net; saved with every registered model.
SETTINGS = (*PREPARATION, *PREDICTION)
# The setting `test_time_augmentation`; 0 is off.
OFF = {"shift": 0.0, "rotation_degrees": 0.0}
SECTION = "evaluation.test_time_augmentation"
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


@dataclass(frozen=True)
class Segmentation:
    """The classes of a series, and how unsure the net was of each structure.

    Attributes:
        labels: uint8 (n, rows, columns), on the slices' own grid.
        entropy: structure (vertebrae, canal, IVD) -> mean entropy of the probabilities that `labels` were decided by,
            over the pixels decided as it, as a share of the greatest, ln(classes): 0 to 1; NaN where there are none.
        disagreement: structure -> 1 - Dice between each slice as it is and moved, over all slices, mean over the moves;
            NaN where the net finds it in no view. None if nobody asked.
    """

    labels: np.ndarray
    entropy: dict[str, float]
    disagreement: dict[str, float] | None


class Segmenter:
    """A net together with the preprocessing that it was trained with.

    Args:
        model: float (n, H, W, 2 * neighbours + 1) -> probabilities (n, H, W, classes): an `OnnxNetwork`, a Keras model,
            or anything else with their `input_shape` and `predict`.
        settings: `size` [H, W], `keep_aspect`, `normalisation` and `percentiles` [lower, upper] as in preprocessing,
            `batch_size` (slices per forward pass) and `test_time_augmentation`: `shift`, a fraction of height and
            width, in whole pixels, and `rotation_degrees`, of the pixel grid. With either above 0 the probabilities are
            averaged over the slice as it is and shifted up, down, to the left and to the right, or turned both ways;
            turning blurs by its interpolation. Without
            `test_time_augmentation` there is none: models registered earlier do not have it in their record.
    Attributes:
        settings: those given, with what earlier records lack.
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
        self.settings = {name: settings[name] for name in SETTINGS}
        self.size = tuple(settings["size"])
        self.keep_aspect = bool(settings["keep_aspect"])
        self.normalisation = settings["normalisation"]
        self.percentiles = tuple(settings["percentiles"])
        self.batch_size = int(settings["batch_size"])
        self.neighbours = neighbours_of(model)
        self._moves = _moves(self.size, settings["test_time_augmentation"])

    @property
    def augmented(self) -> bool:
        """Whether test-time augmentation is on, and moves this net's slices by a pixel or an angle at least."""
        return bool(self._moves)

    def with_test_time_augmentation(self, settings: Mapping[str, float]) -> Segmenter:
        """The same net and preprocessing with other test-time augmentation; the net is shared, not copied.

        Args:
            settings: `shift` and `rotation_degrees`, see `Segmenter`; what is not given is off.
        Raises:
            ValueError: an unknown or impossible setting.
        """
        other = copy(self)
        other._moves = _moves(self.size, settings)
        return other

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
        return self.segmentation(slices, pixel_spacing_mm).labels

    def segmentation(
        self,
        slices: np.ndarray,
        pixel_spacing_mm: tuple[float, float],
        disagreement: Mapping[str, float] | None = None,
    ) -> Segmentation:
        """The same labels, and how unsure they are; memory stays that of one batch.

        Args:
            slices, pixel_spacing_mm: as for `probabilities`.
            disagreement: how to move the slices to see whether the net says the same of them: `shift` and
                `rotation_degrees` as in `test_time_augmentation`, whatever that itself is. Each move costs a forward
                pass, unless test-time augmentation makes it anyway. Compared is the net's own answer with that of the
                moved slice, moved back, where this shows a pixel, at the net's size.
        Raises:
            ValueError: as `probabilities`; moves that move nothing.
        """
        moves = {} if disagreement is None else _moves(self.size, disagreement, "disagreement")
        if disagreement is not None and not moves:
            raise ValueError(
                f"disagreement {dict(disagreement)} moves nothing at the net's size {list(self.size)}; expected a "
                "shift of a pixel or a rotation above 0. Set one, e.g. rotation_degrees to 3."
            )
        labels, entropies, overlap = [], [], np.zeros((len(moves), CLASS_COUNT, 2), np.int64)
        grid, net_inputs = self._prepared(slices, pixel_spacing_mm)
        for net_input in net_inputs:
            probabilities, views = self._predict(net_input, moves)
            overlap += views
            for plane in probabilities:
                rows, columns, native = grid.foreground_to_native(plane)
                decided = np.zeros(grid.native_shape, np.uint8)
                decided[rows, columns] = native.argmax(axis=-1)
                labels.append(decided)
                entropies.append(entropy_sums(decided[None, rows, columns], native[None]))
        return Segmentation(
            np.stack(labels),
            mean_entropy(np.concatenate(entropies)),
            _disagreement(overlap) if moves else None,
        )

    def segment(self, volume: Volume) -> LabelMap:
        """A volume in any orientation -> its uint8 label map in the same storage order and geometry."""
        sagittal, orientation = to_sagittal(volume)
        column, row, _ = sagittal.spacing_mm
        labels = self.labels(sagittal.array, (row, column))
        return LabelMap(orientation.restore(labels), volume.spacing_mm, volume.origin_mm, volume.direction)

    def batches(self, slices: np.ndarray, pixel_spacing_mm: tuple[float, float]) -> Iterator[np.ndarray]:
        """The same as `probabilities`, `batch_size` slices at a time: those of a whole series may not fit in memory."""
        grid, net_inputs = self._prepared(slices, pixel_spacing_mm)
        for net_input in net_inputs:
            yield grid.probabilities_to_native(self.predict(net_input))

    def _prepared(
        self, slices: np.ndarray, pixel_spacing_mm: tuple[float, float]
    ) -> tuple[InPlaneGrid, Iterator[np.ndarray]]:
        """The slices' grid, and what `predict` takes of them, batch by batch."""
        if slices.ndim != 3 or 0 in slices.shape:
            raise ValueError(f"slices of shape {slices.shape}; expected (n, rows, columns), none of them 0")
        if len(pixel_spacing_mm) != 2 or not all(np.isfinite(v) and v > 0 for v in pixel_spacing_mm):
            raise ValueError(f"pixel spacing {pixel_spacing_mm}; expected two positive lengths in mm, (row, column)")
        normalisation = normalisation_of(slices, self.normalisation, self.percentiles)
        grid = InPlaneGrid(slices.shape[1:], tuple(pixel_spacing_mm), self.size, self.keep_aspect)
        return grid, self._net_inputs(slices, normalisation, grid)

    def predict(self, net_input: np.ndarray) -> np.ndarray:
        """Class probabilities at the net's size, with test-time augmentation if it is on.

        Where a moved slice does not show a pixel, the average is over the others; the slice as it is shows all.

        Args:
            net_input: float32 (n, H, W, 2 * neighbours + 1), prepared as for training.
        Returns:
            float32 (n, H, W, classes).
        """
        return self._predict(net_input)[0]

    def _predict(
        self, net_input: np.ndarray, compared: Mapping[Augmentation, tuple[_Move, _Move]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same, and of each of the `compared` moves int64 (moves, classes, 2): the pixels that it shows, of which
        the slices as they are and moved both have a class, and how many have it on each side, added up."""
        compared = compared or {}
        alone = total = self._forward(net_input)
        count = np.ones((*self.size, 1), np.float32)
        overlap = dict.fromkeys(compared)
        # A move that serves both is made once.
        for change, (there, back) in (self._moves | compared).items():
            view = back.apply(self._forward(there.apply_over_air(net_input)))
            if change in self._moves:
                total = total + back.shown * view
                count += back.shown
            if change in compared:
                shown = back.shown[..., 0] > 0
                overlap[change] = _overlap(alone[:, shown].argmax(axis=-1), view[:, shown].argmax(axis=-1))
        overlaps = np.array(list(overlap.values()), np.int64).reshape(-1, CLASS_COUNT, 2)
        return (total / count if self._moves else total), overlaps

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


def check_test_time_augmentation(settings: Mapping[str, float], section: str = SECTION) -> dict[str, float]:
    """The settings with what they leave out. Raises ValueError for one that is unknown or out of range."""
    check_names(settings, OFF, section)
    settings = {**OFF, **settings}
    for name, below in (("shift", 1), ("rotation_degrees", 180)):
        if not (math.isfinite(settings[name]) and 0 <= settings[name] < below):
            raise ValueError(f"{section}.{name} is {settings[name]}; expected 0 or more, below {below}; 0 is off.")
    return settings


def _moves(
    size: tuple[int, int], settings: Mapping[str, float], section: str = SECTION
) -> dict[Augmentation, tuple[_Move, _Move]]:
    """Every change of test-time augmentation -> the move that makes it, and the one that takes it back."""
    settings = check_test_time_augmentation(settings, section)
    # Whole pixels, which shift without any interpolation; a rotation is interpolated both ways, and blurs a little.
    rows, columns = (round(settings["shift"] * length) for length in size)
    widths = {"shift_rows": rows, "shift_columns": columns, "rotation_degrees": settings["rotation_degrees"]}
    moves = {}
    for name, width in widths.items():
        if width > 0:
            # Each of the two takes the other back.
            changes = [Augmentation(**{name: sign * width}) for sign in (1, -1)]
            one, other = (_Move.of(size, change) for change in changes)
            moves |= zip(changes, ((one, other), (other, one)), strict=True)
    return moves


def _overlap(alone: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """int64 (classes, 2): the pixels that have a class on both sides, and the sum of those that have it on either."""
    both, *each = (np.bincount(c.ravel(), minlength=CLASS_COUNT) for c in (alone[alone == moved], alone, moved))
    return np.stack([both, sum(each)], axis=-1)


def _disagreement(overlap: np.ndarray) -> dict[str, float]:
    """Structure -> 1 - Dice, mean over the moves; NaN for one that is nowhere.

    Args:
        overlap: int64 (moves, classes, 2), see `_overlap`.
    """
    by_class = {}
    for index, name in enumerate(CLASSES[1:], start=1):
        both, each = overlap[overlap[:, index, 1] > 0, index].T
        by_class[name] = float(np.mean(1 - 2 * both / each)) if len(each) else np.nan
    return by_class
