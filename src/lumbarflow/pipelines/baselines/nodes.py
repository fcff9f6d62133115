"""The paper's net beside others, trained under one budget on one split."""

from __future__ import annotations

import logging
from typing import Any

import pandas as pd

from lumbarflow import comparison, models, statistics
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.provenance import HASHES, mark_table
from lumbarflow.store import SeriesStore

logger = logging.getLogger(__name__)


def plan_baselines(
    model_input: ModelInput,
    model: dict[str, Any],
    loss: dict[str, Any],
    training: dict[str, Any],
    augmentation: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """One run for each model that the parameters name."""
    check_names(settings, ("models", "reference", "metrics"), "baselines")
    chosen = {name: values for name, values in settings["models"].items() if values is not None}
    if settings["reference"] not in chosen:
        raise ValueError(
            f"baselines.reference is {settings['reference']!r}; expected one of baselines.models, {sorted(chosen)}"
        )
    plan = {}
    for name, values in chosen.items():
        own = (model if name == model["name"] else {}) | values | {"name": name}
        budget = {"model": own, "loss": loss, "training": training, "augmentation": augmentation}
        plan[name] = comparison.plan_run(model_input.manifest, budget)
    return plan


def compare_models(
    plan: dict[str, dict[str, Any]],
    trained: SeriesStore,
    by_case: pd.DataFrame,
    by_class: pd.DataFrame,
    intervals: pd.DataFrame,
    settings: dict[str, Any],
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The table of all models and the paired tests against the reference (each twice: for machines and for people)."""
    table = comparison.baselines_table(plan, trained, by_class, intervals)
    tests = pd.concat(
        [
            statistics.paired_wilcoxon(
                by_case.rename(columns={"run": "model"}), reference_model=settings["reference"], metric=metric
            ).assign(metric=metric)
            for metric in settings["metrics"]
        ],
        ignore_index=True,
    )
    for name in plan:
        row = table[(table["run"] == name) & (table["class"] == comparison.MEAN_FOREGROUND)].iloc[0]
        logger.info("%s: mean foreground Dice %.4f (pooled)", models.find(name).title, row["dice"])
    manifest = plan[settings["reference"]]["manifest"]
    hashes = {name: manifest[name] for name in HASHES}
    tests["p_holm"] = statistics.holm(tests["p"])  # over all tests of the table, not of each figure
    table, tests = mark_table(table, **hashes), mark_table(tests, **hashes)
    return table, table, tests, tests
