"""A SeriesStore as a Kedro dataset: saving does only the work that is outdated, loading reads lazily."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from kedro.io import AbstractDataset

from lumbarflow.files import write_atomically
from lumbarflow.parallel import Workers
from lumbarflow.storage import WorkingCopy
from lumbarflow.store import SeriesStore, SpiderLayoutStore, Update, Work

logger = logging.getLogger(__name__)


class SeriesStoreDataset(AbstractDataset[Mapping[str, Work], SeriesStore]):
    """A folder with one sub-folder per series (see `lumbarflow.store`).

    YAML:
        ingested_series:
          type: lumbarflow.datasets.SeriesStoreDataset
          path: data/02_intermediate/series
          description: ingest
          parallel: {backend: loky, workers: all, scheduler: local}

    Args:
        path: the folder, or its address on another storage, which is worked on in a copy (see `lumbarflow.storage`).
        description: what progress and log call the work.
        keep_others: saving leaves series that the data don't name: several pipelines write to this folder.
        unit: what progress calls the series, if they are something else.
        parallel: how saving makes several series at once, see `lumbarflow.parallel.Workers`; without it, one after the
            other.
    Attributes:
        updated: what the last saving did; None without one, or if it had nothing to do.
    """

    updated: Update | None = None

    def __init__(
        self,
        *,
        path: str,
        description: str = "series",
        keep_others: bool = False,
        unit: str = "series",
        parallel: dict[str, Any] | None = None,
        credentials: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        self._folder = WorkingCopy(path, credentials)
        self._description = description
        self._keep_others = keep_others
        self.unit = unit
        self._workers = None if parallel is None else Workers.of(parallel)
        self.metadata = metadata

    def load(self) -> SeriesStore:
        return self._store(self._folder.pull())

    def save(self, data: Mapping[str, Work]) -> None:
        store = self.load()
        with self._folder.pushing():
            self.updated = store.update(data, self._description, self._keep_others, self.unit, self._workers)

    def _store(self, path: Path) -> SeriesStore:
        return SeriesStore(path)

    def _describe(self) -> dict[str, Any]:
        return {"path": self._folder.address, "description": self._description}

    def _exists(self) -> bool:
        return self._folder.exists() if self._folder.is_remote else bool(self.load().series())


class SyntheticCohortDataset(SeriesStoreDataset):
    """Synthetic scans in the SPIDER layout, with `overview.csv` made from the rows in their records.

    Saving an empty mapping leaves the folder as it is. So does finding somebody's own files there and no synthetic
    ones. Both together are an error: a cohort is never a mixture by accident.

    YAML:
        raw_images@synthetic:
          type: lumbarflow.datasets.SyntheticCohortDataset
          path: data/01_raw
    """

    def _store(self, path: Path) -> SpiderLayoutStore:
        return SpiderLayoutStore(path)

    def save(self, data: Mapping[str, Work]) -> None:
        if not data:
            return
        store = self.load()
        if foreign := store.foreign_files():
            if store.series():
                raise ValueError(
                    f"{self._folder.address}: {len(foreign)} files of yours ({foreign[0]}, ...) beside synthetic "
                    "scans; expected one or the other. Move yours to a folder of their own and name it with "
                    "--params=raw_dir=DIR, or delete images/, masks/, anatomy/ and overview.csv of the synthetic ones."
                )
            logger.info(
                "%s: nothing, %s holds %d files of yours", self._description, self._folder.address, len(foreign)
            )
            return
        with self._folder.pushing():
            self.updated = store.update(data, self._description, workers=self._workers)
            overview = pd.DataFrame([record["overview"] for record in store.records().values()])
            write_atomically(store.root / "overview.csv", lambda partial: overview.to_csv(partial, index=False))
