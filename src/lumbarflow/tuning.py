"""A search for better settings of `training.fit`, by Optuna, on the sides "train" and "validation" alone.

    tuning = tune(ModelInput.open("data/05_model_input"), base, TuneSettings.read(settings), "data/06_models/tune")
    tuning.best.parameters

Every trial is a whole training. The study lies in a SQLite file, under a name that holds the digest of all that makes
trials comparable: a search that was interrupted goes on where it stood, one with other data or another space is
another study. What a trial is given to try depends on the trials before it, on the seed and on its number, never on how
often the search was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import logging
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lumbarflow import comparison, models
from lumbarflow.augmentation import AugmentationSettings
from lumbarflow.files import value_digest
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.training_settings import SECTIONS, TrainingSettings, section

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

OBJECTIVE = "val_mean_iou"
STUDIES, LOCK = "tune.db", "tune.lock"
COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
RANGE, CHOICES = ("low", "high", "log", "step"), ("choices",)
PRUNER = ("startup_trials", "warmup_epochs")
NOT_SEARCHED = tuple(f"training.{name}" for name in ("seed", "max_minutes", "devices", "workers", "resume"))

# A trial's attributes in the study: its epochs so far, and how it ended. One that failed without the latter was cut
# short, and is tried again.
_HISTORY, _OUTCOME = "history", "outcome"

Parameters = dict[str, Any]
Report = Callable[[dict[str, float]], None]


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """The section `tune` of the parameters.

    Attributes:
        space: "section.setting" of `training.fit` -> what to try: `low` and `high` (both included; whole numbers if
            both are), with `log` (bool) or `step`; or `choices`. None leaves a setting out.
        trials: how many in total, over all invocations; pruned and failed ones count.
        seed: of the suggestions.
        max_minutes: no trial starts later than this after the invocation's start; None sets no limit.
        pruner: None, or `startup_trials`: none is pruned before so many are complete, and `warmup_epochs`: nor in its
            first epochs. After those a trial ends once its best epoch is below the median of the complete ones' figures
            at the same epoch.
    Raises:
        ValueError: a value out of range, an empty space. What the space holds is checked by `tune`.
    """

    space: Mapping[str, Mapping[str, Any]]
    trials: int = 20
    seed: int = 0
    max_minutes: float | None = None
    pruner: Mapping[str, int] | None = dataclasses.field(
        default_factory=lambda: {"startup_trials": 5, "warmup_epochs": 5}
    )

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> TuneSettings:
        """From parameters. Raises ValueError for an unknown setting too."""
        check_names(settings, (field.name for field in dataclasses.fields(cls)), "tune")
        return cls(**({"space": {}} | dict(settings)))

    def __post_init__(self):
        chosen = {name: dict(values) for name, values in (self.space or {}).items() if values is not None}
        object.__setattr__(self, "space", chosen)
        if not chosen:
            raise ValueError(
                "tune.space is empty; expected at least one setting to search, "
                "e.g. training.learning_rate: {low: 3.0e-4, high: 3.0e-3, log: true}."
            )
        for name in ("trials", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"tune.{name} is {value}; expected more than 0.")
        if self.seed < 0:
            raise ValueError(f"tune.seed is {self.seed}; expected 0 or more.")
        for name, value in (self.pruner or {}).items():
            check_names(self.pruner, PRUNER, "tune.pruner")
            if value < 0:
                raise ValueError(f"tune.pruner.{name} is {value}; expected 0 or more.")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial that has ended.

    Attributes:
        number: from 1, in the order of the search.
        state: COMPLETE, PRUNED or FAILED.
        parameters: dotted name -> value.
        objective: val_mean_iou of its best epoch, None for a failed trial. A pruned one's is of the epochs it had.
        best_epoch: from 1; None for a failed trial.
        epochs: how many it was trained for.
        minutes: of training and validation, over all invocations.
        message: why it was pruned or failed; else empty.
    """

    number: int
    state: str
    parameters: Parameters
    objective: float | None
    best_epoch: int | None
    epochs: int
    minutes: float
    message: str


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is told of a search while it goes on.

    Attributes:
        run: (name, parameters) -> context that a trial is trained in.
        epoch: called in it with every entry of the history; of a trial that goes on, with the former ones again.
        end: called in it with the ended trial.
    """

    run: Callable[[str, Parameters], contextlib.AbstractContextManager] = lambda name, parameters: (
        contextlib.nullcontext()
    )
    epoch: Callable[[dict[str, float]], None] = lambda row: None
    end: Callable[[Trial], None] = lambda trial: None


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `tune` returns: the study's name, its trials by number, and the complete one with the highest objective."""

    study: str
    trials: list[Trial]
    best: Trial


