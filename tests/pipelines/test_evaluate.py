"""Nodes of evaluation and registration, called by themselves. (That they work as pipelines: test_train.)"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lumbarflow import registry
from lumbarflow.model_input import ModelInput
from lumbarflow.pipelines.evaluate.nodes import score_paper_protocol
from lumbarflow.pipelines.register.nodes import register_model
from lumbarflow.training_record import weights_digest

OFF, SHIFTED = ({"shift": shift, "rotation_degrees": 0.0} for shift in (0.0, 0.25))
EVALUATION = {"batch_size": 2, "test_time_augmentation": OFF, "metrics": {}, "intervals": {}}
PROTOCOL = {"dice": "hard", "stacked": False, "stack_seed": 0, "nsd_tolerance_pixels": 1.0}


class LeftNeighbour:
    """Sees the class in the grey value of the slice to the left."""

    input_shape = (None, 4, 6, 3)

    def predict(self, images, batch_size, verbose):
        return np.eye(4, dtype=np.float32)[images[..., 0].astype(int)]

    def get_weights(self):
        return [np.ones(2, np.float32)]


@pytest.fixture
def model_input(tmp_path) -> ModelInput:
    """One series of four slices, of which 1 to 3 are for testing; each one's label is the picture before it."""
    folder = tmp_path / "series/9_t1"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 4, (4, 4, 6))
    np.save(folder / "images.npy", images.astype(np.float16))
    np.save(folder / "labels.npy", images[[0, 0, 1, 2]].astype(np.uint8))
    preprocess = {"size": [4, 6], "keep_aspect": True, "normalisation": "z_score", "percentiles": [0, 100]}
    manifest = {
        "size": [4, 6],
        "series": {"9_t1": {"n_slices": 4, "patient": "9"}},
        "sides": {"train": {}, "validation": {}, "test": {"9_t1": [1, 2, 3]}},
        "settings": {"preprocess": preprocess},
        "content_hash": "c",
    }
    return ModelInput(tmp_path, manifest)


def test_the_papers_figures_are_of_the_neighbouring_slices_too(model_input):
    table, _ = score_paper_protocol(LeftNeighbour(), model_input, EVALUATION, PROTOCOL)
    assert table["n_slices"].tolist() == [3] * 4
    assert table["iou"].tolist() == [1] * 4


def test_the_papers_figures_are_made_with_test_time_augmentation(model_input):
    # Turned there and back, this picture of noise is blurred, and shows other classes than its own.
    turned = EVALUATION | {"test_time_augmentation": {"shift": 0.0, "rotation_degrees": 20.0}}
    table, _ = score_paper_protocol(LeftNeighbour(), model_input, turned, PROTOCOL)
    assert table["iou"].min() < 1


def test_a_model_is_registered_as_it_was_evaluated(model_input, monkeypatch):
    registered = []
    monkeypatch.setattr(
        registry, "register", lambda path, manifest, metrics, settings, names: registered.append(settings)
    )
    monkeypatch.setattr("lumbarflow.networks.save_model", lambda model, path: None)
    monkeypatch.setattr("lumbarflow.tracking.tag_manifest", lambda manifest: None)
    model, names = LeftNeighbour(), {"name": "lumbar-unet", "alias": "champion"}

    def register(evaluated, evaluation):
        summary = {"weights": weights_digest(model), "content_hash": "c", "settings": {"evaluation": evaluated}}
        register_model(model, model_input, pd.DataFrame(), summary, evaluation, names)

    shifted = EVALUATION | {"test_time_augmentation": SHIFTED}
    register(shifted, shifted)
    assert registered[0]["test_time_augmentation"] == SHIFTED
    assert registered[0]["size"] == [4, 6] and registered[0]["batch_size"] == 2
    with pytest.raises(ValueError, match=r"made with test_time_augmentation \{'shift': 0.25.*--pipeline=evaluate"):
        register(shifted, EVALUATION)
    # Figures from before the setting came to be were made without it.
    register({"batch_size": 8}, EVALUATION)
    with pytest.raises(ValueError, match=r"made with test_time_augmentation \{'shift': 0.0.*parameters say"):
        register({"batch_size": 8}, shifted)
    assert len(registered) == 2
