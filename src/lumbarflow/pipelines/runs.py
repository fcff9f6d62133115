"""Nodes that the comparisons of several trained nets share; a plan says which (see `lumbarflow.comparison`)."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pandas as pd

from lumbarflow import comparison, evaluation, tracking
from lumbarflow.parameters import check_names
from lumbarflow.store import SeriesStore, Work

logger = logging.getLogger(__name__)

Plan = dict[str, dict[str, Any]]


def train_runs(plan: Plan, prepared: SeriesStore) -> dict[str, Work]:
    """Plan the training of every run; a net that was trained from the same things before is taken."""
    return comparison.training_work(plan, prepared, on_epoch=lambda name, row: tracking.log_epoch(row, f"{name}/"))


def predict_runs(
    plan: Plan, trained: SeriesStore, prepared: SeriesStore, series: SeriesStore, settings: dict[str, Any]
) -> dict[str, Work]:
    """Plan the segmentation of the test series of every run."""
    check_names(settings, evaluation.SETTINGS, "evaluation")
    work = {}
    for name, run in plan.items():
        model_input = comparison.model_input_of(run, prepared)
        load = partial(comparison.load_network, trained, run)
        weights = trained.record(run["entry"])["weights"]
        predicted = evaluation.prediction_work(load, weights, run["key"], model_input, series, settings["batch_size"])
        work |= {comparison.prediction_entry(name, case): item for case, item in predicted.items()}
    return work


def score_runs(
    plan: Plan, predictions: SeriesStore, series: SeriesStore, settings: dict[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Score every run on its test slices: figures by case, by class, and their intervals, each with a column `run`."""
    tables = []
    for name, run in plan.items():
        cases = evaluation.predicted_cases(
            run["manifest"], series, predictions, partial(comparison.prediction_entry, name)
        )
        evaluated = evaluation.evaluate_cases(cases, settings)
        tables.append([evaluated.by_case, evaluated.by_class, evaluated.intervals])
        for table in tables[-1]:
            table.insert(0, "run", name)
        row = evaluated.by_class.set_index(["scope", "class"]).loc[("pooled", comparison.MEAN_FOREGROUND)]
        logger.info("%s: mean foreground Dice %.4f (pooled, native grid)", name, row["dice"])
        tracking.log_metrics({f"{name}/mean_foreground_dice": float(row["dice"])})
    by_case, by_class, intervals = (pd.concat(group, ignore_index=True) for group in zip(*tables, strict=True))
    return by_case, by_class, intervals
