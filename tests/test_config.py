"""Configuration asks of the machine what it should, and of nobody else's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lumbarflow.config import prepare_mlflow_ui

NAMES = ("MLFLOW_WORKERS", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION")


@pytest.fixture
def shell(monkeypatch) -> None:
    """Of somebody who has not activated the environment."""
    monkeypatch.setenv("PATH", "/usr/bin")
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back to what it was, or taken away
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("shell")
def test_the_ui_is_mlflows_of_this_environment_and_one_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kedro", "mlflow", "ui", "--port=5001"])
    prepare_mlflow_ui()
    first, *others = os.environ["PATH"].split(os.pathsep)
    assert first == str(Path(sys.executable).parent) and others == ["/usr/bin"]
    assert [os.environ[name] for name in NAMES] == ["1", "false"]


@pytest.mark.usefixtures("shell")
def test_what_somebody_has_said_of_the_ui_stays(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kedro", "mlflow", "ui"])
    for name, value in zip(NAMES, ("3", "true"), strict=True):
        monkeypatch.setenv(name, value)
    prepare_mlflow_ui()
    assert [os.environ[name] for name in NAMES] == ["3", "true"]


@pytest.mark.usefixtures("shell")
@pytest.mark.parametrize("command", [["run", "--pipeline=train"], ["mlflow", "init"], [], ["viz", "run"]])
def test_other_commands_find_their_shell_as_it_was(monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["kedro", *command])
    before = dict(os.environ)
    prepare_mlflow_ui()
    assert dict(os.environ) == before
