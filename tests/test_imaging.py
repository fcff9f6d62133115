"""Volumes keep their geometry through reorientation and through files; a bad file is an error, never a wrong array."""

from __future__ import annotations

import gzip
import itertools
import math
import os
import pickle
import re
import shutil
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow import imaging
from lumbarflow.imaging import (
    SAGITTAL_AXES,
    VOLUME_SUFFIXES,
    LabelMap,
    Orientation,
    Volume,
    VolumeError,
    check_image,
    geometry_differences,
    read_volume,
    sagittal_orientation,
    split_volume_name,
    to_sagittal,
    volume_files,
    write_channels,
    write_volume,
    written_files,
)

AXIS_ALIGNED = [
    np.eye(3)[:, list(axes)] * signs
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1.0, -1.0), repeat=3)
]


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """The rotation about the z, then the y, then the x axis (radians)."""
    about = []
    for axis, angle in enumerate((x, y, z)):
        matrix = np.eye(3)
        i, j = [other for other in range(3) if other != axis]
        matrix[i, i] = matrix[j, j] = np.cos(angle)
        matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
        about.append(matrix)
    return about[0] @ about[1] @ about[2]


def places(volume: Volume) -> np.ndarray:
    """LPS position of every voxel in the order of the voxels' values (which differ), from the definition of a grid."""
    index_zyx = np.indices(volume.array.shape).reshape(3, -1)
    points = np.array(volume.origin_mm)[:, None] + volume.direction @ (
        index_zyx[::-1] * np.array(volume.spacing_mm)[:, None]
    )
    return points.T[np.argsort(volume.array.ravel())]


# --- orientation ------------------------------------------------------------------------------------------------------


def test_there_are_48_axis_orders_and_flips():
    assert len({direction.tobytes() for direction in AXIS_ALIGNED}) == 48


@pytest.mark.parametrize("tilt", [(0, 0, 0), (0.3, 0, 0), (0.1, -0.2, 0.25)], ids=["aligned", "tilted", "oblique"])
@pytest.mark.parametrize(
    "direction", AXIS_ALIGNED, ids=lambda d: "".join(f"{int(x):+d}" for x in d.sum(0) * d.argmax(0))
)
def test_reorientation_is_exact_and_moves_no_voxel(make_volume, direction, tilt):
    stored = rotation(*tilt) @ direction
    volume = make_volume(direction=stored)
    sagittal, orientation = to_sagittal(volume)

    assert np.array_equal(orientation.restore(sagittal.array), volume.array)
    assert sagittal.array.dtype == volume.array.dtype
    np.testing.assert_allclose(places(sagittal), places(volume), atol=1e-9)
    # Each array axis (index axis 2 - t) points where it should, but for the tilt.
    np.testing.assert_allclose(sagittal.direction[:, ::-1], rotation(*tilt) @ SAGITTAL_AXES.T, atol=1e-12)


@pytest.mark.parametrize("direction", AXIS_ALIGNED)
def test_slices_run_left_to_right_rows_down_and_columns_back(make_volume, direction):
    # Markers 10 mm from the middle, at LPS points: +x is the patient's left, +y posterior, +z superior.
    volume = make_volume((11, 21, 31), values=np.zeros((11, 21, 31)), direction=direction, spacing_mm=(1.0, 1.5, 2.5))
    middle = volume.physical_point([15, 10, 5])
    points = {1: (10, 0, 0), 2: (-10, 0, 0), 3: (0, 0, 10), 4: (0, 0, -10), 5: (0, -10, 0), 6: (0, 10, 0)}
    for value, offset in points.items():
        x, y, z = np.round(np.linalg.inv(direction) @ offset / volume.spacing_mm).astype(int) + (15, 10, 5)
        volume.array[z, y, x] = value
    sagittal, _ = to_sagittal(volume)
    left, right, top, bottom, front, back = (np.argwhere(sagittal.array == value)[0] for value in range(1, 7))
    assert left[0] < right[0] and tuple(left[1:]) == tuple(right[1:])
    assert top[1] < bottom[1] and (top[0], top[2]) == (bottom[0], bottom[2])
    assert front[2] < back[2] and tuple(front[:2]) == tuple(back[:2])
    assert np.allclose(sagittal.physical_point((left + right)[::-1] / 2), middle)


def test_an_axial_scan_by_hand(make_volume):
    # Identity direction: x to the left, y to posterior, z to superior. The most superior, anterior, right voxel is
    # array[-1, 0, 0]; among sagittal slices it lies in the last one, in its top left corner.
    volume = make_volume((2, 3, 4), direction=np.eye(3), spacing_mm=(1, 2, 5), origin_mm=(10, 20, 30))
    sagittal, orientation = to_sagittal(volume)
    assert sagittal.array.shape == (4, 2, 3)
    assert sagittal.array[-1, 0, 0] == volume.array[-1, 0, 0]
    assert sagittal.spacing_mm == (2, 5, 1)  # column, row, slice
    assert sagittal.origin_mm == (13, 20, 35)  # the most left, superior, anterior voxel
    assert orientation == Orientation(axes=(2, 0, 1), flips=(True, True, False))


