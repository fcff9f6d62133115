"""The paper's net beside others, trained under one budget on one split."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lumbarflow import comparison, evaluation, statistics
from lumbarflow.labels import CLASSES
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.provenance import mark_table
from lumbarflow.store import SeriesStore


def plan_baselines(
    model_input: ModelInput,
    model: dict[str, Any],
    loss: dict[str, Any],
    training: dict[str, Any],
    augmentation: dict[str, Any],
    evaluation_settings: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """One run for each model that the parameters name."""
    check_names(settings, ("models", "reference", "metrics"), "baselines")
    chosen = {name: values for name, values in settings["models"].items() if values is not None}
    if settings["reference"] not in chosen:
        raise ValueError(
            f"baselines.reference is {settings['reference']!r}; expected one of baselines.models, {sorted(chosen)}"
        )
    if len(chosen) < 2:
        raise ValueError(f"baselines.models names {sorted(chosen)} alone; expected another to compare with it")
    evaluation.check_figures(settings["metrics"], evaluation_settings, "baselines.metrics")
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
    foreground = by_case[by_case["class"] != CLASSES[0]].rename(columns={"run": "model"})
    # Holm's correction is over the models and classes of one figure.
    tests = pd.concat(
        [
            statistics.paired_wilcoxon(foreground, settings["reference"], metric).assign(metric=metric)
            for metric in settings["metrics"]
        ],
        ignore_index=True,
    )
    content_hash = plan[settings["reference"]]["manifest"]["content_hash"]
    table, tests = (mark_table(made, content_hash=content_hash) for made in (table, tests))
    return table, table, tests, tests