def tune(
    model_input: ModelInput,
    base: Mapping[str, Mapping[str, Any]],
    settings: TuneSettings,
    folder: str | Path,
    watch: Watch | None = None,
) -> Tuning:
    """Search the space by training nets, and go on with a search that was interrupted.

    Args:
        model_input: the prepared slices. The side "test" is withheld from the training.
        base: sections of `training.fit`, with `model.name`: what all trials share.
        settings: of the search.
        folder: where the studies lie (STUDIES), and the checkpoints of the trial in hand.
        watch: what is told of it.
    Raises:
        ValueError: a setting that `training.fit` does not have or would refuse, a range that is none, test patients on
            the validation side, another search at work in the folder, or no trial that completed.
    """
    from lumbarflow.backend import load_keras
    from lumbarflow.training import fit

    _check_split(model_input)
    _check_space(base, settings.space)
    folder = Path(folder)
    study = study_name(model_input.manifest, base, settings)
    # Test patients cannot choose settings if nobody can read which they are.
    withheld = {**model_input.manifest, "sides": {**model_input.manifest["sides"], "test": {}}}
    searched = ModelInput(model_input.root, withheld)

    def checkpoints(parameters: Parameters) -> Path:
        return folder / study / comparison.plan_run(model_input.manifest, nested(parameters, base))["key"][:16]

    def objective(parameters: Parameters, report: Report):
        # Keras numbers the layers of all nets of a process: a trial's net should not depend on those before it.
        load_keras().utils.clear_session()
        return fit(searched, nested(parameters, base), output=checkpoints(parameters), on_epoch=report)

    def discard(parameters: Parameters) -> None:
        shutil.rmtree(checkpoints(parameters), ignore_errors=True)

    trials = search(settings, folder, study, objective, discard, watch)
    shutil.rmtree(folder / study, ignore_errors=True)  # what an interruption between two steps may have left
    return Tuning(study, trials, best_of(trials, folder / STUDIES))


def search(
    settings: TuneSettings,
    folder: Path,
    name: str,
    objective: Callable[[Parameters, Report], Any],
    discard: Callable[[Parameters], None] = lambda parameters: None,
    watch: Watch | None = None,
) -> list[Trial]:
    """Run a study until it has `settings.trials` trials or the time is over.

    Args:
        folder: where STUDIES lies; it need not exist yet.
        name: the study's.
        objective: (parameters, report) -> a `training.TrainingResult`, of which `history` and `best_epoch` are read;
            `report` wants every entry of the history as it comes, and ends the trial by an exception if it is pruned.
            FloatingPointError, ValueError and MemoryError make a failed trial; any other error, or an interruption,
            ends the search and leaves the trial to be tried again.
        discard: called with the parameters of a trial once its end is written down.
        watch: what is told of it.
    Returns:
        all ended trials of the study, by number.
    Raises:
        ValueError: another search is at work in the folder.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the lines below say it in our words
    watch = watch or Watch()
    space = {name: _distribution(name, values) for name, values in settings.space.items()}
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), _open_study(folder / STUDIES, name, settings) as study:
        _take_up(study, space)
        trials = _ended(study, settings.space)
        logger.info("study %s in %s: %d of %d trials done", name, folder / STUDIES, len(trials), settings.trials)
        while len(trials) < settings.trials:
            minutes = (time.monotonic() - started) / 60
            if settings.max_minutes is not None and minutes > settings.max_minutes:
                logger.info(
                    "no further trial after %.1f minutes, of %g allowed (tune.max_minutes); the same command goes on",
                    *(minutes, settings.max_minutes),
                )
                break
            # A sampler starts its random numbers anew in each process: one of its own for every trial makes
            # suggestions the same whether or not the search was interrupted before.
            study.sampler = _sampler(settings.seed, len(trials) + 1)
            asked = study.ask(space)
            _run_trial(asked, len(trials) + 1, settings, objective, watch)
            trials = _ended(study, settings.space)
            discard(trials[-1].parameters)
    return trials


def best_of(trials: list[Trial], path: Path | str = STUDIES) -> Trial:
    """The complete trial with the highest objective, the earliest of equals.

    Raises ValueError if none completed; `path` is where the studies lie, for its message.
    """
    complete = [trial for trial in trials if trial.state == COMPLETE]
    if complete:
        return max(complete, key=lambda trial: (trial.objective, -trial.number))
    reasons = "; ".join(f"trial {trial.number}: {trial.message}" for trial in trials)
    raise ValueError(
        f"none of {len(trials)} trials completed ({reasons}); expected at least one. Mend what the messages name, and "
        f"raise tune.trials to try more, or remove {path} to start anew."
    )


def study_name(manifest: Mapping[str, Any], base: Mapping[str, Mapping[str, Any]], settings: TuneSettings) -> str:
    """The name of the study that these trials are comparable in.

    It depends on the code, the data, the space, seed and pruner, and of the base settings on those that are not
    searched: writing the best ones into the parameters starts no new study, nor does another number of workers.
    """
    without = {*settings.space, "training.devices", "training.workers", "training.resume"}
    fixed = {
        part: {name: value for name, value in (values or {}).items() if f"{part}.{name}" not in without}
        for part, values in base.items()
    }
    run = comparison.plan_run(manifest, fixed)
    return "tune-" + value_digest([run["key"], settings.space, settings.seed, settings.pruner])[:16]


def nested(
    parameters: Mapping[str, Any], base: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Dotted names as sections, the shape of the parameter files; over the sections of `base`, which stay as they are.

    >>> nested({"loss.alpha": 0.5}, {"loss": {"alpha": 0.6, "gamma": 4.0}})
    {'loss': {'alpha': 0.5, 'gamma': 4.0}}
    """
    sections = {part: dict(values or {}) for part, values in (base or {}).items()}
    for name, value in parameters.items():
        part, setting = name.split(".")
        sections.setdefault(part, {})[setting] = value
    return sections


