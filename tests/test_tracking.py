from __future__ import annotations

import subprocess

import mlflow
import pytest

from lumbarflow import tracking


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """In a store of its own; creating its tables takes seconds."""
    former, folder = mlflow.get_tracking_uri(), tmp_path_factory.mktemp("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    yield mlflow.create_experiment("test", artifact_location=str(folder / "artefacts"))
    mlflow.set_tracking_uri(former)


@pytest.fixture
def run(experiment):
    with mlflow.start_run(experiment_id=experiment) as active:
        yield lambda: mlflow.MlflowClient().get_run(active.info.run_id).data


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
    with tracking.child_run("trial 1", {"loss.alpha": 0.5, "widths": [8, 16]}) as run_id:
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
    assert run_id == child.run_id


def test_an_error_that_leaves_a_child_run_marks_it_as_failed(run):
    with pytest.raises(KeyError, match="broken"), tracking.child_run("trial 1", {}) as run_id:
        raise KeyError("broken")
    assert mlflow.MlflowClient().get_run(run_id).info.status == "FAILED"
    assert mlflow.active_run().info.run_id != run_id


def test_a_run_whose_process_was_killed_is_marked_as_killed(run, caplog):
    client = mlflow.MlflowClient()
    experiment = mlflow.active_run().info.experiment_id
    open_run, ended = (client.create_run(experiment).info.run_id for _ in range(2))
    client.set_terminated(ended, "FAILED", end_time=1000)
    for run_id in (open_run, ended):
        tracking.kill_run(run_id)
        assert client.get_run(run_id).info.status == "KILLED"
    assert client.get_run(open_run).info.end_time > 1000 == client.get_run(ended).info.end_time
    assert not caplog.records
    # A run that somebody removed should not keep its search from going on.
    tracking.kill_run("0" * 32)
    assert "cannot be marked as killed" in caplog.text


def test_without_a_run_nothing_is_written():
    tracking.tag_run({"a": 1})
    tracking.log_metrics({"a": 1})
    with tracking.child_run("trial 1", {"a": 1}) as run_id:
        assert mlflow.active_run() is run_id is None
    tracking.kill_run("0" * 32)
    assert mlflow.active_run() is None


def test_the_commit_and_whether_something_changed_since(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        options = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        done = subprocess.run(["git", *options, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    monkeypatch.delenv("LUMBARFLOW_COMMIT", raising=False)
    assert tracking.git_commit(str(tmp_path)) == {}
    monkeypatch.setenv("LUMBARFLOW_COMMIT", "")  # an image that was built without
    assert tracking.git_commit(str(tmp_path)) == {}
    monkeypatch.setenv("LUMBARFLOW_COMMIT", "0123abc")
    assert tracking.git_commit(str(tmp_path)) == {"git_commit": "0123abc", "git_changed": "false"}
    monkeypatch.setenv("LUMBARFLOW_COMMIT", "0123abc-dirty")
    assert tracking.git_commit(str(tmp_path)) == {"git_commit": "0123abc", "git_changed": "true"}
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert tracking.git_commit(str(tmp_path)) == {"git_commit": commit, "git_changed": "false"}
    (tmp_path / "file").write_text("two")
    assert tracking.git_commit(str(tmp_path))["git_changed"] == "true"
