"""What a run leaves in MLflow while it goes on: tags, and figures as they come.

Nothing happens without an active run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

logger = logging.getLogger(__name__)

# What of a model input's manifest tells runs apart.
MANIFEST_TAGS = ("data_kind", "data_hash", "split_method", "split_hash", "content_hash", "leaky")


def tag_run(tags: Mapping[str, Any]) -> None:
    """Tag the active run; booleans become "true" and "false", as in the model registry."""
    import mlflow

    if mlflow.active_run():
        mlflow.set_tags({key: str(value).lower() if isinstance(value, bool) else value for key, value in tags.items()})


def tag_manifest(manifest: Mapping[str, Any]) -> None:
    """Tag the active run with what tells its data from others."""
    tag_run({name: manifest[name] for name in MANIFEST_TAGS})


def log_metrics(metrics: Mapping[str, Any], step: int | None = None) -> None:
    """Log the finite numbers among `metrics` to the active run."""
    import mlflow

    if mlflow.active_run():
        numbers = {
            key: float(value)
            for key, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }
        mlflow.log_metrics(numbers, step=step)


def log_epoch(row: Mapping[str, Any], prefix: str = "") -> None:
    """Log one row of the training history under its epoch; `prefix` tells several nets of one run apart."""
    log_metrics({f"{prefix}{key}": value for key, value in row.items() if key != "epoch"}, step=int(row["epoch"]))


@contextlib.contextmanager
def child_run(name: str, parameters: Mapping[str, Any]) -> Iterator[str | None]:
    """A run of its own below the active one, with these parameters: what is logged and tagged meanwhile goes to it.

    It gives the run's id, None without an active run. An exception that leaves it marks the run as failed.
    """
    import mlflow

    parent = mlflow.active_run()
    if parent is None:
        yield None
        return
    # Named: a nested run goes to the default experiment, whichever one its parent is in.
    with mlflow.start_run(run_name=name, nested=True, experiment_id=parent.info.experiment_id) as run:
        mlflow.log_params(dict(parameters))
        yield run.info.run_id


def kill_run(run_id: str) -> None:
    """Mark a run as killed whose process was, and so could not; it has ended then or, if it was still open, now."""
    import mlflow

    if mlflow.active_run():
        client = mlflow.MlflowClient()
        try:
            client.set_terminated(run_id, "KILLED", client.get_run(run_id).info.end_time)
        except mlflow.MlflowException as error:
            # Somebody removed it, or MLflow's store is another one now.
            logger.warning("run %s cannot be marked as killed: %s", run_id, error)


def end_killed() -> None:
    """End the runs of this process as killed: somebody stopped it, and MLflow would call them finished."""
    import mlflow

    while mlflow.active_run():
        mlflow.end_run("KILLED")


def git_commit(folder: str) -> dict[str, str]:
    """The commit that a folder stands at, and whether it was changed since.

    Outside a git checkout, such as in a container, LUMBARFLOW_COMMIT tells them: a hash, and "-dirty" after it if there
    were changes (`git describe --always --abbrev=40 --dirty --exclude='*'`). Empty where neither does.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_changed": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        commit = os.environ.get("LUMBARFLOW_COMMIT", "")
    if not commit:
        return {}
    return {"git_commit": commit.removesuffix("-dirty"), "git_changed": str(commit.endswith("-dirty")).lower()}
