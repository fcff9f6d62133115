"""Techniques beside one reference, each trained under one short budget and scored on the validation patients alone."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from lumbarflow import comparison
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.pipelines.runs import Plan, predict_runs, score_runs, train_runs
from lumbarflow.provenance import mark_table
from lumbarflow.store import RECORD, SeriesStore, Work

logger = logging.getLogger(__name__)

SIDE = "validation"


def plan_screen(
    model_input: ModelInput,
    model: dict[str, Any],
    loss: dict[str, Any],
    training: dict[str, Any],
    augmentation: dict[str, Any],
    settings: dict[str, Any],
) -> Plan:
    """One run for each row that is to be tried."""
    check_names(settings, ("changes", "reference", "rows", "max_minutes"), "screen")
    model_input.check_not_leaky("a screen")
    sections = {"model": model, "loss": loss, "training": training, "augmentation": augmentation}
    check_names(settings["changes"], sections, "screen.changes")
    shared = {name: values | settings["changes"].get(name, {}) for name, values in sections.items()}
    plan = comparison.plan_rows(model_input.manifest, shared, settings["rows"], "screen")
    if settings["reference"] not in plan:
        raise ValueError(
            f"screen.reference is {settings['reference']!r}; expected one of the rows that are run, {sorted(plan)}"
        )
    # The reference first: without it the others have nothing to be compared with.
    return {settings["reference"]: plan[settings["reference"]]} | plan


def train_screen(plan: Plan, prepared: SeriesStore, folder: Path, settings: dict[str, Any]) -> dict[str, Work]:
    """Plan the training of every row; rows that the time does not suffice for wait for the next run."""
    minutes = settings["max_minutes"]
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    work = train_runs(plan, prepared, folder)
    return {
        entry: dataclasses.replace(item, make=partial(_attempt, entry, item.make, deadline, minutes))
        for entry, item in work.items()
    }


def _attempt(entry: str, make: Callable[[], Any], deadline: float | None, minutes: float | None) -> Any:
    """What `make` gives, or a record of why there is no net; without a key, so that the next run tries again."""
    if deadline is not None and time.monotonic() > deadline:
        return _left_out(entry, f"not run: screen.max_minutes ({minutes:g}) were over")
    try:
        return make()
    except (ValueError, FloatingPointError, MemoryError) as error:
        return _left_out(entry, f"failed: {error}")


def _left_out(entry: str, reason: str) -> dict[str, Any]:
    # The other rows go on; the table names this one.
    logger.warning("left out %s: %s", entry, reason)
    return {RECORD: {"key": None, "not_run": reason}}


def predict_screen(
    plan: Plan, trained: SeriesStore, prepared: SeriesStore, series: SeriesStore, settings: dict[str, Any]
) -> dict[str, Work]:
    """Plan the segmentation of the validation patients by every net that there is."""
    return predict_runs(_with_nets(plan, trained), trained, prepared, series, settings, SIDE)


def score_screen(
    plan: Plan,
    trained: SeriesStore,
    predictions: SeriesStore,
    series: SeriesStore,
    evaluation: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What each row does to the figures of the validation patients (twice: for machines and for people)."""
    done = _with_nets(plan, trained)
    if not done:
        reasons = "; ".join(f"{name} {trained.record(run['entry'])['not_run']}" for name, run in plan.items())
        raise ValueError(f"screen: no row has a net ({reasons}); expected one at least")
    _, by_class, _ = score_runs(done, predictions, series, evaluation, SIDE)
    table = comparison.screen_table(settings["rows"], plan, trained, by_class, settings["reference"])
    for row in table.itertuples():
        if row.outcome == "run":
            logger.info("%s: mean foreground Dice %+.4f against %s", row.row, row.difference, settings["reference"])
        elif row.row not in plan:  # (of the others it was said when their turn came)
            logger.info("left out %s: %s", row.row, row.outcome)
    content_hash = next(iter(plan.values()))["manifest"]["content_hash"]
    table = mark_table(table, content_hash=content_hash)
    return table, table


def _with_nets(plan: Plan, trained: SeriesStore) -> Plan:
    return {name: run for name, run in plan.items() if "not_run" not in trained.record(run["entry"])}
