"""A DICOM series is read as the volume it is, or refused by name and reason; its header's identity stays in it."""

from __future__ import annotations

import logging
import re
import shutil
import warnings

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.sequence import Sequence

from lumbarflow.dicom import DicomSeries, find_series, read_series
from lumbarflow.imaging import Volume, VolumeError, geometry_differences

SYNTAXES = ["explicit", "implicit", "deflated", "rle", "jpeg", "jpeg2000", "jpegls"]
EXACT = {"spacing_mm": 1e-9, "origin_mm": 1e-9, "direction": 1e-12}
# Of the volume below: cross(row, column), and the first slice's place along it.
NORMAL = np.array([2.0, -1.0, 2.0]) / 3
ALONG_MM = (-12.5 * 2 - 30.25 + 7.125 * 2) / 3


@pytest.fixture
def volume(make_volume) -> Volume:
    return make_volume((5, 6, 4))


def the_series(files) -> DicomSeries:
    found, others = find_series(files)
    assert len(found) == 1 and not others
    return found[0]


def read(files) -> Volume:
    return read_series(the_series(files)).volume


def change(place=None, **tags):
    """An `edit` that sets tags of slice `place` (of all, if None); `None` deletes one."""

    def edit(dataset, k):
        if place in (None, k):
            for keyword, value in tags.items():
                if value is None:
                    del dataset[keyword]
                else:
                    setattr(dataset, keyword, value)

    return edit


def frames(change_frame):
    """An `edit` of an enhanced file: `change_frame(groups, index)` for the functional groups of each frame."""

    def edit(dataset, _):
        for index, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            change_frame(groups, index)

    return edit


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("enhanced", [False, True], ids=["single-frame", "enhanced"])
def test_a_series_is_the_volume_it_was_made_from(make_dicom, volume, tmp_path, enhanced, shuffled):
    paths = make_dicom(tmp_path, volume, enhanced=enhanced, shuffled=shuffled)
    found = read_series(the_series(paths))
    assert np.array_equal(found.volume.array, volume.array) and found.volume.array.dtype == np.int16
    assert not geometry_differences(found.volume, volume, EXACT)
    assert found.modality == "MR"
    if enhanced:
        assert found.instances == tuple(paths)
        assert sorted(found.frames) == [1, 2, 3, 4, 5] and (found.frames == (1, 2, 3, 4, 5)) is not shuffled
        stored = pydicom.dcmread(paths[0]).pixel_array[np.array(found.frames) - 1]
    else:
        assert found.instances == tuple(paths) and found.frames == (1, 1, 1, 1, 1)
        stored = [pydicom.dcmread(path).pixel_array for path in found.instances]
    assert np.array_equal(stored, found.volume.array)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("enhanced", [False, True], ids=["single-frame", "enhanced"])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_lossless_transfer_syntax(make_dicom, make_volume, tmp_path, syntax, enhanced, dtype):
    volume = make_volume((2, 33, 36), dtype=dtype)
    volume.array[0, 0, :2] = np.iinfo(dtype).min, np.iinfo(dtype).max
    found = read(make_dicom(tmp_path, volume, enhanced=enhanced, transfer_syntax=syntax))
    assert np.array_equal(found.array, volume.array) and found.array.dtype == dtype


@pytest.mark.parametrize("syntax", ["explicit", "jpeg"])
@pytest.mark.parametrize("enhanced", [False, True], ids=["single-frame", "enhanced"])
def test_every_slice_has_its_own_rescale_slope(make_dicom, make_volume, tmp_path, enhanced, syntax):
    volume = make_volume((3, 32, 32), values=np.full((3, 32, 32), 7))
    rescale = [(1, 0), (0.5, 2), (2, -30)]
    found = read(make_dicom(tmp_path, volume, enhanced=enhanced, transfer_syntax=syntax, rescale=rescale))
    assert found.array.dtype == np.float32
    assert [np.unique(plane).tolist() for plane in found.array] == [[7], [5.5], [-16]]


def test_a_slope_of_one_keeps_the_integers(make_dicom, volume, tmp_path):
    assert read(make_dicom(tmp_path, volume, rescale=(1, 0))).array.dtype == np.int16