@given(st.tuples(*[st.floats(-np.pi, np.pi)] * 3), st.booleans())
def test_any_rotation_or_reflection_moves_no_voxel(make_volume, angles, mirrored):
    direction = rotation(*angles) * ([1, 1, -1] if mirrored else [1, 1, 1])
    volume = make_volume(direction=direction)
    sagittal, orientation = to_sagittal(volume)
    assert np.array_equal(orientation.restore(sagittal.array), volume.array)
    np.testing.assert_allclose(places(sagittal), places(volume), atol=1e-9)
    # No other assignment of axes lies closer to the anatomical ones.
    cosines = SAGITTAL_AXES @ sagittal.direction[:, ::-1]
    best = max(sum(abs(cosines[t, a]) for t, a in enumerate(p)) for p in itertools.permutations(range(3)))
    assert np.trace(cosines) == pytest.approx(best)


def test_channels_follow_their_voxels_back(make_volume):
    volume = make_volume(direction=AXIS_ALIGNED[17])
    sagittal, orientation = to_sagittal(volume)
    two = np.stack([sagittal.array, -sagittal.array], axis=-1)
    assert np.array_equal(orientation.restore(two), np.stack([volume.array, -volume.array], axis=-1))
    assert np.array_equal(orientation.apply(orientation.restore(two)), two)


@pytest.mark.parametrize("direction", AXIS_ALIGNED[::7])
def test_an_orientation_survives_json(direction):
    orientation = sagittal_orientation(direction)
    assert Orientation.from_dict(orientation.to_dict()) == orientation


def test_a_label_map_stays_one(make_volume):
    assert type(to_sagittal(make_volume(kind=LabelMap))[0]) is LabelMap


# --- the types --------------------------------------------------------------------------------------------------------


def test_physical_points_by_hand(make_volume):
    # Index x runs posterior (0.5 mm), y superior (2 mm), z to the left (4 mm).
    direction = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    volume = make_volume((2, 3, 4), direction=direction, spacing_mm=(0.5, 2, 4), origin_mm=(100, 200, 300))
    assert volume.size == (4, 3, 2)
    assert volume.physical_point((3, 2, 1)).tolist() == [104, 201.5, 304]
    assert volume.index_point((104, 201.5, 304)).tolist() == [3, 2, 1]


@given(st.tuples(*[st.floats(-50, 50)] * 3))
def test_points_and_indices_are_each_others_inverse(make_volume, index):
    volume = make_volume()
    np.testing.assert_allclose(volume.index_point(volume.physical_point(index)), index, atol=1e-9)


def test_volumes_refuse_other_shapes_and_types(make_volume):
    with pytest.raises(ValueError, match=r"3 axes \(z, y, x\), not shape \(2, 3\)"):
        make_volume((2, 3))
    with pytest.raises(ValueError, match="a label map holds integers, not float32"):
        make_volume(kind=LabelMap, dtype=np.float32)
    with pytest.raises(ValueError, match=r"arrays of shape \(4, 6, 5\), not \(4, 5, 6\)"):
        make_volume().with_array(np.zeros((4, 5, 6)))


def test_with_array_keeps_grid_and_kind(make_volume):
    mask = make_volume(kind=LabelMap)
    changed = mask.with_array(mask.array + 1)
    assert type(changed) is LabelMap and np.array_equal(changed.array, mask.array + 1)
    assert geometry_differences(mask, changed, {"spacing_mm": 0, "origin_mm": 0, "direction": 0}) == []


@pytest.mark.parametrize(
    "name, expected",
    [
        ("1_t2.mha", ("1_t2", ".mha")),
        ("1_t2.nii.gz", ("1_t2", ".nii.gz")),
        ("a.b_t1.NRRD", ("a.b_t1", ".NRRD")),
        ("1_t2.gz", ("1_t2.gz", "")),
        (".mha", (".mha", "")),
    ],
)
def test_split_volume_name(name, expected):
    assert split_volume_name(name) == expected


TOLERANCES = {"spacing_mm": 0.001, "origin_mm": 0.01, "direction": 0.0001}


