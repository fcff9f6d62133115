"""Volumes with their geometry, their files, and the sagittal orientation.

Two conventions meet here and nowhere else. SimpleITK speaks in index order (x, y, z) and in LPS physical space
(x to the patient's left, y to posterior, z to superior, millimetres). NumPy arrays read from it are (z, y, x).
Spacing, origin and direction below keep SimpleITK's order, arrays NumPy's.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lumbarflow.files import PARTIAL

VOLUME_SUFFIXES = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd")

# Where the array axes of a sagittal volume point, in LPS space: slices run from the patient's left to the right,
# rows from superior to inferior, columns from anterior to posterior. This triple is right-handed.
SAGITTAL_AXES = np.array([[-1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])


class VolumeError(ValueError):
    """A file that does not hold a usable 3-D volume. `found`, `expected` and `remedy` are the parts of the message."""

    def __init__(self, path: str | Path, found: str, expected: str, remedy: str):
        super().__init__(f"{path}: {found}; expected {expected}. {remedy}")
        self.path, self.found, self.expected, self.remedy = str(path), found, expected, remedy

    def __reduce__(self):  # an exception with four arguments crosses a process border only with this
        return type(self), (self.path, self.found, self.expected, self.remedy)


@dataclass(frozen=True, eq=False)
class Volume:
    """A scalar image on a regular grid.

    Attributes:
        array: (z, y, x), any real dtype, storage order of the file.
        spacing_mm: distance between voxel centres along index x, y, z.
        origin_mm: LPS position of the centre of voxel (0, 0, 0).
        direction: (3, 3) float64; its columns are the physical directions of index x, y and z.
    """

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: np.ndarray

    def __post_init__(self):
        if self.array.ndim != 3:
            raise ValueError(f"a volume's array has 3 axes (z, y, x), not shape {self.array.shape}")
        object.__setattr__(self, "spacing_mm", tuple(float(value) for value in self.spacing_mm))
        object.__setattr__(self, "origin_mm", tuple(float(value) for value in self.origin_mm))
        object.__setattr__(self, "direction", np.asarray(self.direction, dtype=np.float64).reshape(3, 3))

    @property
    def size(self) -> tuple[int, int, int]:
        """Number of voxels along index x, y, z."""
        return tuple(reversed(self.array.shape))

    def with_array(self, array: np.ndarray) -> Volume:
        """The same grid with other values. Raises ValueError if `array` has another shape."""
        if array.shape != self.array.shape:
            raise ValueError(f"this grid holds arrays of shape {self.array.shape}, not {array.shape}")
        return replace(self, array=array)

    def physical_point(self, index_xyz) -> np.ndarray:
        """LPS position (mm) of a (possibly fractional) voxel index (x, y, z)."""
        scaled = np.asarray(index_xyz, dtype=np.float64) * self.spacing_mm
        return np.asarray(self.origin_mm) + self.direction @ scaled

    def index_point(self, point_mm) -> np.ndarray:
        """Fractional voxel index (x, y, z) of an LPS position (mm)."""
        offset = np.asarray(point_mm, dtype=np.float64) - self.origin_mm
        return np.linalg.solve(self.direction, offset) / self.spacing_mm


class LabelMap(Volume):
    """A volume of integer labels. It is a type of its own so that nothing interpolates it by mistake."""

    def __post_init__(self):
        super().__post_init__()
        if not np.issubdtype(self.array.dtype, np.integer):
            raise ValueError(f"a label map holds integers, not {self.array.dtype}")


def split_volume_name(name: str) -> tuple[str, str]:
    """File name -> (stem, suffix); the suffix is "" when it is not one of VOLUME_SUFFIXES (case ignored)."""
    for suffix in VOLUME_SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], name[-len(suffix) :]
    return name, ""


def volume_files(path: str | Path) -> list[Path]:
    """The files that make up one volume: the named one and, for `.mhd` headers, the data file it names.

    Raises:
        VolumeError: no such file, no MetaImage header, or one that names several data files or one elsewhere.
    """
    path = Path(path)
    if not path.is_file():
        raise VolumeError(path, "no such file", "an existing file", "Restore it from the source.")
    if path.suffix.lower() != ".mhd":
        return [path]
    named = _metaimage_header(path)[0]["ElementDataFile"]
    if named in _LOCAL:
        return [path]
    if named.startswith("LIST") or "%" in named:
        raise VolumeError(
            path, f"its voxels lie in several files ({named!r})", "one data file", "Convert it into one .mha."
        )
    # Not resolved: where files are links into a store, both still lie beside each other by name.
    data = Path(os.path.abspath(path.parent / named))
    if data.parent != Path(os.path.abspath(path.parent)):
        raise VolumeError(
            path,
            f"its ElementDataFile points outside its folder ({named!r})",
            "a data file beside the header",
            "Put both into one folder and name the file alone.",
        )
    return [path, path.parent / data.name]


def written_files(path: str | Path) -> list[Path]:
    """The files that `write_volume` and `write_channels` make for a path: with `.mhd` one for the voxels as well."""
    path = Path(path)
    return [path, path.with_suffix(".zraw")] if path.suffix.lower() == ".mhd" else [path]


def read_volume(path: str | Path, kind: type[Volume] = Volume) -> Volume:
    """Read one 3-D volume through SimpleITK.

    Args:
        path: `.mha`, `.mhd`, `.nii`, `.nii.gz` or `.nrrd`.
        kind: Volume, or LabelMap (float files of whole numbers are then converted).
    Raises:
        VolumeError: unreadable or truncated file, no spacing or orientation, too large, not 3-D, several components per
            voxel, labels that aren't whole.
    """
    import SimpleITK as sitk

    path = Path(path)
    if not split_volume_name(path.name)[1]:
        raise VolumeError(path, f"its name ends in {path.suffix!r}", " ".join(VOLUME_SUFFIXES), "Convert the file.")
    for file in volume_files(path):
        if not file.is_file():
            raise VolumeError(path, f"no file {file.name}", "an existing file", "Restore it from the source.")
    _check_voxel_bytes(path)
    _check_stated_geometry(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    # Left to itself, ITK knows no MetaImage by a name in capitals, and may take a file for another format than checked.
    reader.SetImageIO(_READERS[split_volume_name(path.name)[1].lower()])
    try:
        reader.ReadImageInformation()
        dimension, components = reader.GetDimension(), reader.GetNumberOfComponents()
        # (ITK itself takes a 4-D NIfTI file of one time point for the 3-D one that it is.)
        if dimension != 3:
            raise VolumeError(path, f"{dimension} dimensions", "3", "Export the series as one 3-D volume.")
        if components != 1:
            raise VolumeError(path, f"{components} values per voxel", "1", "Export grey values, not colours.")
        check_size(path, reader.GetSize())
        image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip() if str(error).strip() else "no reason given"
        if "allocate memory" in reason:  # the file may be sound
            raise MemoryError(f"{path}: {reason}") from None
        raise VolumeError(path, f"it cannot be read ({reason})", "a complete volume", _COPY_AGAIN) from None
    array = sitk.GetArrayFromImage(image)
    if kind is LabelMap and not np.issubdtype(array.dtype, np.integer):
        if not (np.array_equal(np.round(array), array) and np.abs(array).max(initial=0) <= np.iinfo(np.int32).max):
            raise VolumeError(path, "labels that aren't whole numbers", "integers", "Was the mask interpolated?")
        array = array.astype(np.int32)
    return kind(array, image.GetSpacing(), image.GetOrigin(), np.reshape(image.GetDirection(), (3, 3)))


_READERS = {
    ".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nii": "NiftiImageIO", ".nii.gz": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
}  # fmt: skip
# What a MetaImage's ElementDataFile is when the voxels follow it; any other spelling is a file's name to ITK.
_LOCAL = ("LOCAL", "Local", "local")
# A line of its header. Where ITK's reader would see other lines than ours (it takes ":" for "=" and words before it for
# keys), it could be led to voxels that we have not looked at, in any file of this machine.
_METAIMAGE_LINE = re.compile(rb"([^\s=:]+)[ \t]*=([^\r\0]*)\r?")
# Bytes of one value of a MetaImage's ElementType.
_METAIMAGE_BYTES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4, "MET_LONG": 4,
    "MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8,
}  # fmt: skip
_HEADER_LIMIT = 65536  # no header comes near it
_BLOCK = 65536
_GZIP = b"\x1f\x8b"
_NIFTI_SCANNER = 1  # an sform_code
_ZLIB_OR_GZIP = 47  # zlib's `wbits` for: either, told by its header
_COPY_AGAIN = "Copy or export it again."
# NRRD's names of spaces whose directions ITK turns into LPS; it takes those of any other space for LPS.
_NRRD_SPACES = {
    "right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps",
}  # fmt: skip
# Far above any MRI of a spine (20 slices of 1024 x 1024 are 2**24.3). As float32 they take 2 GiB, and all that is made
# of them several times that.
_MOST_VOXELS = 2**29


def _check_voxel_bytes(path: Path) -> None:
    """Find what ITK reads without complaint: voxels that end early or do not unpack.

    It then returns zeros, or whatever lay in that memory before: a wrong image.
    """
    name = path.name.lower()
    if name.endswith((".mha", ".mhd")):
        present, expected = _metaimage_bytes(path)
    elif name.endswith((".nii", ".nii.gz")):
        present, expected = _nifti_bytes(path)
    else:
        _check_nrrd(path)
        return
    if present < expected:
        raise VolumeError(path, f"{present} bytes of voxels", f"{expected}", "It is truncated: copy it again.")


def _metaimage_header(path: Path) -> tuple[dict[str, str], int]:
    """The header's keys and values, and the offset of what follows its last line, ElementDataFile."""
    with open(path, "rb") as file:
        head = file.read(_HEADER_LIMIT)
    header: dict[str, str] = {}
    offset = 0
    for line in head.split(b"\n"):
        offset += len(line) + 1
        if not line.strip():
            continue
        if not (read := _METAIMAGE_LINE.fullmatch(line)):
            break
        key, value = (part.strip().decode("latin-1") for part in read.groups())
        header[key] = value
        if key == "ElementDataFile":
            return header, offset
    raise VolumeError(path, "no MetaImage header", "lines of 'key = value' up to 'ElementDataFile = ...'", _COPY_AGAIN)


