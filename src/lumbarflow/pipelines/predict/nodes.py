"""Masks and measurements of anybody's scans, by a model of the registry."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pandas as pd

from lumbarflow import prediction
from lumbarflow.prediction import PredictionFolder
from lumbarflow.registry import RegisteredModel
from lumbarflow.scans import ScanSource
from lumbarflow.store import Work

logger = logging.getLogger(__name__)


def plan_predictions(
    scans: list[ScanSource], model: RegisteredModel, folder: Path, settings: dict[str, Any]
) -> tuple[dict[str, Work], pd.DataFrame]:
    """Plan the segmentation of every scan, and list what is to be done and what must be left as it is."""
    logger.info("predict: %d scans, to be segmented by %s", len(scans), model.title)
    work, index = prediction.plan_predictions(
        scans, model.segmenter, model.title, model.digest, PredictionFolder(folder), settings
    )
    return work, pd.DataFrame(index)


def tabulate_predictions(folder: PredictionFolder, index: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row for each scan of the folder, and one for each measurement."""
    rows, measured = prediction.tables(folder, index.to_dict("records"))
    return rows, measured


def check_predictions(predictions: pd.DataFrame, index: pd.DataFrame) -> None:
    """Fail, now that everything is written, if any scan of this run has no mask of this model."""
    rows = predictions[predictions["scan"].isin(index["scan"])]
    for row in rows[rows["warnings"].fillna("") != ""].itertuples():
        logger.warning("%s: %s", row.scan, row.warnings)
    left = rows[rows["outcome"] != prediction.SEGMENTED]
    for row in left.itertuples():
        reason = (row.found, row.expected, row.what_to_do)
        logger.error("left out %s (%s): %s; expected %s. %s", row.scan, row.file, *reason)
    logger.info("predict: %d scans segmented, %d not", len(rows) - len(left), len(left))
    if len(left):
        raise ValueError(
            f"{len(left)} of {len(rows)} scans were not segmented, such as {left['scan'].iloc[0]}; the reasons stand "
            "in predictions.csv. The others are done."
        )