@pytest.mark.parametrize("name, tolerance", TOLERANCES.items())
def test_grids_agree_up_to_the_tolerance(make_volume, name, tolerance):
    volume = make_volume()
    entry = np.zeros_like(getattr(volume, name))
    entry.ravel()[2:3] = 1  # one entry alone, neither the first nor all
    near = make_volume(**{name: getattr(volume, name) + 0.9 * tolerance * entry})
    assert geometry_differences(volume, near, TOLERANCES) == []
    far = make_volume(**{name: getattr(volume, name) + 1.1 * tolerance * entry})
    for pair in ((volume, far), (far, volume)):
        (difference,) = geometry_differences(*pair, TOLERANCES)
        assert re.fullmatch(rf"{name} \(\S+ \S+ .*\) against \(\S+ \S+ .*\)", difference)


def test_all_differences_are_told_but_size_rules_the_rest_out(make_volume):
    volume = make_volume()
    other = make_volume(spacing_mm=(1, 1, 1), origin_mm=(-12.5, 30.25, np.nan), direction=np.eye(3))
    assert [text.split()[0] for text in geometry_differences(volume, other, TOLERANCES)] == list(TOLERANCES)
    assert geometry_differences(volume, make_volume((6, 4, 5)), TOLERANCES) == ["size (5, 6, 4) against (5, 4, 6)"]


# --- files ------------------------------------------------------------------------------------------------------------

# Relative; NIfTI keeps float32 and a quaternion.
PRECISION = {".nii": 2e-6, ".nii.gz": 2e-6}


@pytest.mark.parametrize("mirrored", [False, True], ids=["right-handed", "left-handed"])
@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_files_keep_voxels_and_geometry(make_volume, tmp_path, suffix, mirrored):
    direction = rotation(0.3, -0.2, 2.1) * ([1, -1, 1] if mirrored else 1)
    volume = make_volume(direction=direction)
    path = tmp_path / f"new folder/1_t2{suffix}"
    write_volume(volume, path)
    again = read_volume(path)
    assert np.array_equal(again.array, volume.array) and again.array.dtype == volume.array.dtype
    tolerance = PRECISION.get(suffix, 1e-14)
    np.testing.assert_allclose(again.spacing_mm, volume.spacing_mm, rtol=tolerance)
    np.testing.assert_allclose(again.origin_mm, volume.origin_mm, rtol=tolerance)
    np.testing.assert_allclose(again.direction, direction, atol=tolerance)
    expected = {path.name, "1_t2.zraw"} if suffix == ".mhd" else {path.name}
    assert {file.name for file in path.parent.iterdir()} == expected


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_files_keep_dtypes(make_volume, tmp_path, dtype):
    volume = make_volume(dtype=dtype)
    write_volume(volume, tmp_path / "a.mha")
    again = read_volume(tmp_path / "a.mha").array
    assert again.dtype == (np.uint8 if dtype is bool else dtype)
    assert np.array_equal(again, volume.array)


def test_float_files_of_whole_numbers_are_label_maps(make_volume, tmp_path):
    path = tmp_path / "mask.nii.gz"
    write_volume(make_volume(dtype=np.float32), path)
    mask = read_volume(path, LabelMap)
    assert type(mask) is LabelMap and mask.array.dtype == np.int32
    assert np.array_equal(mask.array, make_volume().array)
    assert read_volume(path).array.dtype == np.float32


@pytest.mark.parametrize("value", [100.5, np.nan, np.inf, 1e12])
def test_labels_that_are_not_whole_are_an_error(make_volume, tmp_path, value):
    volume = make_volume(dtype=np.float32)
    volume.array[1, 2, 3] = value
    write_volume(volume, tmp_path / "mask.nrrd")
    with pytest.raises(VolumeError, match=r"mask.nrrd: labels that aren't whole numbers; expected integers"):
        read_volume(tmp_path / "mask.nrrd", LabelMap)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(make_volume, tmp_path, monkeypatch):
    path = tmp_path / "1_t2.mhd"
    write_volume(make_volume(), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def disk_full(image, name, **options):
        with open(name, "wb") as file:
            file.write(b"half of ")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(sitk, "WriteImage", disk_full)
    with pytest.raises(RuntimeError, match="No space left"):
        write_volume(make_volume((3, 3, 3)), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_writing_needs_a_known_ending(make_volume, tmp_path):
    with pytest.raises(ValueError, match=r"1_t2.png: cannot tell a volume format .* expected .mha .mhd"):
        write_volume(make_volume(), tmp_path / "1_t2.png")
    assert list(tmp_path.iterdir()) == []


def test_a_volume_error_crosses_processes():
    error = VolumeError("1_t2.mha", "3 bytes", "5", "Copy it again.")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "1_t2.mha: 3 bytes; expected 5. Copy it again."
    assert (again.path, again.found, again.expected, again.remedy) == ("1_t2.mha", "3 bytes", "5", "Copy it again.")


# --- bad files --------------------------------------------------------------------------------------------------------


def store(array, path, compressed=True):
    """Write an array of any dimension as it is, through ITK alone."""
    vector = array.ndim > 2 and array.shape[-1] == 3
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path), useCompression=compressed)
    return path


