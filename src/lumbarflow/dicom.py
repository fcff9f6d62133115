"""DICOM series as volumes: which files belong together, where their slices lie, and what must not pass for a volume.

Headers hold the patient's identity. Nothing here puts their texts or UIDs into a message, nor lets pydicom do so.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lumbarflow.imaging import Volume, VolumeError, check_size

MODALITY = "MR"

# Positions written with two decimals (scanners write three or more) make a gap up to 2 * 0.005 * sqrt(3) = 0.017 mm too
# long or too short, and the gap that it is compared with as well.
_ROUNDING_MM = 0.035
_UNEVEN = 0.01  # of the gap; a missing slice is 1.0
# Cosines; at the far corner of a 300 mm image it is 0.3 mm, less than a pixel. Scanners write six digits.
_SAME_ORIENTATION = 1e-3
_SAME_PIXELS = 1e-3  # of the pixel spacing: a quarter of a pixel at the edge of 512
_SHEAR = 0.25  # pixels by which a slice may lie beside the first one's normal

_EXPORT = "Export the series again from the scanner or archive."
_TRUNCATED = "It may be truncated: copy or export it again."
_SPLIT = "Put each into a folder of its own."


@dataclass(frozen=True)
class DicomSeries:
    """The files of one series in one folder.

    Attributes:
        folder: of its first file.
        files: sorted by name.
    """

    folder: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class DicomVolume:
    """A series as a volume, and where each slice came from.

    Attributes:
        volume: stored values times the rescale slope plus the intercept, in an integer type if those are 1 and 0
            throughout, else float32. Slices ascend along cross(row, column): the direction is right-handed.
        modality: the Modality tag, "" if absent.
        instances: the file of each slice (of the array's first axis); of a multi-frame file, that file alone.
        frames: number (from 1) of each slice's frame within its file.
    """

    volume: Volume
    modality: str
    instances: tuple[Path, ...]
    frames: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Slice:
    """A frame and its place; `orientation` holds the directions of a row and of a column, (2, 3)."""

    file: Path
    frame: int
    frames: int  # of the file
    position_mm: np.ndarray
    orientation: np.ndarray
    spacing_mm: np.ndarray  # between rows, between columns
    slope: float
    intercept: float

    @property
    def name(self) -> str:
        return self.file.name if self.frames == 1 else f"frame {self.frame} of {self.file.name}"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep pydicom's and highdicom's warnings, which quote values, off the terminal and out of logs."""
    loggers = {name: logging.getLogger(name) for name in ("pydicom", "highdicom")}
    levels = {name: logger.level for name, logger in loggers.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for logger in loggers.values():
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for name, logger in loggers.items():
                logger.setLevel(levels[name])


# --- finding series ---------------------------------------------------------------------------------------------------


@quiet_libraries()
def find_series(files: Iterable[Path]) -> tuple[list[DicomSeries], list[Path]]:
    """The DICOM image series among some files, and the files that are no DICOM images.

    Series are told apart by SeriesInstanceUID and folder and come in the order of their first file's path. A file that
    begins like DICOM but has no readable SeriesInstanceUID is a series of its own, so that reading it says what is
    wrong with it. Among the other files are directories (DICOMDIR), structured reports, segmentations, presentation
    states and whatever lacks the 128 bytes and "DICM" that a DICOM file begins with.
    """
    groups: dict[tuple, list[Path]] = {}
    others = []
    for file in sorted(map(Path, files)):
        if not _begins_like_dicom(file):
            others.append(file)
        elif (key := _series_key(file)) is not None:
            groups.setdefault(key, []).append(file)
        else:
            others.append(file)
    return [DicomSeries(members[0].parent, tuple(members)) for members in groups.values()], others


def _begins_like_dicom(file: Path) -> bool:
    try:
        with open(file, "rb") as opened:
            return opened.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _series_key(file: Path) -> tuple | None:
    """What the files of one series have in common; None for what is no image."""
    import pydicom

    wanted = ["SOPClassUID", "SeriesInstanceUID", "Rows"]
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted)
        kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
        name, series = getattr(kind, "name", ""), header.get("SeriesInstanceUID")
    except Exception:  # damaged files raise whatever their bytes lead to
        return (file,)
    named = name not in ("", kind)  # DICOM names its own classes, pydicom gives back private ones as they are
    if named and "Image Storage" not in name:
        return None
    if not series:
        return (file,)
    return (file.parent, str(series)) if named or "Rows" in header else None


# --- reading one ------------------------------------------------------------------------------------------------------


@quiet_libraries()
def read_series(series: DicomSeries) -> DicomVolume:
    """Read one series, single-frame files or one multi-frame file, as a volume.

    Raises:
        VolumeError: what is damaged, is not MR, is a colour or inverted image, or is no single stack of parallel,
            evenly spaced slices. Nothing is resampled or left out.
    """
    datasets = {file: _read(file) for file in series.files}
    for file, dataset in datasets.items():
        _check_kind(file, dataset)
    frames = [_shape(file, dataset)[0] for file, dataset in datasets.items()]
    if sum(frames) == 1:
        raise VolumeError(
            series.files[0], "a single slice", "a volume of several parallel ones", "Export the whole series."
        )
    if max(frames) > 1 and len(frames) > 1:
        found = f"{sum(count > 1 for count in frames)} multi-frame files among the {len(frames)} of one series"
        raise VolumeError(series.folder, found, "one alone, or single-frame files", _SPLIT)
    slices = [place for file, dataset in datasets.items() for place in _slices(file, dataset)]
    _check_same_grid(series.folder, datasets, slices)
    check_size(series.folder, (*reversed(_shape(*next(iter(datasets.items())))[1:]), len(slices)))
    slices, step_mm = _stack(series.folder, slices)
    row, column = _axes(slices[0])
    between_rows, between_columns = slices[0].spacing_mm
    volume = Volume(
        _voxels(datasets, slices),
        (between_columns, between_rows, step_mm),
        tuple(slices[0].position_mm),
        np.stack([row, column, np.cross(row, column)], axis=1),
    )
    files = series.files if max(frames) > 1 else tuple(place.file for place in slices)
    modality = _text(datasets[slices[0].file], "Modality")
    return DicomVolume(volume, modality, files, tuple(place.frame for place in slices))


def _read(file: Path) -> Any:
    import pydicom

    try:
        dataset = pydicom.dcmread(file)
    except Exception as error:  # damaged files raise whatever their bytes lead to; the message may quote them
        found = f"it cannot be read as DICOM ({type(error).__name__})"
        raise VolumeError(file, found, "a complete DICOM file", _TRUNCATED) from None
    if "SeriesInstanceUID" not in dataset:
        raise VolumeError(file, "no SeriesInstanceUID", "the complete header of an image", _TRUNCATED)
    # pydicom drops an element whose end it does not find, pixels or not.
    if "PixelData" not in dataset:
        raise VolumeError(file, "no pixel data", "a complete image", _TRUNCATED)
    return dataset


def _check_kind(file: Path, dataset: Any) -> None:
    modality = _text(dataset, "Modality")
    if modality not in ("", MODALITY):
        raise VolumeError(
            file, f"Modality {modality}", MODALITY, "The model has learnt MRI alone: leave this series out."
        )
    samples, colours = int(_number(file, dataset, "SamplesPerPixel")), _text(dataset, "PhotometricInterpretation")
    if samples != 1 or colours not in ("MONOCHROME1", "MONOCHROME2"):
        found = f"a colour image ({samples} values per pixel, PhotometricInterpretation {colours or 'absent'})"
        raise VolumeError(file, found, "grey values (MONOCHROME2)", "Export the original images, not a capture.")
    if colours == "MONOCHROME1":
        # Whether only the display is inverted or the values are too, the file does not tell.
        raise VolumeError(file, "an inverted image (MONOCHROME1)", "MONOCHROME2", _EXPORT)


def _value(holder: Any, keyword: str) -> Any:
    """What a tag holds; None if it is absent or unusable."""
    try:
        return holder.get(keyword)
    except Exception:  # pydicom parses a value on access; what it raises may quote it
        return None


def _text(holder: Any, keyword: str) -> str:
    return str(_value(holder, keyword) or "")[:16]  # the length of a code string: nothing longer belongs here


def _numbers(file: Path, holder: Any, keyword: str, count: int) -> np.ndarray:
    """`count` finite numbers of a tag, float64."""
    if holder is None or keyword not in holder:
        raise VolumeError(file, f"no {keyword}", "it in every image of a scan", _EXPORT)
    try:
        values = np.array(_value(holder, keyword), dtype=np.float64).reshape(-1)
    except (ValueError, TypeError):
        values = np.array([])
    if len(values) != count or not np.all(np.isfinite(values)):
        found = f"an unusable {keyword}"
        raise VolumeError(file, found, "a finite number" if count == 1 else f"{count} finite numbers", _EXPORT)
    return values


def _number(file: Path, holder: Any, keyword: str) -> float:
    return float(_numbers(file, holder, keyword, 1)[0])


def _shape(file: Path, dataset: Any) -> tuple[int, int, int]:
    """(frames, rows, columns)"""
    frames = _number(file, dataset, "NumberOfFrames") if "NumberOfFrames" in dataset else 1
    shape = (int(frames), *(int(_number(file, dataset, keyword)) for keyword in ("Rows", "Columns")))
    if min(shape) < 1:
        raise VolumeError(file, f"{shape[0]} frames of {shape[1]} x {shape[2]} pixels", "at least 1 of each", _EXPORT)
    return shape


def _slices(file: Path, dataset: Any) -> list[_Slice]:
    """The frames of a file with their places, in stored order."""
    count, *_ = _shape(file, dataset)
    shared = _value(dataset, "SharedFunctionalGroupsSequence") or []
    each = _value(dataset, "PerFrameFunctionalGroupsSequence") or []
    if not (shared or each):
        if count != 1:
            found = f"{count} frames without a place for each (no functional groups)"
            raise VolumeError(file, found, "an enhanced multi-frame file, or one file per slice", _EXPORT)
        return [_slice(file, 1, 1, [dataset])]  # it holds itself what groups hold of a frame
    if len(each) != count:
        raise VolumeError(file, f"{count} frames, but functional groups for {len(each)}", "one for each", _EXPORT)
    return [_slice(file, frame, count, [own, *shared]) for frame, own in enumerate(each, start=1)]


def _slice(file: Path, frame: int, frames: int, groups: Sequence[Any]) -> _Slice:
    """Args: groups: where to look, the frame's own before the shared ones; or a single-frame dataset."""

    def holder(sequence: str, keyword: str) -> Any:
        for group in groups:
            if keyword in group:
                return group
            if held := _value(group, sequence):
                return held[0]
        return None

    def numbers(sequence: str, keyword: str, count: int) -> np.ndarray:
        return _numbers(file, holder(sequence, keyword), keyword, count)

    orientation = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6).reshape(2, 3)
    if not np.allclose(orientation @ orientation.T, np.eye(2), rtol=0, atol=2 * _SAME_ORIENTATION):
        raise VolumeError(
            file, "an ImageOrientationPatient of other vectors", "two unit vectors at right angles", _EXPORT
        )
    spacing = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
    if not np.all(spacing > 0):
        raise VolumeError(file, f"PixelSpacing {spacing[0]:g} {spacing[1]:g} mm", "positive lengths", _EXPORT)
    slope, intercept = 1.0, 0.0
    values = holder("PixelValueTransformationSequence", "RescaleSlope")
    if values is not None and "RescaleSlope" in values:
        slope, intercept = _number(file, values, "RescaleSlope"), _number(file, values, "RescaleIntercept")
        if slope == 0:
            raise VolumeError(file, "RescaleSlope 0", "another factor: all values would be the same", _EXPORT)
    position = numbers("PlanePositionSequence", "ImagePositionPatient", 3)
    return _Slice(file, frame, frames, position, orientation, spacing, slope, intercept)


