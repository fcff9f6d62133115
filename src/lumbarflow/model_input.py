"""The self-contained training folder: all that training needs, on any machine, with NumPy alone.

    model_input/
      manifest.json                the sides, series, slices, settings and hashes
      series/<series>/images.npy   float16 (n, H, W), normalised intensities
      series/<series>/labels.npy   uint8 (n, H, W), classes 0..3

Arrays are opened memory-mapped: what a batch reads is paged in and can be dropped by the system again, so anonymous
memory does not grow with the number of series.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lumbarflow.files import read_json

FORMAT_VERSION = 1
SIDES = ("train", "validation", "test")
MANIFEST = "manifest.json"
IMAGES, LABELS = "images.npy", "labels.npy"
INGESTED = "ingested"  # in the manifest: series -> key of the ingested series that its slices were made from

# What a `lumbarflow.inference.Segmenter` takes from the section `preprocess`, and from the section `evaluation`.
PREPARATION = ("size", "keep_aspect", "normalisation", "percentiles")
PREDICTION = ("batch_size", "test_time_augmentation")

# Open maps are file handles; a cohort of thousands must not exhaust them.
_OPEN_ARRAYS = 128


def neighbour_indices(index: int | np.ndarray, count: int, neighbours: int) -> np.ndarray:
    """Which slices a net sees as channels when it labels one slice: the one convention for training and prediction.

    From left to right, the slice itself in the middle; beyond the series' ends its outermost slice is repeated.

    Args:
        index: of the slice to label, or an array of them.
        count: slices of the series.
        neighbours: on each side.
    Returns:
        int (..., 2 * neighbours + 1), `...` being the shape of `index`.
    Raises:
        ValueError: a slice that the series does not have, or neighbours below 0.
    """
    if neighbours < 0:
        raise ValueError(f"neighbours is {neighbours}; expected 0 or more slices on each side")
    index = np.asarray(index)
    if np.any((index < 0) | (index >= count)):
        raise ValueError(f"slice {index} of a series of {count}; expected 0 to {count - 1}")
    return np.clip(index[..., None] + np.arange(-neighbours, neighbours + 1), 0, count - 1)


class ModelInput:
    """A model input folder, opened read-only.

    Attributes:
        manifest: the parsed `manifest.json`.
        size: (H, W) of every slice.
    """

    def __init__(self, root: Path, manifest: dict):
        self.root = root
        self.manifest = manifest
        self.size: tuple[int, int] = tuple(manifest["size"])
        self._open = lru_cache(maxsize=_OPEN_ARRAYS)(self._map)

    @classmethod
    def open(cls, path: str | Path) -> ModelInput:
        """Raises ValueError if the folder has no manifest or one of another format version."""
        root = Path(path)
        if not (root / MANIFEST).is_file():
            raise ValueError(
                f"{root}: no {MANIFEST}; expected a model input folder. Write one with: kedro run --pipeline=preprocess"
            )
        manifest = read_json(root / MANIFEST)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{root / MANIFEST}: format_version {manifest.get('format_version')!r}; expected {FORMAT_VERSION}. "
                "Write the folder again with: kedro run --pipeline=preprocess"
            )
        return cls(root, manifest)

    def segmenter_settings(self, evaluation: Mapping[str, Any]) -> dict:
        """How the slices were prepared and how to predict, as `lumbarflow.inference.Segmenter` wants to know it.

        Args:
            evaluation: the section of the parameters, of which PREDICTION is taken.
        """
        preparation = self.manifest["settings"]["preprocess"]
        return {name: preparation[name] for name in PREPARATION} | {name: evaluation[name] for name in PREDICTION}

    def check_not_leaky(self, purpose: str) -> None:
        """Raise ValueError if slices of one patient stand on several sides, the test's among them."""
        if self.manifest.get("leaky"):
            raise ValueError(
                f"{self.root}: its split has slices of one patient on several sides; expected none for {purpose}: test "
                "patients would choose, or be known from training. Preprocess with split.method patient or official."
            )

    def check_complete(self, *sides: str) -> None:
        """Raise ValueError for a file of these sides that is missing or cut off, such as an interrupted copy leaves, or
        newer than the manifest, such as an interrupted preprocess leaves.
        """
        for series in sorted({series for side in sides for series in self.manifest["sides"][side]}):
            for name in (IMAGES, LABELS):
                self._map(series, name)
            record = self.root / "series" / series / "record.json"
            digest = self.manifest["series"][series].get("digest")
            if digest and record.is_file() and read_json(record)["digest"] != digest:
                raise ValueError(
                    f"{record}: its slices are not those that {MANIFEST} describes; expected the same. An interrupted "
                    "preprocess leaves it so: run preprocess again, to its end."
                )

    def slices(self, side: str) -> list[tuple[str, int]]:
        """(series, slice) of one side, in a fixed order: series by name, slices from left to right."""
        chosen = self.manifest["sides"][side]
        return [(series, index) for series in sorted(chosen) for index in sorted(chosen[series])]

    def image(self, series: str, index: int, neighbours: int = 0) -> np.ndarray:
        """float16 (H, W), a view of the mapped file; with neighbours a copy, (H, W, 2 * neighbours + 1).

        `neighbour_indices` says which slices. They come from the whole series: also those that a filter left out, and
        under a split by slice those of another side. A net sees their pictures, never their labels.
        """
        images = self._open(series, IMAGES)
        if neighbours == 0:
            return images[index]
        return np.moveaxis(images[neighbour_indices(index, len(images), neighbours)], 0, -1)

    def label(self, series: str, index: int) -> np.ndarray:
        """uint8 (H, W), a view of the mapped file."""
        return self._open(series, LABELS)[index]

    def _map(self, series: str, name: str) -> np.ndarray:
        path = self.root / "series" / series / name
        expected = (self.manifest["series"][series]["n_slices"], *self.size)
        try:
            array = np.load(path, mmap_mode="r")
        except (FileNotFoundError, EOFError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{path}: it cannot be read ({reason}); expected an array {expected}. Copy the whole folder again, or "
                f"remove {path.parent} and run preprocess."
            ) from error
        if array.shape != expected:
            raise ValueError(
                f"{path}: shape {array.shape}; expected {expected} from {MANIFEST}. Remove {path.parent} and run "
                "preprocess."
            )
        return array
