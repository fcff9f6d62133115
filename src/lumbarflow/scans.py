"""Scans of strangers: what lies below a folder, and one of them read so that nothing wrong with it goes unnoticed.

Whatever a file may turn out to be is dealt with here, in `imaging` and in `dicom`; the rest of the project gets a
volume of grey values whose geometry can be trusted, and in words what is unusual about it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lumbarflow import dicom
from lumbarflow.dicom import DicomSeries, DicomVolume
from lumbarflow.imaging import (
    VOLUME_SUFFIXES,
    Volume,
    VolumeError,
    check_image,
    read_volume,
    sagittal_orientation,
    split_volume_name,
    volume_files,
)

# The format of a ScanSource that is no volume file.
DICOM = "dicom"
# What lumbar MRI usually is, on sagittal axes: fewest slices, least and greatest distances. The predict pipeline states
# its own in its parameters; these are for a served model, which has none.
LIMITS = {"minimum_slices": 5, "slice_spacing_mm": (0.5, 8.0), "pixel_spacing_mm": (0.2, 2.0)}

# What slices are called that lie one behind the other along axis 0, 1 or 2 of a sagittal array.
_PLANES = ("sagittal", "axial", "coronal")
# A distance this many times the other two is that between slices; where there is none, no plane stands out.
_ANISOTROPIC = 1.5
# Hounsfield units: below the first is air, within the second most of a body, above the third its inside.
_AIR_HU, _SOFT_TISSUE_HU, _BODY_HU = -900, (-200, 200), -500

# DICOM is told by its content, but these endings promise it. Names without one, or with a number, are common too.
_DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")

HIDDEN, OTHER = "hidden", "neither volumes nor DICOM images"
EARLIER = "with the masks of an earlier prediction"
# Below a folder of masks, what made them: see `prediction.PredictionFolder`.
RECORDS = ".predictions"
# Bytes; file systems take 255, and outputs add their endings to a scan's name, while they are written some more.
_LONGEST_NAME = 200


@dataclass(frozen=True)
class ScanSource:
    """One scan, not read yet.

    Attributes:
        name: a POSIX path, unique among the scans found together: see `find_scans`.
        path: the volume file, or the folder of the DICOM series.
        format: lower-case ending, one of imaging.VOLUME_SUFFIXES, or DICOM.
        series: the DICOM files; None for other formats, and where a problem kept us from looking for them.
        problem: why it must not be read, where names and links alone tell.
    """

    name: str
    path: Path
    format: str
    series: DicomSeries | None = None
    problem: VolumeError | None = None

    @property
    def suffix(self) -> str:
        """How label maps of this scan end: as itself, `.nii.gz` for DICOM."""
        return ".nii.gz" if self.format == DICOM else self.format

    @property
    def mask_name(self) -> str:
        """What its label map is called."""
        return f"{self.name}_seg{self.suffix}"


class FoundScans(list[ScanSource]):
    """Scans by name; `passed_over` counts the files and folders beside them: HIDDEN, OTHER, EARLIER."""

    def __init__(self, sources: Iterable[ScanSource] = (), passed_over: Mapping[str, int] | None = None):
        super().__init__(sources)
        self.passed_over = dict(passed_over or {})


@dataclass(frozen=True)
class ScanImage:
    """A scan as it was read.

    Attributes:
        volume: in the storage order of the file.
        modality: DICOM's; None for other formats, which do not tell.
        dicom: where its voxels lie in the DICOM files; None for other formats.
        warnings: what is unusual about it, in words.
    """

    volume: Volume
    modality: str | None
    dicom: DicomVolume | None
    warnings: tuple[str, ...]


def find_scans(root: str | Path, without: str | Path | None = None) -> FoundScans:
    """Every volume file and every DICOM series below a folder.

    A volume file is called by its path below `root` without its ending; a DICOM series by the path of its folder (the
    name of `root` for that one) and its place, from 1, among the series in it by their files' names. Scans that would
    share a name get their formats added (`1_t2_mha` and `1_t2_nii_gz`), and numbers where these are the same.

    Links that stay below `root` are followed, each folder once. Nothing outside is opened: what leads there is found as
    a scan with a `problem`, and so is what has a name that no output can have. Folders of masks made earlier are passed
    over: a mask is no scan.

    Args:
        without: a folder below `root` that holds outputs and is left out.
    Raises:
        VolumeError: there is no such folder, it holds masks made earlier, or there is no scan below it.
    """
    root = Path(root)
    if not root.is_dir():
        found = "a file" if root.exists() else "no such folder"
        raise VolumeError(root, found, "a folder of scans", "Name the folder that holds them.")
    if (root / RECORDS).is_dir():
        raise VolumeError(root, f"a folder {EARLIER}", "a folder of scans", "Name the folder that holds them.")
    search = _Search(root, None if without is None else _real(Path(without)))
    search.run()
    passed_over = +search.passed_over  # without zeros
    if not search.sources:
        counts = [f"{number} {what}" for what, number in sorted(passed_over.items())]
        raise VolumeError(
            root,
            f"no scans ({', '.join(counts) or 'nothing'} below it)",
            f"volumes ({' '.join(VOLUME_SUFFIXES)}) or DICOM series",
            "Name the folder that holds them.",
        )
    return FoundScans(_uniquely_named(search.sources), passed_over)


def scan_at(path: str | Path, within: str | Path | None = None) -> ScanSource:
    """The scan that somebody names: a volume file, or a folder with the files of one DICOM series.

    Args:
        within: a folder that no link may lead out of; without it links are followed wherever they lead.
    Raises:
        VolumeError: nothing of that kind there, or something outside `within`.
    """
    path = Path(path)
    inside = None if within is None else _real(Path(within))
    if inside is not None and not _real(path).is_relative_to(inside):
        raise _link_error(path)
    if path.is_dir():
        return _only_series(path, inside)
    stem, suffix = split_volume_name(path.name)
    if path.exists() and not suffix:
        expected = f"{' '.join(VOLUME_SUFFIXES)}, or the folder of a DICOM series"
        raise VolumeError(path, f"a file whose name ends in {path.suffix!r}", expected, "Name one of these.")
    for file in volume_files(path):
        # (A folder on the way may be a link too.)
        if inside is not None and not _real(file).is_relative_to(inside):
            raise _link_error(file)
    return ScanSource(stem, path, suffix.lower())


def read_scan(source: ScanSource, limits: Mapping[str, Any] = LIMITS) -> ScanImage:
    """Read a scan and check all that can be checked before a net sees it.

    Args:
        limits: like LIMITS; what lies outside is a warning.
    Raises:
        VolumeError: it is no volume of grey values with a sound geometry, or cannot be read.
    """
    if source.problem is not None:
        raise source.problem
    try:
        read = dicom.read_series(source.series) if source.series else None
        volume = read.volume if read else read_volume(source.path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise VolumeError(source.path, f"it cannot be opened ({reason})", "a readable file", "Allow it.") from None
    except (VolumeError, MemoryError):
        raise
    except Exception as error:
        if source.series is None:
            raise
        # Nobody foresaw it; pydicom's messages may quote the header.
        found = f"it cannot be read as DICOM ({type(error).__name__})"
        raise VolumeError(source.path, found, "a sound MR series", "Export it again from DICOM.") from None
    check_image(source.path, volume)
    if min(volume.size) == 1:
        size = " x ".join(map(str, volume.size))
        raise VolumeError(source.path, f"a 2-D image ({size} voxels)", "several slices", "Export the whole series.")
    warnings = _unusual_geometry(volume, limits)
    if not (read and read.modality) and _looks_like_ct(volume.array):
        warnings.append("intensities like those of CT, not of MRI")
    return ScanImage(volume, read.modality if read else None, read, tuple(warnings))


def _unusual_geometry(volume: Volume, limits: Mapping[str, Any]) -> list[str]:
    """In words, how far a volume is from a usual sagittal scan."""
    axes = sagittal_orientation(volume.direction).axes
    slices = volume.array.shape[axes[0]]
    between, row, column = spacing = [volume.spacing_mm[2 - axis] for axis in axes]
    unusual = []
    _, second, largest = sorted(spacing)
    plane = _PLANES[spacing.index(largest)] if largest > _ANISOTROPIC * second else _PLANES[0]
    if plane != _PLANES[0]:
        unusual.append(f"roughly {plane} slices, {largest:.3g} mm apart; expected sagittal ones")
    if slices < limits["minimum_slices"]:
        unusual.append(f"{slices} sagittal slices; expected at least {limits['minimum_slices']}")
    low, high = limits["slice_spacing_mm"]
    if not low <= between <= high:
        unusual.append(f"sagittal slices {between:.3g} mm apart; expected {low:g} to {high:g} mm")
    low, high = limits["pixel_spacing_mm"]
    if not (low <= row <= high and low <= column <= high):
        unusual.append(f"sagittal pixels of {row:.3g} x {column:.3g} mm; expected {low:g} to {high:g} mm")
    return unusual


def _looks_like_ct(array: np.ndarray) -> bool:
    """Whether values look like Hounsfield units: there is air, and most of what is no air is soft tissue.

    An MRI that was given negative values (its mean subtracted, say) spreads far wider above its background.
    """
    if array.min() > _AIR_HU:
        return False
    body = array[array > _BODY_HU]
    low, high = _SOFT_TISSUE_HU
    return 2 * int(np.count_nonzero((body >= low) & (body <= high))) > body.size


class _Search:
    """One walk through a folder: `sources` and `passed_over` fill up while it runs."""

    def __init__(self, root: Path, without: Path | None):
        self.root, self.inside = root, _real(root)
        # Where outputs go into the folder of the scans itself, or above it, nothing can be left out.
        self.without = without if without is not None and self.inside in without.parents else None
        self.sources: list[ScanSource] = []
        self.passed_over: Counter[str] = Counter()
        self._folders, self._links, self._seen = [root], [], set()

    def run(self) -> None:
        while self._folders or self._links:
            # Links last, and by name: most lead to what is then known by its own path.
            self._links.sort(reverse=True)
            folder = (self._folders or self._links).pop()
            real = _real(folder)
            left_out = self.without is not None and real.is_relative_to(self.without)
            if real not in self._seen and not left_out:
                self._seen.add(real)
                self._look_into(folder)

    def _look_into(self, folder: Path) -> None:
        try:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
            os.stat(f"{folder}/.")  # a folder may let its names be read and nothing else
        except OSError as error:
            problem = VolumeError(folder, f"it cannot be opened ({error.strerror})", "a readable folder", "Allow it.")
            self._add(self._name(folder), folder, problem=problem)
            return
        if RECORDS in names:
            self.passed_over[EARLIER] += 1
            return
        files = []
        for path in (folder / name for name in names):
            if path.name.startswith("."):
                self.passed_over[HIDDEN] += 1
            elif not path.is_dir():
                files.append(path)
            elif _leads_out(path, self.inside):
                self._add(self._name(path), path, problem=_link_error(path))
            else:
                (self._links if path.is_symlink() else self._folders).append(path)
        volumes = [path for path in files if split_volume_name(path.name)[1]]
        parts = {part for path in volumes for part in self._add_volume(path)}
        self._add_dicom(folder, [path for path in files if path not in parts])

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path != self.root else self.inside.name

    def _add(self, name: str, path: Path, format: str = DICOM, **what: Any) -> None:
        usable = _usable(name)
        if usable != name:
            # Told with the other name: nobody could write this one down.
            found = f"a name of over {_LONGEST_NAME} bytes" if printable(name) == name else "a name that is not UTF-8"
            expected = f"at most {_LONGEST_NAME} bytes of UTF-8, to which outputs add their endings"
            what["problem"] = VolumeError(_usable(str(path)), found, expected, "Rename it.")
        self.sources.append(ScanSource(usable, path, format, **what))

    def _add_volume(self, path: Path) -> list[Path]:
        """Returns the volume's files."""
        files, problem = [path], None
        if _leads_out(path, self.inside):
            problem = _link_error(path)
        else:
            try:
                files = volume_files(path)
                problem = next((_link_error(file) for file in files if _leads_out(file, self.inside)), None)
            except VolumeError as error:
                problem = error
            except OSError:
                pass  # told when it is read
        stem, suffix = split_volume_name(self._name(path))
        self._add(stem, path, suffix.lower(), problem=problem)
        return files

    def _add_dicom(self, folder: Path, files: list[Path]) -> None:
        outside = [path for path in files if _leads_out(path, self.inside)]
        series, others, problem = _series_among([path for path in files if path not in outside])
        self.passed_over[OTHER] += others + len(outside)
        # Without such a file a series would be incomplete, and not always with a gap that shows.
        if missing := [path for path in outside if _named_like_dicom(path)]:
            problem = _link_error(*missing)
        if problem and not series:
            self._add(self._name(folder), folder, problem=problem)
        for index, one in enumerate(series, 1):
            self._add(f"{self._name(folder)}_{index}", folder, series=one, problem=problem)


