"""What a run leaves in MLflow while it goes on: tags, and figures as they come.

Nothing happens without an active run.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping
from typing import Any

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


def git_commit(folder: str) -> dict[str, str]:
    """The commit that a folder stands at, and whether it was changed since; empty outside a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_changed": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}