def trials_table(trials: list[Trial], space: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Attributes of the trials, and a column for each searched setting; the best first, failed ones last.

    Choices that one column cannot hold (lists, numbers beside words) are written as JSON.
    """
    columns = [field.name for field in dataclasses.fields(Trial) if field.name != "parameters"]
    rows = [
        {column: getattr(trial, column) for column in columns}
        | {name: _cell(trial.parameters[name], space[name]) for name in space}
        for trial in trials
    ]
    table = pd.DataFrame(rows, columns=[*columns, *space])
    table = table.astype({"objective": float, "best_epoch": "Int64"})
    return table.sort_values(["objective", "number"], ascending=[False, True], ignore_index=True)


# --- one trial


def _run_trial(
    asked: optuna.Trial,
    number: int,
    settings: TuneSettings,
    objective: Callable[[Parameters, Report], Any],
    watch: Watch,
) -> None:
    """Train one trial and write down how it ended, in the study and to the watch."""
    import optuna

    parameters = _parameters(asked.params, settings.space)
    # Of an interruption's.
    history = {row["epoch"]: row for row in asked.user_attrs.get(_HISTORY, [])}
    logger.info("trial %d of %d%s: %s", number, settings.trials, " goes on" if history else "", in_words(parameters))

    def keep(row: dict[str, float]) -> None:
        history[row["epoch"]] = row
        asked.set_user_attr(_HISTORY, list(history.values()))
        asked.report(row[OBJECTIVE], row["epoch"])
        watch.epoch(row)

    def prune_if_due() -> None:
        if asked.should_prune():
            raise optuna.TrialPruned(f"after epoch {max(history)} its best was below the median of complete trials")

    def report(row: dict[str, float]) -> None:
        # A net that goes on from its last checkpoint may repeat an epoch that was reported before.
        if row["epoch"] not in history:
            keep(row)
            prune_if_due()

    with watch.run(f"trial {number}", parameters):
        for row in history.values():
            asked.report(row[OBJECTIVE], row["epoch"])
            watch.epoch(row)
        try:
            if history:
                prune_if_due()
            result = objective(parameters, report)
            for row in result.history:
                if row["epoch"] not in history:
                    keep(row)
            outcome = {"state": COMPLETE, "best_epoch": int(result.best_epoch), "message": ""}
        except optuna.TrialPruned as pruned:
            # max takes the first of equals, as training.fit does.
            best = max(history.values(), key=lambda row: row[OBJECTIVE])
            outcome = {"state": PRUNED, "best_epoch": best["epoch"], "message": str(pruned)}
        except (FloatingPointError, ValueError, MemoryError) as error:
            outcome = {"state": FAILED, "best_epoch": None, "message": f"{type(error).__name__}: {error}"}
            logger.debug("trial %d failed", number, exc_info=True)
        # Before the state: a trial that has an outcome and no state yet is ended by the next search, not trained again.
        asked.set_user_attr(_OUTCOME, outcome)
        _tell(asked.study, asked.number, outcome, history)
        ended = _trial(number, asked.params, asked.user_attrs, settings.space)
        watch.end(ended)
    if ended.state == FAILED:
        logger.warning("trial %d failed and is left out: %s", number, ended.message)
    else:
        logger.info(
            "trial %d %s: validation mean IoU %.4f at epoch %d of %d%s",
            *(number, ended.state, ended.objective, ended.best_epoch, ended.epochs),
            f" ({ended.message})" if ended.message else "",
        )


def _tell(study: optuna.Study, number: int, outcome: Mapping[str, Any], history: Mapping[int, Mapping]) -> None:
    from optuna.trial import TrialState

    if outcome["state"] == COMPLETE:
        study.tell(number, history[outcome["best_epoch"]][OBJECTIVE])
    else:
        study.tell(number, state=TrialState.PRUNED if outcome["state"] == PRUNED else TrialState.FAIL)


def _trial(number: int, params: Mapping, attributes: Mapping, space: Mapping) -> Trial:
    history = {row["epoch"]: row for row in attributes.get(_HISTORY, [])}
    outcome = attributes[_OUTCOME]
    best = outcome["best_epoch"]
    return Trial(
        number=number,
        state=outcome["state"],
        parameters=_parameters(params, space),
        objective=None if best is None else float(history[best][OBJECTIVE]),
        best_epoch=best,
        epochs=len(history),
        minutes=sum(row.get("seconds", 0.0) for row in history.values()) / 60,
        message=outcome["message"],
    )


def in_words(parameters: Mapping[str, Any]) -> str:
    """For log lines."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in parameters.items()
    )


