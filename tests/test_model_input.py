"""The training folder is opened lazily, in a fixed order, and refuses what does not fit its manifest."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow.model_input import FORMAT_VERSION, ModelInput, neighbour_indices

MANIFEST = {
    "format_version": FORMAT_VERSION,
    "size": [4, 6],
    "series": {"10_t2": {"n_slices": 3}, "2_t1": {"n_slices": 2}},
    "sides": {"train": {"2_t1": [1, 0], "10_t2": [2, 0]}, "validation": {"10_t2": [1]}, "test": {}},
    "settings": {
        "preprocess": {
            "size": [4, 6],
            "keep_aspect": False,
            "normalisation": "z_score",
            "percentiles": [1, 99],
            "other": 5,
        }
    },
}


@pytest.fixture
def root(tmp_path):
    for series, facts in MANIFEST["series"].items():
        folder = tmp_path / "series" / series
        folder.mkdir(parents=True)
        shape = (facts["n_slices"], 4, 6)
        values = np.arange(np.prod(shape)).reshape(shape) + 100 * len(series)
        np.save(folder / "images.npy", values.astype(np.float16))
        np.save(folder / "labels.npy", (values % 5 % 4).astype(np.uint8))
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    return tmp_path


def test_slices_that_are_newer_than_the_manifest_are_an_error(root):
    manifest = json.loads((root / "manifest.json").read_text())
    for name, facts in manifest["series"].items():
        facts["digest"] = f"of {name}"
        (root / "series" / name / "record.json").write_text(json.dumps({"digest": f"of {name}"}))
    (root / "manifest.json").write_text(json.dumps(manifest))
    ModelInput.open(root).check_complete("train", "validation")
    (root / "series/2_t1/record.json").write_text(json.dumps({"digest": "of other settings"}))
    ModelInput.open(root).check_complete("validation", "test")  # it is on neither
    with pytest.raises(ValueError, match=r"2_t1/record.json: its slices are not those that manifest.json describes"):
        ModelInput.open(root).check_complete("train")


def test_slices_come_in_a_fixed_order(root):
    opened = ModelInput.open(root)
    assert opened.manifest == MANIFEST and opened.size == (4, 6)
    # Series by name, slices from left to right, whatever the manifest's order.
    assert opened.slices("train") == [("10_t2", 0), ("10_t2", 2), ("2_t1", 0), ("2_t1", 1)]
    assert opened.slices("validation") == [("10_t2", 1)] and opened.slices("test") == []


def test_images_and_labels_are_views_of_the_mapped_files(root):
    opened = ModelInput.open(root)
    image, label = opened.image("10_t2", 2), opened.label("2_t1", 1)
    assert image.dtype == np.float16 and label.dtype == np.uint8
    # 100 * the name's length + 24 values a slice
    assert np.array_equal(image, np.arange(548, 572).reshape(4, 6))
    assert np.array_equal(label, np.arange(424, 448).reshape(4, 6) % 5 % 4)
    for view in (image, label):
        assert isinstance(view, np.memmap) and not view.flags.writeable
    assert np.shares_memory(image, opened.image("10_t2", 2))  # opened once


@pytest.mark.parametrize(
    ("index", "neighbours", "expected"),
    [
        (2, 0, [2]),
        (2, 1, [1, 2, 3]),
        (0, 1, [0, 0, 1]),
        (4, 2, [2, 3, 4, 4, 4]),
        (1, 6, [0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 4, 4, 4]),  # further than the series on both sides
        (np.array([0, 3, 4]), 1, [[0, 0, 1], [2, 3, 4], [3, 4, 4]]),
    ],
)
def test_neighbours_go_from_left_to_right_and_the_outermost_slice_is_repeated(index, neighbours, expected):
    indices = neighbour_indices(index, 5, neighbours)
    assert indices.tolist() == expected
    assert np.issubdtype(indices.dtype, np.integer)


@given(st.integers(1, 9), st.integers(0, 4), st.data())
def test_neighbours_are_as_the_slices_of_a_padded_series(count, neighbours, data):
    index = data.draw(st.integers(0, count - 1))
    padded = np.pad(np.arange(count), neighbours, mode="edge")
    expected = padded[index : index + 2 * neighbours + 1]
    np.testing.assert_array_equal(neighbour_indices(index, count, neighbours), expected)


def test_impossible_neighbours_are_errors():
    with pytest.raises(ValueError, match=r"neighbours is -1; expected 0 or more slices on each side"):
        neighbour_indices(0, 3, -1)
    # Cut off like a neighbour's, such an index would quietly become another slice.
    for index in (-1, 3):
        with pytest.raises(ValueError, match=rf"slice {index} of a series of 3; expected 0 to 2"):
            neighbour_indices(index, 3, 1)


def test_neighbours_are_channels_whatever_side_they_stand_on(root):
    opened = ModelInput.open(root)
    image = opened.image("10_t2", 0, neighbours=2)  # slice 1 is for validation
    assert (image.shape, image.dtype) == ((4, 6, 5), np.float16)
    for channel, source in enumerate([0, 0, 0, 1, 2]):
        np.testing.assert_array_equal(image[..., channel], opened.image("10_t2", source))


def test_nothing_is_read_before_it_is_asked_for(root):
    (root / "series/10_t2/images.npy").unlink()
    opened = ModelInput.open(root)
    assert opened.image("2_t1", 0).shape == (4, 6)
    with pytest.raises(ValueError, match=r"10_t2/images.npy: it cannot be read \(No such file or directory\)"):
        opened.image("10_t2", 0)


def test_open_files_are_bounded(root, monkeypatch):
    monkeypatch.setattr("lumbarflow.model_input._OPEN_ARRAYS", 1)
    opened = ModelInput.open(root)
    first = opened.image("10_t2", 0)
    opened.image("2_t1", 0)
    assert not np.shares_memory(first, opened.image("10_t2", 0))


def test_the_segmenter_prepares_slices_as_this_folder_did(root):
    turned = {"shift": 0.0, "rotation_degrees": 5.0}
    evaluation = {"batch_size": 8, "test_time_augmentation": turned, "metrics": {}}
    assert ModelInput.open(root).segmenter_settings(evaluation) == {
        "size": [4, 6], "keep_aspect": False, "normalisation": "z_score", "percentiles": [1, 99], "batch_size": 8,
        "test_time_augmentation": turned,
    }  # fmt: skip


def test_a_folder_without_manifest_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no manifest.json; expected a model input folder. Write one with: kedro run"):
        ModelInput.open(tmp_path / "absent")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, None])
def test_another_format_is_an_error(root, version):
    (root / "manifest.json").write_text(json.dumps(MANIFEST | {"format_version": version}))
    with pytest.raises(
        ValueError, match=rf"manifest.json: format_version {version}; expected {FORMAT_VERSION}\. Write"
    ):
        ModelInput.open(root)


def test_arrays_that_do_not_fit_the_manifest_are_an_error(root):
    np.save(root / "series/10_t2/labels.npy", np.zeros((3, 6, 4), np.uint8))
    opened = ModelInput.open(root)
    with pytest.raises(ValueError, match=r"labels.npy: shape \(3, 6, 4\); expected \(3, 4, 6\) from manifest.json"):
        opened.label("10_t2", 0)
