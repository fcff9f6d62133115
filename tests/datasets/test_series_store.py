"""Stores as Kedro saves and loads them; a person's own scans are never mixed with synthetic ones."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from kedro.io import DatasetError

from lumbarflow.datasets import SeriesStoreDataset, SyntheticCohortDataset
from lumbarflow.imaging import write_volume
from lumbarflow.store import SeriesStore, SpiderLayoutStore, Work


def test_saving_updates_and_loading_is_lazy(tmp_path, caplog):
    made = []

    def work(name, key):
        return Work(key, lambda: made.append(name) or {"images.npy": np.arange(3), "record.json": {"n": 3}})

    dataset = SeriesStoreDataset(path=str(tmp_path / "series"), description="preprocess")
    assert not dataset.exists()
    with caplog.at_level(logging.INFO, logger="lumbarflow.store"):
        dataset.save({"1_t2": work("1_t2", "a"), "2_t2": work("2_t2", "a")})
        dataset.save({"1_t2": work("1_t2", "b"), "2_t2": work("2_t2", "a")})
    assert made == ["1_t2", "2_t2", "1_t2"]
    assert all(message.startswith("preprocess: ") for message in caplog.messages)
    store = dataset.load()
    assert dataset.exists() and type(store) is SeriesStore
    assert store.records() == {"1_t2": {"key": "b", "n": 3}, "2_t2": {"key": "a", "n": 3}}
    assert store.array("2_t2", "images.npy").tolist() == [0, 1, 2]
    assert str(tmp_path / "series") in str(dataset) and "preprocess" in str(dataset)


@pytest.fixture
def dataset(tmp_path):
    return SyntheticCohortDataset(path=str(tmp_path / "01_raw"), description="synthesize")


@pytest.fixture
def plan(make_pair):
    image, mask = make_pair()

    def work(name, subset="training"):
        row = {"new_file_name": name, "subset": subset}
        return Work(subset, lambda: {"image.mha": image, "mask.mha": mask, "record.json": {"overview": row}})

    return work


def overview(folder):
    return pd.read_csv(folder / "overview.csv").values.tolist()


def test_a_cohort_has_an_overview_of_all_its_series(dataset, plan, tmp_path):
    dataset.save({"2_t2": plan("2_t2", "validation"), "1_t1": plan("1_t1")})
    assert type(dataset.load()) is SpiderLayoutStore and dataset.exists()
    assert dataset.load().series() == ["1_t1", "2_t2"]
    assert overview(tmp_path / "01_raw") == [["1_t1", "training"], ["2_t2", "validation"]]
    # What is taken from the last run is listed as well, what is gone is not.
    dataset.save({"2_t2": plan("2_t2", "validation"), "3_t1": plan("3_t1")})
    assert overview(tmp_path / "01_raw") == [["2_t2", "validation"], ["3_t1", "training"]]


def test_saving_nothing_leaves_the_folder_as_it_is(dataset, plan, tmp_path):
    dataset.save({})
    assert not (tmp_path / "01_raw").exists()
    dataset.save({"1_t1": plan("1_t1")})
    dataset.save({})
    assert dataset.load().series() == ["1_t1"]


def test_a_folder_with_scans_of_somebody_else_is_left_alone(dataset, plan, make_volume, tmp_path, caplog):
    raw = tmp_path / "01_raw"
    write_volume(make_volume(), raw / "images/9_t2.nii.gz")
    (raw / "overview.csv").write_text("new_file_name,subset\n9_t2,training\n")
    before = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    with caplog.at_level(logging.INFO, logger="lumbarflow.datasets.series_store"):
        dataset.save({"1_t1": plan("1_t1")})
    assert {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()} == before
    assert not dataset.exists()
    assert caplog.messages == [f"synthesize: nothing, {raw} holds 2 files of yours"]


def test_an_overview_of_somebody_else_is_left_alone(dataset, plan, tmp_path):
    raw = tmp_path / "01_raw"
    raw.mkdir()
    (raw / "overview.csv").write_text("new_file_name,subset\n500_t2,validation\n")
    dataset.save({"1_t1": plan("1_t1")})
    assert (raw / "overview.csv").read_text() == "new_file_name,subset\n500_t2,validation\n"
    assert not (raw / "images").exists()


def test_files_of_somebody_else_beside_synthetic_ones_are_an_error(dataset, plan, make_volume, tmp_path):
    dataset.save({"1_t1": plan("1_t1")})
    write_volume(make_volume(), tmp_path / "01_raw/images/99_t2.mha")
    with pytest.raises(DatasetError, match=r"1 files of yours \(images/99_t2.mha, ...\) beside synthetic scans"):
        dataset.save({"1_t1": plan("1_t1")})
