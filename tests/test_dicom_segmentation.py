"""A DICOM-SEG holds the label map voxel by voxel, on the images it was made from, and opens elsewhere."""

from __future__ import annotations

import builtins
import logging
import warnings

import highdicom
import numpy as np
import pydicom
import pytest
from highdicom.color import CIELabColor

from lumbarflow.dicom import DicomVolume, find_series, read_series
from lumbarflow.dicom_segmentation import require_highdicom, write_segmentation
from lumbarflow.imaging import LabelMap, VolumeError
from lumbarflow.labels import PALETTE

BOTH = pytest.mark.parametrize("enhanced", [False, True], ids=["single-frame", "enhanced"])


@pytest.fixture
def make_source(make_dicom, make_volume, tmp_path):
    """Factory of a series that was read; its files are in another order than its slices."""

    def make(**options) -> DicomVolume:
        paths = make_dicom(tmp_path / "scan", make_volume((4, 6, 5)), **{"shuffled": True} | options)
        (series,), _ = find_series(paths)
        return read_series(series)

    return make


def label_map(source: DicomVolume, values) -> LabelMap:
    """Every label of `values` somewhere, no two slices alike, the last one empty."""
    array = np.random.default_rng(5).choice([0, *values], source.volume.array.shape).astype(np.uint8)
    array[-1] = 0
    return LabelMap(array, source.volume.spacing_mm, source.volume.origin_mm, source.volume.direction)


def write(labels, source, path, numbered=False, model_version="lumbar-unet version 3"):
    write_segmentation(labels, source, path, model_version=model_version, numbered=numbered)
    return highdicom.seg.segread(path)


def reassembled(segmentation, source) -> np.ndarray:
    """Segment numbers (z, y, x), looked up by source instance or frame."""
    options = {"combine_segments": True, "assert_missing_frames_are_empty": True}
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in source.instances]
    if len(uids) == 1:
        return segmentation.get_pixels_by_source_frame(uids[0], list(source.frames), **options)
    return segmentation.get_pixels_by_source_instance(uids, **options)


@BOTH
@pytest.mark.parametrize("numbered", [False, True], ids=["classes", "instances"])
def test_every_voxel_lies_on_its_source(make_source, tmp_path, enhanced, numbered):
    source = make_source(enhanced=enhanced)
    present = [1, 2, 9, 100, 103, 201, 202] if numbered else [1, 2, 3]
    labels = label_map(source, present)
    segmentation = write(labels, source, tmp_path / "seg.dcm", numbered)
    found = reassembled(segmentation, source)
    assert np.array_equal(np.array([0, *present])[found], labels.array)
    # The same by place: what DICOM viewers go by.
    volume = segmentation.get_volume(combine_segments=True)
    points = volume.map_indices_to_reference(np.argwhere(volume.array == 1))
    expected = [labels.physical_point([i, j, k]) for k, j, i in np.argwhere(labels.array == present[0])]
    np.testing.assert_allclose(sorted(points.round(6).tolist()), sorted(np.round(expected, 6).tolist()), atol=1e-5)


@BOTH
def test_the_file_refers_to_its_images(make_source, tmp_path, enhanced):
    source = make_source(enhanced=enhanced)
    write(label_map(source, [1, 3]), source, tmp_path / "seg.dcm")
    dataset, images = pydicom.dcmread(tmp_path / "seg.dcm"), [pydicom.dcmread(file) for file in source.instances]
    assert dataset.SOPClassUID == pydicom.uid.SegmentationStorage and dataset.Modality == "SEG"
    assert dataset.SegmentationType == "BINARY" and (dataset.Rows, dataset.Columns) == (6, 5)
    (referenced,) = dataset.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == images[0].SeriesInstanceUID
    uids = {image.SOPInstanceUID for image in images}
    assert {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence} == uids
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        assert groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID in uids
    assert dataset.SeriesInstanceUID != images[0].SeriesInstanceUID and dataset.SOPInstanceUID not in uids
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "AccessionNumber",
                    "StudyID", "StudyDate", "FrameOfReferenceUID"):  # fmt: skip
        assert dataset[keyword].value == images[0][keyword].value
    # 2 segments on the 3 slices that are not empty.
    assert dataset.NumberOfFrames == 6


