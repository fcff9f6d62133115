"""From one scan to what its owner wants: label map, measurements, preview and a row of figures.

The predict pipeline and the served model both come here, so that a mask is the same whichever way it was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lumbarflow import (
    augmentation,
    imaging,
    inference,
    instances,
    intensity,
    measurements,
    onnx_network,
    resampling,
    scans,
    uncertainty,
)
from lumbarflow.files import source_digest, value_digest, write_atomically, write_json
from lumbarflow.imaging import LabelMap, Orientation, Volume, VolumeError, to_sagittal, write_volume
from lumbarflow.inference import Segmentation, Segmenter
from lumbarflow.labels import CLASSES, FOREGROUND
from lumbarflow.measurements import Measurement
from lumbarflow.onnx_network import OnnxNetwork
from lumbarflow.parallel import StaysHere
from lumbarflow.parameters import check_names
from lumbarflow.scans import DICOM, ScanImage, ScanSource
from lumbarflow.store import RECORD, SeriesStore, Work

if TYPE_CHECKING:
    import pandas as pd


# What the label map's voxels say: the class, or SPIDER's number of the single vertebra or disc.
LABELS = ("classes", "instances")
# Test-time augmentation: as the model was evaluated (and registered), or whatever that was, with it or without it.
AUGMENTATION = ("as_evaluated", "on", "off")
# Where a model was evaluated without it, "on" is this; also what disagreement is measured with.
CHANGES = {"shift": 0.02, "rotation_degrees": 3.0}

# The section `predict` of the parameters.
SETTINGS = (
    "labels", "overwrite", "preview", "measurements", "dicom_segmentation", "test_time_augmentation", "disagreement",
    "low_confidence", "limits",
)  # fmt: skip

SEGMENTED, FAILED, KEPT = "segmented", "failed", "kept"
# Of a scan without a mask of this model: columns of its row. `file` is a name without its folder: of a DICOM series
# that of the file that something is wrong with.
PROBLEM = ("file", "found", "expected", "what_to_do")


@dataclass(frozen=True)
class Segmented:
    """A segmented scan, sagittal, and the way back to its own storage order.

    Attributes:
        image: the scan, sagittal (see `imaging.to_sagittal`).
        classes: uint8 classes on the same grid.
        orientation, stored: from sagittal arrays to the scan's own grid: see `restore`.
        segmentation: the same labels with their uncertainty.
    """

    image: Volume
    classes: LabelMap
    orientation: Orientation
    stored: Volume
    segmentation: Segmentation

    def restore(self, labels: np.ndarray) -> LabelMap:
        """Integer (slice, row, column) -> a label map in the scan's own storage order and geometry."""
        return _like(LabelMap, self.stored, self.orientation.restore(labels))

    def instances(self) -> LabelMap:
        """uint8 SPIDER ids of single vertebrae and discs, sagittal: see `lumbarflow.instances`."""
        column, row, between = self.image.spacing_mm
        labels = instances.label_instances(self.classes.array, (between, row, column))
        return _like(LabelMap, self.image, labels)


def segment_volume(segmenter: Segmenter, volume: Volume, disagreement: bool = False) -> Segmented:
    """Segment a volume in any orientation. With `disagreement`, how far changed copies agree is measured too."""
    sagittal, orientation = to_sagittal(volume)
    column, row, _ = sagittal.spacing_mm
    segmentation = segmenter.segmentation(sagittal.array, (row, column), CHANGES if disagreement else None)
    return Segmented(sagittal, _like(LabelMap, sagittal, segmentation.labels), orientation, volume, segmentation)


def probabilities(segmenter: Segmenter, volume: Volume) -> np.ndarray:
    """float32 (z, y, x, classes) on the volume's own grid, in its storage order."""
    sagittal, orientation = to_sagittal(volume)
    column, row, _ = sagittal.spacing_mm
    return orientation.restore(segmenter.probabilities(sagittal.array, (row, column)))


