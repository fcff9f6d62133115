"""The model registry: log a trained net as a self-contained model, and decide whether it becomes the champion.

It works with whatever tracking URI is set, and knows nothing of Kedro.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import lumbarflow
from lumbarflow.files import value_digest, write_json
from lumbarflow.inference import SETTINGS
from lumbarflow.labels import CLASSES, FOREGROUND
from lumbarflow.model_input import SIDES
from lumbarflow.tracking import MANIFEST_TAGS

if TYPE_CHECKING:
    from mlflow import ActiveRun, MlflowClient

logger = logging.getLogger(__name__)

# What a pulled model imports; SimpleITK because `lumbarflow.imaging`, which travels with it, reads volumes by it.
REQUIREMENTS = ("mlflow", "tensorflow", "keras", "numpy", "SimpleITK")

PATIENTS_FILE = "patients.json"
FORMAT_VERSION = 1
DATA_KINDS = ("real", "synthetic", "mixed")


@dataclass(frozen=True)
class ModelFacts:
    """What the promotion looks at; None where a version does not say.

    Attributes:
        name, version: of the registered model.
        data_kind: one of DATA_KINDS.
        leaky: whether slices of one patient stand on several sides of the split.
        data_hash, split_hash: of the scans with the meaning of their labels, and of who is on which side.
        mean_foreground_dice: see `lumbarflow.metrics`, on the test patients.
        trained_on: digests of the patients that chose its weights (training and validation).
        tested_on: digests of the test patients.
    """

    name: str
    version: str
    data_kind: str | None = None
    leaky: bool | None = None
    data_hash: str | None = None
    split_hash: str | None = None
    mean_foreground_dice: float | None = None
    trained_on: frozenset[str] | None = None
    tested_on: frozenset[str] | None = None

    def missing(self) -> list[str]:
        """Names of the facts that are absent or make no sense."""
        usable = {
            "data_kind": self.data_kind in DATA_KINDS,
            "leaky": self.leaky is not None,
            "data_hash": bool(self.data_hash),
            "split_hash": bool(self.split_hash),
            "mean_foreground_dice": self.mean_foreground_dice is not None and math.isfinite(self.mean_foreground_dice),
            "trained_on": bool(self.trained_on),
            "tested_on": bool(self.tested_on),
        }
        return [name for name, is_usable in usable.items() if not is_usable]


@dataclass(frozen=True)
class Decision:
    """Whether the alias moves to the candidate, and why, in plain words."""

    promote: bool
    reason: str


def decide_promotion(candidate: ModelFacts, champion: ModelFacts | None, alias: str) -> Decision:
    """Compare a new version with the one that holds the alias (None if there is none).

    Two figures are worth comparing only if both models were tested on the same patients and neither had seen them.
    """
    by_hand = (
        "To serve it all the same: mlflow.MlflowClient().set_registered_model_alias("
        f'"{candidate.name}", "{alias}", "{candidate.version}").'
    )

    def keep_back(reason: str, remedy: str = by_hand) -> Decision:
        return Decision(False, f"{reason}. {remedy}")

    if candidate.leaky:
        return keep_back(
            "Its slices were split without regard to patients, so its figures are too good",
            f"A leaky model never becomes {alias}: split by patient (split.method patient or official).",
        )
    if missing := candidate.missing():
        return keep_back(f"It lacks a usable {', '.join(missing)}", "Run the training and its evaluation again.")
    if seen := len(candidate.trained_on & candidate.tested_on):
        return keep_back(f"It was trained on {seen} of its own test patients", "Run preprocess and the rest again.")
    dice = candidate.mean_foreground_dice
    if champion is None:
        return Decision(True, f"There was no {alias}; its mean foreground Dice is {dice:.4f}.")

    holder = f"the {alias} (version {champion.version})"
    if missing := champion.missing():
        return keep_back(f"It cannot be compared with {holder}, which lacks a usable {', '.join(missing)}")
    if champion.data_kind == "real" and candidate.data_kind != "real":
        return keep_back(f"It was made from {candidate.data_kind} scans and {holder} from real ones")
    if candidate.data_hash != champion.data_hash:
        return keep_back(
            f"It was made from other data ({candidate.data_kind}, hash {candidate.data_hash[:8]}) than {holder} "
            f"({champion.data_kind}, hash {champion.data_hash[:8]}), so their figures cannot be compared"
        )
    if candidate.split_hash != champion.split_hash:
        return keep_back(
            f"It was made from another split (hash {candidate.split_hash[:8]}) than {holder} "
            f"(hash {champion.split_hash[:8]}), so their figures cannot be compared"
        )
    if seen := len(champion.trained_on & candidate.tested_on):
        return keep_back(
            f"The figure of {holder} is too good to compare: it was trained on {seen} of these test patients"
        )
    former = champion.mean_foreground_dice
    if dice < former:
        # As many digits as it takes to see the difference.
        digits = next((n for n in range(4, 17) if f"{dice:.{n}f}" != f"{former:.{n}f}"), 17)
        return keep_back(
            f"Its mean foreground Dice of {dice:.{digits}f} is lower than the {former:.{digits}f} of {holder}"
        )
    return Decision(
        True,
        f"Its mean foreground Dice of {dice:.4f} is not lower than the {former:.4f} of version {champion.version}, "
        "on the same test patients.",
    )


def register(
    model_path: str | Path,
    manifest: Mapping[str, Any],
    metrics: Iterable[Mapping[str, Any]],
    segmenter_settings: Mapping[str, Any],
    settings: Mapping[str, Any],
    run_id: str | None = None,
) -> dict[str, Any]:
    """Log a net as a new version of the registered model, and move the alias to it if it has earned it.

    Args:
        model_path: the `.keras` file.
        manifest: of the model input that it was trained on (see `lumbarflow.model_input`).
        metrics: rows of `metrics_by_class` as dictionaries; of the scope "pooled" they must hold the `dice` of every
            foreground class and of their mean (`lumbarflow.metrics.MEAN_FOREGROUND`).
        segmenter_settings: `lumbarflow.inference.SETTINGS`, as the net was evaluated with.
        settings: `name` of the registered model and `alias`.
        run_id: the run to log to; the active one by default.
    Returns:
        A JSON-able record: name, version, alias, promoted, reason, champion (the version that holds the alias now, or
        None), mean_foreground_dice (or None), run_id, model_uri, load (the line of Python that loads it).
    Raises:
        ValueError: no run, no such file, incomplete settings or metrics, a model that does not predict.
    """
    import mlflow

    name, alias = settings["name"], settings["alias"]
    client = mlflow.MlflowClient()
    with _run(run_id) as run, _quiet():
        candidate = log_model(model_path, manifest, metrics, segmenter_settings, name)
        champion = _champion(client, name, alias)
        decision = decide_promotion(candidate, champion, alias)
        verdict = {"promotion": "promoted" if decision.promote else "kept back", "promotion_reason": decision.reason}
        client.set_tag(run.info.run_id, "registered_version", f"{name} {candidate.version}")
        for key, value in verdict.items():
            client.set_tag(run.info.run_id, key, value)
            client.set_model_version_tag(name, candidate.version, key, value)
        if decision.promote:  # last, so that a champion always carries its reason
            client.set_registered_model_alias(name, alias, candidate.version)
    outcome = f"is now {alias}" if decision.promote else f"does not become {alias}"
    logger.info("%s version %s %s. %s", name, candidate.version, outcome, decision.reason)
    holder = candidate if decision.promote else champion
    reference = f"{name}@{alias}" if decision.promote else f"{name}/{candidate.version}"
    return {
        "name": name,
        "version": candidate.version,
        "alias": alias,
        "promoted": decision.promote,
        "reason": decision.reason,
        "champion": holder.version if holder else None,
        "mean_foreground_dice": _plain(candidate.mean_foreground_dice),
        "run_id": run.info.run_id,
        "model_uri": f"models:/{name}/{candidate.version}",
        "load": f'mlflow.pyfunc.load_model("models:/{reference}")',
    }


def log_model(
    model_path: str | Path,
    manifest: Mapping[str, Any],
    metrics: Iterable[Mapping[str, Any]],
    segmenter_settings: Mapping[str, Any],
    name: str,
) -> ModelFacts:
    """Log the net with its preprocessing to the active run and make it a new version of the registered model `name`.

    Arguments and errors as for `register`. Returns the facts of the new version, which its tags carry too.
    """
    import mlflow

    from lumbarflow import serving

    model_path = Path(model_path)
    if not model_path.is_file():
        raise ValueError(f"{model_path}: no such file; expected a trained net. Run: kedro run --pipeline=fit")
    if lacking := [key for key in SETTINGS if key not in segmenter_settings]:
        raise ValueError(f"the segmenter's settings lack {lacking}; expected {list(SETTINGS)}")
    metrics = [_plain(row) for row in metrics]
    dice = _pooled_dice(metrics)
    patients = patient_digests(manifest)
    run_id = mlflow.active_run().info.run_id
    origin = {"run_id": run_id, "lumbarflow_version": lumbarflow.__version__}
    origin |= {key: manifest[key] for key in MANIFEST_TAGS}
    record = {
        "format_version": FORMAT_VERSION,
        "settings": {key: segmenter_settings[key] for key in SETTINGS},
        "classes": dict(enumerate(CLASSES)),
        "origin": origin,
        "preparation": manifest["settings"],  # with the table of labels; no series or patients
        "metrics_by_class": metrics,
    }
    tags = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in origin.items()}
    # repr: a float comes back from it exactly, and equal figures must stay equal.
    tags |= {key: repr(value) for key, value in dice.items()}
    tags |= {f"{side}_patients": f"{len(digests)} ({value_digest(digests)})" for side, digests in patients.items()}

    with tempfile.TemporaryDirectory() as temporary:
        # Everything is copied to a temporary folder first: MLflow writes the paths that it is given into the model,
        # and they would tell of this machine's folders and users.
        files = Path(temporary)
        source = files / "lumbarflow"
        shutil.copytree(Path(lumbarflow.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(model_path, files / "network.keras")
        write_json(files / "segmenter.json", _plain(record))
        write_json(files / PATIENTS_FILE, patients)
        with _imports_leave_nothing():
            info = mlflow.pyfunc.log_model(
                name=name,
                # A string: MLflow takes a Path for a pickled object in what it says of the model's flavour.
                python_model=str(source / "serving.py"),
                artifacts={
                    serving.NETWORK: str(files / "network.keras"),
                    serving.SEGMENTER: str(files / "segmenter.json"),
                    "patients": str(files / PATIENTS_FILE),
                },
                code_paths=[str(source)],
                pip_requirements=[f"{library}=={installed_version(library)}" for library in REQUIREMENTS],
                signature=serving.SIGNATURE,
                input_example=_input_example(),
            )
            _check_it_predicts(info.model_uri)
    client = mlflow.MlflowClient()
    _ensure_registered(client, name)
    # Not mlflow.register_model, which prints; and here the version and its tags come into being together.
    version = client.create_model_version(name, info.model_uri, run_id=run_id, tags=tags, model_id=info.model_id)
    return _facts(name, str(version.version), tags, patients)


def patient_digests(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """Side -> sorted digests of its patients.

    They compare models without showing patients' names on the registry's pages. They are no secret: whoever has a
    name can look for its digest.
    """
    series = manifest["series"]
    return {
        side: sorted({value_digest(str(series[name]["patient"])) for name in manifest["sides"][side]}) for side in SIDES
    }


def _facts(
    name: str, version: str, tags: Mapping[str, str], patients: Mapping[str, Iterable[str]] | None
) -> ModelFacts:
    """The facts of a version from what `log_model` wrote; what is absent or unreadable becomes None."""
    try:
        dice = float(tags["mean_foreground_dice"])
    except (KeyError, ValueError):
        dice = None
    return ModelFacts(
        name=name,
        version=version,
        data_kind=tags.get("data_kind"),
        leaky={"true": True, "false": False}.get(tags.get("leaky")),
        data_hash=tags.get("data_hash"),
        split_hash=tags.get("split_hash"),
        mean_foreground_dice=dice,
        trained_on=frozenset(patients["train"]) | frozenset(patients["validation"]) if patients else None,
        tested_on=frozenset(patients["test"]) if patients else None,
    )


def _champion(client: MlflowClient, name: str, alias: str) -> ModelFacts | None:
    import mlflow

    # Listed, not looked up: an alias whose version is gone must not read as "no champion".
    version = client.get_registered_model(name).aliases.get(alias)
    if version is None:
        return None
    tags, patients = {}, None
    try:
        tags = client.get_model_version(name, version).tags
        read = mlflow.artifacts.load_dict(f"models:/{name}/{version}/artifacts/{PATIENTS_FILE}")
        patients = {side: read[side] for side in SIDES}
    except Exception as error:  # each artifact store has errors of its own; all of them mean "cannot be compared"
        logger.warning("cannot read what %s version %s was made from (%s)", name, version, str(error).split("\n")[0])
    return _facts(name, str(version), tags, patients)


def _check_it_predicts(model_uri: str) -> None:
    """MLflow tries the model on its example, but only warns if that fails; such a model must not be registered."""
    import mlflow

    slices, params = _input_example()
    try:
        mlflow.pyfunc.load_model(model_uri).predict(slices, params=params)
    except Exception as error:
        raise ValueError(
            f"the model was logged as {model_uri} but does not predict ({error}); it was not registered. "
            "Check the .keras file and the segmenter's settings."
        ) from error


def _pooled_dice(metrics: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Name of the tag -> Dice pooled over the test patients; NaN where there is none."""
    from lumbarflow.metrics import MEAN_FOREGROUND

    names = {f"dice_{CLASSES[index]}": CLASSES[index] for index in FOREGROUND}
    names["mean_foreground_dice"] = MEAN_FOREGROUND
    pooled = {row["class"]: row["dice"] for row in metrics if row["scope"] == "pooled"}
    if lacking := [name for name in names.values() if name not in pooled]:
        raise ValueError(f"metrics_by_class lacks {lacking} of the scope 'pooled'. Run: kedro run --pipeline=evaluate")
    return {tag: math.nan if pooled[name] is None else float(pooled[name]) for tag, name in names.items()}


