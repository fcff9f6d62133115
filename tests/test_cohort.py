"""What lies in a folder of scans, and each check that a series must pass."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lumbarflow.apta import apta
from lumbarflow.cohort import Scan, ingest_scan, read_external_mask, take_inventory
from lumbarflow.imaging import LabelMap, Orientation, VolumeError, read_volume, to_sagittal, write_volume
from lumbarflow.labels import LabelTable

SEQUENCES = ["t1", "t2", "t2_SPACE"]
PERCENTILES = (0.5, 99.5)
TOLERANCES = {"spacing_mm": 0.001, "origin_mm": 0.01, "direction": 0.0001}
TABLE = LabelTable({"vertebrae": ["1-25", "101-125"], "canal": [100], "IVD": ["201-225"]})


def inventory(images, masks=(), overview=()):
    return take_inventory(images, masks, [{"new_file_name": name} for name in overview], SEQUENCES)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, patient, sequence",
    [
        ("1_t1.mha", "1", "t1"),
        ("1_t2.nii.gz", "1", "t2"),
        ("1_t2_SPACE.mha", "1", "t2_SPACE"),
        ("clinic_a_007_t2.nrrd", "clinic_a_007", "t2"),
        ("clinic_t2_t2_SPACE.mha", "clinic_t2", "t2_SPACE"),
        ("a.b_t1.NII", "a.b", "t1"),
    ],
)
def test_names_are_read(name, patient, sequence):
    (scan,) = inventory([name], [name]).scans
    assert (scan.patient, scan.sequence, scan.problem) == (patient, sequence, None)
    assert (scan.image, scan.mask) == (name, name)
    assert scan.series == f"{patient}_{sequence}"


@pytest.mark.parametrize("series", ["1", "1_flair", "_t2", "1-t2", "1_t2_space", "1_T2"])
def test_other_names_are_a_problem(series):
    (scan,) = inventory([f"{series}.mha"]).scans
    assert scan.problem[0] == f"the name {series!r}"
    assert scan.problem[1] == "<patient>_<sequence> with a sequence of t1, t2, t2_SPACE"
    assert "ingest.sequences" in scan.problem[2]


@pytest.mark.parametrize("sequences", [["SPACE", "t2", "t2_SPACE"], ["t2_SPACE", "t2", "SPACE"]])
def test_the_longest_sequence_is_taken(sequences):
    (scan,) = take_inventory(["a_1_t2_SPACE.mha"], [], [], sequences).scans
    assert (scan.patient, scan.sequence) == ("a_1", "t2_SPACE")


def test_a_sequence_is_text_not_a_pattern():
    assert take_inventory(["1_tx2.mha"], [], [], ["t.2"]).scans[0].problem
    assert not take_inventory(["1_t.2.mha"], [], [], ["t.2"]).scans[0].problem


def test_a_series_that_the_overview_has_twice_needs_one_subset():
    twice = [{"new_file_name": "1_t2", "subset": "validation"}, {"new_file_name": "1_t2.mha", "subset": "Validation"}]
    (scan,) = take_inventory(["1_t2.mha"], ["1_t2.mha"], twice, SEQUENCES).scans
    assert scan.row["subset"] == "validation"
    twice[1]["subset"] = "training"
    with pytest.raises(
        ValueError, match=r"overview.csv: 1_t2 stands there with the subsets 'validation' and 'training'"
    ):
        take_inventory(["1_t2.mha"], ["1_t2.mha"], twice, SEQUENCES)


def test_images_masks_and_rows_are_paired_by_name():
    overview = [
        {"new_file_name": " 2_t2 ", "subset": "validation"},
        {"new_file_name": "8_t1", "subset": "training"},
        {"new_file_name": "7_t1", "subset": "training"},
    ]
    found = take_inventory(["2_t2.mha", "1_t2.mha"], ["2_t2.nii.gz", "3_t1.mha"], overview, SEQUENCES)
    assert [(scan.series, scan.image, scan.mask) for scan in found.scans] == [
        ("1_t2", "1_t2.mha", None),
        ("2_t2", "2_t2.mha", "2_t2.nii.gz"),
        ("3_t1", None, "3_t1.mha"),
    ]
    assert [scan.row and scan.row["subset"] for scan in found.scans] == [None, "validation", None]
    assert found.absent == ["7_t1", "8_t1"]
    assert found.ignored == []


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_one_series_in_two_formats_is_a_problem(folder):
    names = {"images": ["1_t2.mha"], "masks": ["1_t2.mha"]}
    names[folder].append("1_t2.nii")
    (scan,) = inventory(**names).scans
    assert scan.problem == (f"1_t2.mha and 1_t2.nii in {folder}", "one file per series", "Keep one of them.")


def test_stray_files_are_ignored_but_data_files_of_headers_are_no_strays():
    images = [
        "1_t2.mhd",
        "1_t2.raw",
        "2_t2.mhd",
        "2_t2.zraw",
        "3_t2.raw",
        "notes.txt",
        ".1_t1.mha",
        "sub/4_t2.mha",
        ".mha",
    ]
    found = inventory(images, ["1_t2.mhd", "1_t2.RAW", "2_t2.raw"])
    assert [scan.series for scan in found.scans] == ["1_t2", "2_t2"]
    assert sorted(found.ignored) == [
        "images/.1_t1.mha",
        "images/.mha",
        "images/3_t2.raw",
        "images/notes.txt",
        "images/sub/4_t2.mha",
        "masks/2_t2.raw",
    ]


def test_no_name_is_looked_for_among_all():
    class Names(list):
        def __contains__(self, name):
            raise AssertionError("a search for each data file takes the square of their number")

    names = Names(["1_t2.mhd", "1_t2.raw"])
    assert inventory(names, names).ignored == []


def test_an_empty_folder_has_rows_only():
    found = inventory([], [], ["1_t2"])
    assert (found.scans, found.absent, found.ignored) == ([], ["1_t2"], [])


# --- checks -----------------------------------------------------------------------------------------------------------


def scan(**changes) -> Scan:
    row = {"new_file_name": "1_t2", "subset": "training", "SeriesDescription": "T2 TSE"}
    return Scan(**{"series": "1_t2", "patient": "1", "sequence": "t2", "image": "1_t2.mha", "mask": "1_t2.nii",
                   "row": row} | changes)  # fmt: skip


def ingest(image, mask, **changes):
    return ingest_scan(scan(**changes), lambda: image, lambda: mask, TABLE, TOLERANCES, PERCENTILES)


def rejection(files) -> dict:
    """The record of a rejected series, after the checks that hold for all of them."""
    assert list(files) == ["record.json"]
    record = files["record.json"]
    assert (record["series"], record["patient"], record["sequence"]) == ("1_t2", "1", "t2")
    assert record["outcome"] == "rejected"
    assert all(record[name] and isinstance(record[name], str) for name in ("file", "found", "expected", "what_to_do"))
    return record


def test_an_accepted_series_is_sagittal_with_classes(make_pair):
    # Axial storage, x to the left, y to posterior, z to superior: sagittal rows are z reversed.
    image, mask = make_pair((4, 6, 5), direction=np.eye(3), spacing_mm=(3.0, 0.5, 0.8))
    mask.array[:, 3] = 101
    files = ingest(image, mask)
    record, sagittal, labels = files["record.json"], files["image.mha"], files["labels.mha"]
    assert sagittal.array.shape == (5, 4, 6)
    assert np.array_equal(sagittal.array, image.array.transpose(2, 0, 1)[::-1, ::-1])
    assert type(labels) is LabelMap and labels.array.dtype == np.uint8
    assert np.array_equal(labels.array, np.broadcast_to([1, 2, 3, 1, 0, 0], (5, 4, 6)))
    assert sagittal.spacing_mm == labels.spacing_mm == (0.5, 0.8, 3.0)
    expected = {
        "outcome": "accepted", "file": "images/1_t2.mha", "n_slices": 5, "rows": 4, "columns": 6,
        "row_spacing_mm": 0.8, "column_spacing_mm": 0.5, "slice_spacing_mm": 3.0,
        "class_counts": [[8, 8, 4, 4]] * 5, "listed": True, "subset": "training", "synthetic": False,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert "key" not in record
    # The way back to the file's own grid.
    assert np.array_equal(Orientation.from_dict(record["orientation"]).restore(sagittal.array), image.array)
    assert record["geometry"] == {
        "spacing_mm": [3.0, 0.5, 0.8], "origin_mm": [-12.5, 30.25, 7.125], "direction": np.eye(3).tolist(),
    }  # fmt: skip


@pytest.mark.parametrize(
    "row, facts",
    [
        (None, (False, "", False)),
        ({"subset": "validation"}, (True, "validation", False)),
        ({"subset": "", "SeriesDescription": "synthetic"}, (True, "", True)),
        ({"subset": None, "SeriesDescription": None}, (True, "", False)),
    ],
)
def test_what_the_overview_says_is_kept(make_pair, row, facts):
    record = ingest(*make_pair(), row=row)["record.json"]
    assert (record["listed"], record["subset"], record["synthetic"]) == facts


@pytest.mark.parametrize(
    "name, near, far",
    [
        ("spacing_mm", (0.7505, 1.3, 3.9), (0.75, 1.3, 3.902)),
        ("origin_mm", (-12.5, 30.255, 7.125), (-12.5, 30.25, 7.14)),
        ("direction", np.eye(3) + 0.00005, np.eye(3) - 0.0002),
    ],
)
def test_image_and_mask_share_a_grid_up_to_the_tolerances(make_pair, name, near, far):
    image, _ = make_pair(direction=np.eye(3))
    _, mask = make_pair(**{"direction": np.eye(3), name: near})
    assert ingest(image, mask)["record.json"]["outcome"] == "accepted"
    _, mask = make_pair(**{"direction": np.eye(3), name: far})
    record = rejection(ingest(image, mask))
    assert record["file"] == "masks/1_t2.nii"
    assert record["found"].startswith(f"{name} (") and record["found"].endswith("of the image")
    assert record["expected"] == "the image's grid" and "ingest.tolerances" in record["what_to_do"]


def test_image_and_mask_of_different_sizes(make_pair):
    record = rejection(ingest(make_pair((4, 6, 5))[0], make_pair((4, 5, 6))[1]))
    assert (record["file"], record["found"]) == ("masks/1_t2.nii", "size (6, 5, 4) against (5, 6, 4) of the image")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_intensities_that_are_not_finite(make_pair, make_volume, value):
    image = make_volume(dtype=np.float32)
    image.array[1, 2, 3] = image.array[0, 0, 0] = value
    record = rejection(ingest(image, make_pair()[1]))
    assert (record["file"], record["found"]) == ("images/1_t2.mha", "2 voxels that aren't finite")
    assert record["expected"] == "finite numbers"


def test_constant_intensities(make_pair, make_volume):
    record = rejection(ingest(make_volume(values=np.full((4, 6, 5), 7)), make_pair()[1]))
    assert (record["file"], record["found"]) == ("images/1_t2.mha", "the constant value 7")


def test_unknown_labels(make_pair):
    image, mask = make_pair()
    mask.array[0, 0, :2] = 26, 240
    record = rejection(ingest(image, mask))
    assert (record["file"], record["found"]) == ("masks/1_t2.nii", "unknown label ids [26, 240]")
    assert "labels.table" in record["expected"] and "labels.table" in record["what_to_do"]


def test_an_empty_mask(make_pair):
    image, mask = make_pair()
    record = rejection(ingest(image, mask.with_array(np.zeros_like(mask.array))))
    assert (record["file"], record["found"]) == ("masks/1_t2.nii", "an empty mask")
    assert record["expected"] == "vertebrae, canal or IVD"


def test_lengths_that_are_not_positive(make_pair):
    record = rejection(ingest(*make_pair(spacing_mm=(0.5, 0.0, 4.0))))
    assert (record["file"], record["expected"]) == ("images/1_t2.mha", "positive lengths")


@pytest.mark.parametrize(
    "missing, file, found",
    [
        ("mask", "images/1_t2.mha", "no file of that name in masks/"),
        ("image", "masks/1_t2.nii", "no file of that name in images/"),
    ],
)
def test_an_image_without_a_mask_and_a_mask_without_an_image(missing, file, found):
    record = rejection(ingest_scan(scan(**{missing: None}), None, None, TABLE, TOLERANCES, PERCENTILES))
    assert (record["file"], record["found"]) == (file, found)
    assert f"{missing}s/1_t2.<ext>" in record["expected"] and file in record["what_to_do"]


def test_a_problem_of_the_name_is_told_before_a_file_is_opened():
    def open_file():
        raise AssertionError("opened")

    problem = ("the name '1_t2'", "another", "Rename it.")
    record = rejection(ingest_scan(scan(problem=problem), open_file, open_file, TABLE, TOLERANCES, PERCENTILES))
    assert (record["found"], record["expected"], record["what_to_do"]) == problem


@pytest.mark.parametrize("spoilt, file", [("image", "images/1_t2.mha"), ("mask", "masks/1_t2.nii")])
def test_an_unreadable_file_gives_its_reason_through_whatever_wraps_it(make_pair, tmp_path, spoilt, file):
    image, mask = make_pair()
    path = tmp_path / file.split("/")[1]
    write_volume(image if spoilt == "image" else mask, path)
    path.write_bytes(path.read_bytes()[:-40])

    def load():
        try:
            return read_volume(path)
        except VolumeError as error:
            raise RuntimeError("a dataset failed") from error

    loaders = {"image": lambda: image, "mask": lambda: mask} | {spoilt: load}
    record = rejection(ingest_scan(scan(), loaders["image"], loaders["mask"], TABLE, TOLERANCES, PERCENTILES))
    assert record["file"] == file
    assert "truncated" in record["what_to_do"]
    assert "key" not in record  # the file's content settles it: no need to try again


def test_a_failure_nobody_foresaw_is_that_series_alone_and_tried_again(make_pair):
    def load():
        raise PermissionError("not yours")

    record = rejection(ingest_scan(scan(), load, load, TABLE, TOLERANCES, PERCENTILES))
    assert record["key"] is None
    assert record["found"] == "PermissionError: not yours"


def test_running_out_of_memory_is_no_fault_of_the_series():
    def load():
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        ingest_scan(scan(), load, load, TABLE, TOLERANCES, PERCENTILES)


def inventory_of(*rows):
    return take_inventory(["1_t1.mha", "1_t2.mha"], ["1_t1.mha", "1_t2.mha"], rows, ["t1", "t2"])


def test_subsets_are_read_whatever_their_case_and_unknown_ones_are_an_error():
    found = inventory_of({"new_file_name": "1_t1", "subset": " Validation "}, {"new_file_name": "1_t2", "subset": None})
    assert [scan.row["subset"] for scan in found.scans] == ["validation", ""]
    with pytest.raises(ValueError, match=r"subset 'test'; expected training or validation, or nothing"):
        inventory_of({"new_file_name": "1_t1", "subset": "test"})


def test_one_sequence_alone_can_be_used_and_the_others_are_named():
    files = ["1_t1.mha", "1_t2.mha", "1_t2_SPACE.mha", "odd.mha"]
    found = take_inventory(files, files, [], SEQUENCES, only="t2")
    assert [scan.series for scan in found.scans] == ["1_t2", "odd"], "a name that fits nothing is still a problem"
    assert found.unused == ["1_t1", "1_t2_SPACE"]
    with pytest.raises(ValueError, match=r"ingest.only is 'T2'; expected null or one of t1, t2, t2_SPACE"):
        take_inventory(files, files, [], SEQUENCES, only="T2")


def test_rows_that_name_a_file_belong_to_its_series():
    found = inventory_of({"new_file_name": "1_t1.mha", "subset": ""}, {"new_file_name": "1_t2.nii.gz", "subset": ""})
    assert [scan.row is not None for scan in found.scans] == [True, True]
    assert found.absent == []


def test_an_image_without_contrast_between_the_percentiles_is_rejected(make_pair):
    image, mask = make_pair()
    flat = np.zeros_like(image.array)
    flat.flat[7] = 5  # not constant, but all that is left after clipping is
    record = rejection(ingest_scan(scan(), lambda: image.with_array(flat), lambda: mask, TABLE, TOLERANCES, (10, 90)))
    assert "constant (0) between percentiles 10 and 90" in record["found"]


def test_a_mask_is_turned_as_its_image_is(make_pair):
    """At 45 degrees a rounding decides which axis is the sagittal one."""

    def turned(degrees):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])

    image, mask = make_pair((6, 16, 16), direction=turned(45.002), spacing_mm=(1.0, 1.0, 4.0))
    mask = LabelMap(mask.array, mask.spacing_mm, mask.origin_mm, turned(44.998))
    image = image.with_array(TABLE.classes(mask.array).astype(np.int16))
    for method in ("direct", "apta"):
        files = ingest_scan(scan(), lambda: image, lambda: mask, TABLE, TOLERANCES, (0, 100), method)
        assert files["record.json"]["outcome"] == "accepted"
        if method == "direct":
            np.testing.assert_array_equal(files["labels.mha"].array, files["image.mha"].array)
        np.testing.assert_array_equal(files["labels.mha"].direction, files["image.mha"].direction)


# --- classes by the paper's way ---------------------------------------------------------------------------------------


def test_apta_makes_the_classes_if_it_is_asked_for(make_pair):
    image, mask = make_pair((5, 12, 9))
    arguments = (scan(), lambda: image, lambda: mask, TABLE, TOLERANCES, PERCENTILES)
    direct, by_apta = ingest_scan(*arguments), ingest_scan(*arguments, "apta")
    np.testing.assert_array_equal(by_apta["labels.mha"].array, apta(to_sagittal(mask)[0].array))
    assert np.any(by_apta["labels.mha"].array != direct["labels.mha"].array)
    assert by_apta["labels.mha"].spacing_mm == direct["labels.mha"].spacing_mm


# --- other tools' masks -----------------------------------------------------------------------------------------------


@pytest.fixture
def ingested(make_pair):
    image, mask = make_pair((5, 7, 6))
    return image, ingest_scan(scan(), lambda: image, lambda: mask, TABLE, TOLERANCES, PERCENTILES)


def external(ingested, masks, table=None):
    _, files = ingested
    readers = {name: (lambda mask=mask: mask) for name, mask in masks.items()}
    table = LabelTable(table or {"vertebrae": [1], "canal": [2], "IVD": [3]})
    return read_external_mask(
        files["record.json"], lambda: files["labels.mha"], list(masks), readers, table, TOLERANCES
    )


def test_an_external_mask_becomes_classes_on_the_images_grid_in_whatever_order_it_is_stored(ingested):
    image, files = ingested
    classes = files["labels.mha"].array
    stored = Orientation.from_dict(files["record.json"]["orientation"]).restore(classes)
    as_the_image = LabelMap(stored, image.spacing_mm, image.origin_mm, image.direction)
    sagittal, _ = to_sagittal(as_the_image)
    assert sagittal.array.shape != stored.shape or np.any(sagittal.array != stored)
    for mask in (as_the_image, sagittal):
        found = external(ingested, {"1_t1.nii.gz": mask})
        assert found["record.json"] == {"series": "1_t2", "file": "1_t1.nii.gz", "outcome": "accepted"}
        np.testing.assert_array_equal(found["labels.mha"].array, stored)
        assert found["labels.mha"].spacing_mm == image.spacing_mm
        np.testing.assert_array_equal(found["labels.mha"].direction, image.direction)


@pytest.mark.parametrize(
    "change, found",
    [
        ({"origin_mm": (0.0, 0.0, 0.0)}, "origin_mm"),
        ({"spacing_mm": (0.75, 1.3, 3.8)}, "spacing_mm"),
        ({"values": np.full((5, 7, 6), 9)}, r"unknown label ids \[9\]"),
    ],
)
def test_an_external_mask_that_does_not_fit_is_left_out_with_the_reason(ingested, make_volume, change, found):
    mask = make_volume((5, 7, 6), kind=LabelMap, dtype=np.uint8, **({"values": np.ones((5, 7, 6))} | change))
    files = external(ingested, {"1_t1.nii.gz": mask})
    assert set(files) == {"record.json"}
    assert files["record.json"]["outcome"] == "rejected"
    assert re.search(found, files["record.json"]["found"])
    assert files["record.json"]["what_to_do"]


def test_a_missing_external_mask_is_written_down_and_two_are_one_too_many(ingested, make_volume):
    record = external(ingested, {})["record.json"]
    assert (record["outcome"], record["found"]) == ("absent", "no mask")
    mask = make_volume((5, 7, 6), kind=LabelMap, dtype=np.uint8, values=np.ones((5, 7, 6)))
    record = external(ingested, {"1_t1.mha": mask, "1_t1.nii.gz": mask})["record.json"]
    assert (record["outcome"], record["found"]) == ("rejected", "2 masks")