# --- the study


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second search out: it would take the first one's trial in hand for an interrupted one.

    The lock is SQLite's, on a file beside the studies, and ends with the process whichever way that ends.
    """
    connection = sqlite3.connect(folder / LOCK, timeout=0, isolation_level=None)
    try:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise ValueError(
                f"{folder / LOCK}: {error}; expected no other search at work in this folder. Wait for it, or stop it."
            ) from error
        yield
    finally:
        connection.close()


@contextlib.contextmanager
def _open_study(path: Path, name: str, settings: TuneSettings) -> Iterator[optuna.Study]:
    import optuna

    pruner = optuna.pruners.NopPruner()
    if settings.pruner is not None:
        values = {"startup_trials": 5, "warmup_epochs": 5} | dict(settings.pruner)
        # Optuna counts steps from 0 and spares those below n_warmup_steps; epochs count from 1.
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=values["startup_trials"], n_warmup_steps=values["warmup_epochs"] + 1
        )
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    try:
        yield optuna.create_study(
            storage=storage, study_name=name, direction="maximize", pruner=pruner, load_if_exists=True
        )
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _take_up(study: optuna.Study, space: Mapping[str, Any]) -> None:
    """End the trials that an interruption left, and queue each with its parameters and the epochs it has had."""
    from optuna.trial import TrialState

    waiting = study.get_trials(states=(TrialState.WAITING,))
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        history = trial.user_attrs.get(_HISTORY, [])
        if outcome := trial.user_attrs.get(_OUTCOME):
            _tell(study, trial.number, outcome, {row["epoch"]: row for row in history})
            continue
        # Without all its parameters it was not begun, and will be suggested the same ones again. A waiting trial is
        # this one's successor already, from a start that was cut short here.
        if set(trial.params) == set(space) and not waiting:
            study.enqueue_trial(trial.params, user_attrs={_HISTORY: history})
        study.tell(trial.number, state=TrialState.FAIL)


def _ended(study: optuna.Study, space: Mapping[str, Any]) -> list[Trial]:
    """The trials that have ended of themselves."""
    ended = (t for t in study.get_trials() if t.state.is_finished() and _OUTCOME in t.user_attrs)
    return [_trial(number, trial.params, trial.user_attrs, space) for number, trial in enumerate(ended, 1)]


def _sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    import optuna

    return optuna.samplers.TPESampler(seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


# --- the space


def _distribution(name: str, values: Mapping[str, Any]) -> optuna.distributions.BaseDistribution:
    """Raises ValueError if the entry of the space is neither a range nor choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    where = f"tune.space.{name}"
    if "choices" in values:
        check_names(values, CHOICES, where)
        choices = values["choices"]
        if not isinstance(choices, (list, tuple)) or not choices:
            raise ValueError(f"{where}.choices is {choices!r}; expected a list of one or more values.")
        stored = [_stored(choice) for choice in choices]
        # Python, and so Optuna, takes 1, 1.0 and true for one value.
        if len(set(stored)) < len(stored):
            raise ValueError(f"{where}.choices is {choices}; expected each value once.")
        return CategoricalDistribution(stored)
    check_names(values, RANGE, where)
    missing = [limit for limit in ("low", "high") if limit not in values]
    if missing:
        raise ValueError(f"{where} has no {missing[0]}; expected low and high, or choices.")
    low, high, log, step = values["low"], values["high"], values.get("log", False), values.get("step")
    for key, value in (("low", low), ("high", high), *([("step", step)] if step is not None else [])):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}.{key} is {value!r}; expected a number.")
    if not low < high:
        raise ValueError(f"{where}: low {low} is not below high {high}; expected a range.")
    if not isinstance(log, bool):
        raise ValueError(f"{where}.log is {log!r}; expected true or false.")
    if log and (step is not None or low <= 0):
        raise ValueError(f"{where}: log goes with neither a step nor a low of {low}; expected low above 0 and no step.")
    whole = isinstance(low, int) and isinstance(high, int)
    if step is not None:
        steps = (high - low) / step if step > 0 else 0
        if round(steps) < 1 or abs(steps - round(steps)) > 1e-6 or (whole and not isinstance(step, int)):
            raise ValueError(f"{where}.step is {step}; expected to reach {high} from {low} in equal steps of one type.")
    if whole:
        return IntDistribution(low, high, log=log, step=step or 1)
    return FloatDistribution(float(low), float(high), log=log, step=step)