def printable(text: str) -> str:
    """The same text; bytes of file names that are no UTF-8, which no log or table can hold, are spelled out."""
    return os.fsencode(text).decode(errors="backslashreplace")


def _usable(name: str) -> str:
    """The same path, but for bytes that are no UTF-8 and for parts that are too long."""
    text = printable(name)
    return "/".join(part.encode()[:_LONGEST_NAME].decode(errors="ignore") for part in text.split("/"))


def _only_series(folder: Path, inside: Path | None) -> ScanSource:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    outside = [path for path in files if inside is not None and _leads_out(path, inside)]
    if outside:
        raise _link_error(*outside)
    files = [path for path in files if not split_volume_name(path.name)[1]]
    series, others, problem = _series_among(files)
    if problem:
        raise problem
    if len(series) != 1:
        found = f"{len(series)} DICOM series" if series else f"no DICOM series ({others} other files)"
        remedy = "Put each into a folder of its own." if series else "Name the folder that its files lie in."
        raise VolumeError(folder, found, "the files of exactly one", remedy)
    return ScanSource(f"{_real(folder).name}_1", folder, DICOM, series[0])


def _series_among(files: list[Path]) -> tuple[list[DicomSeries], int, VolumeError | None]:
    """DICOM series by their files' names, how many files belong to none, and why a series may lack files."""
    regular = [path for path in files if path.is_file()]  # a pipe would keep us waiting
    series, strangers = dicom.find_series(regular)
    others = len(files) - len(regular) + len(strangers)
    lost = [path for path in strangers if not os.access(path, os.R_OK) or _is_broken_dicom(path)]
    if not lost:
        return series, others, None
    found = f"no DICOM or not readable{_more(lost)}"
    return series, others, VolumeError(lost[0], found, "a complete DICOM file", "Copy it again, or remove it.")