def choose_augmentation(segmenter: Segmenter, choice: str) -> Segmenter:
    """The segmenter with test-time augmentation as one of AUGMENTATION says. Raises ValueError for another word."""
    if choice not in AUGMENTATION:
        raise ValueError(f"test_time_augmentation is {choice!r}; expected one of {', '.join(AUGMENTATION)}")
    if choice == "as_evaluated" or (choice == "on" and segmenter.augmented):
        return segmenter
    return segmenter.with_test_time_augmentation(CHANGES if choice == "on" else inference.OFF)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Stop at a setting that is unknown or out of range, before any scan is read. Raises ValueError."""
    check_names(settings, SETTINGS, "predict")
    check_names(settings["limits"], scans.LIMITS, "predict.limits")
    for name, allowed in (("labels", LABELS), ("test_time_augmentation", AUGMENTATION)):
        if settings[name] not in allowed:
            raise ValueError(f"predict.{name} is {settings[name]!r}; expected one of {', '.join(allowed)}")
    for name in ("overwrite", "preview", "measurements", "dicom_segmentation", "disagreement"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"predict.{name} is {settings[name]!r}; expected true or false")
    if settings["dicom_segmentation"]:
        from lumbarflow.dicom_segmentation import require_highdicom

        require_highdicom()
    if not 0 <= settings["low_confidence"] <= 1:
        raise ValueError(f"predict.low_confidence is {settings['low_confidence']}; expected a number from 0 to 1")


# Columns of `predictions.csv`; those of disagreement are empty unless it was asked for.
COLUMNS = (
    "scan", "outcome", "model", "seconds", "slices",
    *(f"volume_ml_{CLASSES[index]}" for index in FOREGROUND),
    "vertebrae", "discs",
    *(f"{name}_{CLASSES[index]}" for name in ("entropy", "disagreement") for index in FOREGROUND),
    "warnings", *PROBLEM,
)  # fmt: skip
TABLES = ("predictions.csv", "measurements.csv")


def tables(folder: PredictionFolder, index: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row for each scan, and one for each measurement, of all that the folder holds.

    Args:
        index: of `plan_predictions`. A scan whose outputs were left as they were has its earlier figures, the outcome
            KEPT, and the reason.
    """
    import pandas as pd

    kept = {row["scan"]: {name: row[name] for name in PROBLEM} for row in index if row["found"]}
    records = {scan: folder.record(scan) for scan in folder.series()}
    rows = {scan: record["row"] for scan, record in records.items()}
    for scan, problem in kept.items():
        rows[scan] = {"scan": scan, **rows.get(scan, {}), "outcome": KEPT, **problem}
    measured = [entry for _, record in sorted(records.items()) for entry in record["measurements"]]
    return (
        pd.DataFrame([rows[scan] for scan in sorted(rows)], columns=list(COLUMNS)),
        pd.DataFrame(measured, columns=["scan", *measurements.measurement_table([]).columns]),
    )


# What the record of a scan says while its outputs are being written.
_INTERRUPTED = ("the run was interrupted before its outputs were complete", "all of them", "Run it again.")


