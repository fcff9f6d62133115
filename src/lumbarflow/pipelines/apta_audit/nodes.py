"""What the paper's pixel transformation changes against the direct map of label ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from lumbarflow.apta import apta, audit, summarise_audit
from lumbarflow.imaging import LabelMap, Orientation
from lumbarflow.labels import LabelTable
from lumbarflow.preparation import data_hash, label_settings
from lumbarflow.progress import track
from lumbarflow.provenance import mark_table
from lumbarflow.store import SeriesStore

logger = logging.getLogger(__name__)


def audit_apta(
    masks: Mapping[str, Callable[[], LabelMap]], series: SeriesStore, series_index: pd.DataFrame, labels: dict[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Both ways from raw ids to classes, slice by slice: a table of all slices, and a summary (twice)."""
    table, rows = LabelTable(labels["table"]), []
    for name in track(series_index["series"].tolist(), "audit"):
        record = series.record(name)
        ids = Orientation.from_dict(record["orientation"]).apply(masks[record["mask"]]().array)
        rows += [{"series": name} | row for row in audit(table.classes(ids), apta(ids))]
    slices = pd.DataFrame(rows)
    summary = summarise_audit(slices)
    for row in summary.itertuples():
        logger.info(
            "%s: Dice of APTA against the direct map %.4f, vanished from %d of %d slices",
            *(row[1], row.dice, row.vanished_slices, row.slices),
        )
    summary = mark_table(summary, data_hash=data_hash(series_index, label_settings(labels)))
    return slices, summary, summary