def _check_same_grid(folder: Path, datasets: dict[Path, Any], slices: Sequence[_Slice]) -> None:
    """All slices parallel, with the same pixels."""
    sizes = {file: _shape(file, dataset)[1:] for file, dataset in datasets.items()}
    first = slices[0]
    orientations: list[np.ndarray] = []
    for place in slices:
        if not any(np.abs(place.orientation - known).max() <= _SAME_ORIENTATION for known in orientations):
            orientations.append(place.orientation)
    if len(orientations) > 1:
        found = f"slices of {len(orientations)} orientations in one series (a localizer?)"
        raise VolumeError(
            folder, found, "parallel slices", "Split the folder into one per orientation, or leave it out."
        )
    for place in slices:
        if sizes[place.file] != sizes[first.file]:
            shown = [f"{place.name} of {' x '.join(map(str, sizes[place.file]))}" for place in (first, place)]
            raise VolumeError(folder, f"{shown[0]} pixels, {shown[1]}", "one size in a series", _SPLIT)
        if not np.allclose(place.spacing_mm, first.spacing_mm, rtol=_SAME_PIXELS, atol=0):
            shown = [
                f"{place.name} with pixels of {' x '.join(f'{s:g}' for s in place.spacing_mm)} mm"
                for place in (first, place)
            ]
            raise VolumeError(folder, f"{shown[0]}, {shown[1]}", "one PixelSpacing in a series", _SPLIT)