class PredictionFolder(SeriesStore):
    """What people take away lies in the folder under the scans' names; what made it, in `.predictions` below it.

    Files without a record belong to somebody else and are never touched.
    """

    FOLDER = scans.RECORDS

    def series(self) -> list[str]:
        folder = self.root / self.FOLDER
        # (Hidden is what a killed run was writing.)
        records = [path for path in folder.rglob("*.json") if not path.name.startswith(".")]
        return sorted(path.relative_to(folder).as_posix()[: -len(".json")] for path in records)

    def path(self, series: str, name: str) -> Path:
        return self.root / self.FOLDER / f"{series}.json" if name == RECORD else self.root / name

    def known(self, series: str) -> dict | None:
        """The record of a scan, None without a readable one."""
        try:
            return self.record(series)
        except (OSError, ValueError):
            return None

    def is_made_by(self, series: str, key: str) -> bool:
        """Whether the scan's outputs, as far as they are still there, are what this work makes."""
        return (self.known(series) or {}).get("key") == key

    def _key(self, series: str) -> str | None:
        record = self.known(series) or {}
        # Files in a folder that people use may be gone while their record is still there.
        whole = all(self.path(series, name).is_file() for name in _files_of(record.get("outputs", [])))
        return record.get("key") if whole else None

    def _write(self, series: str, work: Work) -> None:
        files = dict(work.make())
        record = files.pop(RECORD)
        # The record comes first, without its key, and again last, with it: what an interruption cut short is then known
        # as ours, and made again.
        record["outputs"] = sorted(files)
        former = self.known(series) or {}
        if self.is_made_by(series, work.key):  # only some are gone; the others may have been corrected by hand
            files = {
                name: value
                for name, value in files.items()
                if not all(self.path(series, file).is_file() for file in _files_of([name]))
            }
        interrupted = _without_mask(record["row"], VolumeError(series, *_INTERRUPTED)) if files else {}
        write_json(self.path(series, RECORD), {**record, **interrupted, "key": None})
        if files and former.get("key") != work.key:
            # A picture or a DICOM-SEG of another net or other settings would be taken for this mask's. (A scan that
            # fails now keeps what it had.)
            for file in _files_of(set(former.get("outputs", [])) - set(record["outputs"])):
                self.path(series, file).unlink(missing_ok=True)
        try:
            for name, value in files.items():
                if isinstance(value, Volume):
                    write_volume(value, self.path(series, name))
                else:
                    write_atomically(self.path(series, name), value)
        except Exception as error:
            foreseen = isinstance(error, VolumeError)
            problem = error if foreseen else _unforeseen(series, "its outputs cannot be written", error)
            record |= _without_mask(record["row"], problem)
        write_json(self.path(series, RECORD), {"key": work.key, **record})


def plan_predictions(
    sources: Sequence[ScanSource],
    segmenter: Segmenter,
    model: str,
    digest: str,
    folder: PredictionFolder,
    settings: Mapping[str, Any],
) -> tuple[dict[str, Work], list[dict[str, Any]]]:
    """Plan the segmentation of some scans.

    Args:
        sources: what `scans.find_scans` found.
        segmenter: as registered.
        model: its name and version, for people.
        digest: of its weights and settings.
        folder: where the outputs go.
        settings: SETTINGS.
    Returns:
        scan -> Work for all that may be written; and one row for each scan: `scan`, `key`, and, where outputs are there
        already that must not be overwritten, PROBLEM.
    """
    check_settings(settings)
    if not folder.series() and (foreign := [name for name in TABLES if (folder.root / name).exists()]):
        raise ValueError(
            f"{folder.root}: {foreign[0]} is there already, and not from here; expected a folder for the masks alone. "
            "Name another one with output=DIR, or move that file."
        )
    segmenter = choose_augmentation(segmenter, settings["test_time_augmentation"])
    code = source_digest(
        *(augmentation, imaging, inference, instances, intensity, measurements, onnx_network, resampling, scans),
        uncertainty,
    )
    predict = predict_scan
    if not isinstance(segmenter.model, OnnxNetwork):
        predict = StaysHere(predict_scan, "ONNX Runtime does not compute this net")
    # Whether outputs may be overwritten says nothing about what is in them.
    asked = {name: value for name, value in settings.items() if name != "overwrite"}
    work, index = {}, []
    for source in sources:
        key = value_digest([code, digest, asked, _state(source)])
        row = {"scan": source.name, "key": key} | dict.fromkeys(PROBLEM, "")
        if not (folder.is_made_by(source.name, key) or settings["overwrite"]):
            row |= _in_the_way(source, folder, model, settings)
        if not row["found"]:
            work[source.name] = Work(key, partial(predict, source, segmenter, model, settings))
        index.append(row)
    return work, index


def predict_scan(
    source: ScanSource, segmenter: Segmenter, model: str, settings: Mapping[str, Any]
) -> dict[str, Volume | Callable[[Path], Any] | dict]:
    """Segment one scan; whatever is wrong with it stands in the record, and is nobody else's trouble.

    Args:
        source, settings: see `plan_predictions`.
        segmenter: with test-time augmentation as it shall be.
        model: its name and version, for people.
    Returns:
        Files for a PredictionFolder: the record and, if all went well, the label map in the scan's own format
        (`.nii.gz` for DICOM) and what else the settings ask for.
    """
    start = time.monotonic()
    row: dict[str, Any] = {"scan": source.name, "outcome": SEGMENTED, "model": model}
    try:
        image = scans.read_scan(source, settings["limits"])
        done = segment_volume(segmenter, image.volume, settings["disagreement"])
        files, record = _outputs(source, image, done, model, settings)
    except Exception as error:
        return {RECORD: _without_mask(row, problem_of(source.path, error))}
    row |= {"seconds": round(time.monotonic() - start, 2)} | record.pop("row")
    return {RECORD: {"row": row, **record}, **files}


