"""Preprocessing through Kedro, on a few small scans."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from lumbarflow.labels import CLASSES
from lumbarflow.model_input import ModelInput

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ingested(kedro_run, raw, project) -> Path:
    kedro_run("ingest", raw_dir=str(raw))
    return project


def test_the_training_folder_needs_nothing_else(ingested, kedro_run, raw, tmp_path_factory):
    kedro_run("preprocess")
    folder = tmp_path_factory.mktemp("elsewhere") / "model_input"
    shutil.move(ingested / "data/05_model_input", folder)
    shutil.rmtree(raw)
    shutil.rmtree(ingested / "data")
    model_input = ModelInput.open(folder)
    seen = {side: model_input.slices(side) for side in ("train", "validation", "test")}
    assert sum(map(len, seen.values())) > 0
    for series, index in sum(seen.values(), []):
        image, label = model_input.image(series, index), model_input.label(series, index)
        assert image.shape == label.shape == (64, 64)
        assert (image.dtype, label.dtype) == (np.float16, np.uint8)
        counts = model_input.manifest["series"][series]["class_counts"][index]
        assert np.bincount(label.ravel(), minlength=len(CLASSES)).tolist() == counts


def test_changed_preprocessing_is_done_again_and_changed_splits_and_filters_are_not(ingested, kedro_run, caplog):
    with caplog.at_level(logging.INFO):
        kedro_run("preprocess")
        assert "preprocess: 5 made, 0 unchanged" in caplog.text
        caplog.clear()
        kedro_run("preprocess", filter={"minimum_classes": 3}, split={"seed": 1})
        assert "preprocess: 0 made, 5 unchanged" in caplog.text
        caplog.clear()
        kedro_run("preprocess", preprocess={"size": [48, 64]})
        assert "preprocess: 5 made, 0 unchanged" in caplog.text


def test_labels_of_another_table_and_a_half_made_ingest_are_an_error(ingested, kedro_run, raw, write_scan, monkeypatch):
    with pytest.raises(
        ValueError, match="1_t1 and 4 more series were ingested with another labels.table or labels.meth"
    ):
        kedro_run("preprocess", labels={"method": "apta"})
    kedro_run("preprocess")
    # A second ingest that ends before its table is written: the scans are newer than what the table says of them.
    write_scan(raw, "1_t1", seed=9)
    with pytest.raises(ValueError, match="ingest.max_rejected_fraction"):
        (raw / "masks/2_t2.nrrd").unlink()
        kedro_run("ingest", raw_dir=str(raw), ingest={"max_rejected_fraction": 0.0})
    with pytest.raises(ValueError, match="1_t1: series_index was made from another scan of this name"):
        kedro_run("preprocess")


def test_the_index_keeps_slices_that_the_filter_left_out(ingested, kedro_run, caplog):
    with caplog.at_level(logging.INFO):
        catalog = kedro_run("preprocess", filter={"slices_per_sequence": 2})
    index = catalog.load("slice_index")
    assert len(index) == 5 * 4
    left_out = index[~index["kept"]]
    assert set(left_out["side"]) == {"train"}
    assert set(left_out["reason"]) == {"beyond 2 slices of its sequence"}
    assert f"train: {len(left_out)} slices left out, beyond 2 slices of its sequence" in caplog.text


def test_the_official_split_says_that_its_test_side_is_empty(ingested, kedro_run):
    with pytest.raises(ValueError, match=r"the split leaves test empty .*subset is 'validation'"):
        kedro_run("preprocess", split={"method": "official"})


def test_an_environment_replaces_local_and_keeps_its_own_folder(kedro_run, project, raw):
    shutil.rmtree(project / "conf/spider")
    shutil.move(project / "conf/local", project / "conf/spider")
    shutil.copy(ROOT / "conf/spider/globals.yml", project / "conf/spider")
    kedro_run("ingest", environment="spider", raw_dir=str(raw))
    assert (project / "data/spider/02_intermediate/series_index.parquet").is_file()
    assert not (project / "data/02_intermediate").exists()
