"""The public data set, from its archive to the folder of raw scans."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lumbarflow import download
from lumbarflow.progress import counted

logger = logging.getLogger(__name__)

# The record as it is fetched, beside images and masks.
DOWNLOADS = "downloads"


def fetch_files(settings: dict[str, Any], raw_dir: str, synthetic_dir: str, folder: Path) -> dict[str, str]:
    """Bring the record's files here, those that are missing; each is whole and has its checksum."""
    if raw_dir == synthetic_dir:  # both absolute, made so by the configuration
        raise ValueError(
            f"{raw_dir}: the folder of synthetic scans; expected one for real scans. Give --env=spider, or name a "
            "folder with --params=raw_dir=DIR"
        )
    outcomes = download.fetch(settings, folder / DOWNLOADS, folder)
    fetched = sum(outcome == download.FETCHED for outcome in outcomes.values())
    logger.info("download: %s fetched, %d here already", counted(fetched, "files"), len(outcomes) - fetched)
    return outcomes


def unpack_files(fetched: dict[str, str], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Lay out what was fetched, and write down whose it is and what of it is there."""
    counts = download.unpack(settings, folder / DOWNLOADS, folder)
    logger.info("download: %s (%s), cite it wherever it is shown", settings["attribution"], settings["licence"])
    return {
        "attribution": settings["attribution"],
        "licence": settings["licence"],
        "files": [
            {"name": file.name, "md5": file.md5, "outcome": fetched[file.name], **counts[file.name]}
            | {"folder": file.unpack or "."}
            for file in download.record_files(settings)
        ],
    }