def _stored(choice: Any) -> Any:
    """A choice as Optuna can keep it: lists as JSON."""
    return choice if choice is None or isinstance(choice, (bool, int, float, str)) else json.dumps(choice)


def _parameters(params: Mapping[str, Any], space: Mapping[str, Mapping[str, Any]]) -> Parameters:
    """What a trial tries, in the order of the space, as the space has it: lists are lists again."""
    own = {name: {_stored(choice): choice for choice in values.get("choices", ())} for name, values in space.items()}
    return {name: own[name].get(params[name], params[name]) for name in space}


def _cell(value: Any, values: Mapping[str, Any]) -> Any:
    kinds = {float if type(choice) is int else type(choice) for choice in values.get("choices", ())}
    return value if not kinds or (len(kinds) == 1 and kinds <= {bool, float, str}) else json.dumps(value)


def _check_space(base: Mapping[str, Mapping[str, Any]], space: Mapping[str, Mapping[str, Any]]) -> None:
    """Stop before the first hour of training, not after it: at names, and at values that `training.fit` refuses."""
    from lumbarflow.losses import FocalDiceLoss

    functions = {
        "model": (models.find(base["model"]["name"]).build, ("size", "channels", "classes", "precision")),
        "loss": (FocalDiceLoss, ("name", "kwargs")),
        "training": (TrainingSettings, ()),
        "augmentation": (AugmentationSettings, ()),
    }
    ends: dict[str, dict[str, list]] = {}
    for name, values in space.items():
        section_name, _, setting = name.partition(".")
        if section_name not in functions or not setting:
            raise ValueError(f"tune.space names {name!r}; expected section.setting with a section of {list(SECTIONS)}.")
        function, reserved = functions[section_name]
        taken = [key for key in inspect.signature(function).parameters if key not in reserved]
        check_names([setting], taken, section_name)
        if name in NOT_SEARCHED:
            raise ValueError(
                f"tune.space names {name}; expected settings that make better nets. The best of several seeds is luck "
                "on these validation patients, and how a training is run is the machine's concern."
            )
        _distribution(name, values)
        ends.setdefault(section_name, {})[setting] = values.get("choices") or [values["low"], values["high"]]
    for section_name, searched in ends.items():
        if section_name == "model":  # a net's values are checked when it is built
            continue
        function, reserved = functions[section_name]
        for setting, values in searched.items():
            for value in values:
                tried = searched | {setting: [value]}
                _check_value(function, base.get(section_name) or {}, section_name, reserved, tried)


def _check_value(
    function: Callable, values: Mapping[str, Any], name: str, reserved: tuple[str, ...], ends: Mapping[str, list]
) -> None:
    """Raise ValueError if no combination of these ends goes: one setting may allow another's value."""
    refused = None
    for combination in itertools.product(*ends.values()):
        try:
            section(function, {name: {**values, **dict(zip(ends, combination, strict=True))}}, name, reserved)
            return
        except ValueError as error:
            refused = refused or error
    raise ValueError(f"tune.space: {refused}") from refused


def _check_split(model_input: ModelInput) -> None:
    if model_input.manifest.get("leaky"):
        raise ValueError(
            f"{model_input.root}: its split has slices of one patient on several sides; expected none, or test "
            "patients would choose the settings. Preprocess with split.method patient or official."
        )
