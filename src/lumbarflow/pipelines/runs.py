"""Nodes that the comparisons of several trained nets share; a plan says which (see `lumbarflow.comparison`)."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from lumbarflow import comparison, evaluation, tracking
from lumbarflow.model_input import PREDICTION
from lumbarflow.parameters import check_names
from lumbarflow.store import SeriesStore, Work

logger = logging.getLogger(__name__)

Plan = dict[str, dict[str, Any]]


def train_runs(plan: Plan, prepared: SeriesStore, folder: Path) -> dict[str, Work]:
    """Plan the training of every run; a net that was trained from the same things before is taken."""

    def log_epoch(name: str, row: dict[str, float]) -> None:
        tracking.log_epoch(row, f"{name}/")

    return comparison.training_work(plan, prepared, folder, log_epoch)


def predict_runs(
    plan: Plan,
    trained: SeriesStore,
    prepared: SeriesStore,
    series: SeriesStore,
    settings: dict[str, Any],
    side: str = "test",
) -> dict[str, Work]:
    """Plan the segmentation of one side's series of every run.

    A run may say under "evaluation" how it differs from `settings` in `model_input.PREDICTION`.
    """
    check_names(settings, evaluation.SETTINGS, "evaluation")
    work = {}
    for name, run in plan.items():
        # The figures' own settings are those of all runs: their tables stand side by side.
        own = run.get("evaluation", {})
        check_names(own, PREDICTION, f"{name}.evaluation")
        model_input = comparison.model_input_of(run, prepared)
        load = partial(comparison.load_network, trained, run)
        weights = trained.record(run["entry"])["weights"]
        predicted = evaluation.prediction_work(
            load, weights, run["key"], model_input, series, settings | own, side=side
        )
        work |= {comparison.prediction_entry(name, case): item for case, item in predicted.items()}
    return work


def score_runs(
    plan: Plan, predictions: SeriesStore, series: SeriesStore, settings: dict[str, Any], side: str = "test"
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Score every run on one side's slices: figures by case, by class, and intervals, each with a column `run`."""
    tables = []
    for name, run in plan.items():
        cases = evaluation.predicted_cases(
            run["manifest"], series, predictions, partial(comparison.prediction_entry, name), side=side
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