def output_names(source: ScanSource, settings: Mapping[str, Any]) -> dict[str, str]:
    """What each output of a scan is called, relative to the output folder."""
    names = {"labels": source.mask_name}
    if settings["preview"]:
        names["preview"] = f"{source.name}_preview.png"
    if settings["measurements"]:
        names["measurements"] = f"{source.name}_measurements.png"
    if settings["dicom_segmentation"] and source.format == DICOM:
        names["dicom_segmentation"] = f"{source.name}_seg.dcm"
    return names


def describe(done: Segmented) -> dict[str, Any]:
    """Volumes in ml and uncertainty of each foreground class, as columns of a table."""
    voxel_ml = float(np.prod(done.classes.spacing_mm)) / 1000
    voxels = np.bincount(done.classes.array.ravel(), minlength=len(CLASSES))
    row: dict[str, Any] = {"slices": len(done.classes.array)}
    row |= {f"volume_ml_{CLASSES[index]}": round(float(voxels[index]) * voxel_ml, 3) for index in FOREGROUND}
    found = {"entropy": done.segmentation.entropy, "disagreement": done.segmentation.disagreement}
    for name, values in found.items():
        if values is not None:
            row |= {f"{name}_{CLASSES[index]}": _rounded(values[CLASSES[index]]) for index in FOREGROUND}
    return row


def doubts(done: Segmented, low_confidence: float) -> list[str]:
    """What somebody should look at before believing the masks, in words."""
    present = np.unique(done.classes.array)
    if missing := [CLASSES[index] for index in FOREGROUND if index not in present]:
        what = "no spine found" if len(missing) == len(FOREGROUND) else f"found no {' and no '.join(missing)}"
        found = [what]
    else:
        found = []
    unsure = {
        CLASSES[index]: value
        for index in FOREGROUND
        if (value := done.segmentation.entropy[CLASSES[index]]) > low_confidence
    }
    if unsure:
        each = ", ".join(f"{name} {value:.2f}" for name, value in unsure.items())
        found.append(f"low confidence (mean entropy {each}; usual below {low_confidence:g})")
    return found


