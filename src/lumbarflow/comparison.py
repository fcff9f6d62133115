"""Several nets trained under one budget: each is trained once, and kept under what it was trained from.

A run is a name in tables, a manifest of model input (its split among it) and the settings of `training.fit`. Trained
nets are stored by the digest of all that determines them, so that pipelines that need the same net share it, and a
run that was interrupted goes on with the nets that are still missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from lumbarflow import models
from lumbarflow.files import read_json, value_digest
from lumbarflow.inference import check_test_time_augmentation
from lumbarflow.labels import CLASSES, FOREGROUND
from lumbarflow.metrics import MEAN_FOREGROUND
from lumbarflow.model_input import PREDICTION, ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.store import RECORD, SeriesStore, Work
from lumbarflow.tracking import git_commit
from lumbarflow.training_record import describe_training
from lumbarflow.training_settings import SECTIONS, effective, setting_names, training_code

NETWORK, HISTORY = "model.keras", "history.json"
COUNTS = ("n_cases", "n_surface", "n_nsd", "n_missing_prediction")


def plan_run(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run as JSON: the manifest, the settings, and the name that its trained net has in the store.

    Args:
        manifest: of the model input.
        settings: sections of `training.fit`, with `model.name`.
    Raises:
        ValueError: no model of that name, or settings that make no sense.
    """
    # A slip in the last of several nets' settings should not wait for the others to be trained.
    check_run(settings)
    key = net_key(manifest, effective(settings))
    name = settings["model"]["name"]
    return {"entry": f"{name}-{key[:16]}", "key": key, "manifest": dict(manifest), "settings": dict(settings)}


def check_run(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a model, or for settings of the model or the loss, that `training.fit` does not have."""
    known = setting_names(models.find(settings["model"]["name"]).build)
    check_names(settings["model"], ["name", *known["model"]], "model")
    check_names(settings.get("loss") or {}, known["loss"], "loss")


def net_key(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Hex digest of what a trained net depends on: code, Keras, data, and settings as `effective` gives them."""
    code = training_code(models.find(settings["model"]["name"]).build)["syntax"]
    return value_digest([code, version("keras"), manifest["content_hash"], settings])


def plan_rows(
    manifest: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, Mapping[str, Any] | str],
    section: str,
) -> dict[str, dict[str, Any]]:
    """A run for each row of a table of techniques.

    Args:
        manifest: of the model input.
        settings: sections of `training.fit` that all rows share.
        rows: name -> what the row changes, by section; also "evaluation", which changes how the net is used and not how
            it is trained. A text instead says why the row is not run.
        section: the parameters that hold the rows, for errors.
    Raises:
        ValueError: a row changes another section, or what `plan_run` refuses.
    """
    plan = {}
    for name, changes in rows.items():
        if isinstance(changes, str):
            continue
        check_names(changes, (*SECTIONS, "evaluation"), f"{section}.rows.{name}")
        own = {part: dict(settings[part]) | dict(changes.get(part) or {}) for part in SECTIONS}
        # Settings of one net are none of another's.
        if own["model"]["name"] != settings["model"]["name"]:
            own["model"] = dict(changes["model"])
        plan[name] = plan_run(manifest, own)
        if use := changes.get("evaluation"):
            check_names(use, PREDICTION, f"{section}.rows.{name}.evaluation")
            check_test_time_augmentation(use.get("test_time_augmentation", {}))
            plan[name]["evaluation"] = dict(use)
    return plan


def training_work(
    plan: Mapping[str, Mapping[str, Any]],
    prepared: SeriesStore,
    folder: Path,
    on_epoch: Callable[[str, dict[str, float]], None] | None = None,
) -> dict[str, Work]:
    """What a store of trained nets has to hold for these runs, and how to train what it lacks.

    Args:
        plan: run -> `plan_run`.
        prepared: the arrays that the manifests describe.
        folder: of checkpoints, for a training that is interrupted; it is cleared when the net is in the store.
        on_epoch: called after each epoch with the run's name and the epoch's history entry.
    """

    def train(name: str, run: Mapping[str, Any]) -> dict[str, Any]:
        from lumbarflow.networks import save_model
        from lumbarflow.training import fit

        model_input = model_input_of(run, prepared)
        follow = partial(on_epoch, name) if on_epoch else None
        result = fit(model_input, run["settings"], output=folder / run["entry"], on_epoch=follow)
        return {
            NETWORK: partial(save_model, result.model),
            HISTORY: result.history,
            RECORD: describe_training(result, model_input.manifest, run["settings"]) | git_commit("."),
        }

    work: dict[str, Work] = {}
    for name, run in plan.items():
        # Runs that differ in how their net is used share it, and it is trained under the first one's name.
        if run["entry"] not in work:
            cleared = partial(shutil.rmtree, folder / run["entry"], ignore_errors=True)
            work[run["entry"]] = Work(run["key"], partial(train, name, run), cleared)
    return work


def model_input_of(run: Mapping[str, Any], prepared: SeriesStore) -> ModelInput:
    """The model input of a run: its own manifest over the arrays that all runs share."""
    return ModelInput(prepared.root.parent, run["manifest"])