@pytest.fixture
def grey():
    return np.random.default_rng(0).integers(0, 3000, (5, 37, 49)).astype(np.int16)


@pytest.mark.parametrize("keep", [-20, 0.9, 0.5, 0.1, 30])
@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_truncated_files_are_errors(tmp_path, grey, capfd, suffix, compressed, keep):
    path = store(grey, tmp_path / f"1_t2{suffix}", compressed)
    read_volume(path)  # leaves the right voxels in freed memory, where ITK may find them again
    target = volume_files(path)[-1]
    content = target.read_bytes()
    target.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(VolumeError, match=r"1_t2\S+: .+; expected .+\. [A-Z].*copy|Copy"):
        read_volume(path)
    assert capfd.readouterr() == ("", "")  # ITK's own complaints would only confuse


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nii.gz", ".nrrd"])
def test_compressed_files_that_lack_a_byte_of_their_checksum_are_errors(tmp_path, grey, capfd, suffix):
    path = store(grey, tmp_path / f"1_t2{suffix}")
    target = volume_files(path)[-1]
    target.write_bytes(target.read_bytes()[:-1])
    with pytest.raises(VolumeError, match=r"1_t2\S+: compressed data that end early; expected all of them"):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".mha", ".nii.gz", ".nrrd"])
def test_damaged_compressed_files_are_errors(tmp_path, grey, capfd, suffix):
    path = store(grey, tmp_path / f"1_t2{suffix}")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=r"1_t2\S+: (damaged compressed data|it cannot be read) \(.+\); expected"):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


def test_a_complete_gzip_around_too_few_voxels_is_an_error(tmp_path, grey):
    path = store(grey, tmp_path / "1_t2.nii.gz")
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-2]))
    # 352 bytes of header, 5 x 37 x 49 voxels of 2 bytes
    with pytest.raises(VolumeError, match="18480 bytes of voxels; expected 18482. It is truncated"):
        read_volume(path)


def test_gzip_files_may_be_joined_or_not_be_packed_at_all(tmp_path, grey):
    path = store(grey, tmp_path / "1_t2.nii.gz")
    plain = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(plain[:9000]) + gzip.compress(plain[9000:]))
    assert np.array_equal(read_volume(path).array, grey)
    path.write_bytes(plain)
    assert np.array_equal(read_volume(path).array, grey)


@pytest.mark.parametrize("content", [b"", b"no volume at all\n" * 60], ids=["empty", "garbage"])
@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_files_without_a_volume_are_errors(tmp_path, capfd, suffix, content):
    path = tmp_path / f"1_t2{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        VolumeError, match=r"1_t2\S+: (no (MetaImage|NIfTI-1|NRRD) header|it cannot be read \(.+\)); expected"
    ):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_an_absent_file_is_an_error(tmp_path, suffix):
    with pytest.raises(VolumeError, match=r"1_t2\S+: no such file; expected an existing file"):
        read_volume(tmp_path / f"1_t2{suffix}")


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
@pytest.mark.parametrize(
    "shape, message",
    [
        ((37, 49), "2 dimensions; expected 3"),
        ((2, 5, 7, 9), "4 dimensions; expected 3"),
        ((5, 7, 9, 3), "3 values per voxel; expected 1"),
        ((7, 9, 3), "2 dimensions; expected 3"),
    ],
    ids=["2-D", "4-D", "colour", "2-D colour"],
)
def test_other_dimensions_and_colours_are_errors(tmp_path, suffix, shape, message):
    path = store(np.ones(shape, np.uint8), tmp_path / f"1_t2{suffix}")
    with pytest.raises(VolumeError, match=rf"1_t2\S+: {message}\. Export"):
        read_volume(path)


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_one_slice_is_a_volume(tmp_path, grey, suffix):
    assert np.array_equal(read_volume(store(grey[:1], tmp_path / f"1_t2{suffix}")).array, grey[:1])


def test_reading_needs_a_known_ending(tmp_path):
    with pytest.raises(VolumeError, match=r"1_t2.dcm: its name ends in '.dcm'; expected .mha .mhd .nii .nii.gz .nrrd"):
        read_volume(tmp_path / "1_t2.dcm")


def test_a_header_without_its_data_file_is_an_error(tmp_path, grey):
    path = store(grey, tmp_path / "1_t2.mhd", compressed=False)
    (tmp_path / "1_t2.raw").unlink()
    with pytest.raises(VolumeError, match=r"1_t2.mhd: no file 1_t2.raw; expected an existing file"):
        read_volume(path)