def _is_broken_dicom(path: Path) -> bool:
    return path.suffix.lower() in _DICOM_SUFFIXES and not dicom._begins_like_dicom(path)


def _named_like_dicom(path: Path) -> bool:
    return path.suffix.lower() in ("", *_DICOM_SUFFIXES) or path.suffix[1:].isdigit()


def _real(path: Path) -> Path:
    # (Path.resolve raises for links in a circle.)
    return Path(os.path.realpath(path))


def _leads_out(path: Path, inside: Path) -> bool:
    """Whether a file or folder that lies inside is a link to somewhere else."""
    return path.is_symlink() and not _real(path).is_relative_to(inside)


def _link_error(*paths: Path) -> VolumeError:
    found = f"a link that leads out of the folder of scans{_more(paths)}"
    return VolumeError(paths[0], found, "a file inside that folder", "Copy what it leads to, or remove the link.")


def _more(paths: Sequence[Path]) -> str:
    return f", like {len(paths) - 1} more beside it" if len(paths) > 1 else ""


def _uniquely_named(sources: list[ScanSource]) -> list[ScanSource]:
    """Sources by name, none of which occurs twice; the order in which they come does not matter."""
    sources = sorted(sources, key=lambda source: (source.name, source.path.as_posix()))
    counts = Counter(source.name for source in sources)
    taken = {name for name, count in counts.items() if count == 1}
    named = []
    for source in sources:
        name = source.name
        if counts[name] > 1:
            stem = name = f"{name}_{source.format.lstrip('.').replace('.', '_')}"
            number = 1
            while name in taken:
                number += 1
                name = f"{stem}_{number}"
            taken.add(name)
        named.append(replace(source, name=name))
    return sorted(named, key=lambda source: source.name)
