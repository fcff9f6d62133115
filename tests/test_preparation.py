from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lumbarflow.imaging import SAGITTAL_AXES, LabelMap, Volume
from lumbarflow.preparation import build_manifest, prepare_series, split_hash

DIRECTION = SAGITTAL_AXES[::-1].T
SETTINGS = {"size": [16, 32], "keep_aspect": True, "normalisation": "z_score", "percentiles": [0, 100]}


def series(rows: int = 32, columns: int = 40, n: int = 3) -> tuple[Volume, LabelMap]:
    labels = np.zeros((n, rows, columns), np.uint8)
    labels[:, 8:24, 8:16], labels[:, 8:24, 20:26], labels[1, 4:8, 8:16] = 1, 2, 3
    image = labels * 100.0 + np.arange(columns)
    grid = ((0.5, 1.0, 4.0), (0, 0, 0), DIRECTION)  # (column, row, slice) spacing
    return Volume(image.astype(np.int16), *grid), LabelMap(labels, *grid)


def test_arrays_have_the_size_and_types_of_the_format():
    files = prepare_series(*series(), SETTINGS)
    assert (files["images.npy"].shape, files["images.npy"].dtype) == ((3, 16, 32), np.float16)
    assert (files["labels.npy"].shape, files["labels.npy"].dtype) == ((3, 16, 32), np.uint8)
    record = files["record.json"]
    # 32 rows of 1 mm in 16, 40 columns of 0.5 mm in 32: the rows ask for 2 mm, the columns for less.
    assert record["pixel_spacing_mm"] == [2.0, 2.0]
    assert record["n_slices"] == 3
    assert np.sum(record["class_counts"], axis=1).tolist() == [16 * 32] * 3
    assert [counts[3] > 0 for counts in record["class_counts"]] == [False, True, False]


def test_intensities_are_normalised_over_the_series_and_padded_with_air():
    image, labels = series()
    images = prepare_series(image, labels, SETTINGS)["images.npy"].astype(float)
    darkest = (image.array.min() - image.array.mean()) / image.array.std()
    # 20 mm of columns fill 10 of 32 pixels; the rest is padding.
    np.testing.assert_allclose(images[:, :, :11], darkest, atol=2e-3)
    np.testing.assert_allclose(images[:, :, 21:], darkest, atol=2e-3)
    inside = images[:, :, 11:21]
    assert abs(inside.mean()) < 0.1
    assert 0.75 < inside.std() < 1.1  # antialiasing takes some


def test_the_ceiling_is_what_the_size_alone_costs():
    image, labels = series()
    by_slice = np.array(prepare_series(image, labels, SETTINGS)["record.json"]["ceiling"])
    assert by_slice.sum(axis=(1, 2)).tolist() == [32 * 40] * 3
    assert by_slice[0, 3].sum() == 0 and by_slice[1, 3].sum() > 0  # the disc is in the middle slice alone
    small = by_slice.sum(axis=0)
    same = prepare_series(image, labels, SETTINGS | {"size": [32, 40], "keep_aspect": False})
    assert small.sum() == labels.array.size
    assert np.array_equal(small.sum(axis=1), np.bincount(labels.array.ravel()))
    # At its own size nothing is lost.
    ceiling = np.array(same["record.json"]["ceiling"]).sum(axis=0)
    assert np.array_equal(ceiling, np.diag(np.diag(ceiling)))


def manifest(records=dict, **changes) -> dict:
    series_index = pd.DataFrame(
        {
            "series": ["a_t1", "b_t2"],
            "patient": ["a", "b"],
            "sequence": ["t1", "t2"],
            "synthetic": [False, False],
            "image_digest": ["i1", "i2"],
            "mask_digest": ["m1", "m2"],
            "key": ["k1", "k2"],
        }
    )
    slice_index = pd.DataFrame(
        [("a_t1", 1, "train", True), ("a_t1", 0, "train", False), ("b_t2", 0, "test", True), ("b_t2", 1, "test", True)],
        columns=["series", "slice", "side", "kept"],
    )
    settings = {"preprocess": SETTINGS, "split": {"method": "patient"}, "filter": {}, "labels": {"canal": [100]}}
    for name, value in changes.items():
        if name in settings:
            settings[name] = value
        elif name in slice_index:
            slice_index[name] = value
        else:
            series_index[name] = value
    record = {"n_slices": 2, "pixel_spacing_mm": [1.0, 1.0], "class_counts": [[1, 0, 0, 0]] * 2, "digest": "d"}
    return build_manifest(series_index, slice_index, records({"a_t1": record, "b_t2": record}), settings)


def test_the_manifest_lists_the_slices_kept_on_each_side():
    sides = manifest()["sides"]
    assert sides == {"train": {"a_t1": [1]}, "validation": {}, "test": {"b_t2": [0, 1]}}


def test_each_record_is_looked_at_once():
    class Read(dict):
        times: list[str] = []

        def __getitem__(self, series):
            self.times.append(series)
            return super().__getitem__(series)

    manifest(records=Read)
    assert Read.times == ["a_t1", "b_t2"]


def test_the_data_hash_follows_scans_and_labels_only():
    first = manifest()
    assert manifest(image_digest=["i1", "other"])["data_hash"] != first["data_hash"]
    assert manifest(labels={"canal": [99]})["data_hash"] != first["data_hash"]
    other_size = manifest(preprocess=SETTINGS | {"size": [64, 64]})
    assert other_size["data_hash"] == first["data_hash"]
    assert other_size["content_hash"] != first["content_hash"]


def test_the_split_hash_follows_the_sides_and_not_the_filter():
    first = manifest()
    assert manifest(kept=[True, True, True, True])["split_hash"] == first["split_hash"]
    assert manifest(side=["test", "test", "train", "train"])["split_hash"] != first["split_hash"]


@pytest.mark.parametrize(
    ("synthetic", "kind"), [([False, False], "real"), ([True, False], "mixed"), ([True, True], "synthetic")]
)
def test_one_synthetic_series_is_enough_not_to_count_as_real(synthetic, kind):
    assert manifest(synthetic=synthetic)["data_kind"] == kind


def test_the_slice_split_is_marked_leaky():
    assert manifest()["leaky"] is False
    assert manifest(split={"method": "slice"})["leaky"] is True


def test_the_split_hash_is_of_the_slices_that_are_scored():
    index = pd.DataFrame(
        {"series": "a_t1", "slice": [0, 1, 2], "side": ["train", "test", "test"], "kept": [True, True, True]}
    )
    first = split_hash(index)
    assert split_hash(index.assign(kept=[False, True, True])) == first, "who trains less is tested on the same"
    assert split_hash(index.assign(kept=[True, True, False])) != first, "fewer slices are scored"
    assert split_hash(index.assign(side=["train", "test", "validation"])) != first