@pytest.mark.parametrize("elsewhere", ["../1_t2.raw", "sub/1_t2.raw", "/etc/passwd", "..", ""])
def test_a_header_that_points_outside_its_folder_is_an_error(tmp_path, grey, elsewhere):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    path = store(grey, folder / "1_t2.mhd", compressed=False)
    for other in (tmp_path, folder / "sub"):
        shutil.copy(folder / "1_t2.raw", other)
    path.write_text(path.read_text().replace("1_t2.raw", elsewhere))
    with pytest.raises(
        VolumeError, match=rf"outside its folder \('{re.escape(elsewhere)}'\); expected .* beside the header"
    ):
        read_volume(path)


@pytest.mark.parametrize("several", ["LIST", "1_t2.%03d 1 5 1"])
def test_a_header_that_names_several_files_is_an_error(tmp_path, grey, several):
    path = store(grey, tmp_path / "1_t2.mhd", compressed=False)
    path.write_text(path.read_text().replace("1_t2.raw", several))
    with pytest.raises(VolumeError, match="its voxels lie in several files .* expected one data file"):
        read_volume(path)


def test_an_nrrd_header_that_points_elsewhere_is_an_error(tmp_path, grey):
    path = store(grey, tmp_path / "1_t2.nrrd", compressed=False)
    header, _, voxels = path.read_bytes().partition(b"\n\n")
    (tmp_path / "voxels.raw").write_bytes(voxels)
    path.write_bytes(header + b"\ndata file: ../voxels.raw\n\n")
    with pytest.raises(VolumeError, match=r"its voxels lie in another file \('../voxels.raw'\); expected one file"):
        read_volume(path)


def test_headers_and_data_may_be_links_into_a_store(tmp_path, grey, monkeypatch):
    (tmp_path / "store").mkdir()
    path = store(grey, tmp_path / "1_t2.mhd", compressed=False)
    for number, file in enumerate(volume_files(path)):
        file.rename(tmp_path / f"store/{number}")
        file.symlink_to(tmp_path / f"store/{number}")
    assert np.array_equal(read_volume(path).array, grey)
    monkeypatch.chdir(tmp_path)
    assert [os.fspath(file) for file in volume_files("1_t2.mhd")] == ["1_t2.mhd", "1_t2.raw"]


@pytest.mark.parametrize(
    "line, replacement",
    [
        (r"DimSize = .*", "DimSize = a b c"),
        (r"DimSize = .*", "DimSize = -49 37 5"),
        (r"DimSize = .*\n", ""),
        (r"NDims = .*", "NDims = x"),
        (r"ElementType = .*", "ElementType = MET_STRING"),
        (r"BinaryData = .*", "BinaryData = False"),
        (r"CompressedDataSize = .*\n", ""),
    ],
)
def test_a_spoilt_header_is_an_error(tmp_path, grey, capfd, line, replacement):
    path = store(grey, tmp_path / "1_t2.mhd")
    path.write_text(re.sub(line, replacement, path.read_text(), count=1))
    with pytest.raises(
        VolumeError, match=r"1_t2.mhd: a header with NDims = .*; expected binary voxels of a known type"
    ):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 77, -1])
def test_nifti_voxels_that_are_not_finite_are_found_before_itk_makes_them_0(tmp_path, suffix, dtype, value, place):
    array = np.arange(3 * 40 * 50, dtype=dtype).reshape(3, 40, 50)
    volume = Volume(array, (0.5, 0.7, 4.0), (0, 0, 0), np.eye(3))
    path = tmp_path / f"1_t2{suffix}"
    write_volume(volume, path)
    np.testing.assert_array_equal(read_volume(path).array, array)
    array.flat[place] = value
    write_volume(volume, path)
    with pytest.raises(VolumeError, match=r"voxels that aren't finite; expected finite numbers"):
        read_volume(path)


# --- the geometry that a header states --------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path):
    """Factory of an uncompressed file of spacing 0.5, 0.75, 4 mm along x, y, z and axes that run along LPS."""

    def make(suffix):
        volume = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), (0.5, 0.75, 4.0), (1, 2, 3), np.eye(3))
        path = tmp_path / f"1_t2{suffix}"
        write_volume(volume, path)
        image = sitk.ReadImage(str(path))
        sitk.WriteImage(image, str(path), useCompression=False)
        return path

    return make


def replace_text(path, old, new):
    content = path.read_bytes()
    assert content.count(old.encode()) == 1
    path.write_bytes(content.replace(old.encode(), new.encode()))


def pack(path, *fields):
    """Overwrite fields of a NIfTI header: (offset, struct's format, values)."""
    content = bytearray(path.read_bytes())
    for offset, form, *values in fields:
        struct.pack_into("<" + form, content, offset, *values)
    path.write_bytes(content)


# What ITK makes of them: an error for some, for others 1 mm, or a turned axis.
NO_LENGTHS = ["0", "-0.75", "nan", "inf"]


