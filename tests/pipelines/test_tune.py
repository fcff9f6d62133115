"""The search for settings, from raw volumes to a parameter file that fit takes."""

from __future__ import annotations

import json
import logging

import mlflow
import optuna
import pandas as pd
import pytest
import yaml

from lumbarflow import tracking

SETTINGS = {
    "preprocess": {"size": [32, 32]},
    "filter": {"minimum_classes": 3},
    "training": {"epochs": 2, "batch_size": 8},
}
SPACE = {
    "training.learning_rate": {"low": 1.0e-3, "high": 1.0e-2},
    "training.batch_size": None,
    "augmentation.rotation_degrees": None,
    "model.batch_norm_momentum": None,
}


pytestmark = pytest.mark.usefixtures("quick_nets")


def children(experiment="lumbarflow"):
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], order_by=["start_time ASC"])
    return [run for run in runs if "mlflow.parentRunId" in run.data.tags]


def test_a_search_is_resumed_and_pruned_and_its_best_can_be_used(kedro_run, raw, project, caplog, monkeypatch):
    epochs, log_epoch = [], tracking.log_epoch

    def interrupt(row, prefix=""):
        log_epoch(row, prefix)
        epochs.append(row["epoch"])
        if len(epochs) == 3:  # in the second trial's first epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "log_epoch", interrupt)
    tune = {"space": SPACE, "trials": 3, "pruner": {"startup_trials": 1, "warmup_epochs": 0}}
    with pytest.raises(KeyboardInterrupt):
        kedro_run("tune", raw_dir=str(raw), tune=tune, **SETTINGS)
    assert not (project / "data/08_reporting/tune_best.json").exists()
    interrupted = children()[-1]

    # The third trial, whichever it is, is pruned after its first epoch.
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: self.number == 3)
    with caplog.at_level(logging.INFO):
        catalog = kedro_run("tune", raw_dir=str(raw), tune=tune, **SETTINGS)
    assert "1 of 3 trials done" in caplog.text and "going on after epoch 1 of 2" in caplog.text
    assert epochs == [1, 2, 1, 1, 2, 1]

    table = catalog.load("tune_trials").set_index("number")
    assert table["state"].sort_index().tolist() == ["complete", "complete", "pruned"]
    assert table["epochs"].sort_index().tolist() == [2, 2, 1]
    assert table["objective"].is_monotonic_decreasing
    assert (table["content_hash"] == catalog.load("model_input").manifest["content_hash"]).all()
    assert pd.read_csv(project / "data/08_reporting/tune_trials.csv")["objective"].tolist() == pytest.approx(
        table["objective"].tolist()
    )
    assert not list((project / "data/06_models/tune").glob("tune-*"))

    best = catalog.load("tune_best")
    row = table[table["state"] == "complete"].iloc[0]
    assert (best["objective"], best["trial"], best["best_epoch"]) == (row["objective"], row.name, row["best_epoch"])
    assert best["study"].startswith("tune-")
    assert best["parameters"] == {
        "training": {"learning_rate": row["training.learning_rate"]},
        "loss": {"alpha": row["loss.alpha"]},
    }
    assert "conf/<new>/parameters_tuned.yml, or in place of the same settings" in caplog.text
    assert "see " in caplog.text

    # Every trial is a run below its search's; the interrupted one's second run has the whole curve.
    first, killed, second, third = children()
    assert (killed.info.run_id, killed.info.status) == (interrupted.info.run_id, "KILLED")
    assert killed.data.params == second.data.params
    for number, run in ((1, first), (2, second), (3, third)):
        row = table.loc[number]
        assert run.data.tags["mlflow.runName"] == f"trial {number}"
        assert (run.data.tags["state"], run.info.status) == (row["state"], "FINISHED")
        assert float(run.data.params["loss.alpha"]) == row["loss.alpha"]
        assert run.data.metrics["objective"] == row["objective"]
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "val_mean_iou")
        assert [metric.step for metric in history] == list(range(1, row["epochs"] + 1))
    assert third.data.tags["message"].startswith("after epoch 1")
    parent = mlflow.MlflowClient().get_run(second.data.tags["mlflow.parentRunId"])
    assert parent.data.metrics["best_objective"] == best["objective"]
    assert parent.data.tags["study"] == best["study"]
    assert second.data.tags["mlflow.parentRunId"] == third.data.tags["mlflow.parentRunId"]
    assert second.info.experiment_id == parent.info.experiment_id
    assert first.data.tags["mlflow.parentRunId"] != parent.info.run_id

    # As the log says: into a file of an environment, as it stands. The study is then still the same.
    small = yaml.safe_load((project / "conf/local/parameters_small.yml").read_text())
    del small["training"]["learning_rate"]  # Kedro takes a setting from one file of an environment
    (project / "conf/mine").mkdir()
    (project / "conf/mine/parameters_small.yml").write_text(yaml.safe_dump(small))
    (project / "conf/mine/parameters_tuned.yml").write_text(json.dumps(best["parameters"]))
    assert yaml.safe_load((project / "conf/mine/parameters_tuned.yml").read_text()) == best["parameters"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        kedro_run("tune", "mine", raw_dir=str(raw), tune=tune, **SETTINGS)
    assert "3 of 3 trials done" in caplog.text
    assert len(epochs) == 6


def test_a_misspelt_space_is_an_error_before_any_training(kedro_run, raw):
    with pytest.raises(ValueError, match=r"unknown setting loss.alfa; expected some of"):
        kedro_run("tune", raw_dir=str(raw), tune={"space": {"loss.alfa": {"low": 0.1, "high": 0.2}}}, **SETTINGS)