def _outputs(
    source: ScanSource, image: ScanImage, done: Segmented, model: str, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Files by name, and the record without what every scan has."""
    names = output_names(source, settings)
    numbered = done.instances() if settings["measurements"] or settings["labels"] == "instances" else None
    chosen = numbered if settings["labels"] == "instances" else done.classes
    delivered = done.restore(chosen.array)
    files: dict[str, Any] = {names["labels"]: delivered}
    row = describe(done)
    measured: list[Measurement] = []
    if numbered is not None:
        row |= dict(zip(("vertebrae", "discs"), instances.count_instances(numbered.array), strict=True))
    if settings["measurements"]:
        measured = measurements.measure(numbered)
        files[names["measurements"]] = partial(_draw_measurements, done.image, numbered, measured)
    if settings["preview"]:
        files[names["preview"]] = partial(_draw_preview, done)
    warnings = [*image.warnings, *doubts(done, settings["low_confidence"])]
    if "dicom_segmentation" in names:
        if delivered.array.any():
            files[names["dicom_segmentation"]] = partial(_write_dicom, delivered, image, model, settings["labels"])
        else:
            warnings.append("no DICOM-SEG: there is nothing to put into one")
    row |= {"warnings": "; ".join(warnings)}
    rows = measurements.measurement_table(measured).astype(object)
    table = rows.where(rows.notna(), None).to_dict("records")
    return files, {"row": row, "measurements": [{"scan": source.name} | entry for entry in table]}


def _write_dicom(labels: LabelMap, image: ScanImage, model: str, kind: str, path: Path) -> None:
    from lumbarflow.dicom_segmentation import write_segmentation

    write_segmentation(labels, image.dicom, path, model_version=model, numbered=kind == "instances")


def _draw_preview(done: Segmented, path: Path) -> None:
    from lumbarflow.figures import preview_figure

    preview_figure(done.image, done.classes).savefig(path, dpi=100)


def _draw_measurements(image: Volume, numbered: LabelMap, measured: Sequence[Measurement], path: Path) -> None:
    from lumbarflow.figures import measurement_figure

    measurement_figure(image, numbered, measured).savefig(path, dpi=120)


def _in_the_way(
    source: ScanSource, folder: PredictionFolder, model: str, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Why a scan's outputs must not be written, as PROBLEM; empty if nothing is in the way."""
    there = [name for name in _files_of(output_names(source, settings).values()) if (folder.root / name).exists()]
    record = folder.known(source.name)
    # A record without a key is of a scan that failed, or was cut short: what lies there is ours and unfinished.
    unfinished = record is not None and record.get("key") is None
    if unfinished:
        ours = _files_of(record.get("outputs", []))
        there = [name for name in there if name not in ours]
    if not there:
        return {}
    if record is None:
        found = f"{there[0]} is there already, and not from here"
    elif unfinished:
        found = f"{there[0]} is there already, from elsewhere or from before this scan failed"
    else:
        found = (
            f"{there[0]} is there already, made by {record['row']['model']} of another scan, model, code or settings"
        )
    expected = f"nothing of that name, or what {model} makes of this scan as it is now"
    what_to_do = "Name another folder with output=DIR, or allow it with overwrite=true."
    return dict(zip(PROBLEM, (source.path.name, found, expected, what_to_do), strict=True))


def _files_of(outputs: Iterable[str]) -> list[str]:
    """The files of some outputs, both relative to their folder."""
    return [file.as_posix() for name in outputs for file in imaging.written_files(name)]


def _state(source: ScanSource) -> list[Any]:
    """What tells whether a scan has changed: its files' names, sizes and times (reading them all takes too long)."""
    if source.problem is not None:
        return [str(source.problem)]
    try:
        files = source.series.files if source.series else _files(source.path)
        return [[scans.printable(file.name), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]
    except OSError as error:  # told when it is read
        return [type(error).__name__]


def _files(path: Path) -> list[Path]:
    try:
        return [file for file in imaging.volume_files(path) if file.is_file()]
    except VolumeError:
        return [path]


def problem_of(path: str | Path, error: Exception) -> VolumeError:
    """Whatever was raised while a scan was segmented, as what was found, what was expected and what to do."""
    if isinstance(error, VolumeError):
        return error
    if isinstance(error, MemoryError):
        return VolumeError(path, "too large for the memory", "a scan that fits", "Free some, or crop the scan.")
    return _unforeseen(path, "it cannot be segmented", error)


def _unforeseen(path: str | Path, what: str, error: Exception) -> VolumeError:
    """Nobody foresaw it; still it is only that scan's trouble. (What reads DICOM keeps headers out of its errors.)"""
    # An OSError's own text names the folders of this machine.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    found = f"{what} ({type(error).__name__}: {reason})"
    return VolumeError(
        path, found, "a sagittal MRI of the lumbar spine, and room for its masks", "Open it in a viewer."
    )


def _without_mask(row: Mapping[str, Any], problem: VolumeError) -> dict[str, Any]:
    """The record of a scan that has no masks now. Without its key it is tried again next time: the cause may pass."""
    parts = (Path(problem.path).name, problem.found, problem.expected, problem.remedy)
    what = dict(zip(PROBLEM, map(scans.printable, parts), strict=True))
    kept = {name: row[name] for name in ("scan", "model")}
    return {"key": None, "row": kept | {"outcome": FAILED} | what, "measurements": []}


def _like(kind: type[Volume], grid: Volume, array: np.ndarray) -> Any:
    return kind(array, grid.spacing_mm, grid.origin_mm, grid.direction)


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