@pytest.mark.parametrize("value", [*NO_LENGTHS, "wide"])
@pytest.mark.parametrize("suffix", [".mha", ".mhd"])
@pytest.mark.parametrize("key", ["ElementSpacing", "ElementSize"])
def test_a_metaimage_whose_spacing_is_none_is_an_error(plain, capfd, suffix, value, key):
    path = plain(suffix)
    replace_text(path, "ElementSpacing = 0.5 0.75 4", f"{key} = 0.5 {value} 4")
    shown = "nan" if value == "wide" else value
    with pytest.raises(
        VolumeError, match=rf"1_t2{suffix}: spacing 0.5 {shown} 4 mm; expected positive lengths. Correct"
    ):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", NO_LENGTHS)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_nifti_file_whose_spacing_is_none_is_an_error(plain, capfd, value, axis, codes, packed):
    path = plain(".nii")
    pack(path, (80 + 4 * axis, "f", float(value)), (252, "2h", *codes))
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    shown = ["0.5", "0.75", "4"]
    shown[axis] = value
    with pytest.raises(VolumeError, match=rf"1_t2.nii: spacing {' '.join(shown)} mm; expected positive lengths"):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "line, found",
    [
        ("space directions: (0.5,0,0) (0,0,0) (0,0,4)", "spacing 0.5 0 4 mm"),
        ("space directions: (0.5,0,0) (0,nan,nan) (0,0,4)", "spacing 0.5 nan 4 mm"),
        ("space directions: (0.5,0,0) none (0,0,4)", "spacing 0.5 nan 4 mm"),
        ("spacings: 0.5 0 4", "spacing 0.5 0 4 mm"),
        ("spacings: 0.5 -0.75 4", "spacing 0.5 -0.75 4 mm"),
        ("spacings: 0.5 nan 4", "spacing 0.5 nan 4 mm"),
    ],
)
def test_an_nrrd_file_whose_spacing_is_none_is_an_error(plain, capfd, line, found):
    path = plain(".nrrd")
    replace_text(path, "space directions: (0.5,0,0) (0,0.75,0) (0,0,4)", line)
    with pytest.raises(VolumeError, match=rf"1_t2.nrrd: {found}; expected positive lengths"):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "suffix, old, new",
    [
        (".mha", "ElementSpacing = 0.5 0.75 4\n", ""),
        (".mhd", "ElementSpacing = 0.5 0.75 4\n", ""),
        (".nrrd", "space directions: (0.5,0,0) (0,0.75,0) (0,0,4)\n", ""),
    ],
)
def test_a_spacing_that_is_missing_is_an_error(plain, suffix, old, new):
    path = plain(suffix)
    replace_text(path, old, new)
    with pytest.raises(VolumeError, match=rf"1_t2{suffix}: no spacing; expected positive lengths"):
        read_volume(path)


@pytest.mark.parametrize(
    "suffix, old, new, found",
    [
        (".mha", "TransformMatrix = 1 0 0 0 1 0 0 0 1\n", "", "no TransformMatrix"),
        (".nrrd", "space directions: (0.5,0,0) (0,0.75,0) (0,0,4)", "spacings: 0.5 0.75 4", "no space directions"),
        (".nrrd", "space: left-posterior-superior", "space dimension: 3", "directions in a space without a name"),
        (".nrrd", "space: left-posterior-superior", "space: scanner-xyz", "directions in the space 'scanner-xyz'"),
    ],
)
def test_axes_whose_directions_nobody_states_are_an_error(plain, suffix, old, new, found):
    path = plain(suffix)
    replace_text(path, old, new)
    with pytest.raises(VolumeError, match=rf"1_t2{suffix}: {found}; expected a geometry that tells how"):
        read_volume(path)


@pytest.mark.parametrize(
    "fields, found",
    [
        ([(252, "2h", 0, 0)], r"no orientation \(qform_code 0, sform_code 0\)"),
        ([(252, "2h", -1, 0)], r"no orientation \(qform_code -1, sform_code 0\)"),
        ([(254, "h", 0), (256, "f", math.nan)], "an orientation that isn't finite"),
        ([(252, "h", 0), (280, "f", math.inf)], "an orientation that isn't finite"),
        ([(252, "h", 0), (84, "f", 9.0)], "a spacing of 0.5 9 4 mm beside an sform of 0.5 0.75 4 mm"),
        ([(252, "h", 0), (280, "12f", *[0] * 12)], "a spacing of 0.5 0.75 4 mm beside an sform of 0 0 0 mm"),
        (
            [(252, "2h", 1, 1), (280, "12f", *[-1, 0, 0, 9, 0, -1.5, 0, 9, 0, 0, 8, 9])],  # only this was rewritten
            "a spacing of 0.5 0.75 4 mm beside an sform of 1 1.5 8 mm",
        ),
    ],
)
def test_a_nifti_file_without_a_sound_orientation_is_an_error(plain, capfd, fields, found):
    path = plain(".nii")
    pack(path, *fields)
    with pytest.raises(VolumeError, match=rf"1_t2.nii: {found}; expected a geometry that tells how"):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


