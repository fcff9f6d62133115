"""Nodes of evaluation and registration, called by themselves. (That they work as pipelines: test_train.)"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lumbarflow import registry, uncertainty
from lumbarflow.imaging import LabelMap, Orientation, Volume
from lumbarflow.model_input import ModelInput
from lumbarflow.pipelines.evaluate.nodes import draw_figures, score_cases, score_paper_protocol
from lumbarflow.pipelines.register.nodes import register_model
from lumbarflow.store import SeriesStore, Work
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


@pytest.fixture(autouse=True)
def nets_as_they_are(monkeypatch) -> None:
    """The nets here are no Keras models; test_networks.py has what becomes of those."""
    monkeypatch.setattr("lumbarflow.networks.for_inference", lambda model: model)


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


def beliefs(classes: np.ndarray, sure: float) -> np.ndarray:
    """Probabilities: `sure` of each pixel's class, the rest evenly of the others."""
    others = (1 - sure) / 3
    return (np.eye(4) * (sure - others) + others)[classes].astype(np.float32)


@pytest.fixture
def predicted(tmp_path) -> tuple[SeriesStore, SeriesStore, SeriesStore, ModelInput]:
    """Three cases of three patients, each worse found than the one before it, and with less conviction."""
    reference = np.zeros((2, 6, 8), np.uint8)
    reference[:, 0:4, 0:4], reference[:, 0:4, 5:7], reference[:, 5:, 0:4] = 1, 2, 3
    geometry = {"spacing_mm": (0.8, 0.5, 4.0), "origin_mm": (0, 0, 0), "direction": np.eye(3)}
    orientation = Orientation((0, 1, 2), (False, False, False)).to_dict()
    series, predictions, prepared = (SeriesStore(tmp_path / name) for name in ("series", "predictions", "prepared"))
    work = {store: {} for store in (series, predictions, prepared)}
    for missed, sure in enumerate((0.95, 0.85, 0.75)):
        found = reference.copy()
        found[:, 0:4, 0:missed] = 0
        contents = {
            series: {
                "record.json": {"patient": str(missed), "orientation": orientation},
                "labels.mha": LabelMap(reference, **geometry),
                "image.mha": Volume(reference * 9.0, **geometry),
            },
            predictions: {
                "record.json": {"model": "w"},
                "labels.mha": LabelMap(found, **geometry),
                "entropy.npy": uncertainty.entropy_sums(found, beliefs(found, sure)),
                "reliability.npy": uncertainty.reliability_counts(reference, beliefs(found, sure)),
            },
            prepared: {"record.json": {"ceiling": [np.diag([20, 16, 8, 4]).tolist()] * 2}},
        }
        for store, files in contents.items():
            work[store][f"{missed}_t1"] = Work("key", lambda files=files: files)
    for store in work:
        store.update(work[store])
    names = series.series()
    manifest = {
        "size": [6, 8],
        "series": {name: {"patient": name[0]} for name in names},
        "sides": {"test": {name: [0, 1] for name in names}},
        "content_hash": "c",
    }
    return predictions, series, prepared, ModelInput(tmp_path, manifest)


def test_scoring_tells_how_far_probabilities_and_entropy_can_be_believed(predicted, caplog):
    predictions, series, prepared, model_input = predicted
    metrics = {"nsd_tolerances_mm": [1.0], "detection_iou": 0.1, "minimum_component_mm3": 0.0}
    settings = EVALUATION | {"metrics": metrics, "intervals": {"samples": 5, "seed": 0}}
    with caplog.at_level("INFO"):
        scored = score_cases(predictions, series, prepared, model_input, settings, PROTOCOL, {"workers": 1})
    by_case, reliability, reliability_csv, confusion, summary = scored[1], *scored[7:]
    assert reliability.equals(reliability_csv)
    # The canal's 16 pixels in each case get 0.95, 0.85 and 0.75, and all are canal; the 80 others get a third of the
    # rest, and none is.
    canal = reliability[reliability["class"] == "canal"].set_index("low")
    assert canal.loc[[0.7, 0.8, 0.9], "count"].tolist() == [16, 16, 16]
    assert canal.loc[[0.7, 0.8, 0.9], "frequency"].tolist() == [1, 1, 1]
    error = (16 * (0.05 + 0.15 + 0.25) + 80 * (0.05 + 0.15 + 0.25) / 3) / (3 * 96)
    assert summary["calibration_error_canal"] == pytest.approx(error, rel=1e-5)
    # The vertebra is found ever worse, and with ever more entropy; the canal always whole.
    assert summary["entropy_dice_correlation_vertebrae"] == pytest.approx(-1)
    assert np.isnan(summary["entropy_dice_correlation_canal"])
    entropy = by_case[by_case["class"] == "canal"].set_index("series")["entropy"]
    assert entropy["0_t1"] == pytest.approx(-(0.95 * np.log(0.95) + 0.05 * np.log(0.05 / 3)) / np.log(4), rel=1e-5)
    assert f"canal: expected calibration error {error:.3f}; rank correlation of entropy" in caplog.text

    figures = draw_figures(predictions, series, by_case, model_input, confusion, reliability)
    assert len(figures) == 3
    assert figures[2].axes[1].get_title() == f"canal: calibration error {error:.3f}"


def test_a_model_is_registered_as_it_was_evaluated(model_input, monkeypatch):
    registered = []
    monkeypatch.setattr(
        registry, "register", lambda path, manifest, figures, settings, names: registered.append((figures, settings))
    )
    monkeypatch.setattr("lumbarflow.networks.save_model", lambda model, path: None)
    monkeypatch.setattr("lumbarflow.tracking.tag_manifest", lambda manifest: None)
    model = LeftNeighbour()
    names = {
        "name": "lumbar-unet",
        "alias": "champion",
        "promotion": {"class_tolerance": 0.01, "paired_test": {"alpha": 0.05}},
        "data": {},
    }
    tables = [pd.DataFrame({"table": [name]}) for name in ("class", "case", "intervals")]

    def register(evaluated, evaluation):
        summary = {"weights": weights_digest(model), "content_hash": "c", "settings": {"evaluation": evaluated}}
        register_model(model, model_input, *tables, summary, evaluation, names)

    shifted = EVALUATION | {"test_time_augmentation": SHIFTED}
    register(shifted, shifted)
    figures, settings = registered[0]
    assert settings["test_time_augmentation"] == SHIFTED
    assert settings["size"] == [4, 6] and settings["batch_size"] == 2
    rows = figures.by_class, figures.by_case, figures.intervals
    assert rows == ([{"table": "class"}], [{"table": "case"}], [{"table": "intervals"}])
    assert figures.weights == weights_digest(model)
    with pytest.raises(ValueError, match=r"made with test_time_augmentation \{'shift': 0.25.*--pipeline=evaluate"):
        register(shifted, EVALUATION)
    # Figures from before the setting came to be were made without it.
    register({"batch_size": 8}, EVALUATION)
    with pytest.raises(ValueError, match=r"made with test_time_augmentation \{'shift': 0.0.*parameters say"):
        register({"batch_size": 8}, shifted)
    assert len(registered) == 2
