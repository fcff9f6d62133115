"""What splitting by slice adds to the figures: the same net, data and budget under both splits."""

from __future__ import annotations

import logging
from typing import Any

import pandas as pd

from lumbarflow import comparison, evaluation
from lumbarflow.parameters import check_names
from lumbarflow.pipelines.preprocess.nodes import index_slices, manifest_of, split_series
from lumbarflow.provenance import mark_table
from lumbarflow.store import SeriesStore

logger = logging.getLogger(__name__)

SPLITS = ("slice", "patient")


def plan_leakage(
    prepared: SeriesStore,
    series: SeriesStore,
    series_index: pd.DataFrame,
    preprocess: dict[str, Any],
    split: dict[str, Any],
    filter_settings: dict[str, Any],
    labels: dict[str, Any],
    model: dict[str, Any],
    loss: dict[str, Any],
    training: dict[str, Any],
    augmentation: dict[str, Any],
    evaluation_settings: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """One run for each split: its manifest, and the settings of training that both share."""
    check_names(settings, (*SPLITS, "metrics"), "leakage")
    evaluation.check_figures(settings["metrics"], evaluation_settings, "leakage.metrics")
    plan = {}
    for name in SPLITS:
        changed = split | settings[name]
        logger.info("split by %s:", name)
        slice_index = index_slices(split_series(series_index, changed), series, series_index, filter_settings)
        manifest = manifest_of(prepared, series_index, slice_index, preprocess, changed, filter_settings, labels)
        budget = {"model": model, "loss": loss, "training": training, "augmentation": augmentation}
        plan[name] = comparison.plan_run(manifest, budget)
    return plan


def compare_splits(
    plan: dict[str, dict[str, Any]], by_class: pd.DataFrame, intervals: pd.DataFrame, settings: dict[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The difference per class (twice: for machines and for people)."""
    table = comparison.leakage_table(by_class, intervals, settings["metrics"])
    pooled = table[(table["scope"] == "pooled") & (table["metric"] == settings["metrics"][0])]
    for row in pooled.itertuples():
        logger.info(
            "%s: pooled %s %.4f when split by slice, %.4f by patient: the leak adds %+.4f",
            row[2], row.metric, row.slice_split, row.patient_split, row.difference,
        )  # fmt: skip
    table["epochs"] = plan["patient"]["settings"]["training"]["epochs"]
    table = mark_table(table, data_hash=plan["patient"]["manifest"]["data_hash"])
    return table, table