def test_a_machine_without_memory_says_nothing_of_the_file(plain, monkeypatch):
    class Full(sitk.ImageFileReader):
        def Execute(self):
            raise RuntimeError("Exception thrown in SimpleITK:\nitk::ERROR: Failed to allocate memory for image.")

    path = plain(".nii")
    monkeypatch.setattr(sitk, "ImageFileReader", Full)
    with pytest.raises(MemoryError, match=r"1_t2.nii: .*Failed to allocate memory"):
        read_volume(path)


@pytest.mark.parametrize(
    "fields",
    [
        [(252, "h", 0)],
        [(254, "h", 0), (280, "12f", *[math.nan] * 12)],
        [(252, "h", 0), (256, "6f", *[math.nan] * 6)],
        [(254, "h", 4), (280, "12f", *[-0.6, 0.3, 0, 0, 0, -0.8, 0, 0, 0, 0, 5, 0])],  # affine, to an atlas
    ],
    ids=["sform", "qform", "sform beside rubbish", "atlas"],
)
def test_one_sound_orientation_is_enough(plain, fields):
    path = plain(".nii")
    pack(path, *fields)
    volume = read_volume(path)
    assert volume.spacing_mm == (0.5, 0.75, 4)
    np.testing.assert_allclose(volume.direction, np.eye(3), atol=1e-6)


@pytest.mark.parametrize("space", ["right-anterior-superior", "RAS", "LAS", "lps", "Left-Posterior-Superior"])
def test_an_nrrd_file_may_use_any_space_of_the_patient(plain, space):
    path = plain(".nrrd")
    replace_text(path, "space: left-posterior-superior", f"space: {space}")
    signs = [1 if letter in "LPlp" else -1 for letter in (space[0], "P" if "ost" in space or space[1] in "Pp" else "A")]
    assert np.array_equal(read_volume(path).direction, np.diag([*signs, 1]))


def test_a_turned_axis_of_an_nrrd_file_is_no_negative_spacing(plain):
    path = plain(".nrrd")
    replace_text(path, "(0,0.75,0)", "(0,-0.75,0)")
    volume = read_volume(path)
    assert volume.spacing_mm == (0.5, 0.75, 4) and np.array_equal(volume.direction, np.diag([1, -1, 1]))


def test_a_nifti_file_of_one_time_point_is_a_volume_and_of_two_is_not(plain):
    path = plain(".nii")
    expected = read_volume(path).array
    pack(path, (40, "8h", 4, 5, 4, 3, 1, 1, 1, 1))
    assert np.array_equal(read_volume(path).array, expected)
    pack(path, (40, "8h", 4, 5, 4, 1, 3, 1, 1, 1))
    with pytest.raises(VolumeError, match="1_t2.nii: 4 dimensions; expected 3. Export the series as one 3-D volume"):
        read_volume(path)


def test_a_volume_that_would_not_fit_in_memory_is_an_error(plain, monkeypatch):
    path = plain(".mha")
    monkeypatch.setattr(imaging, "_MOST_VOXELS", 60)
    read_volume(path)
    monkeypatch.setattr(imaging, "_MOST_VOXELS", 59)
    with pytest.raises(VolumeError, match="1_t2.mha: 5 x 4 x 3 voxels; expected at most 59, what fits in memory. Crop"):
        read_volume(path)


# --- what every image must fulfil -------------------------------------------------------------------------------------


def test_an_image_is_checked_whatever_it_came_from(make_volume):
    check_image("1_t2", make_volume())
    for mirrored in AXIS_ALIGNED[::5]:
        check_image("1_t2", make_volume(direction=np.round(rotation(0.3, -0.2, 0.5), 6) @ mirrored))


