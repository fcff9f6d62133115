"""Anybody's masks of the same scans, through the same figures into the same tables. Needs no training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pandas as pd

from lumbarflow import cohort, evaluation, imaging
from lumbarflow.cohort import ABSENT, ACCEPTED
from lumbarflow.files import source_digest, value_digest
from lumbarflow.imaging import LabelMap, split_volume_name
from lumbarflow.labels import LabelTable
from lumbarflow.parameters import check_names
from lumbarflow.pipelines.ingest.nodes import digest_of
from lumbarflow.pipelines.preprocess.nodes import split_series
from lumbarflow.preparation import data_hash, label_settings
from lumbarflow.provenance import mark_table
from lumbarflow.store import SeriesStore, Work

logger = logging.getLogger(__name__)

SERIES = ("all", "test")


def read_external(
    masks: Mapping[str, Callable[[], LabelMap]],
    digests: Mapping[str, Callable[[], str]],
    series: SeriesStore,
    series_index: pd.DataFrame,
    split: dict[str, Any],
    ingest: dict[str, Any],
    settings: dict[str, Any],
    external_dir: str,
) -> dict[str, Work]:
    """Plan the check of every series' external mask; a series without one is written down as missing."""
    check_names(settings, ("name", "table", "series"), "external")
    if settings["series"] not in SERIES:
        raise ValueError(f"external.series is {settings['series']!r}; expected one of {', '.join(SERIES)}")
    if not masks:
        raise ValueError(
            f"{external_dir}: no volumes; expected masks named like the images, e.g. "
            f"{series_index['series'].iloc[0]}.nii.gz. Name the folder with --params=external_dir=DIR"
        )
    files: dict[str, list[str]] = {}
    for file in sorted(masks):
        name, suffix = split_volume_name(file)
        if suffix:
            files.setdefault(name, []).append(file)
    chosen = series_index["series"]
    if settings["series"] == "test":
        sides = split_series(series_index, split)
        chosen = sorted(sides.loc[sides["side"] == "test", "series"].unique())
    if strangers := sorted(set(files) - set(series_index["series"])):
        logger.warning(
            "%s: %d volumes have no accepted series of their name and are not scored, such as %s",
            *(external_dir, len(strangers), files[strangers[0]][0]),
        )
    table = LabelTable(settings["table"])
    code = source_digest(cohort, imaging)
    work = {}
    for name in chosen:
        found = files.get(name, [])
        contents = {file: digest_of(digests, file) for file in found}
        key = value_digest([code, series.record(name)["key"], contents, table.to_dict(), ingest["tolerances"]])
        read = partial(
            cohort.read_external_mask,
            series.record(name),
            partial(series.label_map, name, "labels.mha"),
            found,
            masks,
            table,
            ingest["tolerances"],
        )
        work[name] = Work(key, read)
    return work


def report_external(series: SeriesStore, settings: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What became of every series (twice: for machines and for people); stops if nothing is left to score."""
    columns = ["series", "file", "outcome", "found", "expected", "what_to_do"]
    records = series.records()
    report = pd.DataFrame([{name: record.get(name, "") for name in columns} for record in records.values()])
    left_out = report[report["outcome"] != ACCEPTED]
    absent = left_out[left_out["outcome"] == ABSENT]
    if len(absent):
        logger.warning(
            "%d series have no mask of %s; they are listed in external_report.csv", len(absent), settings["name"]
        )
    for row in left_out[left_out["outcome"] != ABSENT].itertuples():
        logger.warning("left out %s: %s; expected %s. %s", row.series, row.found, row.expected, row.what_to_do)
    logger.info("%s: %d masks to score, %d left out", settings["name"], len(report) - len(left_out), len(left_out))
    if len(left_out) == len(report):
        raise ValueError(
            f"none of the {len(report)} series has a usable mask; the reasons stand in external_report.csv"
        )
    return report, report


def score_external(
    predictions: SeriesStore,
    series: SeriesStore,
    report: pd.DataFrame,
    series_index: pd.DataFrame,
    labels: dict[str, Any],
    evaluation_settings: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[pd.DataFrame, ...]:
    """Score the masks: by slice; by case, by class and intervals, each twice (for machines and for people)."""
    names = report.loc[report["outcome"] == ACCEPTED, "series"]
    cases = {name: partial(evaluation.read_case, series, predictions, name) for name in names}
    evaluated = evaluation.evaluate_cases(cases, evaluation_settings)
    tables = (evaluated.by_slice, evaluated.by_case, evaluated.by_class, evaluated.intervals)
    for table in tables:
        table.insert(0, "tool", settings["name"])
    for row in evaluated.by_class[evaluated.by_class["scope"] == "pooled"].itertuples():
        logger.info("%s, %s: Dice %.4f (pooled)", settings["name"], row[2], row.dice)
    of = data_hash(series_index, label_settings(labels))
    by_slice, *others = (mark_table(table, data_hash=of) for table in tables)
    return (by_slice, *(table for table in others for _ in range(2)))
