"""nnU-Net's folder as a Kedro dataset."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset

from lumbarflow.nnunet import Export, NnunetStore
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

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None):
        self._path = Path(path)
        self.metadata = metadata

    def load(self) -> NnunetStore:
        return NnunetStore(self._path)

    def save(self, data: Export) -> None:
        self.updated = self.load().export(data, "export_nnunet")
        logger.info("nnU-Net's data set is in %s; README.txt beside nnUNet_raw has the commands", self._path)

    def _describe(self) -> dict[str, Any]:
        return {"path": str(self._path)}

    def _exists(self) -> bool:
        return bool(self.load().series())
