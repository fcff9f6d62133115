"""The model input folder and the `.keras` file, as Kedro loads and saves them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from kedro.io import DatasetError

from lumbarflow.datasets import FolderDataset, KerasModelDataset, ModelInputDataset
from lumbarflow.model_input import FORMAT_VERSION, ModelInput


def test_saving_a_model_input_writes_its_manifest(tmp_path):
    dataset = ModelInputDataset(path=str(tmp_path / "model_input"))
    assert not dataset.exists()
    manifest = {"format_version": FORMAT_VERSION, "size": [4, 6], "sides": {"test": {"1_t2": [0]}}}
    dataset.save(manifest)
    assert dataset.exists()
    assert json.loads((tmp_path / "model_input/manifest.json").read_text()) == manifest
    opened = dataset.load()
    assert type(opened) is ModelInput and opened.slices("test") == [("1_t2", 0)]
    assert str(tmp_path / "model_input") in str(dataset)


def test_a_folder_that_is_no_model_input_is_an_error(tmp_path):
    with pytest.raises(DatasetError, match="no manifest.json; expected a model input folder"):
        ModelInputDataset(path=str(tmp_path)).load()
    ModelInputDataset(path=str(tmp_path)).save({"format_version": 99})
    with pytest.raises(DatasetError, match=f"format_version 99; expected {FORMAT_VERSION}"):
        ModelInputDataset(path=str(tmp_path)).load()


def test_a_reloaded_model_predicts_the_same(tmp_path):
    from lumbarflow.backend import load_keras

    keras = load_keras()
    inputs = keras.Input((4, 6, 1))
    outputs = keras.layers.Conv2D(4, 3, padding="same", activation="softmax", bias_initializer="normal")(inputs)
    model = keras.Model(inputs, outputs)
    image = np.random.default_rng(0).normal(size=(2, 4, 6, 1)).astype(np.float32)
    expected = model.predict(image, verbose=0)

    dataset = KerasModelDataset(filepath=str(tmp_path / "06_models/model.keras"))
    assert not dataset.exists()
    dataset.save(model)
    assert dataset.exists() and str(tmp_path) in str(dataset)
    assert np.array_equal(dataset.load().predict(image, verbose=0), expected)
    assert [path.name for path in (tmp_path / "06_models").iterdir()] == ["model.keras"]


def test_code_in_a_model_file_is_not_run(tmp_path):
    from lumbarflow.backend import load_keras

    keras = load_keras()
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x + 1)])
    model.save(tmp_path / "model.keras")
    with pytest.raises(DatasetError, match="(?s)Lambda.*safe"):
        KerasModelDataset(filepath=str(tmp_path / "model.keras")).load()


def test_an_absent_model_is_an_error(tmp_path):
    with pytest.raises(DatasetError, match=r"model.keras: no such file; expected a .keras file"):
        KerasModelDataset(filepath=str(tmp_path / "model.keras")).load()


def test_a_folder_loads_as_its_path_and_is_not_saved(tmp_path):
    dataset = FolderDataset(path=str(tmp_path / "training"))
    assert dataset.load() == tmp_path / "training"
    assert dataset.exists() and str(tmp_path) in str(dataset)
    with pytest.raises(DatasetError, match="this folder is filled by the node that is given its path"):
        dataset.save("anything")
