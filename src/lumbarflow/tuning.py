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
from lumbarflow.files import value_digest
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.progress import track
from lumbarflow.training_settings import SECTIONS, WITHOUT_EFFECT, effective, setting_names

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

OBJECTIVE = "val_mean_iou"
STUDIES, LOCK = "tune.db", "tune.lock"
COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
PRUNER = {"startup_trials": 5, "warmup_epochs": 5}
NOT_SEARCHED = tuple(f"training.{name}" for name in ("seed", "max_minutes", *WITHOUT_EFFECT))

# So many trials failing before any is complete have a common cause, which is no setting.
FAILURES = 3

# A trial's attributes in the study. One that Optuna has as failed but that has no message was interrupted.
_MESSAGE, _MINUTES, _RUN = "message", "minutes", "run"

Parameters = dict[str, Any]
Report = Callable[[dict[str, float]], None]


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """The section `tune` of the parameters.

    Attributes:
        space: "section.setting" of `training.fit` -> what to try: `low` and `high` (both included; whole numbers if
            all are), with `log` (bool) or `step`; or `choices`. None leaves a setting out.
        trials: how many in total, over all invocations; pruned and failed ones count, but not failures that ended a
            search (FAILURES of them before any trial is complete).
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
    pruner: Mapping[str, int] | None = dataclasses.field(default_factory=PRUNER.copy)

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> TuneSettings:
        """From parameters. Raises ValueError for an unknown setting too."""
        check_names(settings, (field.name for field in dataclasses.fields(cls)), "tune")
        return cls(**({"space": {}} | dict(settings)))

    def __post_init__(self):
        chosen = {name: values for name, values in (self.space or {}).items() if values is not None}
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
        if self.pruner is not None:
            check_names(self.pruner, PRUNER, "tune.pruner")
            object.__setattr__(self, "pruner", PRUNER | dict(self.pruner))
            for name, value in self.pruner.items():
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
        run: (name, parameters) -> context that a trial is trained in, which an exception leaves if the trial failed or
            was interrupted. It gives a name for the trial's run, or None.
        epoch: called in it with every entry of the history; of a trial that goes on, with the former ones again.
        end: called in it with the ended trial.
        left: called with the name of a run whose trial was interrupted, before that is tried again in a run of its own.
    """

    run: Callable[[str, Parameters], contextlib.AbstractContextManager[str | None]] = lambda name, parameters: (
        contextlib.nullcontext()
    )
    epoch: Callable[[dict[str, float]], None] = lambda row: None
    end: Callable[[Trial], None] = lambda trial: None
    left: Callable[[str], None] = lambda run: None


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
        ValueError: a setting that `training.fit` does not have, base settings that it would refuse, an entry of the
            space that is none, slices of test patients on the validation side, another search at work in the folder,
            a folder that cannot be written, or no trial that completed.
    """
    from lumbarflow.backend import load_keras
    from lumbarflow.training import fit

    model_input.check_not_leaky("a search")
    _check_names(base["model"]["name"], settings.space)
    folder = Path(folder)
    study = study_name(model_input.manifest, base, settings)
    # Test patients cannot choose settings if nobody can read which they are.
    withheld = {**model_input.manifest, "sides": {**model_input.manifest["sides"], "test": {}}}
    searched = ModelInput(model_input.root, withheld)

    def objective(parameters: Parameters, report: Report):
        checkpoints = folder / study / value_digest(parameters)[:16]
        for other in (folder / study).glob("*"):  # of trials that have ended
            if other != checkpoints:
                shutil.rmtree(other, ignore_errors=True)
        # Keras numbers the layers of all nets of a process: a trial's net should not depend on those before it.
        load_keras().utils.clear_session()
        return fit(searched, nested(parameters, base), output=checkpoints, on_epoch=report)

    trials = search(settings, folder, study, objective, watch)
    shutil.rmtree(folder / study, ignore_errors=True)
    return Tuning(study, trials, best_of(trials))


def search(
    settings: TuneSettings,
    folder: Path,
    name: str,
    objective: Callable[[Parameters, Report], Any],
    watch: Watch | None = None,
) -> list[Trial]:
    """Run a study until it has `settings.trials` trials or the time is over.

    Args:
        folder: where STUDIES lies; it need not exist yet.
        name: the study's.
        objective: (parameters, report) -> a `training.TrainingResult`, of which `history` and `best_epoch` are read.
            `report` wants every entry of the history, in order, and ends the trial by an exception if it is pruned. An
            `Exception` makes a failed trial. An interruption, and an OSError such as of a full disk, which is no
            setting's fault, leave the trial to be tried again with the same parameters; if it goes on then, it reports
            its former epochs again.
        watch: what is told of it.
    Returns:
        all ended trials of the study, by number.
    Raises:
        ValueError: an entry of the space that is neither a range nor choices, another search at work in the folder, a
            folder that cannot be written, FAILURES failed trials before any is complete.
        OSError: of a trial.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the lines below say it in our words
    watch = watch or Watch()
    # The sampler's random numbers go to the settings in this order, and order is no reason for another study.
    space = {key: _distribution(key, settings.space[key]) for key in sorted(settings.space)}
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), _open_study(folder / STUDIES, name, settings) as study:
        _take_up(study, space, watch)
        trials = _counted(study, settings)
        logger.info("study %s in %s: %d of %d trials done", name, folder / STUDIES, len(trials), settings.trials)
        for _ in track(range(len(trials), settings.trials), "tune", "trials", done=len(trials)):
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
            ended = _run_trial(study.ask(space), len(trials) + 1, settings, objective, watch)
            trials = _counted(study, settings)
            if not trials:
                raise ValueError(
                    f"each of the first {ended.number} trials failed, the last with: {ended.message}; expected one to "
                    "complete. They do not count: mend what the message names and give the same command again."
                )
    return trials


