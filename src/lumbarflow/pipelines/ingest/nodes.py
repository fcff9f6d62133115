"""From raw files to checked, sagittal series of classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pandas as pd

from lumbarflow import apta, cohort, imaging, intensity, preparation
from lumbarflow import labels as label_module
from lumbarflow.cohort import (
    ABSENT,
    ACCEPTED,
    IGNORED,
    LABEL_METHODS,
    REJECTED,
    Inventory,
    ingest_scan,
    take_inventory,
)
from lumbarflow.files import source_digest, value_digest
from lumbarflow.imaging import LabelMap, Volume, VolumeError
from lumbarflow.labels import LabelTable
from lumbarflow.parameters import check_names
from lumbarflow.progress import track
from lumbarflow.storage import is_storage_error
from lumbarflow.store import SeriesStore, Work

logger = logging.getLogger(__name__)

Files = Mapping[str, Callable[[], Any]]


def ingest_series(
    images: Mapping[str, Callable[[], Volume]],
    masks: Mapping[str, Callable[[], LabelMap]],
    image_digests: Files,
    mask_digests: Files,
    overview: pd.DataFrame,
    settings: dict[str, Any],
    labels: dict[str, Any],
    percentiles: list[float],
    raw_dir: str,
) -> dict[str, Work]:
    """Plan the check and reorientation of every series; each runs only if its files or settings have changed."""
    check_names(settings, ("sequences", "only", "tolerances", "max_rejected_fraction"), "ingest")
    check_names(labels, ("method", "table"), "labels")
    if labels["method"] not in LABEL_METHODS:
        raise ValueError(f"labels.method is {labels['method']!r}; expected one of {', '.join(LABEL_METHODS)}")
    intensity.check_percentiles(percentiles)  # or each series would be said to have no contrast
    inventory = _inventory(images, masks, overview, settings)
    if not inventory.scans:
        raise ValueError(
            f"{raw_dir}: no scans in images/ and masks/; expected the SPIDER layout, images/<patient>_<sequence>.mha "
            "with masks/ likewise and overview.csv. Name the folder with --params=raw_dir=DIR, or get SPIDER's scans "
            "with kedro run --pipeline=download --env=spider"
        )
    logger.info(
        "ingest: found %d series, %d rows of overview.csv without files, %d files that are no volumes",
        len(inventory.scans), len(inventory.absent), len(inventory.ignored),
    )  # fmt: skip
    table = LabelTable(labels["table"])
    labels_digest = preparation.labels_digest(labels)
    code = source_digest(apta, cohort, imaging, intensity, label_module)
    work = {}
    for scan in track(inventory.scans, "looking for changed files"):
        digests = {
            "image_digest": digest_of(image_digests, scan.image),
            "mask_digest": digest_of(mask_digests, scan.mask),
            "labels_digest": labels_digest,
        }
        row = {name: (scan.row or {}).get(name) for name in ("subset", "SeriesDescription")} if scan.row else None
        key = value_digest(
            [
                code,
                digests,
                [scan.patient, scan.sequence, scan.problem, row],
                [settings["tolerances"], percentiles],
            ]
        )

        work[scan.series] = Work(
            key,
            partial(
                _ingest,
                scan,
                digests,
                images.get(scan.image),
                masks.get(scan.mask),
                table,
                settings["tolerances"],
                percentiles,
                labels["method"],
            ),
        )
    return work


def _ingest(scan, digests, load_image, load_mask, *checks) -> dict[str, Any]:
    files = ingest_scan(scan, load_image, load_mask, *checks)
    return files | {"record.json": digests | files["record.json"]}


def report_ingest(
    series: SeriesStore, images: Files, masks: Files, overview: pd.DataFrame, settings: dict[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The outcome of every series, in one table (twice: for machines and for people)."""
    inventory = _inventory(images, masks, overview, settings)
    columns = ["series", "file", "outcome", "found", "expected", "what_to_do"]
    rows: list[dict[str, str]] = []
    for record in series.records().values():
        row = {name: record.get(name, "") for name in columns}
        if record["outcome"] == ACCEPTED and not record["listed"]:
            row |= {"found": "no row in overview.csv", "what_to_do": "nothing: it is split by its patient"}
        rows.append(row)
    for file in inventory.ignored:
        rows.append({"file": file, "outcome": IGNORED, "found": "not a volume file"})
    if inventory.unused:
        found = f"{len(inventory.unused)} series of other sequences"
        rows.append({"file": "images", "outcome": IGNORED, "found": found, "what_to_do": "nothing: see ingest.only"})
    if inventory.absent:
        found = f"{len(inventory.absent)} rows of overview.csv have no files"
        rows.append(
            {"file": "overview.csv", "outcome": ABSENT, "found": found, "what_to_do": "nothing: a partial copy"}
        )
    report = pd.DataFrame(rows, columns=columns).fillna("")
    rejected = report[report["outcome"] == REJECTED]
    for row in rejected.itertuples():
        logger.warning("left out %s: %s; expected %s. %s", row.file, row.found, row.expected, row.what_to_do)
    counts = report["outcome"].value_counts()
    logger.info(
        "ingest: %d series accepted, %d rejected, %d listed but not here",
        counts.get(ACCEPTED, 0), len(rejected), len(inventory.absent),
    )  # fmt: skip
    return report, report


def index_series(series: SeriesStore, report: pd.DataFrame, settings: dict[str, Any]) -> pd.DataFrame:
    """The accepted series, one row each; stops if none or too few of those present were accepted."""
    present = report["outcome"].isin([ACCEPTED, REJECTED]).sum()
    rejected = (report["outcome"] == REJECTED).sum()
    if rejected == present:
        raise ValueError(f"all {present} series were rejected; their reasons stand in ingest_report.csv")
    if rejected / present > settings["max_rejected_fraction"]:
        raise ValueError(
            f"{rejected} of {present} series were rejected, more than ingest.max_rejected_fraction "
            f"({settings['max_rejected_fraction']:g}) allows; their reasons stand in ingest_report.csv. "
            "Mend or remove them, or raise the fraction."
        )
    columns = [
        "series", "patient", "sequence", "subset", "listed", "synthetic", "n_slices", "rows", "columns",
        "row_spacing_mm", "column_spacing_mm", "slice_spacing_mm",
        "image_digest", "mask_digest", "labels_digest", "key",
    ]  # fmt: skip
    accepted = (record for record in series.records().values() if record["outcome"] == ACCEPTED)
    return pd.DataFrame([{name: record[name] for name in columns} for record in accepted])


def _inventory(images: Files, masks: Files, overview: pd.DataFrame, settings: dict[str, Any]) -> Inventory:
    if len(overview) and "new_file_name" not in overview:
        raise ValueError(
            f"overview.csv has the columns {list(overview.columns)[:5]}...; expected 'new_file_name' among them"
        )
    return take_inventory(
        list(images), list(masks), overview.to_dict("records"), settings["sequences"], settings["only"]
    )


def digest_of(digests: Files, name: str | None) -> str | None:
    """The digest of a file; of one that can't be read, what was wrong."""
    if name is None:
        return None
    try:
        return digests[name]()
    except Exception as error:  # an unreadable file is reported when it is read, not here
        if is_storage_error(error) or not isinstance(error.__cause__, (OSError, VolumeError)):
            raise
        return f"unreadable: {type(error.__cause__).__name__}"
