from __future__ import annotations

import subprocess

import mlflow
import pytest

from lumbarflow import tracking


@pytest.fixture
def run(tmp_path):
    former = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = mlflow.create_experiment("test", artifact_location=str(tmp_path / "artefacts"))
    with mlflow.start_run(experiment_id=experiment) as active:
        yield lambda: mlflow.MlflowClient().get_run(active.info.run_id).data
    mlflow.set_tracking_uri(former)


def test_tags_and_figures_go_to_the_active_run(run):
    tracking.tag_run({"leaky": True, "data_hash": "abc", "n": 3})
    tracking.log_metrics({"dice": 0.5, "slices": 7, "name": "t2", "nan": float("nan"), "flag": True})
    data = run()
    assert {key: data.tags[key] for key in ("leaky", "data_hash", "n")} == {
        "leaky": "true",
        "data_hash": "abc",
        "n": "3",
    }
    assert data.metrics == {"dice": 0.5, "slices": 7.0}


def test_an_epoch_is_the_step_of_its_figures(run):
    tracking.log_epoch({"epoch": 1, "loss": 0.9})
    tracking.log_epoch({"epoch": 2, "loss": 0.4})
    run_id = mlflow.active_run().info.run_id
    history = mlflow.MlflowClient().get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.9), (2, 0.4)]


def test_a_child_run_takes_what_is_logged_meanwhile(run):
    with tracking.child_run("trial 1", {"loss.alpha": 0.5, "widths": [8, 16]}):
        tracking.log_epoch({"epoch": 1, "loss": 0.9})
        tracking.tag_run({"state": "complete"})
        child = mlflow.active_run().info
    tracking.log_metrics({"dice": 0.5})
    parent, data = mlflow.active_run().info, mlflow.MlflowClient().get_run(child.run_id).data
    assert data.params == {"loss.alpha": "0.5", "widths": "[8, 16]"}
    assert data.metrics == {"loss": 0.9} and data.tags["state"] == "complete"
    assert (data.tags["mlflow.runName"], data.tags["mlflow.parentRunId"]) == ("trial 1", parent.run_id)
    assert child.experiment_id == parent.experiment_id != "0"
    assert run().metrics == {"dice": 0.5} and not run().params
    assert mlflow.MlflowClient().get_run(child.run_id).info.status == "FINISHED"


def test_without_a_run_nothing_is_written():
    tracking.tag_run({"a": 1})
    tracking.log_metrics({"a": 1})
    with tracking.child_run("trial 1", {"a": 1}):
        assert mlflow.active_run() is None
    assert mlflow.active_run() is None


def test_the_commit_and_whether_something_changed_since(tmp_path):
    def git(*arguments: str) -> str:
        options = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        done = subprocess.run(["git", *options, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert tracking.git_commit(str(tmp_path)) == {}
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert tracking.git_commit(str(tmp_path)) == {"git_commit": commit, "git_changed": "false"}
    (tmp_path / "file").write_text("two")
    assert tracking.git_commit(str(tmp_path))["git_changed"] == "true"
