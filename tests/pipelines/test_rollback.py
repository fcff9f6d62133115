"""`kedro run --pipeline=rollback`, against a store of its own. (What it does in each case: test_registry.)"""

from __future__ import annotations

import json
import logging

import pytest


@pytest.fixture
def client(project, monkeypatch):
    """The store of the project, with two versions, the second promoted over the first."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    client.create_registered_model("lumbar-unet")
    for former in ("none", "1"):
        client.create_model_version("lumbar-unet", "file:///somewhere", tags={"former_champion": former})
    client.set_registered_model_alias("lumbar-unet", "champion", "2")
    return client


def test_rollback_moves_the_alias_and_writes_down_what_it_did(kedro_run, client, project, caplog):
    with caplog.at_level(logging.INFO):
        catalog = kedro_run("rollback")
    record = catalog.load("rollback")
    assert record == json.loads((project / "data/08_reporting/rollback.json").read_text())
    assert (record["champion"], record["rolled_back"]) == ("1", "2")
    assert str(client.get_registered_model("lumbar-unet").aliases["champion"]) == "1"
    assert "lumbar-unet version 1 is champion again, in place of version 2. To undo it: mlflow.Mlflow" in caplog.text
    # It trains nothing: a run of its own would only stand among those that do.
    experiment = client.get_experiment_by_name("lumbarflow")
    assert not experiment or not client.search_runs([experiment.experiment_id])

    with pytest.raises(ValueError, match="version 1 was promoted when no version held the alias champion"):
        kedro_run("rollback")
    assert str(client.get_registered_model("lumbar-unet").aliases["champion"]) == "1"


def test_rollback_follows_the_configured_names(kedro_run, client):
    with pytest.raises(
        ValueError, match=r"no version of lumbar-unet holds the alias best; expected one to go back from"
    ):
        kedro_run("rollback", registration={"alias": "best"})
