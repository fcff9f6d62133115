"""The model registry: log a trained net as a self-contained model, decide whether it becomes the champion, undo that.

It works with whatever tracking URI is set, and knows nothing of Kedro.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import lumbarflow
from lumbarflow.files import value_digest, write_json
from lumbarflow.inference import SETTINGS, Segmenter
from lumbarflow.labels import CLASSES, FOREGROUND
from lumbarflow.model_card import model_card
from lumbarflow.model_input import SIDES
from lumbarflow.onnx_network import OnnxNetwork
from lumbarflow.parameters import check_names
from lumbarflow.promotion import DATA_KINDS, Decision, ModelFacts, by_hand, decide_promotion
from lumbarflow.tracking import MANIFEST_TAGS
from lumbarflow.training_record import weights_digest

if TYPE_CHECKING:
    from mlflow import ActiveRun, MlflowClient

logger = logging.getLogger(__name__)

# What a pulled model imports: SimpleITK and pydicom to read volumes, SciPy for what is measured on the masks. And what
# computes its net.
REQUIREMENTS = ("mlflow", "numpy", "scipy", "SimpleITK", "pydicom")
ONNX_RUNTIME, KERAS = ("onnxruntime",), ("keras", "tensorflow")

PATIENTS_FILE, CASES_FILE, CARD_FILE = "patients.json", "cases.json", "model_card.md"
FORMAT_VERSION = 1

# Tags of a version: who held the alias when it was promoted, and what rollbacks did.
FORMER, NO_FORMER, ROLLED_BACK, REINSTATED = "former_champion", "none", "rolled_back", "reinstated"

# Of a version's description, in characters. SQLite takes more, PostgreSQL does not.
DESCRIPTION_LIMIT = 5000


@dataclass(frozen=True)
class Figures:
    """What the evaluation says of a net; tables as rows, each a dictionary.

    Attributes:
        by_class: of `metrics_by_class`; of the scope "pooled" they must hold the `dice` of every foreground class and
            of their mean (`lumbarflow.metrics.MEAN_FOREGROUND`).
        by_case: of `metrics_by_case`: series, patient, class and dice of every test series.
        intervals: of `metrics_intervals`, with the pooled Dice of every foreground class.
        weights: digest of the net's weights.
    """

    by_class: Iterable[Mapping[str, Any]]
    by_case: Iterable[Mapping[str, Any]]
    intervals: Iterable[Mapping[str, Any]]
    weights: str


def check_settings(settings: Mapping[str, Any]) -> None:
    """Stop at a section `registration` of the parameters that `register` and `rollback` cannot follow.

    Raises:
        ValueError: names the setting, what it is and what was expected.
    """
    promotion, data = settings["promotion"], settings["data"]
    sections = {
        "registration": (settings, ("name", "alias", "promotion", "data")),
        "registration.promotion": (promotion, ("class_tolerance", "paired_test")),
        "registration.promotion.paired_test": (promotion["paired_test"], ("alpha",)),
        "registration.data": (data, ("synthetic", "real")),
    } | {f"registration.data.{kind}": (entry, ("licence", "attribution")) for kind, entry in data.items()}
    for section, (given, names) in sections.items():
        check_names(given, names, section)
    limits = {
        "promotion.class_tolerance": promotion["class_tolerance"],
        "promotion.paired_test.alpha": promotion["paired_test"]["alpha"],
    }
    for name, value in limits.items():
        if not 0 <= value <= 1:
            raise ValueError(f"registration.{name} is {value}; expected a number from 0 to 1")


def register(
    model_path: str | Path,
    manifest: Mapping[str, Any],
    figures: Figures,
    segmenter_settings: Mapping[str, Any],
    settings: Mapping[str, Any],
    run_id: str | None = None,
) -> dict[str, Any]:
    """Log a net as a new version of the registered model, and move the alias to it if it has earned it.

    Args:
        model_path: the `.keras` file.
        manifest: of the model input that it was trained on (see `lumbarflow.preparation.build_manifest`).
        figures: of its evaluation.
        segmenter_settings: `lumbarflow.inference.SETTINGS`, as the net was evaluated with.
        settings: the section `registration` of the parameters.
        run_id: the run to log to; the active one by default.
    Returns:
        A JSON-able record: name, version, alias, promoted, reason, champion (the version that holds the alias now, or
        None), mean_foreground_dice (or None), run_id, model_uri, load (the line of Python that loads it).
    Raises:
        ValueError: no run, no such file, incomplete settings or figures, a model that does not predict.
    """
    import mlflow

    check_settings(settings)
    name, alias = settings["name"], settings["alias"]
    client = mlflow.MlflowClient()
    with _run(run_id) as run, _quiet():
        candidate, record = log_model(model_path, manifest, figures, segmenter_settings, settings)
        candidate = replace(candidate, rolled_back=_rolled_back(client, name, figures.weights))
        client.set_tag(run.info.run_id, "registered_version", f"{name} {candidate.version}")
        while True:
            champion = _champion(client, name, alias)
            decision = decide_promotion(candidate, champion, alias, settings["promotion"])
            _tell(client, run.info.run_id, candidate, champion, decision, record)
            if not decision.promote:
                break
            # Someone else may have moved the alias while this one was compared with its former holder. MLflow has no
            # compare-and-set: between these calls another registration can still slip in, but hardly.
            former = champion.version if champion else None
            if _holder(client, name, alias) == former:
                client.set_model_version_tag(name, candidate.version, FORMER, former or NO_FORMER)
                client.set_registered_model_alias(name, alias, candidate.version)
                break
            logger.info("%s was given to another version meanwhile; comparing again", alias)
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


def _tell(
    client: MlflowClient,
    run_id: str,
    candidate: ModelFacts,
    champion: ModelFacts | None,
    decision: Decision,
    record: Mapping[str, Any],
) -> None:
    """Write a decision to the version and its run, before the alias moves: a champion always carries its reason."""
    name, version = candidate.name, candidate.version
    verdict = {"promotion": "promoted" if decision.promote else "kept back", "promotion_reason": decision.reason}
    for key, value in verdict.items():
        client.set_tag(run_id, key, value)
        client.set_model_version_tag(name, version, key, value)
    card = model_card(record, name, version, f"{verdict['promotion']}. {decision.reason}")
    client.update_model_version(name, version, description=_description(card))


def _description(card: str) -> str:
    """A card as the registry takes it; what does not fit stands in the file."""
    if len(card) <= DESCRIPTION_LIMIT:
        return card
    rest = f"\n\nThe rest stands in {CARD_FILE}, among the model's artefacts.\n"
    return card[: DESCRIPTION_LIMIT - len(rest)].rpartition("\n")[0] + rest


def rollback(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give the alias back to the version that held it when the present holder was promoted.

    The version that loses it keeps its figures and its verdict, and says that it was rolled back; its net, registered
    anew, is not promoted again. Called twice, it goes back two promotions.

    Args:
        settings: the section `registration` of the parameters.
    Returns:
        A JSON-able record: name, alias, champion (the version that holds the alias now), rolled_back (the one that held
        it), at (ISO 8601, UTC), undo (the line of Python that does), load.
    Raises:
        ValueError: no such model, no holder of the alias, no former one, or one that is gone.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    check_settings(settings)
    name, alias = settings["name"], settings["alias"]
    client = mlflow.MlflowClient()
    try:
        holder = _holder(client, name, alias)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(
            f"{_registry()} has no registered model {name}; expected one with a version that holds the alias {alias}. "
            "Register one (kedro run --pipeline=register), or let MLFLOW_TRACKING_URI name the registry that has it."
        ) from None
    any_version = f"To choose one: {by_hand(name, alias, 'VERSION')}."
    if holder is None:
        raise ValueError(f"no version of {name} holds the alias {alias}; expected one to go back from. {any_version}")
    former = _version_tags(client, name, holder).get(FORMER)
    if former is None:
        raise ValueError(
            f"{name} version {holder} holds the alias {alias} and does not say who held it before; expected its tag "
            f"{FORMER}, which a promotion writes: it was given the alias by hand, or registered before rollbacks came "
            f"to be. {any_version}"
        )
    if former == NO_FORMER:
        raise ValueError(
            f"{name} version {holder} was promoted when no version held the alias {alias}; expected a former one to "
            f"go back to. {any_version}"
        )
    try:
        tags = _version_tags(client, name, former)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ValueError(
            f"{name} version {former}, which held the alias {alias} before version {holder}, is gone from the "
            f"registry; expected it there to go back to. {any_version}"
        ) from None

    at = datetime.now(UTC).isoformat(timespec="seconds")
    if _holder(client, name, alias) != holder:
        raise ValueError(
            f"the alias {alias} of {name} left version {holder} while this went on; expected it to stay. Nothing was "
            "changed: look who holds it now, and run it again if it still has to go back."
        )
    # The alias last: if this breaks off before, the same command does it; after, it would go back once more.
    client.set_model_version_tag(name, holder, ROLLED_BACK, f"{at}, to version {former}")
    client.set_model_version_tag(name, former, REINSTATED, f"{at}, in place of version {holder}")
    if ROLLED_BACK in tags:
        client.delete_model_version_tag(name, former, ROLLED_BACK)
    client.set_registered_model_alias(name, alias, former)
    undo = by_hand(name, alias, holder)
    logger.info("%s version %s is %s again, in place of version %s. To undo it: %s", name, former, alias, holder, undo)
    return {
        "name": name,
        "alias": alias,
        "champion": former,
        "rolled_back": holder,
        "at": at,
        "undo": undo,
        "load": f'mlflow.pyfunc.load_model("models:/{name}@{alias}")',
    }


@dataclass(frozen=True)
class RegisteredModel:
    """A version of a registered model, ready to segment.

    Attributes:
        title: its name and version, for people.
        digest: of its weights, of what computes with them, and of how it prepares its input.
        segmenter: as it was evaluated.
    """

    title: str
    digest: str
    segmenter: Segmenter


def pull(model_uri: str) -> RegisteredModel:
    """Load a version from the registry.

    Its net and settings are the registered ones, and the code is this checkout's.

    Args:
        model_uri: `models:/<name>@<alias>` or `models:/<name>/<version>`.
    Raises:
        ValueError: another form, no such model, alias or version, or one that is not ours.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    match = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))", model_uri)
    if match is None:
        raise ValueError(f"model_uri is {model_uri!r}; expected models:/<name>@<alias> or models:/<name>/<version>.")
    name = match["name"]
    client = mlflow.MlflowClient()
    try:
        # The version is looked up first: the alias may move while the model loads.
        version = match["version"] or client.get_model_version_by_alias(name, match["alias"]).version
        with _imports_leave_nothing(), _quiet():
            loaded = mlflow.pyfunc.load_model(f"models:/{name}/{version}").unwrap_python_model()
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ValueError(
            f"{_registry()} has no {model_uri}; expected a registered model. Register one "
            "(kedro run --pipeline=train), or let MLFLOW_TRACKING_URI name the registry that has it."
        ) from None
    if not isinstance(segmenter := getattr(loaded, "segmenter", None), Segmenter):
        raise ValueError(f"{model_uri} holds a {type(loaded).__name__}; expected a model that lumbarflow registered.")
    network = segmenter.model
    # (Keras computes the nets of earlier versions, perhaps in bfloat16: their masks are not those of a graph.)
    weights = network.weights if isinstance(network, OnnxNetwork) else [weights_digest(network), "Keras"]
    digest = value_digest([weights, segmenter.settings])
    return RegisteredModel(f"{name} version {version}", digest, segmenter)