def best_of(trials: list[Trial]) -> Trial:
    """The complete trial with the highest objective, the earliest of equals. Raises ValueError if none completed."""
    complete = [trial for trial in trials if trial.state == COMPLETE]
    if not complete:
        reasons = "; ".join(f"trial {trial.number}: {trial.message}" for trial in trials)
        raise ValueError(
            f"none of {len(trials)} trials completed ({reasons}); expected at least one. Mend what the messages name; "
            "the same command goes on."
        )
    return max(complete, key=lambda trial: (trial.objective, -trial.number))


def study_name(manifest: Mapping[str, Any], base: Mapping[str, Mapping[str, Any]], settings: TuneSettings) -> str:
    """The name of the study that these trials are comparable in.

    It depends on the code, the data, the space, seed and pruner, and of the base settings on those that are not
    searched: writing the best ones into the parameters starts no new study, nor does another number of workers.
    """
    comparison.check_run(base)
    fixed = {
        part: {name: value for name, value in values.items() if f"{part}.{name}" not in settings.space}
        for part, values in effective(base).items()
    }
    key = comparison.net_key(manifest, fixed)
    return "tune-" + value_digest([key, settings.space, settings.seed, settings.pruner])[:16]


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


def trials_table(trials: list[Trial]) -> pd.DataFrame:
    """Attributes of the trials, and a column for each searched setting; the best first, failed ones last.

    A setting that was neither a number nor a text in all trials is written as JSON.
    """
    fields = [field.name for field in dataclasses.fields(Trial) if field.name != "parameters"]
    columns = {field: [getattr(trial, field) for trial in trials] for field in fields}
    for name in trials[0].parameters:
        values = [trial.parameters[name] for trial in trials]
        kinds = {type(value) for value in values}
        columns[name] = values if kinds <= {int, float} or kinds == {str} else [json.dumps(value) for value in values]
    table = pd.DataFrame(columns).astype({"objective": float, "best_epoch": "Int64"})
    return table.sort_values(["objective", "number"], ascending=[False, True], ignore_index=True)


# --- one trial


class _Failed(Exception):
    """Leaves the context of a failed trial's run, and goes no further."""


def _run_trial(
    asked: optuna.Trial,
    number: int,
    settings: TuneSettings,
    objective: Callable[[Parameters, Report], Any],
    watch: Watch,
) -> Trial:
    """Train one trial and write down how it ended, in the study and to the watch."""
    import optuna
    from optuna.trial import TrialState

    parameters = _parameters(asked.params, settings.space)
    logger.info("trial %d of %d: %s", number, settings.trials, in_words(parameters))
    minutes = 0.0

    def report(row: dict[str, float]) -> None:
        nonlocal minutes
        minutes += row["seconds"] / 60
        asked.set_user_attr(_MINUTES, minutes)
        asked.report(row[OBJECTIVE], row["epoch"])
        watch.epoch(row)
        if asked.should_prune():
            raise optuna.TrialPruned

    with contextlib.suppress(_Failed), watch.run(f"trial {number}", parameters) as run:
        if run is not None:
            asked.set_user_attr(_RUN, run)
        try:
            result = objective(parameters, report)
        except optuna.TrialPruned:
            told = asked.study.tell(asked, state=TrialState.PRUNED)
        except OSError:
            raise  # the next trial would meet the full disk too; this one goes on when there is room
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            # Before the state: a trial that has a message is not tried again.
            asked.set_user_attr(_MESSAGE, message)
            told = asked.study.tell(asked, state=TrialState.FAIL)
            # These three say what to change; where any other comes from has to be seen.
            unexpected = not isinstance(error, (FloatingPointError, ValueError, MemoryError))
            logger.warning("trial %d failed and is left out: %s", number, message, exc_info=unexpected)
        else:
            told = asked.study.tell(asked, result.history[result.best_epoch - 1][OBJECTIVE])
        ended = _trial(number, told, settings.space)
        watch.end(ended)
        if ended.state == FAILED:
            raise _Failed
    if ended.state != FAILED:
        logger.info(
            "trial %d %s: validation mean IoU %.4f at epoch %d of %d%s",
            *(number, ended.state, ended.objective, ended.best_epoch, ended.epochs),
            f" ({ended.message})" if ended.message else "",
        )
    return ended


