"""The self-contained training folder: all that training needs, on any machine, with NumPy alone.

    model_input/
      manifest.json                the sides, series, slices, settings and hashes
      series/<series>/images.npy   float16 (n, H, W), normalised intensities
      series/<series>/labels.npy   uint8 (n, H, W), classes 0..3

Arrays are opened memory-mapped: what a batch reads is paged in and can be dropped by the system again, so anonymous
memory does not grow with the number of series.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from lumbarflow.files import read_json

FORMAT_VERSION = 1
SIDES = ("train", "validation", "test")
MANIFEST = "manifest.json"
IMAGES, LABELS = "images.npy", "labels.npy"

# Open maps are file handles; a cohort of thousands must not exhaust them.
_OPEN_ARRAYS = 128


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

    def segmenter_settings(self, batch_size: int) -> dict:
        """How the slices were prepared, as `lumbarflow.inference.Segmenter` wants to know it."""
        preparation = self.manifest["settings"]["preprocess"]
        return {name: preparation[name] for name in ("size", "keep_aspect", "normalisation", "percentiles")} | {
            "batch_size": batch_size
        }

    def slices(self, side: str) -> list[tuple[str, int]]:
        """(series, slice) of one side, in a fixed order: series by name, slices from left to right."""
        chosen = self.manifest["sides"][side]
        return [(series, index) for series in sorted(chosen) for index in sorted(chosen[series])]

    def image(self, series: str, index: int) -> np.ndarray:
        """float16 (H, W), a view of the mapped file."""
        return self._open(series, IMAGES)[index]

    def label(self, series: str, index: int) -> np.ndarray:
        """uint8 (H, W), a view of the mapped file."""
        return self._open(series, LABELS)[index]

    def _map(self, series: str, name: str) -> np.ndarray:
        path = self.root / "series" / series / name
        array = np.load(path, mmap_mode="r")
        expected = (self.manifest["series"][series]["n_slices"], *self.size)
        if array.shape != expected:
            raise ValueError(f"{path}: shape {array.shape}; expected {expected} from {MANIFEST}. Run preprocess again.")
        return array
