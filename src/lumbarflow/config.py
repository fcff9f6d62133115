"""What the configuration files ask of the machine they are read on."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from kedro.utils import find_kedro_project


def quiet_tools() -> None:
    """Keep off the terminal what tools say about themselves on every command.

    That is how a class of kedro-mlflow is written, and that `--pipeline` has a longer form; our documentation uses it
    because it names one pipeline.
    """
    # MLflow asks for this warning in a filter of its own, so none of ours would stop it; recording it does.
    with warnings.catch_warnings(record=True):
        import kedro_mlflow.mlflow  # noqa: F401
    if "viz" in sys.argv:
        # Kedro-Viz asks the package index for its newest version at every start: nothing phones home.
        from kedro_viz.integrations import pypi

        pypi.get_latest_version = lambda: None
    warnings.filterwarnings("ignore", message="Option '--pipeline' is deprecated")


def project_path(name: str | int) -> str:
    """The absolute path of `name`, relative to the project's root from whichever of its folders Kedro is called.

    `~` is the home folder; a folder named by a number arrives as one.
    """
    root = find_kedro_project(Path.cwd()) or Path.cwd()
    return Path(os.path.normpath(Path(root) / Path(str(name)).expanduser())).as_posix()


def artifact_location() -> str | None:
    """Where MLflow keeps artefacts: in the project beside its SQLite file, or wherever a named server keeps them."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else project_path("mlruns")
