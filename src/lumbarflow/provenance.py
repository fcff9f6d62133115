"""Which data a net was trained on and which net a figure is of: steps that are run one by one must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from lumbarflow.store import SeriesStore

# What of a manifest a table can carry to say what it was made from: the scans alone, or all of the model input.
HASHES = ("data_hash", "content_hash")


def mark_table(table: pd.DataFrame, **hashes: str) -> pd.DataFrame:
    """The table with what it was made from: a column for each of some HASHES, the same in all rows."""
    return table.assign(**hashes)


def unmarked_if_of(table: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.DataFrame | None:
    """A table without its marks if they are the manifest's; None if it was made from other data, or does not say.

    Args:
        table: of `mark_table`, or an empty one, which is returned as it is.
        manifest: of the model input at hand.
    """
    if table.empty:
        return table
    marks = [name for name in HASHES if name in table]
    if not marks or not all((table[name] == manifest[name]).all() for name in marks):
        return None
    return table.drop(columns=marks)


def check_labels(series_index: pd.DataFrame, digest: str) -> None:
    """Stop if series were ingested with other labels than are told of them.

    Args:
        series_index: `series`, `labels_digest`; one of an earlier version lacks that.
        digest: `preparation.labels_digest` of what is told.
    Raises:
        ValueError: names the first series.
    """
    told = series_index.get("labels_digest", pd.Series("", series_index.index))
    others = series_index.loc[told != digest, "series"]
    if len(others):
        raise ValueError(
            f"{others.iloc[0]} and {len(others) - 1} more series were ingested with another labels.table or "
            "labels.method than the one at hand; expected the same. Run ingest, and what comes after it, with the same "
            "labels."
        )


def check_ingested(keys: Mapping[str, str], series: SeriesStore, what: str) -> None:
    """Stop if ingested series are not those that something was made from: other scans, labels or settings since.

    Args:
        keys: series -> key of the ingested series that it was made from.
        series: the ingested series at hand.
        what: was made from them, for the error.
    Raises:
        ValueError: names the first series.
    """
    for name, key in keys.items():
        try:
            found = series.record(name).get("key")
        except FileNotFoundError:  # it is no longer there at all
            found = None
        if found != key:
            raise ValueError(
                f"{name}: {what} was made from another scan of this name, or from other labels or settings of ingest, "
                "than the ingested series at hand; expected the same. Run ingest, and what comes after it, with the "
                "same raw_dir and settings."
            )


def check_training(record: Mapping[str, Any], weights: str, manifest: Mapping[str, Any]) -> None:
    """Stop if a net is not the one that was trained on this model input.

    Evaluated on another split, it could be scored on patients that it was trained on.

    Args:
        record: what `fit` wrote down: `weights` (digest) and `content_hash` (of the model input).
        weights: digest of the net at hand.
        manifest: of the model input at hand.
    Raises:
        ValueError: one of the two is another one.
    """
    if record["weights"] != weights:
        raise ValueError(
            "model: its weights are not those that training_record describes; expected the net that fit wrote last. "
            "Run: kedro run --pipeline=fit"
        )
    if record["content_hash"] != manifest["content_hash"]:
        raise ValueError(
            f"model: it was trained on the model input {record['content_hash'][:8]}, and the one at hand is "
            f"{manifest['content_hash'][:8]} (another split, filter, size or other scans); expected the same. Run fit "
            "again, or preprocess with the settings that the model was trained with."
        )


def check_cohort(data_hash: str, split_hash: str, manifest: Mapping[str, Any]) -> None:
    """Stop if the ingested scans or the split at hand are not those that the model input was made from.

    Args:
        data_hash, split_hash: of the series index and of the slice index at hand (see `lumbarflow.preparation`).
        manifest: of the model input at hand.
    Raises:
        ValueError: one of the two is another one.
    """
    for name, found, what in (("data_hash", data_hash, "scans"), ("split_hash", split_hash, "split")):
        if found != manifest[name]:
            raise ValueError(
                f"the {what} at hand ({found[:8]}) are not those of the model input ({manifest[name][:8]}); expected "
                "the same. Another pipeline has ingested other scans since: run ingest and preprocess with the raw_dir "
                "and the settings that the model was trained with."
            )


def check_evaluation(summary: Mapping[str, Any], weights: str, manifest: Mapping[str, Any]) -> None:
    """Stop if figures are of another net or of other data than those at hand.

    Args:
        summary: `evaluation_summary`, with `weights` and `content_hash`.
        weights, manifest: as for `check_training`.
    Raises:
        ValueError: one of the two is another one.
    """
    if summary["weights"] != weights or summary["content_hash"] != manifest["content_hash"]:
        raise ValueError(
            "evaluation_summary: its figures are of another model or other model input than those at hand; expected "
            "the same. Run: kedro run --pipeline=evaluate"
        )
