"""How the nodes that several comparisons share hand their settings on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lumbarflow import comparison, evaluation
from lumbarflow.pipelines.runs import predict_runs, score_runs

OFF, TURNED = ({"shift": 0.0, "rotation_degrees": degrees} for degrees in (0.0, 5.0))
SETTINGS = {"batch_size": 8, "test_time_augmentation": OFF, "metrics": {}, "intervals": {}}
PLAN = {
    "plain": {"entry": "net-1", "key": "1", "manifest": {"of": "plain"}},
    "turned": {"entry": "net-1", "key": "1", "manifest": {"of": "turned"}},
}
STORE = SimpleNamespace(root=SimpleNamespace(parent="."), record=lambda entry: {"weights": f"of {entry}"})


@pytest.fixture
def predicted(monkeypatch):
    """What `prediction_work` was asked for, and `model_input_of` a model input of no particular size."""
    asked = []

    def prediction_work(load, weights, network, model_input, series, settings, side):
        asked.append((weights, model_input, settings, side))
        return {"9_t1": f"work {len(asked)}"}

    monkeypatch.setattr(evaluation, "prediction_work", prediction_work)
    monkeypatch.setattr(comparison, "model_input_of", lambda run, prepared: run["manifest"]["of"])
    return asked


def test_a_run_may_predict_in_its_own_way(predicted):
    own = {"test_time_augmentation": TURNED}
    plan = PLAN | {"turned": PLAN["turned"] | {"evaluation": own}}
    work = predict_runs(plan, STORE, STORE, STORE, SETTINGS, side="validation")
    assert work == {"plain@9_t1": "work 1", "turned@9_t1": "work 2"}
    assert predicted == [
        ("of net-1", "plain", SETTINGS, "validation"),
        ("of net-1", "turned", SETTINGS | own, "validation"),
    ]


def test_the_side_is_that_of_the_test_patients_unless_said_otherwise(predicted, monkeypatch):
    predict_runs(PLAN, STORE, STORE, STORE, SETTINGS)
    assert [side for *_, side in predicted] == ["test", "test"]
    sides = []

    def predicted_cases(manifest, series, predictions, entry, side):
        sides.append((manifest["of"], side, entry("9_t1")))
        raise StopIteration

    monkeypatch.setattr(evaluation, "predicted_cases", predicted_cases)
    for more, side in (((), "test"), (("validation",), "validation")):
        with pytest.raises(StopIteration):
            score_runs(PLAN, STORE, STORE, SETTINGS, *more)
        assert sides[-1] == ("plain", side, "plain@9_t1")


def test_a_run_cannot_have_figures_of_its_own(predicted):
    plan = {"plain": PLAN["plain"] | {"evaluation": {"intervals": {"samples": 1}}}}
    with pytest.raises(
        ValueError, match=r"unknown setting plain.evaluation.intervals; expected some of \['batch_size'"
    ):
        predict_runs(plan, STORE, STORE, STORE, SETTINGS)