def _axes(place: _Slice) -> tuple[np.ndarray, np.ndarray]:
    """The directions of a row and of a column, made exactly orthonormal: files hold them rounded."""
    row, column = place.orientation
    row = row / np.linalg.norm(row)
    column = column - row * (row @ column)
    return row, column / np.linalg.norm(column)


def _stack(folder: Path, slices: Sequence[_Slice]) -> tuple[list[_Slice], float]:
    """The slices in the order of their places along the normal, and the distance (mm) between neighbours."""
    normal = np.cross(*_axes(slices[0]))
    slices = sorted(slices, key=lambda place: float(place.position_mm @ normal))
    along = np.array([place.position_mm @ normal for place in slices])
    gaps = np.diff(along)
    if len(same := np.flatnonzero(gaps <= _ROUNDING_MM)):
        one, other = slices[same[0]], slices[same[0] + 1]
        more = f" (one of {len(same)} such pairs)" if len(same) > 1 else ""
        raise VolumeError(
            folder,
            f"{one.name} and {other.name} both at {along[same[0]]:.2f} mm along the slice normal{more}",
            "one slice at each place",
            "Put each echo, time point, stack or copy into a folder of its own.",
        )
    # The lower median: slices that are missing only make gaps longer.
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    uneven = np.flatnonzero(np.abs(gaps - usual) > max(_UNEVEN * usual, _ROUNDING_MM))
    if len(uneven):
        one, other = slices[uneven[0]], slices[uneven[0] + 1]
        more = f" (one of {len(uneven)} such gaps)" if len(uneven) > 1 else ""
        raise VolumeError(
            folder,
            f"a gap of {gaps[uneven[0]]:.2f} mm between {one.name} and {other.name}{more}",
            f"the usual {usual:.2f} mm between slices",
            "Restore the missing slices, or keep a part without gaps: none are made up.",
        )
    offsets = np.array([place.position_mm - slices[0].position_mm for place in slices])
    beside = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    if beside.max() > _SHEAR * slices[0].spacing_mm.min():
        raise VolumeError(
            folder,
            f"sheared slices: {slices[int(beside.argmax())].name} lies {beside.max():.2f} mm beside {slices[0].name}",
            "each straight above the first",
            "Resample the series to a grid at right angles and give that as .nii.gz or .mha.",
        )
    return slices, float(along[-1] - along[0]) / len(gaps)