@pytest.mark.parametrize("mirrored", [False, True])
def test_simpleitk_reads_the_same(make_dicom, make_volume, tmp_path, mirrored):
    stored = make_volume((5, 6, 4))
    if mirrored:  # stored from the far end: left-handed
        stored = Volume(
            stored.array, stored.spacing_mm, stored.origin_mm, stored.direction * np.array([1.0, 1.0, -1.0])
        )
    found = read(make_dicom(tmp_path, stored, shuffled=True, rescale=(1.5, 4)))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    array = sitk.GetArrayFromImage(image)
    theirs = Volume(array, image.GetSpacing(), image.GetOrigin(), np.reshape(image.GetDirection(), (3, 3)))
    assert not geometry_differences(found, theirs, EXACT)
    assert np.array_equal(found.array, array)
    assert np.linalg.det(found.direction) == pytest.approx(1)


@settings(max_examples=12)
@given(st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: np.dot(q, q) > 0.1), st.booleans(), st.booleans())
def test_any_rotation_keeps_every_voxel_in_its_place(tmp_path_factory, make_dicom, make_volume, q, mirrored, enhanced):
    w, x, y, z = np.array(q) / np.linalg.norm(q)
    direction = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    ) * ([1, 1, -1] if mirrored else [1, 1, 1])
    volume = make_volume((3, 4, 5), direction=direction)
    found = read(make_dicom(tmp_path_factory.mktemp("any"), volume, enhanced=enhanced, shuffled=True))
    places = [
        {int(one.array[k, j, i]): one.physical_point([i, j, k]) for k, j, i in np.ndindex(one.array.shape)}
        for one in (found, volume)
    ]
    for value, place in places[1].items():
        np.testing.assert_allclose(places[0][value], place, atol=1e-6)


def test_the_slice_distance_is_measured_not_the_thickness(make_dicom, volume, tmp_path):
    paths = make_dicom(tmp_path, volume, edit=change(SliceThickness=3.0, SpacingBetweenSlices=77.0))
    assert read(paths).spacing_mm == pytest.approx((0.75, 1.3, 3.9), abs=1e-12)


def test_groups_may_stand_with_each_frame(make_dicom, volume, tmp_path):
    def edit(dataset, _):
        shared = dataset.SharedFunctionalGroupsSequence[0]
        for groups in dataset.PerFrameFunctionalGroupsSequence:
            groups.PlaneOrientationSequence = shared.PlaneOrientationSequence
            groups.PixelMeasuresSequence = shared.PixelMeasuresSequence
        del dataset.SharedFunctionalGroupsSequence

    assert not geometry_differences(read(make_dicom(tmp_path, volume, enhanced=True, edit=edit)), volume, EXACT)


def test_a_missing_modality_is_left_open(make_dicom, volume, tmp_path):
    assert read_series(the_series(make_dicom(tmp_path, volume, edit=change(Modality=None)))).modality == ""


# --- what scanners round ----------------------------------------------------------------------------------------------


def test_positions_of_two_decimals_are_even(make_dicom, make_volume, tmp_path):
    volume = make_volume((5, 6, 4), spacing_mm=(0.75, 1.3, 0.9))  # of which 1 % is less than what rounding moves

    def edit(dataset, k):  # the worst case: gaps are 0.0167 mm too long and too short by turns
        off = 0.005 * np.sign(NORMAL) * (-1) ** k
        dataset.ImagePositionPatient = list((volume.physical_point([0, 0, k]) + off).round(9))

    assert read(make_dicom(tmp_path, volume, edit=edit)).spacing_mm[2] == pytest.approx(0.9)


def test_cosines_of_four_decimals_are_made_orthonormal(make_dicom, volume, tmp_path):
    def edit(dataset, _):
        dataset.ImageOrientationPatient = [round(float(value), 4) for value in dataset.ImageOrientationPatient]

    found = read(make_dicom(tmp_path, volume, edit=edit))
    np.testing.assert_allclose(found.direction.T @ found.direction, np.eye(3), atol=1e-15)
    np.testing.assert_allclose(found.direction, volume.direction, atol=1e-4)


