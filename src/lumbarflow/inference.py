"""From the raw intensities of a series to its label map, by one path for evaluation, prediction and the registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lumbarflow.files import array_digest
from lumbarflow.imaging import LabelMap, Volume, to_sagittal
from lumbarflow.intensity import normalisation_of
from lumbarflow.resampling import InPlaneGrid

# What a Segmenter needs to know beside the net; saved with every registered model.
SETTINGS = ("size", "keep_aspect", "normalisation", "percentiles", "batch_size")


def weights_digest(model: Any) -> str:
    """Hex digest of a Keras model's weights: tells whether figures or predictions are of this very net."""
    return array_digest(*model.get_weights())


class Segmenter:
    """A net together with the preprocessing that it was trained with.

    Args:
        model: Keras model, float (n, H, W, 1) -> probabilities (n, H, W, classes).
        settings: `size` [H, W], `keep_aspect`, `normalisation` and `percentiles` [lower, upper] as in preprocessing,
            `batch_size` (slices per forward pass).
    """

    def __init__(self, model: Any, settings: Mapping[str, Any]):
        missing = [name for name in SETTINGS if name not in settings]
        if missing:
            raise ValueError(f"a Segmenter needs the settings {list(SETTINGS)}; {missing} are missing")
        self.model = model
        self.size = tuple(settings["size"])
        self.keep_aspect = bool(settings["keep_aspect"])
        self.normalisation = settings["normalisation"]
        self.percentiles = tuple(settings["percentiles"])
        self.batch_size = int(settings["batch_size"])

    def probabilities(self, slices: np.ndarray, pixel_spacing_mm: tuple[float, float]) -> np.ndarray:
        """Class probabilities on the slices' own grid.

        Args:
            slices: (n, rows, columns), all sagittal slices of one series (normalisation is over the series), superior
                up and anterior left, raw intensities of any real dtype.
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
        for start in range(0, len(slices), self.batch_size):
            batch = normalisation.apply(slices[start : start + self.batch_size])
            net_input = normalisation.finish(grid.to_model(batch, outside=normalisation.outside))
            # The manifest's arrays are float16: the net sees the same rounding here as in training.
            net_input = net_input.astype(np.float16).astype(np.float32)[..., None]
            predicted = self.model.predict(net_input, batch_size=self.batch_size, verbose=0)
            yield grid.probabilities_to_native(np.asarray(predicted, np.float32))