# --- pixels -----------------------------------------------------------------------------------------------------------


def _voxels(datasets: dict[Path, Any], slices: Sequence[_Slice]) -> np.ndarray:
    """(z, y, x) in the order of `slices`, rescaled."""
    stored = {file: _stored_values(file, dataset) for file, dataset in datasets.items()}
    planes = [stored[place.file][place.frame - 1] for place in slices]
    if all((place.slope, place.intercept) == (1.0, 0.0) for place in slices):
        return np.stack(planes)
    pairs = zip(planes, slices, strict=True)
    return np.stack([(plane * place.slope + place.intercept).astype(np.float32) for plane, place in pairs])


def _stored_values(file: Path, dataset: Any) -> np.ndarray:
    """(frame, row, column), as stored: without the rescale slope."""
    from pydicom.uid import RLELossless

    shape = _shape(file, dataset)
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    name = "no transfer syntax" if syntax is None else "a private one" if syntax.is_private else syntax.name
    try:
        encapsulated = syntax.is_encapsulated
        if not encapsulated:
            present, expected = len(dataset.PixelData), math.prod(shape) * int(dataset.BitsAllocated) // 8
            if present < expected:
                raise VolumeError(file, f"{present} bytes of pixels", f"{expected}", "It is truncated: copy it again.")
        decode = _gdcm_values if encapsulated and syntax != RLELossless else _pydicom_values
        return decode(dataset).reshape(shape)
    except VolumeError:
        raise
    except Exception as error:  # of pydicom, its plugins and GDCM; some quote the header
        raise VolumeError(
            file,
            f"pixels that cannot be decoded ({name}; {type(error).__name__})",
            "uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000 ones, complete",
            "Copy it again, or export the series uncompressed.",
        ) from None


def _pydicom_values(dataset: Any) -> np.ndarray:
    return dataset.pixel_array


def _gdcm_values(dataset: Any) -> np.ndarray:
    """What SimpleITK's GDCM makes of the pixels alone: of a whole file it would also apply the rescale slope."""
    import SimpleITK as sitk
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import MultiFrameGrayscaleWordSecondaryCaptureImageStorage, generate_uid

    bare = Dataset()
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    bare.SOPClassUID, bare.SOPInstanceUID = MultiFrameGrayscaleWordSecondaryCaptureImageStorage, generate_uid()
    for keyword in (
        "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated",
        "BitsStored", "HighBit", "PixelRepresentation", "PixelData",
    ):  # fmt: skip
        if keyword in dataset:
            bare[keyword] = dataset[keyword]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pixels.dcm")
        bare.save_as(path, enforce_file_format=True)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        return sitk.GetArrayFromImage(reader.Execute())
