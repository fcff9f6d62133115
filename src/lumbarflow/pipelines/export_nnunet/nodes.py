"""The same split for nnU-Net."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pandas as pd

from lumbarflow import imaging, nnunet
from lumbarflow.cohort import ACCEPTED
from lumbarflow.files import source_digest, value_digest
from lumbarflow.nnunet import Export
from lumbarflow.store import RECORD, SeriesStore, Work

logger = logging.getLogger(__name__)


def export_nnunet(series: SeriesStore, split: pd.DataFrame, settings: dict[str, Any]) -> Export:
    """Plan the data set; a series is written only if it, its place or this code has changed."""
    nnunet.check_settings(settings)
    sides = nnunet.sides_of_series(split, settings["include_test"])
    records = series.records()
    if gone := [name for name in sides if records.get(name, {}).get("outcome") != ACCEPTED]:
        raise ValueError(
            f"{len(gone)} series of the split are not among the ingested ones; expected all. Run preprocess again."
        )
    code = source_digest(nnunet, imaging)

    def write(name: str, files: tuple[str, str]) -> dict[str, Any]:
        image, labels = series.volume(name, "image.mha"), series.label_map(name, "labels.mha")
        pair = nnunet.stored_pair(image, labels, records[name])
        return dict(zip(files, pair, strict=True)) | {RECORD: {}}

    work = {}
    for name, side in sides.items():
        files = nnunet.case_files(settings, name, side)
        work[name] = Work(value_digest([code, files, records[name]["key"]]), partial(write, name, files))
    synthetic = any(records[name]["synthetic"] for name in sides)
    documents = nnunet.documents(settings, sides, synthetic)
    for side in nnunet.PARTS:
        logger.info("nnU-Net, %s: %d series", side, sum(own == side for own in sides.values()))
    return Export(nnunet.dataset_folder(settings), work, documents)
