"""Pages of single cases for a browser."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd

from lumbarflow import viewer
from lumbarflow.evaluation import read_case
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.pipelines.evaluate.nodes import choose_overlays
from lumbarflow.provenance import check_evaluation
from lumbarflow.store import SeriesStore

logger = logging.getLogger(__name__)


def write_pages(
    predictions: SeriesStore,
    series: SeriesStore,
    by_case: pd.DataFrame,
    model_input: ModelInput,
    training_record: dict[str, Any],
    summary: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Callable[[], str]]:
    """File name -> what makes the page, one for each case asked for; they are made one at a time, when saved."""
    check_names(settings, ("case",), "viewer")
    check_evaluation(summary, training_record["weights"], model_input.manifest)
    _, shown = choose_overlays(predictions, series, by_case, model_input)
    names = viewer.chosen_cases(settings["case"], by_case["series"].unique(), shown["series"])
    logger.info("%d of %d cases: %s", len(names), by_case["series"].nunique(), ", ".join(names))
    return {f"{name}.html": partial(_page, name, predictions, series, by_case, summary["weights"]) for name in names}


def _page(name: str, predictions: SeriesStore, series: SeriesStore, by_case: pd.DataFrame, weights: str) -> str:
    case, image = read_case(series, predictions, name), series.volume(name, "image.mha")
    reference = series.label_map(name, "labels.mha")
    page = viewer.case_page(
        name, image, reference, reference.with_array(case.prediction), by_case[by_case["series"] == name], weights
    )
    logger.info("%s: a page of %.1f MB", name, len(page) / 1e6)
    return page
