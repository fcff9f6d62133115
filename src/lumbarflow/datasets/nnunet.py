"""nnU-Net's folder as a Kedro dataset."""

from __future__ import annotations

import logging
from typing import Any

from kedro.io import AbstractDataset

from lumbarflow.nnunet import Export, NnunetStore
from lumbarflow.storage import WorkingCopy
from lumbarflow.store import Update

logger = logging.getLogger(__name__)


class NnunetDataset(AbstractDataset[Export, NnunetStore]):
    """A raw data set of nnU-Net v2 (see `lumbarflow.nnunet`); saving writes only the series that are outdated.

    YAML:
        nnunet_dataset:
          type: lumbarflow.datasets.NnunetDataset
          path: data/07_model_output/nnunet

    Args:
        path: the folder; the data set gets its own in `nnUNet_raw/` there.
    Attributes:
        updated: what the last saving did.
    """

    unit = "series"
    updated: Update | None = None

    def __init__(self, *, path: str, credentials: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None):
        self._folder = WorkingCopy(path, credentials)
        self.metadata = metadata

    def load(self) -> NnunetStore:
        return NnunetStore(self._folder.pull())

    def save(self, data: Export) -> None:
        store = self.load()
        with self._folder.pushing():
            self.updated = store.export(data, "export_nnunet")
        logger.info("nnU-Net's data set is in %s; README.txt beside nnUNet_raw has the commands", self._folder.address)

    def _describe(self) -> dict[str, Any]:
        return {"path": self._folder.address}

    def _exists(self) -> bool:
        return self._folder.exists() if self._folder.is_remote else bool(self.load().series())
