"""What the configuration files ask of the machine they are read on."""

from __future__ import annotations

import logging
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
        _quiet_viz()
    warnings.filterwarnings("ignore", message="Option '--pipeline' is deprecated")


def prepare_mlflow_ui() -> None:
    """Let `kedro mlflow ui` find the `mlflow` of its own environment, and start what one person needs.

    kedro-mlflow takes the first `mlflow` on the PATH, where there is none, or another one, unless the environment is
    activated. MLflow would start four workers and, for jobs of language models, half a dozen more processes.
    """
    if sys.argv[1:3] != ["mlflow", "ui"]:
        return
    here = str(Path(sys.executable).parent)  # not resolved: in a virtual environment it is a link
    os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])
    os.environ.setdefault("MLFLOW_WORKERS", "1")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")


def _quiet_viz() -> None:
    """Let Kedro-Viz ask nobody for its newest version, and complain of no preview that can't be there yet."""
    from kedro_viz import __version__
    from kedro_viz.integrations import pypi
    from packaging.version import parse

    # The server's process has imported the function before it reads our settings.
    for name in (pypi.__name__, "kedro_viz.api.rest.responses.version"):
        if name in sys.modules:
            sys.modules[name].get_latest_version = lambda: parse(__version__)
    logging.getLogger("kedro_viz.models.flowchart.node_metadata").addFilter(_is_no_absent_file)
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")  # FastAPI's, to Kedro-Viz


def _is_no_absent_file(record: logging.LogRecord) -> bool:
    """False for what Kedro-Viz says of the preview of a file that its pipeline has not made yet."""
    errors = [value for value in record.args or () if isinstance(value, Exception)]
    return not any(isinstance(cause, FileNotFoundError) for error in errors for cause in (error, error.__cause__))


def data_root() -> str:
    """Where all folders lie that are not named one by one: the variable LUMBARFLOW_DATA, or `data` in the project."""
    return os.path.expanduser(os.environ.get("LUMBARFLOW_DATA", "").rstrip("/") or "data")


def project_path(name: str | int) -> str:
    """The absolute path of `name`, relative to the project's root from whichever of its folders Kedro is called.

    `~` is the home folder; a folder named by a number arrives as one; an address on another storage is left as it is.
    """
    if "://" in str(name):
        return str(name).rstrip("/")
    root = find_kedro_project(Path.cwd()) or Path.cwd()
    return Path(os.path.normpath(Path(root) / Path(str(name)).expanduser())).as_posix()


def artifact_location() -> str | None:
    """Where MLflow keeps artefacts: in the project beside its SQLite file, or wherever a named server keeps them."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else project_path("mlruns")
