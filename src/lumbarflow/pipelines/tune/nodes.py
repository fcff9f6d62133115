"""A search for better settings, on validation patients."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pandas as pd

from lumbarflow import tracking, tuning
from lumbarflow.model_input import ModelInput
from lumbarflow.provenance import mark_table

logger = logging.getLogger(__name__)


def search_settings(
    model_input: ModelInput,
    model: dict[str, Any],
    loss: dict[str, Any],
    training: dict[str, Any],
    augmentation: dict[str, Any],
    settings: dict[str, Any],
    folder: Path,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Try settings, each by a training that is an MLflow run below this one.

    Returns the table of trials (twice: for machines and for people) and the best one.
    """
    chosen = tuning.TuneSettings.read(settings)
    tracking.tag_manifest(model_input.manifest)
    base = {"model": model, "loss": loss, "training": training, "augmentation": augmentation}
    watch = tuning.Watch(run=tracking.child_run, epoch=tracking.log_epoch, end=_log_end, left=tracking.kill_run)
    tuned = tuning.tune(model_input, base, chosen, folder, watch)
    best = tuned.best
    tracking.log_metrics({"best_objective": best.objective, "trials": len(tuned.trials)})
    tracking.tag_run({"study": tuned.study, "best_trial": best.number})
    logger.info(
        "best is trial %d of %d, validation mean IoU %.4f: %s. To train with it, write what tune_best has under "
        "`parameters` (as it stands: JSON is YAML) to a new environment's folder, as conf/<new>/parameters_tuned.yml, "
        "or in place of the same settings of an environment that has them already, and run fit with that --env",
        *(best.number, len(tuned.trials), best.objective, tuning.in_words(best.parameters)),
    )
    content_hash = model_input.manifest["content_hash"]
    table = mark_table(tuning.trials_table(tuned.trials), content_hash=content_hash)
    record = {
        "parameters": tuning.nested(best.parameters),
        "objective": best.objective,
        "trial": best.number,
        "best_epoch": best.best_epoch,
        "study": tuned.study,
        "content_hash": content_hash,
    }
    return table, table, record


def _log_end(trial: tuning.Trial) -> None:
    tracking.log_metrics({"objective": trial.objective, "best_epoch": trial.best_epoch, "epochs": trial.epochs})
    # MLflow refuses tags of some thousand characters.
    tracking.tag_run({"state": trial.state} | ({"message": trial.message[:1000]} if trial.message else {}))