@pytest.mark.parametrize(
    "what, message",
    [
        ({"spacing_mm": (0.5, 0, 4)}, "spacing 0.5 0 4 mm; expected positive lengths"),
        ({"spacing_mm": (0.5, -0.75, 4)}, "spacing 0.5 -0.75 4 mm; expected positive lengths"),
        ({"spacing_mm": (0.5, 0.75, np.nan)}, "spacing 0.5 0.75 nan mm; expected positive lengths"),
        ({"spacing_mm": (np.inf, 0.75, 4)}, "spacing inf 0.75 4 mm; expected positive lengths"),
        (
            {"direction": [[1, 0, 0], [0, 1, 0.002], [0, 0, 1]]},
            r"a sheared or scaled grid \(direction 1 0 0 0 1 0.002 0 0 1\); expected axes at right angles",
        ),
        (
            {"direction": np.diag([1, 1.002, 1])},
            r"a sheared or scaled grid \(.*1.002.*\); expected axes at right",
        ),
        ({"direction": np.diag([1, 0, 1])}, "a sheared or scaled grid"),
        ({"direction": np.full((3, 3), np.nan)}, "a sheared or scaled grid"),
        ({"values": np.full((4, 6, 5), 7)}, "the constant value 7; expected an image with contrast"),
        ({"values": [[[1.0, np.nan, -np.inf]]], "dtype": np.float32}, "2 voxels that aren't finite; expected finite"),
    ],
)
def test_an_image_that_nobody_can_use_is_an_error(make_volume, what, message):
    with pytest.raises(VolumeError, match=f"^1_t2: {message}"):
        check_image("1_t2", make_volume(**what))


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_sheared_file_is_known_by_the_check(plain, suffix):
    path = plain(suffix)
    if suffix == ".mha":
        replace_text(path, "TransformMatrix = 1 0 0 0 1 0 0 0 1", "TransformMatrix = 1 0 0 0 1 0 0 0.5 1")
    else:
        replace_text(path, "(0,0.75,0)", "(0.2,0.75,0)")
    with pytest.raises(VolumeError, match="1_t2: a sheared or scaled grid"):
        check_image("1_t2", read_volume(path))


def test_channels_are_written_on_a_volumes_grid(make_volume, tmp_path):
    import SimpleITK as sitk

    grid = make_volume((3, 5, 4))
    values = np.random.default_rng(0).random((3, 5, 4, 2), np.float32)
    write_channels(values, grid, tmp_path / "p.mha")
    image = sitk.ReadImage(str(tmp_path / "p.mha"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), values)
    assert image.GetSpacing() == grid.spacing_mm and image.GetOrigin() == grid.origin_mm
    assert image.GetDirection() == tuple(grid.direction.ravel())
    with pytest.raises(ValueError, match=r"holds arrays of shape \(3, 5, 4\) and channels, not \(5, 3, 4, 2\)"):
        write_channels(values.transpose(1, 0, 2, 3), grid, tmp_path / "q.mha")


HEADER = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
    "ElementSpacing = 1 1 1\nDimSize = 4 3 2\nElementType = MET_UCHAR\n"
)


@pytest.mark.parametrize(
    ("suffix", "lines", "found"),
    [
        # ITK follows each of these to the other file.
        (".mha", "ElementDataFile = ../other.raw\n", r"its voxels lie in another file \('../other.raw'\)"),
        (".mha", "ElementDataFile : ../other.raw\nElementDataFile = LOCAL\n", "no MetaImage header"),
        (".mhd", "ElementDataFile : ../other.raw\nElementDataFile = LOCAL\n", "no MetaImage header"),
        (".mha", "Comment = a\rElementDataFile = LOCAL\nElementDataFile = ../other.raw\n", "no MetaImage header"),
        (".mhd", "ElementDataFile = LIST3\n../other.raw\n../other.raw\n", "its voxels lie in several files"),
        (".mhd", "ElementDataFile = LoCaL\n", "no file LoCaL"),
        (".nrrd", "#\rdata file: ../other.raw\n\n", "no NRRD header"),
    ],
)
def test_no_trick_in_a_header_leads_to_another_file(tmp_path, suffix, lines, found):
    header = HEADER if suffix != ".nrrd" else (
        "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 4 3 2\nspace: left-posterior-superior\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\n"
    )  # fmt: skip
    (tmp_path / "other.raw").write_bytes(bytes(range(24)))
    path = tmp_path / f"in/1_t2{suffix}"
    path.parent.mkdir()
    path.write_bytes((header + lines).encode() + b"\7" * 24)
    with pytest.raises(VolumeError, match=rf"1_t2{suffix}: {found}.*; expected"):
        read_volume(path)


@pytest.mark.parametrize("local", ["LOCAL", "Local", "local"])
def test_voxels_in_the_file_itself_are_read(tmp_path, local):
    path = tmp_path / "1_t2.mha"
    path.write_bytes((HEADER + f"Comment = a: b = c\nElementDataFile = {local}\n").encode() + bytes(range(24)))
    assert read_volume(path).array.ravel().tolist() == list(range(24))


@pytest.mark.parametrize("name", ["1_t2.mha", "1.t2.mhd", "1_t2.nii.gz", "1_t2.nrrd"])
def test_all_files_of_a_volume_are_known(tmp_path, make_volume, name):
    write_volume(make_volume(), tmp_path / name)
    assert sorted(tmp_path.iterdir()) == sorted(written_files(tmp_path / name))


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_names_in_capitals_are_read(tmp_path, make_volume, suffix):
    write_volume(make_volume(), tmp_path / f"a{suffix}")
    (tmp_path / f"a{suffix}").rename(tmp_path / f"B{suffix.upper()}")
    assert read_volume(tmp_path / f"B{suffix.upper()}").array.shape == (4, 6, 5)
