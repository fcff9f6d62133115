"""Several nets trained under one budget: each is trained once, and kept under what it was trained from.

A run is a name in tables, a manifest of model input (its split among it) and the settings of `training.fit`. Trained
nets are stored by the digest of all that determines them, so that pipelines that need the same net share it, and a
run that was interrupted goes on with the nets that are still missing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pandas as pd

from lumbarflow import models
from lumbarflow.files import code_digest, value_digest
from lumbarflow.labels import CLASSES, FOREGROUND
from lumbarflow.metrics import MEAN_FOREGROUND
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.provenance import describe_training
from lumbarflow.store import RECORD, SeriesStore, Work
from lumbarflow.tracking import git_commit

NETWORK, HISTORY = "model.keras", "history.json"
COUNTS = ("n_cases", "n_surface", "n_nsd", "n_missing_prediction")

# What a trained net depends on beside its data, its settings and the module that builds it. Named, not imported: these
# import Keras.
_CODE = ("training", "losses", "augmentation", "backend", "models", "models.levels")


def plan_run(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run as JSON: the manifest, the settings, and the name that its trained net has in the store.

    Args:
        manifest: of the model input.
        settings: sections of `training.fit`, with `model.name`.
    Raises:
        ValueError: no model of that name.
    """
    name = settings["model"]["name"]
    # A slip in the last of several nets' settings should not wait for the others to be trained.
    check_names(settings["model"], ["name", *inspect.signature(models.find(name).build).parameters], "model")
    modules = [f"lumbarflow.{module}" for module in _CODE] + [models.find(name).build.__module__]
    code = code_digest(find_spec(module).origin for module in modules)
    key = value_digest([code, version("keras"), manifest["content_hash"], settings])
    return {"entry": f"{name}-{key[:16]}", "key": key, "manifest": dict(manifest), "settings": dict(settings)}


def training_work(
    plan: Mapping[str, Mapping[str, Any]],
    prepared: SeriesStore,
    on_epoch: Callable[[str, dict[str, float]], None] | None = None,
) -> dict[str, Work]:
    """What a store of trained nets has to hold for these runs, and how to train what it lacks.

    Args:
        plan: run -> `plan_run`.
        prepared: the arrays that the manifests describe.
        on_epoch: called after each epoch with the run's name and the epoch's history entry.
    """

    def train(name: str, run: Mapping[str, Any]) -> dict[str, Any]:
        from lumbarflow.training import fit, save_model

        model_input = model_input_of(run, prepared)
        result = fit(model_input, run["settings"], on_epoch=partial(on_epoch, name) if on_epoch else None)
        return {
            NETWORK: partial(save_model, result.model),
            HISTORY: result.history,
            RECORD: describe_training(result, model_input.manifest, run["settings"]) | git_commit("."),
        }

    return {run["entry"]: Work(run["key"], partial(train, name, run)) for name, run in plan.items()}


def model_input_of(run: Mapping[str, Any], prepared: SeriesStore) -> ModelInput:
    """The model input of a run: its own manifest over the arrays that all runs share."""
    return ModelInput(prepared.root.parent, run["manifest"])


def leakage_table(by_class: pd.DataFrame, intervals: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """What the split by slice adds to each figure.

    Args:
        by_class, intervals: tables of `evaluation.Evaluation` of the runs "slice" and "patient", with a column `run`.
        columns: figures to compare.
    Returns:
        scope, class, metric, slice_split, patient_split, difference (slice minus patient), for the pooled figures and
        the means over slices: a case is whole under the split by patient only, so there are no means over cases. Then
        slice_low, slice_high, patient_low and patient_high, the bootstrap intervals, NaN where there are none, and
        slice_n and patient_n, the scored slices.
    """
    names = [*(CLASSES[index] for index in FOREGROUND), MEAN_FOREGROUND]
    limits = intervals.set_index(["run", "scope", "class", "metric"])[["low", "high"]]
    rows = []
    for scope in ("pooled", "slice mean"):
        chosen = by_class[by_class["scope"] == scope].set_index(["run", "class"])
        for metric in columns:
            for name in names:
                row = {"scope": scope, "class": name, "metric": metric}
                row |= {f"{run}_split": float(chosen.loc[(run, name), metric]) for run in ("slice", "patient")}
                row["difference"] = row["slice_split"] - row["patient_split"]
                for run in ("slice", "patient"):
                    interval = limits.reindex([(run, scope, name, metric)]).iloc[0]
                    row |= {f"{run}_{limit}": interval[limit] for limit in ("low", "high")}
                row |= {f"{run}_n": int(chosen.loc[(run, name), "n_slices"]) for run in ("slice", "patient")}
                rows.append(row)
    return pd.DataFrame(rows)


def baselines_table(
    plan: Mapping[str, Mapping[str, Any]], trained: SeriesStore, by_class: pd.DataFrame, intervals: pd.DataFrame
) -> pd.DataFrame:
    """Every run in the figures that baselines are compared by.

    Args:
        plan, trained: the runs and their nets.
        by_class, intervals: tables of `evaluation.Evaluation`, with a column `run`.
    Returns:
        run, model (its title), parameters, epochs, best_epoch, minutes (of training), precision (of its arithmetic),
        class, dice with dice_low and dice_high (pooled over voxels; interval over patients), every surface figure as
        its mean over cases, and COUNTS: of how many cases.
    """
    surfaces = [name for name in by_class if name == "asd_mm" or name.startswith(("hd95", "nsd"))]
    rows = []
    for run_name, run in plan.items():
        record = trained.record(run["entry"])
        facts = {
            "run": run_name,
            "model": models.find(run["settings"]["model"]["name"]).title,
            "parameters": record["parameters"],
            "epochs": record["epochs"],
            "best_epoch": record["best_epoch"],
            "minutes": record["seconds"] / 60,
            "precision": record["hardware"]["precision"],
        }
        figures = by_class[by_class["run"] == run_name].set_index(["scope", "class"])
        limits = intervals[
            (intervals["run"] == run_name) & (intervals["scope"] == "pooled") & (intervals["metric"] == "dice")
        ].set_index("class")
        for label in (*(CLASSES[index] for index in FOREGROUND), MEAN_FOREGROUND):
            rows.append(
                facts
                | {"class": label, "dice": figures.loc[("pooled", label), "dice"]}
                | {"dice_low": limits.loc[label, "low"], "dice_high": limits.loc[label, "high"]}
                | {name: figures.loc[("case mean", label), name] for name in (*surfaces, *COUNTS)}
            )
    return pd.DataFrame(rows)


def load_network(trained: SeriesStore, run: Mapping[str, Any]) -> Any:
    """The trained net of a run."""
    from lumbarflow.training import load_model

    return load_model(trained.path(run["entry"], NETWORK))


def prediction_entry(run: str, series: str) -> str:
    """The name that a run's prediction of a series has in a store."""
    return f"{run}@{series}"
