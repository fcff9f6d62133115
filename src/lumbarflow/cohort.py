"""A folder of scans in the SPIDER layout: its names, its overview, and the checks that each series must pass.

images/<patient>_<t1|t2|t2_SPACE>.<ext>    masks/<same name>.<ext>    overview.csv
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lumbarflow.apta import apta
from lumbarflow.imaging import (
    LabelMap,
    Orientation,
    Volume,
    VolumeError,
    check_image,
    geometry_differences,
    split_volume_name,
    to_sagittal,
)
from lumbarflow.intensity import Normalisation
from lumbarflow.labels import FOREGROUND, LabelTable, UnknownLabelError, class_counts
from lumbarflow.storage import is_storage_error

# What overview.csv says of a synthetic series (phantom.py writes it): the registry tells them from real ones by it.
SYNTHETIC_MARK = "synthetic"

# The values of overview.csv's subset column; the second one holds the official test patients.
SUBSETS = ("training", "validation")

ACCEPTED, REJECTED, ABSENT, IGNORED = "accepted", "rejected", "absent", "ignored"

# The table of ids, or the paper's pixel transformation of a mask that was turned into greys (see `lumbarflow.apta`).
LABEL_METHODS = ("direct", "apta")


class SeriesRejected(Exception):
    """Why one series cannot be used: the file, what was found, what was expected, what to do."""

    def __init__(self, file: str, found: str, expected: str, remedy: str):
        super().__init__(f"{file}: {found}; expected {expected}. {remedy}")
        self.file, self.found, self.expected, self.remedy = file, found, expected, remedy


@dataclass(frozen=True)
class Scan:
    """One series of the folder: its files (None where missing) and its row in the overview (None without one).

    Attributes:
        image, mask: file names inside `images/` and `masks/`.
        problem: (found, expected, what to do) if the names alone rule it out.
    """

    series: str
    patient: str
    sequence: str
    image: str | None
    mask: str | None
    row: Mapping[str, Any] | None
    problem: tuple[str, str, str] | None = None


@dataclass
class Inventory:
    """What lies in the folder.

    Attributes:
        scans: series with at least one file, by name.
        absent: rows of the overview without any file (a partial copy is normal).
        ignored: files that are no volumes.
        unused: series of sequences that were not asked for.
    """

    scans: list[Scan] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def take_inventory(
    images: Sequence[str],
    masks: Sequence[str],
    overview: Sequence[Mapping[str, Any]],
    sequences: Sequence[str],
    only: str | None = None,
) -> Inventory:
    """Pair images with masks and with their rows.

    Args:
        images, masks: file names in the two folders.
        overview: rows with at least `new_file_name`; others, such as `subset`, are kept.
        sequences: names that a series may end in, e.g. t1, t2, t2_SPACE.
        only: the one of them to use; None for all.
    Raises:
        ValueError: `only` is none of the sequences; or a subset that is neither empty nor one of SUBSETS; taken for
            empty, it would let official test patients train; or a series with two subsets.
    """
    if only is not None and only not in sequences:
        raise ValueError(f"ingest.only is {only!r}; expected null or one of {', '.join(sequences)}")
    inventory = Inventory()
    # Some list the series by its file's name.
    rows: dict[str, Mapping[str, Any]] = {}
    for row in map(_with_subset, overview):
        series = split_volume_name(str(row["new_file_name"]).strip())[0]
        if series in rows and rows[series].get("subset") != row.get("subset"):
            raise ValueError(
                f"overview.csv: {series} stands there with the subsets {rows[series].get('subset')!r} and "
                f"{row.get('subset')!r}; expected one, or an official test patient may train. Remove one of its rows."
            )
        rows[series] = row
    files: dict[str, dict[str, list[str]]] = {}
    for folder, names in (("images", images), ("masks", masks)):
        present = set(names)
        for name in sorted(names):
            series, suffix = split_volume_name(name)
            if not suffix or "/" in name or name.startswith("."):
                # The data file of an `.mhd` header is part of that volume, not a stray file.
                header = f"{name.rsplit('.', 1)[0]}.mhd"
                if not (name.lower().endswith((".raw", ".zraw")) and header in present):
                    inventory.ignored.append(f"{folder}/{name}")
                continue
            files.setdefault(series, {"images": [], "masks": []})[folder].append(name)
    # As little as possible for the patient, or "1_t2_SPACE" would be patient "1_t2" where "SPACE" is a sequence too.
    pattern = re.compile(rf"(?P<patient>.+?)_(?P<sequence>{'|'.join(map(re.escape, sequences))})")
    for series, found in sorted(files.items()):
        match = pattern.fullmatch(series)
        if match and only not in (None, match["sequence"]):
            inventory.unused.append(series)
            continue
        problem = None
        if match is None:
            problem = (
                f"the name {series!r}",
                f"<patient>_<sequence> with a sequence of {', '.join(sequences)}",
                "Rename the file, or add its sequence to ingest.sequences.",
            )
        for folder, names in found.items():
            if len(names) > 1:
                problem = (f"{' and '.join(names)} in {folder}", "one file per series", "Keep one of them.")
        inventory.scans.append(
            Scan(
                series,
                match["patient"] if match else series,
                match["sequence"] if match else "",
                found["images"][0] if found["images"] else None,
                found["masks"][0] if found["masks"] else None,
                rows.get(series),
                problem,
            )
        )
    inventory.absent = sorted(set(rows) - set(files))
    return inventory


def _with_subset(row: Mapping[str, Any]) -> dict[str, Any]:
    subset = str(row.get("subset") or "").strip().lower()
    if subset not in ("", *SUBSETS):
        raise ValueError(
            f"overview.csv: subset {row['subset']!r}; expected {' or '.join(SUBSETS)}, or nothing. Correct the table."
        )
    return {**row, "subset": subset}


def ingest_scan(
    scan: Scan,
    load_image: Callable[[], Volume] | None,
    load_mask: Callable[[], LabelMap] | None,
    labels: LabelTable,
    tolerances: Mapping[str, float],
    percentiles: tuple[float, float],
    label_method: str = "direct",
) -> dict[str, Any]:
    """Check one series and turn it sagittal.

    Args:
        load_image, load_mask: read the two files; called only if the names are right.
        labels: raw ids -> classes.
        tolerances: see `imaging.geometry_differences`.
        percentiles: an image must have contrast between them, or it could not be normalised later.
        label_method: one of LABEL_METHODS, how classes are made of raw ids.
    Returns:
        Files for a SeriesStore: `record.json` always, `image.mha` and `labels.mha` (uint8 classes, sagittal) if the
        series is accepted. No series raises: what is wrong with it stands in its record.
    """
    record: dict[str, Any] = {"series": scan.series, "patient": scan.patient, "sequence": scan.sequence}
    try:
        image, mask = _load_pair(scan, load_image, load_mask)
        classes, facts = _check_pair(scan, image, mask, labels, tolerances, percentiles)
    except SeriesRejected as reason:
        return {
            "record.json": record
            | {
                "outcome": REJECTED,
                "file": reason.file,
                "found": reason.found,
                "expected": reason.expected,
                "what_to_do": reason.remedy,
            }
        }
    except MemoryError:
        raise
    except Exception as error:  # a series that fails in a way nobody foresaw is still only that series
        if is_storage_error(error):
            raise
        return {
            "record.json": record
            | {
                "key": None,  # tried again next time: the cause may pass (a full disk, a lost network drive)
                "outcome": REJECTED,
                "file": f"images/{scan.image}",
                "found": f"{type(error).__name__}: {error}",
                "expected": "a series that can be read",
                "what_to_do": "Open the files in a viewer; if they are fine, report this message.",
            }
        }
    sagittal, orientation = to_sagittal(image)
    sagittal_classes, _ = to_sagittal(classes)
    if label_method == "apta":
        sagittal_classes = sagittal_classes.with_array(apta(orientation.apply(mask.array)))
    record |= {
        "outcome": ACCEPTED,
        "file": f"images/{scan.image}",
        "mask": scan.mask,
        "orientation": orientation.to_dict(),
        # The file's own geometry, so that results go back to exactly its numbers.
        "geometry": {
            "spacing_mm": list(image.spacing_mm),
            "origin_mm": list(image.origin_mm),
            "direction": image.direction.tolist(),
        },
        "n_slices": int(sagittal.array.shape[0]),
        "rows": int(sagittal.array.shape[1]),
        "columns": int(sagittal.array.shape[2]),
        "row_spacing_mm": sagittal.spacing_mm[1],
        "column_spacing_mm": sagittal.spacing_mm[0],
        "slice_spacing_mm": sagittal.spacing_mm[2],
        "class_counts": class_counts(sagittal_classes.array).tolist(),
        **facts,
    }
    return {"record.json": record, "image.mha": sagittal, "labels.mha": sagittal_classes}


def read_external_mask(
    record: Mapping[str, Any],
    load_reference: Callable[[], LabelMap],
    files: Sequence[str],
    masks: Mapping[str, Callable[[], LabelMap]],
    labels: LabelTable,
    tolerances: Mapping[str, float],
) -> dict[str, Any]:
    """Check somebody's mask of an accepted series.

    Args:
        record: of the ingested series (see `ingest_scan`).
        load_reference: reads its sagittal label map. Tools turn volumes as they like: the mask has to be on the same
            grid once both are sagittal, in whatever order its file holds it.
        files: names of the masks of this series, one if all is well.
        masks: file name -> reader.
        labels: the tool's ids -> classes.
        tolerances: see `imaging.geometry_differences`.
    Returns:
        Files for a SeriesStore: `record.json` always, `labels.mha` (uint8 classes in the raw image's storage order and
        with exactly its geometry) if the mask can be scored. What is wrong with it stands in the record.
    """
    outcome: dict[str, Any] = {"series": record["series"], "file": ", ".join(files)}
    try:
        if len(files) != 1:
            found = f"{len(files)} masks" if files else "no mask"
            raise SeriesRejected(record["series"], found, "one volume named like the image", "Add it, or keep one.")
        mask = _load(files[0], masks[files[0]])
        sagittal, _ = to_sagittal(mask)
        differences = geometry_differences(sagittal, load_reference(), tolerances)
        if differences:
            raise SeriesRejected(
                files[0],
                "; ".join(differences) + " of the image",
                "the image's grid",
                "Resample the mask to its image (nearest neighbour), or widen ingest.tolerances.",
            )
        try:
            classes = labels.classes(sagittal.array)
        except UnknownLabelError as error:
            raise SeriesRejected(
                files[0],
                f"unknown label ids {error.ids}",
                "ids of the table external.table",
                "Add them to external.table in the parameters, or correct the mask.",
            ) from None
    except MemoryError:
        raise
    except Exception as error:
        if is_storage_error(error):
            raise
        if not isinstance(error, SeriesRejected):  # nobody foresaw it; still it is only that series
            found = f"{type(error).__name__}: {error}"
            outcome["key"] = None  # tried again next time: the cause may pass
            error = SeriesRejected(files[0], found, "a mask that can be read", "Open it in a viewer.")
        what = {"found": error.found, "expected": error.expected, "what_to_do": error.remedy}
        return {"record.json": outcome | {"outcome": REJECTED if files else ABSENT} | what}
    stored = Orientation.from_dict(record["orientation"]).restore(classes)
    return {"record.json": outcome | {"outcome": ACCEPTED}, "labels.mha": LabelMap(stored, **record["geometry"])}


def _load_pair(scan: Scan, load_image, load_mask) -> tuple[Volume, LabelMap]:
    for folder, name in (("images", scan.image), ("masks", scan.mask)):
        if name is None:
            other = f"{'masks' if folder == 'images' else 'images'}/{scan.mask or scan.image}"
            raise SeriesRejected(
                other,
                f"no file of that name in {folder}/",
                f"an image and its mask, {folder}/{scan.series}.<ext>",
                f"Add the {folder[:-1]}, or remove {other}.",
            )
    if scan.problem:
        raise SeriesRejected(f"images/{scan.image}", *scan.problem)
    return _load(f"images/{scan.image}", load_image), _load(f"masks/{scan.mask}", load_mask)


def _load(file: str, load: Callable[[], Volume]) -> Volume:
    try:
        return load()
    except Exception as error:
        cause = _volume_error(error)
        if cause is None:
            raise
        raise SeriesRejected(file, cause.found, cause.expected, cause.remedy) from None


def _volume_error(error: BaseException | None) -> VolumeError | None:
    """A dataset wraps what its loading raised; the reason lies below."""
    while error is not None and not isinstance(error, VolumeError):
        error = error.__cause__ or error.__context__
    return error


def _check_pair(
    scan: Scan,
    image: Volume,
    mask: LabelMap,
    labels: LabelTable,
    tolerances: Mapping[str, float],
    percentiles: tuple[float, float],
) -> tuple[LabelMap, dict[str, Any]]:
    image_file, mask_file = f"images/{scan.image}", f"masks/{scan.mask}"
    differences = geometry_differences(mask, image, tolerances)
    if differences:
        raise SeriesRejected(
            mask_file,
            "; ".join(differences) + " of the image",
            "the image's grid",
            "Resample the mask to its image (nearest neighbour), or widen ingest.tolerances.",
        )
    try:
        check_image(image_file, image)
    except VolumeError as error:
        raise SeriesRejected(image_file, error.found, error.expected, error.remedy) from None
    try:
        Normalisation.of(image.array, percentiles)
    except ValueError as error:
        raise SeriesRejected(image_file, str(error), "an image with contrast", "Export it again.") from None
    try:
        classes = labels.classes(mask.array)
    except UnknownLabelError as error:
        raise SeriesRejected(
            mask_file,
            f"unknown label ids {error.ids}",
            "ids of the table labels.table",
            "Add them to labels.table in the parameters, or correct the mask.",
        ) from None
    if not np.any(np.isin(classes, list(FOREGROUND))):
        raise SeriesRejected(mask_file, "an empty mask", "vertebrae, canal or IVD", "Segment it, or remove the series.")
    row = scan.row or {}
    facts = {
        "listed": scan.row is not None,
        "subset": row.get("subset") or "",
        "synthetic": str(row.get("SeriesDescription") or "").strip() == SYNTHETIC_MARK,
    }
    # On the image's grid to the last digit: at 45 degrees these decide which axis is which.
    return LabelMap(classes, image.spacing_mm, image.origin_mm, image.direction), facts
