"""From checked series to the self-contained training folder."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lumbarflow import intensity, metrics, preparation, resampling, selection, split, tracking
from lumbarflow.files import source_digest, value_digest
from lumbarflow.model_input import SIDES
from lumbarflow.parameters import check_names
from lumbarflow.progress import counted
from lumbarflow.provenance import check_ingested, check_labels
from lumbarflow.store import SeriesStore, Work

logger = logging.getLogger(__name__)


def split_series(series_index: pd.DataFrame, settings: dict[str, Any]) -> pd.DataFrame:
    """Assign every slice to training, validation or test."""
    table = split.split_slices(series_index, settings)
    for side in SIDES:
        rows = table[table["side"] == side]
        patients, slices = counted(rows["patient"].nunique(), "patients"), counted(len(rows), "slices")
        logger.info("%s: %s, %d series, %s", side, patients, rows["series"].nunique(), slices)
    return table


def index_slices(
    table: pd.DataFrame, series: SeriesStore, series_index: pd.DataFrame, settings: dict[str, Any]
) -> pd.DataFrame:
    """Apply the slice filters, keeping every slice in the table."""
    _check_index(series_index, series)
    counts = {name: np.array(series.record(name)["class_counts"]) for name in table["series"].unique()}
    index = selection.index_slices(table, counts, settings)
    for (side, reason), rows in index[~index["kept"]].groupby(["side", "reason"]):
        logger.info("%s: %d slices left out, %s", side, len(rows), reason)
    return index


def compare_filter_rules(index: pd.DataFrame, settings: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What each reading of the paper's imbalance rule would keep (twice: for machines and for people)."""
    table = selection.compare_rules(index, settings)
    return table, table


def prepare_series(series: SeriesStore, series_index: pd.DataFrame, settings: dict[str, Any]) -> dict[str, Work]:
    """Plan the normalised, resampled arrays of every series; each is made only if something has changed."""

    check_names(settings, preparation.SETTINGS, "preprocess")
    _check_index(series_index, series)
    code = source_digest(preparation, resampling, intensity)

    def prepare(name: str) -> dict[str, Any]:
        image, labels = series.volume(name, "image.mha"), series.label_map(name, "labels.mha")
        return preparation.prepare_series(image, labels, settings)

    return {
        row.series: Work(value_digest([code, row.key, settings]), partial(prepare, row.series))
        for row in series_index.itertuples()
    }


def _check_index(series_index: pd.DataFrame, series: SeriesStore) -> None:
    """An ingest that was interrupted leaves the former table beside newer series."""
    check_ingested(dict(zip(series_index["series"], series_index["key"], strict=True)), series, "series_index")


def describe_model_input(
    prepared: SeriesStore,
    series_index: pd.DataFrame,
    slice_index: pd.DataFrame,
    preprocess: dict[str, Any],
    split_settings: dict[str, Any],
    filter_settings: dict[str, Any],
    labels: dict[str, Any],
) -> dict[str, Any]:
    """Write down what the training folder holds, and tag the MLflow run with it."""
    manifest = manifest_of(prepared, series_index, slice_index, preprocess, split_settings, filter_settings, labels)
    kept = {side: sum(map(len, chosen.values())) for side, chosen in manifest["sides"].items()}
    logger.info(
        "model input: %d x %d pixels, %d training, %d validation and %d test slices, %s data",
        *manifest["size"], *(kept[side] for side in SIDES), manifest["data_kind"],
    )  # fmt: skip
    ceiling = sum(np.array(record["ceiling"]).sum(axis=0) for record in prepared.records().values())
    logger.info(
        "model input: the references themselves, resampled to this size and back, have a mean foreground Dice of %.4f",
        metrics.mean_foreground_dice(ceiling),
    )
    tracking.tag_manifest(manifest)
    return manifest


def manifest_of(
    prepared: SeriesStore,
    series_index: pd.DataFrame,
    slice_index: pd.DataFrame,
    preprocess: dict[str, Any],
    split_settings: dict[str, Any],
    filter_settings: dict[str, Any],
    labels: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of one split of the prepared series."""
    check_labels(series_index, preparation.labels_digest(labels))
    settings = {
        "preprocess": preprocess,
        "split": split_settings,
        "filter": filter_settings,
        "labels": preparation.label_settings(labels),
    }
    return preparation.build_manifest(series_index, slice_index, prepared.records(), settings)