def _holder(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that holds the alias. Listed, not looked up: a version that is gone must not read as none."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)


def _version_tags(client: MlflowClient, name: str, version: str) -> dict[str, str]:
    return dict(client.get_model_version(name, version).tags)


def _rolled_back(client: MlflowClient, name: str, weights: str) -> str | None:
    """The version of these weights that was rolled back, if there is one."""
    same = client.search_model_versions(f"tags.weights = '{weights}'")
    return next(
        (str(version.version) for version in same if version.name == name and ROLLED_BACK in version.tags), None
    )


def _registry() -> str:
    """The registry's address as far as it may be shown: without user, password and query."""
    import mlflow

    return re.split("[?#]", _without_password(mlflow.get_registry_uri()))[0]


def _without_password(text: str) -> str:
    """Text whose addresses lack user and password, as MLflow's errors quote them.

    Not by urlsplit: SQLAlchemy takes passwords with ?, # or / in them, where that one sees the end of the host.
    """
    return re.sub(r"(?<=://)(?!/)\S*@", "", text)


def log_model(
    model_path: str | Path,
    manifest: Mapping[str, Any],
    figures: Figures,
    segmenter_settings: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> tuple[ModelFacts, dict[str, Any]]:
    """Log the net with its preprocessing to the active run and make it a new version of the registered model.

    Arguments and errors as for `register`. Returns the facts of the new version, which its tags and files carry too,
    and the record that its card is made from.
    """
    import mlflow

    from lumbarflow import serving

    model_path = Path(model_path)
    if not model_path.is_file():
        raise ValueError(f"{model_path}: no such file; expected a trained net. Run: kedro run --pipeline=fit")
    if lacking := [key for key in SETTINGS if key not in segmenter_settings]:
        raise ValueError(f"the segmenter's settings lack {lacking}; expected {list(SETTINGS)}")
    by_class, intervals = ([_plain(row) for row in rows] for rows in (figures.by_class, figures.intervals))
    dice = _pooled_dice(by_class)
    _check_intervals(intervals)
    patients, cases = patient_digests(manifest), case_digests(manifest, figures.by_case)
    name, client = settings["name"], mlflow.MlflowClient()
    run_id = mlflow.active_run().info.run_id
    run_tags = client.get_run(run_id).data.tags
    origin = {"run_id": run_id, "lumbarflow_version": lumbarflow.__version__, "weights": figures.weights}
    origin |= {key: run_tags[key] for key in ("git_commit", "git_changed") if key in run_tags}
    origin |= {key: manifest[key] for key in MANIFEST_TAGS}
    kinds = DATA_KINDS[:2] if manifest["data_kind"] == "mixed" else (manifest["data_kind"],)
    record = _plain(
        {
            "format_version": FORMAT_VERSION,
            "settings": {key: segmenter_settings[key] for key in SETTINGS},
            "classes": dict(enumerate(CLASSES)),
            "origin": origin,
            "preparation": manifest["settings"],  # with the table of labels; no series or patients
            "cohort": cohort_summary(manifest),
            "data": {kind: settings["data"][kind] for kind in kinds},
            "metrics_by_class": by_class,
            "metrics_intervals": intervals,
        }
    )
    tags = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in origin.items()}
    # repr: a float comes back from it exactly, and equal figures must stay equal.
    tags |= {key: repr(value) for key, value in dice.items()}
    tags |= {f"{side}_patients": f"{len(digests)} ({value_digest(digests)})" for side, digests in patients.items()}
    card = model_card(record, name)

    with tempfile.TemporaryDirectory() as temporary:
        # Everything is copied to a temporary folder first: MLflow writes the paths that it is given into the model,
        # and they would tell of this machine's folders and users.
        files = Path(temporary)
        source = files / "lumbarflow"
        shutil.copytree(Path(lumbarflow.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
        keras_file = files / "network.keras"
        shutil.copyfile(model_path, keras_file)
        graph = _graph(model_path)
        if graph is None:
            network, computes = keras_file, KERAS
        else:
            network, computes = files / "network.onnx", ONNX_RUNTIME
            network.write_bytes(graph)
        write_json(files / "segmenter.json", record)
        write_json(files / PATIENTS_FILE, patients)
        write_json(files / CASES_FILE, cases)
        (files / CARD_FILE).write_text(card, encoding="utf-8")
        with _imports_leave_nothing():
            info = mlflow.pyfunc.log_model(
                name=name,
                # A string: MLflow takes a Path for a pickled object in what it says of the model's flavour.
                python_model=str(source / "serving.py"),
                artifacts={
                    serving.NETWORK: str(network),
                    # What computes cannot be trained further; this can.
                    "keras": str(keras_file),
                    serving.SEGMENTER: str(files / "segmenter.json"),
                    "patients": str(files / PATIENTS_FILE),
                    "cases": str(files / CASES_FILE),
                    "card": str(files / CARD_FILE),
                },
                code_paths=[str(source)],
                pip_requirements=[f"{library}=={installed_version(library)}" for library in REQUIREMENTS + computes],
                signature=serving.SIGNATURE,
                input_example=_input_example(),
            )
            _check_it_predicts(info.model_uri)
    _ensure_registered(client, name)
    # Not mlflow.register_model, which prints; and here the version and its tags come into being together.
    version = client.create_model_version(
        name, info.model_uri, run_id=run_id, tags=tags, model_id=info.model_id, description=_description(card)
    )
    return _facts(name, str(version.version), tags, patients, cases), record


def _graph(model_path: Path) -> bytes | None:
    """The net as it was evaluated, see `networks.for_inference`; None if that is as it is."""
    from lumbarflow.networks import load_model, to_onnx

    try:
        model = load_model(model_path)
    except Exception as error:  # zipfile's, h5py's, Keras's, ...
        raise ValueError(
            f"{model_path}: not readable as a net ({error}); expected a .keras file. It was not registered. Run: "
            "kedro run --pipeline=fit"
        ) from error
    try:
        return to_onnx(model)
    except ValueError:
        return None


def cohort_summary(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How many were trained and tested on, of what kind; nobody's name.

    Returns:
        sides: side -> numbers of patients, series and slices; sequences: sequence -> number of series of all sides;
        pixel_spacing_mm: smallest and largest [row, column] pixel of their slices as the net sees them.
    """
    series, sides = manifest["series"], manifest["sides"]
    used = {name for side in SIDES for name in sides[side]}
    sequences = [series[name]["sequence"] for name in sorted(used)]
    spacings = np.array([series[name]["pixel_spacing_mm"] for name in sorted(used)])
    return {
        "sides": {
            side: {
                "patients": len({series[name]["patient"] for name in sides[side]}),
                "series": len(sides[side]),
                "slices": sum(map(len, sides[side].values())),
            }
            for side in SIDES
        },
        "sequences": {sequence: sequences.count(sequence) for sequence in sorted(set(sequences))},
        "pixel_spacing_mm": [spacings.min(axis=0).tolist(), spacings.max(axis=0).tolist()],
    }


def patient_digests(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """Side -> sorted digests of its patients.

    They compare models without showing patients' names on the registry's pages. They are no secret: whoever has a
    name can look for its digest.
    """
    series = manifest["series"]
    return {
        side: sorted({value_digest(str(series[name]["patient"])) for name in manifest["sides"][side]}) for side in SIDES
    }


def case_digests(manifest: Mapping[str, Any], by_case: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Digest of a test series -> `patient` (digest) and `dice` (foreground class -> Dice, None where there is none).

    Digests for the same reason as in `patient_digests`.

    Args:
        by_case: see `Figures`.
    Raises:
        ValueError: the table is not of the manifest's test series, or lacks a class of one.
    """
    dice = {(row["series"], row["class"]): row["dice"] for row in by_case}
    tested, found = set(manifest["sides"]["test"]), {series for series, _ in dice}
    names = [CLASSES[i] for i in FOREGROUND]
    whole = all((series, name) in dice for series in tested for name in names)
    if found != tested or not whole:
        raise ValueError(
            f"metrics_by_case has {len(found & tested)} of the {len(tested)} test series and {len(found - tested)} "
            f"others; expected the test series, each with {', '.join(names)}. Run: kedro run --pipeline=evaluate"
        )
    return {
        value_digest(series): {
            "patient": value_digest(str(manifest["series"][series]["patient"])),
            "dice": {name: _plain(dice[series, name]) for name in names},
        }
        for series in sorted(tested)
    }


def _facts(
    name: str,
    version: str,
    tags: Mapping[str, str],
    patients: Mapping[str, Iterable[str]] | None,
    cases: Mapping[str, Mapping[str, Any]] | None,
) -> ModelFacts:
    """The facts of a version from what `log_model` wrote; what is absent or unreadable becomes None or empty."""

    def number(tag: str) -> float | None:
        try:
            return float(tags[tag])
        except (KeyError, ValueError):
            return None

    class_dice = {CLASSES[i]: number(f"dice_{CLASSES[i]}") for i in FOREGROUND}
    return ModelFacts(
        name=name,
        version=version,
        data_kind=tags.get("data_kind"),
        leaky={"true": True, "false": False}.get(tags.get("leaky")),
        data_hash=tags.get("data_hash"),
        split_hash=tags.get("split_hash"),
        mean_foreground_dice=number("mean_foreground_dice"),
        class_dice={key: value for key, value in class_dice.items() if value is not None},
        case_dice={(case["patient"], series): _mean(case["dice"].values()) for series, case in (cases or {}).items()},
        trained_on=frozenset(patients["train"]) | frozenset(patients["validation"]) if patients else None,
        tested_on=frozenset(patients["test"]) if patients else None,
    )


def _mean(dice: Iterable[float | None]) -> float:
    there = [value for value in dice if value is not None]
    return sum(there) / len(there) if there else math.nan


def _champion(client: MlflowClient, name: str, alias: str) -> ModelFacts | None:
    import mlflow

    version = _holder(client, name, alias)
    if version is None:
        return None
    tags, patients, cases = {}, None, None
    artefacts = f"models:/{name}/{version}/artifacts"
    try:
        tags = _version_tags(client, name, version)
        read = mlflow.artifacts.load_dict(f"{artefacts}/{PATIENTS_FILE}")
        patients = {side: read[side] for side in SIDES}
        cases = mlflow.artifacts.load_dict(f"{artefacts}/{CASES_FILE}")
    except Exception as error:  # each artifact store has errors of its own; all of them mean "cannot be compared"
        why = _without_password(str(error).split("\n")[0])
        logger.warning("cannot read what %s version %s was made from (%s)", name, version, why)
    return _facts(name, version, tags, patients, cases)


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


def _check_intervals(intervals: Iterable[Mapping[str, Any]]) -> None:
    there = {row["class"] for row in intervals if row["scope"] == "pooled" and row["metric"] == "dice"}
    if lacking := [CLASSES[i] for i in FOREGROUND if CLASSES[i] not in there]:
        raise ValueError(
            f"metrics_intervals lacks the Dice of {lacking} of the scope 'pooled'. Run: kedro run --pipeline=evaluate"
        )


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