@pytest.mark.parametrize(("shift_mm", "even"), [(0.03, True), (0.05, False)])
def test_a_hundredth_of_the_gap_is_the_limit(make_dicom, volume, tmp_path, shift_mm, even):
    def edit(dataset, k):
        if k == 4:  # 3.9 mm from its neighbour
            dataset.ImagePositionPatient = list(
                volume.physical_point([0, 0, 4]).round(9) + (NORMAL * shift_mm).round(9)
            )

    paths = make_dicom(tmp_path, volume, edit=edit)
    if even:
        assert read(paths).spacing_mm[2] == pytest.approx(3.9 + 0.03 / 4)
    else:
        with pytest.raises(VolumeError, match=r"a gap of 3\.95 mm between IM0004\.dcm and IM0005\.dcm"):
            read(paths)


# --- what is refused --------------------------------------------------------------------------------------------------


def beside(dataset, k):
    """Each slice half a millimetre further along its rows than the one before."""
    row = np.array([2.0, 2.0, -1.0]) / 3
    dataset.ImagePositionPatient = list((np.array(dataset.ImagePositionPatient, float) + 0.5 * k * row).round(9))


def capture(dataset, k):
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.PixelData = dataset.PixelData * 3


def same_echo(dataset, k):
    dataset.ImagePositionPatient = [1, 2, 3]


def localizer(dataset, k):
    dataset.ImageOrientationPatient = [AXIAL, SAGITTAL, [1, 0, 0, 0, 0, -1]][k % 3]


AXIAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]
NOWHERE = change(ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
FAULTS = {
    "localizer": (
        {"edit": localizer},
        r"slices of 3 orientations in one series .*; expected parallel slices\. Split the folder",
    ),
    "one tilted slice": ({"edit": change(1, ImageOrientationPatient=AXIAL)}, "slices of 2 orientations"),
    "duplicate": (
        {"duplicate": 2},
        rf"IM0003\.dcm and IM0006\.dcm both at {ALONG_MM + 2 * 3.9:.2f} mm along the slice normal; "
        r"expected one slice at each place\. Put each echo, time point",
    ),
    "all at one place": ({"edit": same_echo}, r"both at .* \(one of 4 such pairs\)"),
    "missing": (
        {"missing": (1,)},
        r"a gap of 7\.80 mm between IM0001\.dcm and IM0002\.dcm; expected the usual 3\.90 mm between slices\. Restore",
    ),
    "missing at two places": ({"missing": (1, 2)}, r"a gap of 11\.70 mm between IM0001\.dcm and IM0002\.dcm; expected"),
    "sheared": ({"edit": beside}, r"sheared slices: IM0005\.dcm lies 2\.00 mm beside IM0001\.dcm"),
    "sizes": (
        {"edit": change(2, Rows=4, Columns=6)},
        r"IM0001\.dcm of 6 x 4 pixels, IM0003\.dcm of 4 x 6; expected one size",
    ),
    "spacings": (
        {"edit": change(2, PixelSpacing=[1.3, 0.8])},
        r"IM0001\.dcm with pixels of 1\.3 x 0\.75 mm, IM0003\.dcm with pixels of 1\.3 x 0\.8 mm",
    ),
    "colours": ({"edit": capture}, r"IM0001\.dcm: a colour image \(3 values per pixel, .* RGB\); expected grey"),
    "vectors": ({"edit": change(SamplesPerPixel=3)}, r"a colour image \(3 values per pixel, .* MONOCHROME2\)"),
    "palette": ({"edit": change(PhotometricInterpretation="PALETTE COLOR")}, r"a colour image \(1 .* PALETTE COLOR\)"),
    "inverted": ({"edit": change(PhotometricInterpretation="MONOCHROME1")}, r"an inverted image \(MONOCHROME1\)"),
    "CT": ({"modality": "CT"}, r"IM0001\.dcm: Modality CT; expected MR\. The model has learnt MRI alone"),
    "a capture": ({"modality": "OT"}, "Modality OT; expected MR"),
    "no position": ({"edit": change(3, ImagePositionPatient=None)}, r"IM0004\.dcm: no ImagePositionPatient"),
    "no orientation": ({"edit": change(3, ImageOrientationPatient=None)}, r"IM0004\.dcm: no ImageOrientationPatient"),
    "no spacing": ({"edit": change(3, PixelSpacing=None)}, r"IM0004\.dcm: no PixelSpacing"),
    "no rows": ({"edit": change(3, Rows=None)}, r"IM0004\.dcm: no Rows"),
    "no columns": ({"edit": change(3, Columns=0)}, r"IM0004\.dcm: 1 frames of 6 x 0 pixels"),
    "no direction": ({"edit": NOWHERE}, r"IM0001\.dcm: an ImageOrientationPatient of other vectors; expected two unit"),
    "zero spacing": ({"edit": change(PixelSpacing=[0, 0.75])}, r"PixelSpacing 0 0\.75 mm; expected positive lengths"),
    "negative spacing": ({"edit": change(PixelSpacing=[1.3, -0.75])}, r"PixelSpacing 1\.3 -0\.75 mm; expected"),
    "infinite spacing": ({"edit": change(PixelSpacing=["1.3", "inf"])}, "an unusable PixelSpacing; expected 2 finite"),
    "one spacing": ({"edit": change(PixelSpacing=1.3)}, "an unusable PixelSpacing; expected 2 finite numbers"),
    "no slope": ({"rescale": (0, 5)}, r"IM0001\.dcm: RescaleSlope 0"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named(make_dicom, volume, tmp_path, options, message):
    paths = make_dicom(tmp_path, volume, **options)
    with pytest.raises(VolumeError, match=message) as caught:
        read(paths)
    assert str(caught.value).startswith(str(tmp_path))
    assert not [known for known in make_dicom.identifiers if known in str(caught.value)]


ENHANCED_FAULTS = {
    "two echoes": ({"duplicate": 2}, r"frame 3 of IM0001\.dcm and frame 6 of IM0001\.dcm both at -5\.87 mm"),
    "missing": ({"missing": (2,)}, r"a gap of 7\.80 mm between frame 2 of IM0001\.dcm and frame 3 of IM0001\.dcm"),
    "orientations": (
        {
            "edit": frames(
                lambda groups, index: setattr(
                    groups, "PlaneOrientationSequence", Sequence([orientation([AXIAL, SAGITTAL][index % 2])])
                )
            )
        },
        "slices of 2 orientations",
    ),
    "no position": ({"edit": frames(lambda groups, _: groups.pop("PlanePositionSequence"))}, "no ImagePositionPatient"),
    "no groups": (
        {"edit": change(PerFrameFunctionalGroupsSequence=None, SharedFunctionalGroupsSequence=None)},
        r"5 frames without a place for each \(no functional groups\)",
    ),
    "too few groups": (
        {"edit": lambda dataset, _: dataset.PerFrameFunctionalGroupsSequence.pop()},
        "5 frames, but functional groups for 4; expected one for each",
    ),
    "CT": ({"modality": "CT"}, "Modality CT; expected MR"),
}


def orientation(cosines):
    dataset = pydicom.Dataset()
    dataset.ImageOrientationPatient = cosines
    return dataset


@pytest.mark.parametrize(("options", "message"), ENHANCED_FAULTS.values(), ids=ENHANCED_FAULTS)
def test_a_fault_of_an_enhanced_file_is_named(make_dicom, volume, tmp_path, options, message):
    with pytest.raises(VolumeError, match=message) as caught:
        read(make_dicom(tmp_path, volume, enhanced=True, **options))
    assert str(caught.value).startswith(str(tmp_path))
    assert not [known for known in make_dicom.identifiers if known in str(caught.value)]


@pytest.mark.parametrize("enhanced", [False, True], ids=["single-frame", "enhanced"])
def test_a_single_slice_is_no_volume(make_dicom, make_volume, tmp_path, enhanced):
    paths = make_dicom(tmp_path, make_volume((1, 6, 4)), enhanced=enhanced)
    with pytest.raises(VolumeError, match=r"IM0001\.dcm: a single slice; expected a volume of several"):
        read(paths)


def test_several_enhanced_files_of_one_series_are_not_mixed(make_dicom, volume, tmp_path):
    (first,) = make_dicom(tmp_path, volume, enhanced=True)
    second = first.with_name("IM0002.dcm")
    shutil.copy(first, second)
    with pytest.raises(VolumeError, match="2 multi-frame files among the 2 of one series; expected one alone"):
        read([first, second])


def test_a_tag_that_is_no_number_is_not_quoted(make_dicom, volume, tmp_path):
    paths = make_dicom(tmp_path, volume, edit=change(PixelSpacing=["1.25", "0.75"]))
    data = paths[2].read_bytes()
    assert data.count(b"1.25\\0.75 ") == 1
    paths[2].write_bytes(data.replace(b"1.25\\0.75 ", b"LEAK-4711\\"))
    with pytest.raises(VolumeError, match=r"IM0003\.dcm: an unusable PixelSpacing; expected 2 finite") as caught:
        read(paths)
    assert "LEAK" not in str(caught.value)


# --- truncated and damaged files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("enhanced", [False, True], ids=["single-frame", "enhanced"])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_truncated_pixels_are_found(make_dicom, make_volume, tmp_path, syntax, enhanced):
    paths = make_dicom(tmp_path, make_volume((3, 32, 32)), enhanced=enhanced, transfer_syntax=syntax)
    broken = paths[-1]
    whole = broken.read_bytes()
    for lost in (10, 100, 1000):  # the last 8 bytes of compressed pixels only mark their end
        broken.write_bytes(whole[:-lost])
        found, others = find_series(paths)
        assert not others  # a deflated file no longer tells its series, and is one of its own
        (bad,) = [series for series in found if broken in series.files]
        with pytest.raises(VolumeError, match=rf"{broken.name}: .*(truncated|Copy it again)"):
            read_series(bad)


def test_the_bytes_are_counted(make_dicom, volume, tmp_path):
    paths = make_dicom(tmp_path, volume)
    paths[1].write_bytes(paths[1].read_bytes()[:-10])
    with pytest.raises(VolumeError, match=r"IM0002\.dcm: 38 bytes of pixels; expected 48\. It is truncated: copy it"):
        read(paths)


@pytest.mark.parametrize("kept", [140, 200, 300, 500, 700, 900])
def test_a_truncated_header_is_an_error_of_its_own(make_dicom, volume, tmp_path, kept):
    paths = make_dicom(tmp_path, volume)
    paths[1].write_bytes(paths[1].read_bytes()[:kept])
    found, others = find_series(paths)
    assert not others
    (bad,) = [series for series in found if paths[1] in series.files]
    with pytest.raises(VolumeError, match=r"IM0002\.dcm: .*truncated"):
        read_series(bad)


@pytest.mark.parametrize("syntax", ["rle", "jpeg", "jpeg2000", "jpegls"])
def test_compressed_pixels_that_end_early_are_found(make_dicom, make_volume, tmp_path, syntax):
    from pydicom.encaps import encapsulate, get_frame

    paths = make_dicom(tmp_path, make_volume((2, 32, 32)), transfer_syntax=syntax)
    dataset = pydicom.dcmread(paths[1])  # complete as DICOM, but not the image in it
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    dataset.PixelData = encapsulate([frame[: len(frame) // 2]])
    dataset.save_as(paths[1])
    with pytest.raises(VolumeError, match=r"IM0002\.dcm: pixels that cannot be decoded \((RLE|JPEG).*; RuntimeError\)"):
        read(paths)


def test_an_unreadable_transfer_syntax_is_named(make_dicom, make_volume, tmp_path):
    paths = make_dicom(tmp_path, make_volume((2, 32, 32)), transfer_syntax="jpeg")
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
        dataset.save_as(path)
    with pytest.raises(VolumeError, match=r"cannot be decoded \(MPEG2 .*\); expected uncompressed, RLE, JPEG"):
        read(paths)


# --- which files belong together --------------------------------------------------------------------------------------


def test_series_are_told_apart_by_uid_and_folder(make_dicom, volume, make_volume, tmp_path):
    other = make_volume((2, 3, 4))
    first = make_dicom(tmp_path / "b", volume, series=1)
    again = make_dicom(tmp_path / "c", volume, series=1)
    kept = [path.rename(path.with_name(f"A{path.name}")) for path in make_dicom(tmp_path / "d", other, series=2)]
    beside = [path.rename(tmp_path / "b" / path.name) for path in kept]
    found, others = find_series([*again, *reversed(first), *beside])
    assert [series.files for series in found] == [tuple(beside), tuple(first), tuple(again)]
    assert [series.folder.name for series in found] == ["b", "b", "c"]
    assert not others


def as_class(uid):
    def edit(dataset, _):
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid

    return edit


def test_what_is_no_image_is_left_out(make_dicom, make_volume, tmp_path):
    one = make_volume((1, 6, 4))
    strangers = [tmp_path / "notes.txt", tmp_path / "empty", tmp_path / "volume.nii.gz"]
    strangers[0].write_text("x" * 500)
    strangers[1].write_bytes(b"")
    strangers[2].write_bytes(b"\x1f\x8b" + bytes(400))
    classes = {
        "DICOMDIR": pydicom.uid.MediaStorageDirectoryStorage,
        "report": pydicom.uid.BasicTextSRStorage,
        "segmentation": pydicom.uid.SegmentationStorage,
        "presentation": pydicom.uid.GrayscaleSoftcopyPresentationStateStorage,
        "raw": pydicom.uid.RawDataStorage,
    }
    for name, uid in classes.items():
        (path,) = make_dicom(tmp_path / name, one, edit=as_class(uid))
        strangers.append(path)

    def private(dataset, _):
        as_class("1.3.12.2.1107.5.9.1")(dataset, _)  # Siemens's for what is no image
        for keyword in ("Rows", "Columns", "PixelData"):
            del dataset[keyword]

    (path,) = make_dicom(tmp_path / "private", one, edit=private)
    strangers.append(path)
    (image,) = make_dicom(tmp_path / "image", one)
    (private_image,) = make_dicom(tmp_path / "its own class", one, edit=as_class("1.3.46.670589.11.0.0.12.1"))
    found, others = find_series([*strangers, image, private_image])
    assert [series.files for series in found] == [(image,), (private_image,)]
    assert others == sorted(strangers)


def test_what_begins_like_dicom_is_never_dropped(tmp_path):
    path = tmp_path / "IM1"
    path.write_bytes(bytes(128) + b"DICM" + b"\xff" * 50)
    assert find_series([path]) == ([DicomSeries(tmp_path, (path,))], [])
    with pytest.raises(VolumeError, match="IM1: "):
        read_series(DicomSeries(tmp_path, (path,)))


def test_an_image_of_no_series_is_an_error_of_its_own(make_dicom, volume, tmp_path):
    paths = make_dicom(tmp_path, volume, edit=change(2, SeriesInstanceUID=None))
    found, others = find_series(paths)
    assert [series.files for series in found] == [(*paths[:2], *paths[3:]), (paths[2],)] and not others
    with pytest.raises(VolumeError, match=r"IM0003\.dcm: no SeriesInstanceUID; expected the complete header"):
        read_series(found[1])


# --- identity ---------------------------------------------------------------------------------------------------------


def test_the_libraries_do_not_quote_the_header(make_dicom, volume, tmp_path, caplog, capfd):
    def edit(dataset, k):
        dataset.SpecificCharacterSet = "LEAK-4711"  # an encoding nobody knows: pydicom warns of it by name

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = make_dicom(tmp_path, volume, edit=edit)
        data = paths[1].read_bytes()
        uid = f"{make_dicom.uid_root}.2.1".encode()
        paths[1].write_bytes(data.replace(uid, uid[:-1] + b"x"))  # an invalid UID
    with pytest.warns(UserWarning, match=re.escape(make_dicom.uid_root)):
        str(pydicom.dcmread(paths[1]).SeriesInstanceUID)
    caplog.clear()
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        found, _ = find_series(paths)
        assert len(found) == 2
        for series in found:
            with pytest.raises(VolumeError):
                read_series(series)
    assert not warned and not caplog.records
    assert capfd.readouterr() == ("", "")


def test_the_libraries_speak_again_afterwards(make_dicom, volume, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="pydicom")
    before = list(warnings.filters)
    with pytest.raises(VolumeError):
        read(make_dicom(tmp_path, volume, modality="CT"))
    assert logging.getLogger("pydicom").level == logging.INFO and warnings.filters == before


@pytest.mark.parametrize("enhanced", [False, True], ids=["single-frame", "enhanced"])
def test_a_series_that_fills_the_memory_is_an_error(make_dicom, volume, tmp_path, monkeypatch, enhanced):
    paths = make_dicom(tmp_path, volume, enhanced=enhanced)
    monkeypatch.setattr("lumbarflow.imaging._MOST_VOXELS", 119)
    with pytest.raises(VolumeError, match="4 x 6 x 5 voxels; expected at most 119, what fits in memory. Crop"):
        read(paths)