def _metaimage_bytes(path: Path) -> tuple[int, int]:
    """(present, expected) bytes of unpacked voxels."""
    header, offset = _metaimage_header(path)
    try:
        sizes = [int(size) for size in header["DimSize"].split()]
        width = _METAIMAGE_BYTES[header["ElementType"]]
        channels = int(header.get("ElementNumberOfChannels", 1))
        compressed = header.get("CompressedData", "False").lower() == "true"
        stored = int(header["CompressedDataSize"]) if compressed else -1  # ITK reads rubbish without that line
        skipped = max(0, int(header.get("HeaderSize", 0)))
        if header.get("BinaryData", "True").lower() != "true" or len(sizes) != int(header["NDims"]) or min(sizes) < 1:
            raise ValueError
    except (KeyError, ValueError):
        lines = ", ".join(
            f"{key} = {header.get(key)}"
            for key in ("NDims", "DimSize", "ElementType", "BinaryData", "CompressedDataSize")
        )
        raise VolumeError(
            path, f"a header with {lines}", "binary voxels of a known type and size", _COPY_AGAIN
        ) from None
    data = volume_files(path)[-1]
    # A `.mha` may name another file as well, and ITK would read it.
    if data == path and header["ElementDataFile"] not in _LOCAL:
        named = header["ElementDataFile"]
        raise VolumeError(path, f"its voxels lie in another file ({named!r})", "one file", "Convert it into one.")
    with open(data, "rb") as file:
        file.seek(skipped + (offset if data == path else 0))
        present = sum(map(len, _unpacked(path, file, stored) if compressed else _blocks(file)))
    return present, math.prod(sizes) * width * channels