def _trial(number: int, frozen: optuna.trial.FrozenTrial, space: Mapping[str, Mapping[str, Any]]) -> Trial:
    from optuna.trial import TrialState

    state = {TrialState.COMPLETE: COMPLETE, TrialState.PRUNED: PRUNED, TrialState.FAIL: FAILED}[frozen.state]
    scores = frozen.intermediate_values  # epoch -> val_mean_iou
    # max takes the first of equals, as training.fit does.
    best_epoch = None if state == FAILED else max(sorted(scores), key=scores.get)
    message = frozen.user_attrs.get(_MESSAGE, "")
    if state == PRUNED:
        message = f"after epoch {max(scores)} its best was below the median of complete trials"
    return Trial(
        number=number,
        state=state,
        parameters=_parameters(frozen.params, space),
        objective=scores.get(best_epoch),
        best_epoch=best_epoch,
        epochs=len(scores),
        minutes=frozen.user_attrs.get(_MINUTES, 0.0),
        message=message,
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
    with contextlib.ExitStack() as stack:
        try:
            connection = sqlite3.connect(folder / LOCK, timeout=0, isolation_level=None)
            stack.callback(connection.close)
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            expected = "a file that can be written. Choose another folder, or allow it"
            if "locked" in str(error):
                expected = "no other search at work in this folder. Wait for it, or stop it"
            raise ValueError(f"{folder / LOCK}: {error}; expected {expected}.") from error
        yield


@contextlib.contextmanager
def _open_study(path: Path, name: str, settings: TuneSettings) -> Iterator[optuna.Study]:
    import optuna

    pruner = optuna.pruners.NopPruner()
    if settings.pruner is not None:
        # Optuna counts steps from 0 and spares those below n_warmup_steps; epochs count from 1.
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=settings.pruner["startup_trials"], n_warmup_steps=settings.pruner["warmup_epochs"] + 1
        )
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    try:
        yield optuna.create_study(
            storage=storage, study_name=name, direction="maximize", pruner=pruner, load_if_exists=True
        )
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _take_up(study: optuna.Study, space: Mapping[str, Any], watch: Watch) -> None:
    """End what an interruption left, and queue the trial with its parameters: its training knows where it stood."""
    from optuna.trial import TrialState

    waiting = study.get_trials(states=(TrialState.WAITING,))
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if (run := trial.user_attrs.get(_RUN)) is not None:
            watch.left(run)
        # Without all its parameters it was not begun, and will be suggested the same ones again. A waiting trial is
        # this one's successor already, from a start that was cut short here. One with a message has failed.
        if set(trial.params) == set(space) and not waiting and _MESSAGE not in trial.user_attrs:
            study.enqueue_trial(trial.params)
        study.tell(trial.number, state=TrialState.FAIL)


def _counted(study: optuna.Study, settings: TuneSettings) -> list[Trial]:
    """The trials that have ended of themselves, less the failures that ended a search."""
    from optuna.trial import TrialState

    ended = [
        trial
        for trial in study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
        if trial.state != TrialState.FAIL or _MESSAGE in trial.user_attrs
    ]
    most = min(FAILURES, settings.trials)
    while len(ended) >= most and all(trial.state == TrialState.FAIL for trial in ended[:most]):
        ended = ended[most:]
    return [_trial(number, trial, settings.space) for number, trial in enumerate(ended, 1)]


def _sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    import optuna

    return optuna.samplers.TPESampler(seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


# --- the space


def _distribution(name: str, values: Mapping[str, Any]) -> optuna.distributions.BaseDistribution:
    """What Optuna, which checks it, has for an entry of the space. Raises ValueError if that is no range or choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    try:
        entry = {key: value for key, value in dict(values).items() if value is not None}
        if "choices" in entry:
            if not isinstance(entry["choices"], (list, tuple)):
                raise TypeError("choices are no list")
            # As JSON: Optuna keeps no lists, and takes 1, 1.0 and true for one value.
            return CategoricalDistribution(**entry | {"choices": [json.dumps(choice) for choice in entry["choices"]]})
        whole = all(isinstance(value, int) for value in entry.values())  # True and False of `log` are whole, too
        return (IntDistribution if whole else FloatDistribution)(**entry)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"tune.space.{name} is {values} ({error}); expected low and high, with log or step, or choices."
        ) from error


def _parameters(params: Mapping[str, Any], space: Mapping[str, Mapping[str, Any]]) -> Parameters:
    """What a trial tries, in the order of the space."""
    return {name: json.loads(params[name]) if "choices" in space[name] else params[name] for name in space}


def _check_names(model: str, space: Mapping[str, Mapping[str, Any]]) -> None:
    """Stop at a misspelt setting before the first training; values are the training's to refuse, in seconds."""
    known = setting_names(models.find(model).build)
    for name in space:
        part, _, setting = name.partition(".")
        if part not in known or not setting:
            raise ValueError(f"tune.space names {name!r}; expected section.setting with a section of {list(SECTIONS)}.")
        check_names([setting], known[part], part)
        if name in NOT_SEARCHED:
            raise ValueError(
                f"tune.space names {name}; expected settings that make better nets. The best of several seeds is luck "
                "on these validation patients, and how a training is run is the machine's concern."
            )