def _input_example() -> tuple[np.ndarray, dict[str, Any]]:
    """A made-up series, a ramp without and with a disc: a model must not carry a patient's picture around."""
    rows, columns = np.mgrid[:24, :20]
    ramp, disc = rows + columns, 100 * (np.hypot(rows - 12, columns - 10) < 6)
    return np.stack([ramp, ramp + disc]).astype(np.int16), {"pixel_spacing_mm": [2.0, 1.5], "output": "labels"}


def _ensure_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _plain(value: Any) -> Any:
    """To what JSON has: NumPy's scalars become Python's, numbers that aren't finite None, keys strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _run(run_id: str | None) -> Iterator[ActiveRun]:
    """The run to log to: the active one, or the given one taken up again."""
    import mlflow

    active = mlflow.active_run()
    if active is not None and run_id in (None, active.info.run_id):
        yield active
    elif run_id is not None:
        with mlflow.start_run(run_id=run_id, nested=active is not None) as resumed:
            yield resumed
    else:
        raise ValueError("no MLflow run is active; expected one to log the model to. Start one or pass run_id.")


@contextmanager
def _imports_leave_nothing() -> Iterator[None]:
    """Loading a model puts its code at the head of sys.path, for good; here that is a folder about to be deleted.

    It also compiles that code into the model's own folder, where nothing but source shall lie.
    """
    path, compiles_nothing = sys.path, sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path, sys.dont_write_bytecode = path, compiles_nothing


@contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's progress bars, one for each of a dozen small files that it copies."""
    variable = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    before = os.environ.get(variable)
    os.environ[variable] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