def test_segments_are_described(make_source, tmp_path):
    source = make_source()
    segmentation = write(label_map(source, [1, 2, 3]), source, tmp_path / "seg.dcm")
    described = [segmentation.get_segment_description(number) for number in segmentation.segment_numbers]
    assert [one.segment_label for one in described] == ["Vertebrae", "Vertebral canal", "Intervertebral discs"]
    assert [one.segmented_property_type.value for one in described] == ["51282000", "61853006", "360499006"]
    for one, kind in zip(described, ["vertebrae", "canal", "IVD"], strict=True):
        assert one.segmented_property_category.value == "91723000"  # in CID 7150
        assert one.segmented_property_type.scheme_designator == "SCT"
        assert one.algorithm_type.value == "AUTOMATIC"
        assert one.algorithm_identification.name == "lumbarflow"
        assert one.algorithm_identification.version == "lumbar-unet version 3"
        shown = CIELabColor.from_dicom_value(one.RecommendedDisplayCIELabValue).to_rgb(clip=True)
        hexadecimal = [int(PALETTE[kind][i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(np.subtract(shown, hexadecimal)).max() <= 1


def test_instances_are_numbered_from_the_lowest(make_source, tmp_path):
    source = make_source()
    segmentation = write(label_map(source, [2, 100, 106, 201, 205]), source, tmp_path / "seg.dcm", numbered=True)
    described = [segmentation.get_segment_description(number) for number in segmentation.segment_numbers]
    assert [one.segment_label for one in described] == [
        "Vertebra 2 from the lowest",
        "Vertebral canal",
        "Vertebra 6 from the lowest, cut off",
        "Intervertebral disc 1 from the lowest",
        "Intervertebral disc 5 from the lowest",
    ]
    types = ["51282000", "61853006", "51282000", "360499006", "360499006"]
    assert [one.segmented_property_type.value for one in described] == types


@pytest.mark.parametrize(("numbered", "label"), [(False, 4), (False, 100), (True, 200)])
def test_an_unknown_label_is_an_error(make_source, tmp_path, numbered, label):
    source = make_source()
    with pytest.raises(ValueError, match=f"unknown label {label}; expected"):
        write(label_map(source, [1, label]), source, tmp_path / "seg.dcm", numbered)
    assert not (tmp_path / "seg.dcm").exists()


def test_nothing_to_write_is_an_error(make_source, tmp_path):
    source = make_source()
    with pytest.raises(ValueError, match="a label map without labels; expected at least one"):
        write(label_map(source, [0]), source, tmp_path / "seg.dcm")
    assert not (tmp_path / "seg.dcm").exists()


def test_another_grid_is_an_error(make_source, make_volume, tmp_path):
    labels = make_volume((4, 5, 6), kind=LabelMap)
    with pytest.raises(ValueError, match=r"labels of shape \(4, 5, 6\) for a scan of shape \(4, 6, 5\)"):
        write(labels, make_source(), tmp_path / "seg.dcm")


def test_without_highdicom_it_says_what_to_install(make_source, tmp_path, monkeypatch):
    source, real = make_source(), builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "highdicom":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"not installed\. Run: pip install .* -e '\.\[dicom\]'"):
        require_highdicom()
    with pytest.raises(ImportError, match=r"not installed\. Run: pip install"):
        write_segmentation(label_map(source, [1]), source, tmp_path / "x", model_version="1", numbered=False)


def test_a_failed_write_leaves_nothing(make_source, tmp_path, monkeypatch):
    source = make_source()

    def fail(self, path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", fail)
    with pytest.raises(OSError, match="disk full"):
        write(label_map(source, [1]), source, tmp_path / "out" / "seg.dcm")
    assert list((tmp_path / "out").iterdir()) == []


# --- headers as they come ---------------------------------------------------------------------------------------------


def anonymised(dataset, _):
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
                    "StudyDate", "StudyTime", "SliceThickness", "SeriesNumber", "InstanceNumber"):  # fmt: skip
        if keyword in dataset:
            del dataset[keyword]


def rounded_in_several_ways(dataset, k):
    cosines = [float(value) for value in dataset.ImageOrientationPatient]
    dataset.ImageOrientationPatient = [round(value, 6 + k % 2) for value in cosines]


def with_each_frame(dataset, _):
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        groups.PlaneOrientationSequence = shared.PlaneOrientationSequence
        groups.PixelMeasuresSequence = shared.PixelMeasuresSequence
    del dataset.SharedFunctionalGroupsSequence


@pytest.mark.parametrize(
    ("enhanced", "edit"),
    [(False, anonymised), (True, anonymised), (False, rounded_in_several_ways), (True, with_each_frame)],
)
def test_what_dicom_allows_is_written(make_source, tmp_path, enhanced, edit):
    source = make_source(enhanced=enhanced, edit=edit)
    labels = label_map(source, [1, 2, 3])
    assert np.array_equal(reassembled(write(labels, source, tmp_path / "seg.dcm"), source), labels.array)


def test_a_header_without_a_study_is_named_but_not_quoted(make_source, make_dicom, tmp_path):
    def edit(dataset, _):
        del dataset["StudyInstanceUID"]

    source = make_source(edit=edit)
    with pytest.raises(
        VolumeError, match=r"IM000\d\.dcm: a header that no DICOM-SEG can refer to \(.*Error\)"
    ) as caught:
        write(label_map(source, [1]), source, tmp_path / "seg.dcm")
    assert not [known for known in make_dicom.identifiers if known in str(caught.value)]
    assert not (tmp_path / "seg.dcm").exists()


def test_the_patient_stays_out_of_logs(make_source, tmp_path, caplog, capfd):
    def edit(dataset, _):
        dataset.PatientName = "Leakova"  # highdicom warns of names of one part, and quotes them

    source = make_source(edit=edit)
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        write_segmentation(label_map(source, [1]), source, tmp_path / "seg.dcm", model_version="1", numbered=False)
    assert str(pydicom.dcmread(tmp_path / "seg.dcm").PatientName) == "Leakova"
    assert not warned and not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_failed_write_does_not_quote_the_header(make_source, make_dicom, tmp_path, monkeypatch):
    source = make_source()

    def fail(self, path):
        raise ValueError(f"invalid value {self.PatientID}")

    monkeypatch.setattr("highdicom.seg.Segmentation.save_as", fail)
    with pytest.raises(VolumeError, match=r"a header that no DICOM-SEG can refer to \(ValueError\)") as caught:
        write(label_map(source, [1]), source, tmp_path / "seg.dcm")
    assert make_dicom.patient["PatientID"] not in str(caught.value)