def screen_table(
    rows: Mapping[str, Mapping[str, Any] | str],
    plan: Mapping[str, Mapping[str, Any]],
    trained: SeriesStore,
    by_class: pd.DataFrame,
    reference: str,
) -> pd.DataFrame:
    """What each technique does to the figures of the validation patients, and which were not tried.

    Args:
        rows: as in `plan_rows`.
        plan: the runs of those that were to be tried.
        trained: their nets; a record with `not_run` has none.
        by_class: table of `evaluation.Evaluation` of the runs that have a net, with a column `run`.
        reference: the row that the others are compared with.
    Returns:
        row, outcome ("run", or why not), changes (JSON), epochs, best_epoch, val_mean_iou (of that epoch, at the net's
        size), dice of each foreground class and of their mean (pooled over the slices of the validation patients, on
        the native grid), difference (of that mean to the reference's), minutes (of training), slices_per_second (median
        over epochs), parameters. Rows in the order of their mean, those not run last, in their own order.
    """
    classes = [*(CLASSES[index] for index in FOREGROUND), MEAN_FOREGROUND]
    pooled = by_class[by_class["scope"] == "pooled"].set_index(["run", "class"])["dice"]
    table = []
    for name, changes in rows.items():
        row = {"row": name, "outcome": changes, "changes": None}
        if name in plan:
            record = trained.record(plan[name]["entry"])
            row |= {"outcome": record.get("not_run", "run"), "changes": json.dumps(changes, sort_keys=True)}
            if row["outcome"] == "run":
                history = pd.DataFrame(read_json(trained.path(plan[name]["entry"], HISTORY)))
                best = record["best_epoch"]
                row |= {"epochs": record["epochs"], "best_epoch": best}
                row |= {"val_mean_iou": history.loc[history["epoch"] == best, "val_mean_iou"].item()}
                row |= {f"dice_{label.replace(' ', '_')}": pooled.loc[(name, label)] for label in classes}
                row |= {"minutes": record["seconds"] / 60, "slices_per_second": history["slices_per_second"].median()}
                row |= {"parameters": record["parameters"]}
        table.append(row)
    means = f"dice_{MEAN_FOREGROUND.replace(' ', '_')}"
    columns = ["row", "outcome", "changes", "epochs", "best_epoch", "val_mean_iou"]
    columns += [f"dice_{label.replace(' ', '_')}" for label in classes]
    frame = pd.DataFrame(table).reindex(columns=[*columns, "minutes", "slices_per_second", "parameters"])
    there = frame.loc[frame["row"] == reference, means]
    frame.insert(columns.index(means) + 1, "difference", frame[means] - (there.item() if len(there) else float("nan")))
    return frame.sort_values(means, ascending=False, na_position="last", kind="stable", ignore_index=True)


def seeds_table(by_class: pd.DataFrame, names: Mapping[str, tuple[str, int]]) -> pd.DataFrame:
    """The figures of recipes that were trained with several seeds each, on the test patients.

    Args:
        by_class: table of `evaluation.Evaluation`, with a column `run`.
        names: run -> (recipe, seed).
    Returns:
        recipe, class (foreground classes, then their mean), seeds, and of the pooled Dice on the native grid and of the
        mean ASD over cases in mm: mean, standard deviation over seeds (n - 1; NaN of one seed), lowest and highest; and
        the sums over seeds of n_surface and n_missing_prediction, the cases with an ASD and those whose structure was
        missed: the fewer have one, the less it says.
    """
    rows = by_class.assign(recipe=[names[run][0] for run in by_class["run"]])
    order = [*(CLASSES[index] for index in FOREGROUND), MEAN_FOREGROUND]
    table = []
    for recipe in dict.fromkeys(recipe for recipe, _ in names.values()):
        for label in order:
            chosen = rows[(rows["recipe"] == recipe) & (rows["class"] == label)].set_index("scope")
            row = {"recipe": recipe, "class": label, "seeds": int((chosen.index == "pooled").sum())}
            for figure, scope in (("dice", "pooled"), ("asd_mm", "case mean")):
                values = chosen.loc[[scope], figure]
                row |= {f"{figure}_mean": values.mean(), f"{figure}_std": values.std(ddof=1)}
                row |= {f"{figure}_lowest": values.min(), f"{figure}_highest": values.max()}
            for count in ("n_surface", "n_missing_prediction"):
                row[count] = int(chosen.loc[["case mean"], count].sum())
            table.append(row)
    return pd.DataFrame(table)


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
        run, model (its title), parameters, epochs, best_epoch, minutes and precision (of training), class, dice with
        dice_low and dice_high (pooled over voxels; interval over patients), every surface figure as its mean
        over cases, and COUNTS: of how many cases.
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
    """The trained net of a run, as it is evaluated: see `networks.for_inference`."""
    from lumbarflow.networks import for_inference, load_model

    return for_inference(load_model(trained.path(run["entry"], NETWORK)))


def prediction_entry(run: str, series: str) -> str:
    """The name that a run's prediction of a series has in a store."""
    return f"{run}@{series}"