def _nifti_bytes(path: Path) -> tuple[int, int]:
    """(present, expected) bytes of the unpacked file: header, extensions and voxels."""
    with open(path, "rb") as file:
        packed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        blocks = _unpacked(path, file) if packed else _blocks(file)
        head = next(blocks, b"")
        order = _nifti_byte_order(path, head)
        dimensions, *sizes = struct.unpack_from(order + "8h", head, 40)
        kind, bits = struct.unpack_from(order + "2h", head, 70)
        (offset,) = struct.unpack_from(order + "f", head, 108)
        floats = {16: "f4", 64: "f8"}.get(kind)
        present, rest = len(head), head[int(offset) :]
        for block in blocks:
            present += len(block)
            if floats:
                _check_finite(path, rest + block, order + floats)
                rest = block[len(block) - (len(rest) + len(block)) % (bits // 8) :]
        if floats:
            _check_finite(path, rest, order + floats)
    return present, int(offset) + math.prod(max(1, size) for size in sizes[: max(0, dimensions)]) * bits // 8


def _nifti_byte_order(path: Path, head: bytes) -> str:
    """`<` or `>`, read from the start of the unpacked file."""
    order = {b"\x5c\x01\0\0": "<", b"\0\0\x01\x5c": ">"}.get(head[:4])  # 348, the header's length, at its start
    if order is None or len(head) < 348 or head[344:347] != b"n+1":
        raise VolumeError(path, "no NIfTI-1 header", "one file with header and voxels", _COPY_AGAIN)
    return order


def _check_finite(path: Path, voxels: bytes, dtype: str) -> None:
    """ITK's NIfTI reader turns what isn't finite into 0, so it has to be found before."""
    whole = len(voxels) // np.dtype(dtype).itemsize
    if not np.all(np.isfinite(np.frombuffer(voxels, dtype, whole))):
        raise VolumeError(path, "voxels that aren't finite", "finite numbers", _COPY_AGAIN)


def _check_nrrd(path: Path) -> None:
    """ITK does see that voxels are missing here; it does not look at checksums, and reads other files if told so."""
    with open(path, "rb") as file:
        fields = _nrrd_fields(file)
        if "datafile" in fields:
            raise VolumeError(
                path, f"its voxels lie in another file ({fields['datafile']!r})", "one file", "Convert it into one."
            )
        if fields.get("encoding") in ("gzip", "gz"):
            for _ in _unpacked(path, file):
                pass


def _nrrd_fields(file: BinaryIO) -> dict[str, str]:
    """The header's fields and values; the file is then at the first voxel."""
    fields = {}
    while line := file.readline().strip():  # an empty one ends the header
        if b"\r" in line:  # ends a line for ITK, which would see fields that we do not
            return {}
        key, _, value = line.decode("latin-1").partition(":")
        fields[key.replace(" ", "").lower()] = value.strip()
    return fields


def _check_stated_geometry(path: Path) -> None:
    """Find what ITK puts right in silence: a spacing that is none, and axes whose directions nobody stated.

    It takes lengths that are 0, absent or not finite for 1 mm, negative ones for a turned axis, and unknown axes for
    those of an axial scan: a sagittal one would pass for it, and left for right.
    """
    name = path.name.lower()
    if name.endswith((".mha", ".mhd")):
        spacing, direction = _metaimage_geometry(path)
    elif name.endswith((".nii", ".nii.gz")):
        spacing, direction = _nifti_geometry(path)
    else:
        spacing, direction = _nrrd_geometry(path)
    _check_spacing(path, spacing)
    if direction:
        raise VolumeError(path, direction, "a geometry that tells how the patient lies", "Export it again from DICOM.")


def _check_spacing(path: str | Path, spacing_mm: Sequence[float]) -> None:
    if not spacing_mm or not all(math.isfinite(length) and length > 0 for length in spacing_mm):
        found = f"spacing {_numbers(spacing_mm)} mm" if spacing_mm else "no spacing"
        raise VolumeError(path, found, "positive lengths", "Correct its header, or export it again.")


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


# The next three: the lengths that the header states, NaN for what is no number, and what is wrong with its directions.


def _metaimage_geometry(path: Path) -> tuple[list[float], str]:
    header, _ = _metaimage_header(path)
    stated = not {"TransformMatrix", "Rotation", "Orientation"}.isdisjoint(header)
    spacing = header.get("ElementSpacing", header.get("ElementSize", ""))
    return [_number(text) for text in spacing.split()], "" if stated else "no TransformMatrix"


def _nifti_geometry(path: Path) -> tuple[list[float], str]:
    with open(path, "rb") as file:
        packed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        head = next(_unpacked(path, file) if packed else _blocks(file), b"")
    order = _nifti_byte_order(path, head)
    (dimensions,) = struct.unpack_from(order + "h", head, 40)
    spacing = list(struct.unpack_from(order + "3f", head, 80))[: max(0, dimensions)]
    qform, sform = struct.unpack_from(order + "2h", head, 252)
    quaternion, affine = struct.unpack_from(order + "6f", head, 256), struct.unpack_from(order + "12f", head, 280)
    if qform <= 0 and sform <= 0:
        return spacing, f"no orientation (qform_code {qform}, sform_code {sform})"
    if not np.all(np.isfinite((quaternion if qform > 0 else ()) + (affine if sform > 0 else ()))):
        return spacing, "an orientation that isn't finite"
    columns = np.reshape(affine, (3, 4))[:, :3]
    lengths = np.linalg.norm(columns, axis=0)
    # With a qform, the spacing is the one it was made with, and the sform may lead into the space of some atlas. Of one
    # that is the scanner's (1), ITK takes origin and axes all the same, if they are at right angles.
    angles = columns.T @ columns / np.maximum(np.outer(lengths, lengths), 1e-12)
    counts = qform <= 0 or (sform == _NIFTI_SCANNER and np.allclose(angles, np.eye(3), atol=1e-3))
    if counts and dimensions >= 3 and not np.allclose(lengths, np.abs(spacing), rtol=0.01, atol=0):
        return spacing, f"a spacing of {_numbers(spacing)} mm beside an sform of {_numbers(lengths)} mm"
    return spacing, ""


def _nrrd_geometry(path: Path) -> tuple[list[float], str]:
    with open(path, "rb") as file:
        fields = _nrrd_fields(file)
    if "sizes" not in fields:
        raise VolumeError(path, "no NRRD header", "a line 'sizes: ...'", _COPY_AGAIN)
    if "spacedirections" not in fields:
        return [_number(text) for text in fields.get("spacings", "").split()], "no space directions"
    every = re.findall(r"none|\([^)]*\)", fields["spacedirections"])
    kinds = fields.get("kinds", "").split() or ["domain"] * len(every)
    # The axis of colours has no direction.
    vectors = [vector for vector, kind in zip(every, kinds, strict=False) if vector != "none" or kind == "domain"]
    spacing = [math.hypot(*(_number(text) for text in vector.strip("()").split(","))) for vector in vectors]
    known = fields.get("space", "").lower() in _NRRD_SPACES or len(vectors) != 3  # other dimensions are told later
    space = f"the space {fields['space']!r}" if "space" in fields else "a space without a name"
    return spacing, "" if known else f"directions in {space}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_size(path: str | Path, size: Sequence[int]) -> None:
    """Raises VolumeError about `path` if an image of that many voxels along each axis would fill the memory."""
    if math.prod(size) > _MOST_VOXELS:
        found, expected = f"{' x '.join(map(str, size))} voxels", f"at most {_MOST_VOXELS}, what fits in memory"
        raise VolumeError(path, found, expected, "Crop it to the lumbar spine.")


def check_image(path: str | Path, image: Volume) -> None:
    """What every scan must fulfil, whatever file it came from.

    Raises:
        VolumeError: about `path`, for lengths that are not positive, axes that are not at right angles, voxels that are
            not finite, constant intensities.
    """
    _check_spacing(path, image.spacing_mm)
    # Files keep six digits or more of each cosine.
    if not np.allclose(image.direction.T @ image.direction, np.eye(3), rtol=0, atol=1e-3):
        found = f"a sheared or scaled grid (direction {_numbers(image.direction.ravel())})"
        raise VolumeError(path, found, "axes at right angles", "Resample it to such a grid.")
    if not np.all(np.isfinite(image.array)):
        count = int(np.count_nonzero(~np.isfinite(image.array)))
        raise VolumeError(path, f"{count} voxels that aren't finite", "finite numbers", "Export it again.")
    if image.array.min() == image.array.max():
        raise VolumeError(
            path, f"the constant value {image.array.flat[0]}", "an image with contrast", "Export it again."
        )


def _blocks(file: BinaryIO, size: float = math.inf) -> Iterator[bytes]:
    """What is left of a file, `size` bytes at most, in pieces."""
    while block := file.read(int(min(_BLOCK, size))):
        size -= len(block)
        yield block


def _unpacked(path: Path, file: BinaryIO, size: float = math.inf) -> Iterator[bytes]:
    """The same, unpacked from zlib or gzip; checksums are checked.

    Raises:
        VolumeError: about `path`, if the data are damaged or end early.
    """
    unpacker = zlib.decompressobj(wbits=_ZLIB_OR_GZIP)
    try:
        for block in _blocks(file, size):
            yield unpacker.decompress(block)
            while unpacker.unused_data.startswith(_GZIP):  # gzip files may be joined into one
                block, unpacker = unpacker.unused_data, zlib.decompressobj(wbits=_ZLIB_OR_GZIP)
                yield unpacker.decompress(block)
    except zlib.error as error:
        raise VolumeError(path, f"damaged compressed data ({error})", "data that unpack", _COPY_AGAIN) from None
    if not unpacker.eof:
        raise VolumeError(path, "compressed data that end early", "all of them", "It is truncated: copy it again.")


def write_volume(volume: Volume, path: str | Path) -> None:
    """Write a volume with its geometry; the file appears under its name only when it is complete.

    Raises:
        ValueError: `path` does not end in one of VOLUME_SUFFIXES.
    """
    array = volume.array.astype(np.uint8) if volume.array.dtype == bool else volume.array
    _write(array, volume, Path(path), channels=False)


def write_channels(array: np.ndarray, grid: Volume, path: str | Path) -> None:
    """Write several values per voxel, such as probabilities, (z, y, x, channels), on the grid of a volume.

    Raises:
        ValueError: as `write_volume`; another shape than the grid's.
    """
    if array.shape[:-1] != grid.array.shape:
        raise ValueError(f"this grid holds arrays of shape {grid.array.shape} and channels, not {array.shape}")
    _write(array, grid, Path(path), channels=True)


def _write(array: np.ndarray, grid: Volume, path: Path, channels: bool) -> None:
    import SimpleITK as sitk

    if not split_volume_name(path.name)[1]:
        raise ValueError(f"{path}: cannot tell a volume format from the name; expected {' '.join(VOLUME_SUFFIXES)}")
    image = sitk.GetImageFromArray(array, isVector=channels)
    image.SetSpacing(grid.spacing_mm)
    image.SetOrigin(grid.origin_mm)
    image.SetDirection(grid.direction.ravel())
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own, because `.mhd` writes two files and its header names the other one.
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
    try:
        # Level 1: five times as fast as the default 6 for a tenth more bytes on MRI.
        sitk.WriteImage(image, str(partial / path.name), useCompression=True, compressionLevel=1)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == path.name):  # the header last
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Orientation:
    """How a file's array becomes the sagittal one and back: a permutation of axes, then flips. Lossless.

    Attributes:
        axes: array axis of the file that serves as sagittal axis 0 (slice), 1 (row), 2 (column).
        flips: whether that sagittal axis runs against the file's.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    def apply(self, array: np.ndarray) -> np.ndarray:
        """(z, y, x, ...) in storage order -> (slice, row, column, ...)."""
        rest = tuple(range(3, array.ndim))
        turned = np.transpose(array, self.axes + rest)
        return np.ascontiguousarray(np.flip(turned, [axis for axis in range(3) if self.flips[axis]]))

    def restore(self, array: np.ndarray) -> np.ndarray:
        """(slice, row, column, ...) -> (z, y, x, ...) in storage order; the exact inverse of `apply`."""
        rest = tuple(range(3, array.ndim))
        flipped = np.flip(array, [axis for axis in range(3) if self.flips[axis]])
        return np.ascontiguousarray(np.transpose(flipped, tuple(int(axis) for axis in np.argsort(self.axes)) + rest))

    def to_dict(self) -> dict:
        return {"axes": list(self.axes), "flips": list(self.flips)}

    @classmethod
    def from_dict(cls, value: Mapping) -> Orientation:
        return cls(tuple(int(axis) for axis in value["axes"]), tuple(bool(flip) for flip in value["flips"]))


def sagittal_orientation(direction: np.ndarray) -> Orientation:
    """The orientation whose axes lie closest to SAGITTAL_AXES, read from a direction matrix alone.

    For oblique scans each axis goes to the anatomical one it is nearest to, the three chosen together, so that no
    axis is taken twice.
    """
    # cosines[t, a]: sagittal axis t against the file's array axis a (array axis a is index axis 2 - a).
    cosines = SAGITTAL_AXES @ np.asarray(direction, dtype=np.float64).reshape(3, 3)[:, ::-1]
    axes = max(
        itertools.permutations(range(3)),
        key=lambda axes: sum(abs(cosines[target, axis]) for target, axis in enumerate(axes)),
    )
    return Orientation(axes, tuple(bool(cosines[target, axis] < 0) for target, axis in enumerate(axes)))


def to_sagittal(volume: Volume) -> tuple[Volume, Orientation]:
    """Reorder a volume to (slice: left to right, row: superior to inferior, column: anterior to posterior).

    No voxel is interpolated: values, spacing and the physical place of every voxel are kept.
    """
    orientation = sagittal_orientation(volume.direction)
    index_axes = [2 - axis for axis in orientation.axes]  # index axis of the file behind each sagittal array axis
    first = [0, 0, 0]
    direction = np.empty((3, 3))
    spacing = [0.0, 0.0, 0.0]
    for target, (axis, flip) in enumerate(zip(index_axes, orientation.flips, strict=True)):
        first[axis] = volume.size[axis] - 1 if flip else 0
        direction[:, 2 - target] = volume.direction[:, axis] * (-1.0 if flip else 1.0)
        spacing[2 - target] = volume.spacing_mm[axis]
    turned = type(volume)(
        orientation.apply(volume.array), tuple(spacing), tuple(volume.physical_point(first)), direction
    )
    return turned, orientation


def geometry_differences(first: Volume, second: Volume, tolerances: Mapping[str, float]) -> list[str]:
    """What differs between two grids, in words; empty if they agree.

    Args:
        tolerances: `spacing_mm`, `origin_mm` and `direction` (largest difference of an entry).
    """
    if first.size != second.size:
        return [f"size {first.size} against {second.size}"]
    differences = []
    for name in ("spacing_mm", "origin_mm", "direction"):
        one, other = np.asarray(getattr(first, name)), np.asarray(getattr(second, name))
        if not np.all(np.abs(one - other) <= tolerances[name]):
            shown = [" ".join(f"{value:.6g}" for value in array.ravel()) for array in (one, other)]
            differences.append(f"{name} ({shown[0]}) against ({shown[1]})")
    return differences
