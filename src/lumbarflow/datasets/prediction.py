"""What prediction reads and writes, as Kedro datasets: a folder of scans, a registered model, a folder of masks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

from lumbarflow.datasets.series_store import SeriesStoreDataset
from lumbarflow.prediction import PredictionFolder
from lumbarflow.scans import ScanSource, find_scans
from lumbarflow.storage import WorkingCopy

logger = logging.getLogger(__name__)


class ScanFolderDataset(AbstractDataset[None, list[ScanSource]]):
    """Every scan below a folder, volume files and DICOM series; their voxels are read when they are needed.

    YAML:
        scans:
          type: lumbarflow.datasets.ScanFolderDataset
          path: data/01_raw/scans
          without: data/07_model_output/scans

    Args:
        path: the folder.
        without: a folder below it that holds outputs, no scans.
    """

    def __init__(
        self,
        *,
        path: str,
        without: str | None = None,
        credentials: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        self._folder = WorkingCopy(path, credentials)
        self._without = WorkingCopy(without, credentials) if without else None
        self.metadata = metadata

    def load(self) -> list[ScanSource]:
        path, without = self._folder.path, self._without.path if self._without else None
        if without and path.resolve().is_relative_to(without.resolve()):
            # The next run would take masks for scans.
            raise DatasetError(
                f"{self._folder.address}: the scans lie in the output folder {self._without.address}; expected a "
                "folder of its own for the masks, which may lie below the scans'. Name another one with output=DIR."
            )
        found = find_scans(self._folder.pull(), without)
        for what, number in found.passed_over.items():
            logger.info("predict: passed over %d %s in %s", number, what, self._folder.address)
        return found

    def save(self, data: None) -> None:
        raise DatasetError(f"{self._folder.address}: scans are only read here")

    def _describe(self) -> dict[str, Any]:
        return {"path": self._folder.address}

    def _exists(self) -> bool:
        return self._folder.is_remote or self._folder.path.is_dir()  # told when it is read


class PredictionFolderDataset(SeriesStoreDataset):
    """The same for a folder of masks (see `lumbarflow.prediction`).

    YAML:
        segmentations:
          type: lumbarflow.datasets.PredictionFolderDataset
          path: data/07_model_output/scans
          description: predict
          keep_others: true
    """

    def _store(self, path: Path) -> PredictionFolder:
        return PredictionFolder(path)


class RegisteredModelDataset(AbstractDataset[None, Any]):
    """A model of MLflow's registry, ready to segment: a `registry.RegisteredModel`.

    YAML:
        registered_model:
          type: lumbarflow.datasets.RegisteredModelDataset
          model_uri: models:/lumbar-unet@champion

    Args:
        model_uri: `models:/<name>@<alias>` or `models:/<name>/<version>`.
    """

    def __init__(self, *, model_uri: str, metadata: dict[str, Any] | None = None):
        self._model_uri = model_uri
        self.metadata = metadata

    def load(self) -> Any:
        from lumbarflow import registry

        return registry.pull(self._model_uri)

    def save(self, data: None) -> None:
        raise DatasetError(f"{self._model_uri}: models are registered by kedro run --pipeline=register")

    def _describe(self) -> dict[str, Any]:
        return {"model_uri": self._model_uri}

    def _exists(self) -> bool:
        return True  # told by the registry when it is asked
