"""Recipes trained with several seeds each, and scored on the test patients: the final rows."""

from __future__ import annotations

import logging
from typing import Any

import pandas as pd

from lumbarflow import comparison
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.pipelines.runs import Plan
from lumbarflow.provenance import mark_table

logger = logging.getLogger(__name__)


def plan_recipes(
    model_input: ModelInput,
    model: dict[str, Any],
    loss: dict[str, Any],
    training: dict[str, Any],
    augmentation: dict[str, Any],
    settings: dict[str, Any],
) -> Plan:
    """One run for each recipe and seed."""
    check_names(settings, ("seeds", "rows"), "recipes")
    model_input.check_not_leaky("final rows")
    if not settings["seeds"] or len(set(settings["seeds"])) < len(settings["seeds"]):
        raise ValueError(f"recipes.seeds is {settings['seeds']}; expected at least one, none of them twice")
    for name, changes in settings["rows"].items():
        if not isinstance(changes, str) and "seed" in (changes.get("training") or {}):
            raise ValueError(f"recipes.rows.{name}.training.seed is set; expected none, as recipes.seeds says which")
    plan = {}
    for seed in settings["seeds"]:
        seeded = {"model": model, "loss": loss, "training": training | {"seed": seed}, "augmentation": augmentation}
        for name, run in comparison.plan_rows(model_input.manifest, seeded, settings["rows"], "recipes").items():
            plan[f"{name} seed {seed}"] = run | {"recipe": name, "seed": seed}
    return plan


def compare_recipes(plan: Plan, by_class: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The recipes beside each other, over their seeds (twice: for machines and for people)."""
    table = comparison.seeds_table(by_class, {name: (run["recipe"], run["seed"]) for name, run in plan.items()})
    for row in table[table["class"] == comparison.MEAN_FOREGROUND].itertuples():
        logger.info(
            "%s: mean foreground Dice %.4f, %.4f to %.4f over %d seeds (pooled, native grid)",
            *(row.recipe, row.dice_mean, row.dice_lowest, row.dice_highest, row.seeds),
        )
    table = mark_table(table, content_hash=next(iter(plan.values()))["manifest"]["content_hash"])
    return table, table
