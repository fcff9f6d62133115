from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
import sqlite3
import types

import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow import models, training, tuning
from lumbarflow.backend import load_keras
from lumbarflow.files import write_json
from lumbarflow.model_input import FORMAT_VERSION, ModelInput
from lumbarflow.tuning import Trial, TuneSettings, Watch, best_of, nested, search, study_name, trials_table, tune

SPACE = {
    "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "training.batch_size": {"low": 2, "high": 8, "step": 3},
    "loss.dice_over": {"choices": ["pooled", "classes"]},
}


def settings(space=SPACE, **overrides) -> TuneSettings:
    return TuneSettings(space, **{"trials": 14, "seed": 3, "pruner": None} | overrides)


def result(history):
    best = max(history, key=lambda row: row["val_mean_iou"])
    return types.SimpleNamespace(history=history, best_epoch=best["epoch"])


def curve(parameters, epochs=3):
    """Best at a learning rate of 1e-3 and pooled sums; each epoch is better than the last by 0.01."""
    score = 0.8 - 0.1 * abs(math.log10(parameters["training.learning_rate"]) + 3)
    score -= 0.2 * (parameters["loss.dice_over"] == "classes")
    return [{"epoch": k, "val_mean_iou": score + 0.01 * k, "seconds": 6.0} for k in range(1, epochs + 1)]


def quick(parameters, report):
    history = curve(parameters)
    for row in history:
        report(row)
    return result(history)


@pytest.fixture(scope="session")
def empty_studies(tmp_path_factory):
    """A file for studies without any: creating its tables takes seconds, copying it none."""
    path = tmp_path_factory.mktemp("studies") / tuning.STUDIES
    optuna.storages.RDBStorage(f"sqlite:///{path}").engine.dispose()
    return path


@pytest.fixture
def folder(tmp_path, empty_studies):
    path = tmp_path / "tune"
    path.mkdir()
    shutil.copy(empty_studies, path)
    return path


# --- the settings


def test_a_range_is_whole_or_not_by_its_ends():
    distributions = {name: tuning._distribution(name, values) for name, values in SPACE.items()}
    assert distributions == {
        "training.learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "training.batch_size": optuna.distributions.IntDistribution(2, 8, step=3),
        "loss.dice_over": optuna.distributions.CategoricalDistribution(['"pooled"', '"classes"']),
    }
    for entry in ({"low": 0, "high": 4.0, "step": 0.5}, {"low": 0, "high": 4, "step": 0.5}):
        mixed = tuning._distribution("loss.gamma", entry)
        assert mixed == optuna.distributions.FloatDistribution(0.0, 4.0, step=0.5)
    unset = {"low": 2, "high": 8, "step": None, "log": True}
    assert tuning._distribution("n", unset) == optuna.distributions.IntDistribution(2, 8, log=True)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"low": 3.0, "high": 2},
            r"tune.space.loss.gamma is {'low': 3.0, 'high': 2} \(.*; expected low and high, with",
        ),
        ({"low": 3.0}, r"tune.space.loss.gamma is {'low': 3.0} \(.*'high'\); expected low and high"),
        ({"low": "1e-4", "high": 2}, r"tune.space.loss.gamma is {'low': '1e-4', 'high': 2} \(.*; expected"),
        ({"low": 0, "high": 2, "log": True}, r"tune.space.loss.gamma is .*low >= 1.*; expected low and high"),
        ({"low": 1.0, "high": 2.0, "log": True, "step": 0.5}, r"`step` is not supported when `log` is true"),
        ({"low": 1, "high": 2, "step": -1}, r"tune.space.loss.gamma is .*step=-1.*; expected"),
        ({"low": 1, "high": 2, "high_": 3}, r"tune.space.loss.gamma is .*unexpected keyword argument 'high_'"),
        ({"choices": []}, r"tune.space.loss.gamma is {'choices': \[\]} \(.*one or more elements.*or choices"),
        ({"choices": "ab"}, r"{'choices': 'ab'} \(choices are no list\)"),
        ({"choices": [1], "low": 0}, r"tune.space.loss.gamma is .*unexpected keyword argument 'low'"),
        ([4, 8], r"tune.space.loss.gamma is \[4, 8\] \(.*; expected low and high, with log or step, or choices"),
    ],
)
def test_what_is_no_range_says_so(values, message):
    with pytest.raises(ValueError, match=message):
        tuning._distribution("loss.gamma", values)


@pytest.mark.parametrize(
    "given_settings, message",
    [
        ({}, r"tune.space is empty; expected at least one setting to search"),
        ({"space": {"loss.alpha": None}}, r"tune.space is empty"),
        ({"space": SPACE, "trial": 3}, r"unknown setting tune.trial; expected some of \['space', 'trials'"),
        ({"space": SPACE, "trials": 0}, r"tune.trials is 0; expected more than 0"),
        ({"space": SPACE, "max_minutes": -1}, r"tune.max_minutes is -1; expected more than 0"),
        ({"space": SPACE, "seed": -1}, r"tune.seed is -1; expected 0 or more"),
        ({"space": SPACE, "pruner": {"warmup": 1}}, r"unknown setting tune.pruner.warmup; expected some of"),
        ({"space": SPACE, "pruner": {"warmup_epochs": -1}}, r"tune.pruner.warmup_epochs is -1; expected 0 or more"),
    ],
)
def test_settings_of_the_search_are_checked(given_settings, message):
    with pytest.raises(ValueError, match=message):
        TuneSettings.read(given_settings)


def test_null_leaves_a_setting_out():
    assert TuneSettings.read({"space": SPACE | {"loss.dice_over": None}}).space.keys() == {
        "training.learning_rate",
        "training.batch_size",
    }


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("optimizer.beta", {"low": 0.1, "high": 0.2}, r"tune.space names 'optimizer.beta'; expected section.setting"),
        ("alpha", {"low": 0.1, "high": 0.2}, r"tune.space names 'alpha'; expected section.setting with a section of"),
        ("loss.alfa", {"low": 0.1, "high": 0.2}, r"unknown setting loss.alfa; expected some of \['gamma', 'alpha'"),
        ("model.depth", {"low": 1, "high": 2}, r"unknown setting model.depth; expected some of"),
        ("model.name", {"choices": ["plain_unet"]}, r"unknown setting model.name; expected some of"),
        ("loss.name", {"choices": ["a"]}, r"unknown setting loss.name; expected some of"),
        ("training.seed", {"low": 1, "high": 9}, r"tune.space names training.seed; .* several seeds is luck"),
        ("training.workers", {"low": 1, "high": 9}, r"tune.space names training.workers; expected settings that"),
    ],
)
def test_a_setting_that_the_training_does_not_have_is_refused_first(name, values, message):
    with pytest.raises(ValueError, match=message):
        tuning._check_names("plain_unet", {name: values})


def test_dotted_names_become_sections_over_the_others():
    assert nested({"loss.alpha": 0.5, "model.width": 3}, {"loss": {"alpha": 0.6, "gamma": 4.0}, "model": None}) == {
        "loss": {"alpha": 0.5, "gamma": 4.0},
        "model": {"width": 3},
    }
    assert nested({"loss.alpha": 0.5}) == {"loss": {"alpha": 0.5}}


BASE = {
    "model": {"name": "plain_unet"},
    "loss": {"alpha": 0.6},
    "training": {"learning_rate_schedule": "constant"},
    "augmentation": {},
}


def test_the_study_is_another_one_when_its_trials_are_no_longer_comparable():
    manifest = {"content_hash": "abc"}
    first = settings({"loss.alpha": {"low": 0.1, "high": 0.9}}, pruner=tuning.PRUNER)
    name = study_name(manifest, BASE, first)
    assert name.startswith("tune-")

    def other(base=BASE, manifest=manifest, **changes):
        return study_name(manifest, base, dataclasses.replace(first, **changes)) != name

    assert not other()
    assert not other(trials=99) and not other(max_minutes=1.0)
    assert not other(base=BASE | {"loss": {"alpha": 0.123}}), "what is searched has no base"
    assert not other(base=BASE | {"loss": {}})
    assert not other(base=BASE | {"training": BASE["training"] | {"workers": 3, "devices": 2, "resume": False}})
    assert not other(pruner={})
    # What is searched would not go with the defaults of the rest, had it been left out: the base is checked whole.
    bent = BASE | {"augmentation": {"elastic_shift": 0.2, "elastic_cells": 2}}
    assert other(bent, space={"augmentation.elastic_cells": {"low": 1, "high": 2}})
    assert other(base=BASE | {"loss": {"alpha": 0.6, "gamma": 3.0}})
    assert other(manifest={"content_hash": "abd"})
    assert other(space={"loss.alpha": {"low": 0.1, "high": 0.8}})
    assert other(seed=4)
    assert other(pruner={"startup_trials": 1})


# --- the search


def test_a_search_finds_what_is_better(folder):
    trials = search(settings(), folder, "study", quick)
    assert [trial.number for trial in trials] == list(range(1, 15))
    assert {trial.state for trial in trials} == {"complete"}
    for trial in trials:
        assert 1e-4 <= trial.parameters["training.learning_rate"] <= 1e-2
        assert trial.parameters["training.batch_size"] in (2, 5, 8)
        assert isinstance(trial.parameters["training.batch_size"], int)
        assert trial.objective == pytest.approx(curve(trial.parameters)[-1]["val_mean_iou"])
        assert (trial.best_epoch, trial.epochs, trial.minutes) == (3, 3, pytest.approx(0.3))
    best = best_of(trials)
    assert best.parameters["loss.dice_over"] == "pooled"
    assert best.objective == max(trial.objective for trial in trials)
    assert search(settings(), folder, "study", None) == trials, "nothing is left to be tried"
    assert len(search(settings(trials=15), folder, "study", quick)) == 15
    assert len(search(settings(trials=1), folder, "another", quick)) == 1


def test_the_order_of_the_space_changes_no_suggestion(folder):
    first = search(settings(trials=2), folder, "first", quick)
    turned = settings(dict(reversed(SPACE.items())), trials=2)
    assert search(turned, folder, "turned", quick) == first
    assert study_name({"content_hash": "abc"}, BASE, turned) == study_name(
        {"content_hash": "abc"}, BASE, settings(trials=2)
    )


def test_an_interrupted_search_suggests_what_an_uninterrupted_one_does(folder):
    chosen = settings(trials=14, pruner={"startup_trials": 2, "warmup_epochs": 1})
    whole = search(chosen, folder, "whole", quick)
    assert "pruned" in {trial.state for trial in whole}
    calls = [0]

    def interrupted(parameters, report):
        calls[0] += 1
        history = curve(parameters)
        for row in history:
            report(row)
            # In the first trials, which are random, and in later ones, which build on them; in each epoch.
            if calls[0] in (2, 5, 6, 14, 16) and row["epoch"] == calls[0] % 3 + 1:
                raise KeyboardInterrupt
        return result(history)

    trials, interruptions = None, 0
    while trials is None:
        try:
            trials = search(chosen, folder, "parts", interrupted)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 3
    assert trials == whole
    assert len({tuple(trial.parameters.values()) for trial in trials}) == 14


def scores(*values):
    return [{"epoch": k, "val_mean_iou": value, "seconds": 6.0} for k, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    "second, best",
    [
        # From its checkpoint a training reports the former epochs again.
        ((0.5, 0.7, 0.6, 0.4), (0.7, 2)),
        # Without one it is another training, of which the first one's 0.7 is no part.
        ((0.4, 0.3, 0.6, 0.4), (0.6, 3)),
    ],
)
def test_an_interrupted_trial_has_the_history_of_its_last_training_alone(folder, monkeypatch, second, best):
    seen, told, sampler = [], [], tuning._sampler

    def objective(parameters, report):
        seen.append(parameters)
        history = scores(*((0.5, 0.7) if len(seen) == 1 else second))
        for row in history:
            report(row)
        if len(seen) == 1:
            raise KeyboardInterrupt
        return result(history)

    watch = Watch(epoch=lambda row: told.append(row["epoch"]))
    with pytest.raises(KeyboardInterrupt):
        search(settings(trials=1), folder, "study", objective, watch)
    # Its parameters are kept: another version of Optuna may suggest others for the same number.
    monkeypatch.setattr(tuning, "_sampler", lambda seed, number: sampler(seed + 1, number))
    (trial,) = search(settings(trials=1), folder, "study", objective, watch)
    assert told == [1, 2, 1, 2, 3, 4]
    assert seen[0] == seen[1] == trial.parameters
    assert (trial.number, trial.state, trial.epochs, trial.minutes) == (1, "complete", 4, pytest.approx(0.4))
    assert (trial.objective, trial.best_epoch) == best


def running(path, **attributes):
    """What a process leaves that is killed in its first trial."""
    storage = f"sqlite:///{path / tuning.STUDIES}"
    study = optuna.create_study(storage=storage, study_name="study", direction="maximize", load_if_exists=True)
    trial = study.ask({name: tuning._distribution(name, values) for name, values in SPACE.items()})
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    return trial


def test_a_trial_killed_after_it_failed_is_not_tried_again(folder):
    left = []
    parameters = tuning._parameters(running(folder, message="TypeError: x", run="a1").params, SPACE)
    trials = search(settings(trials=2), folder, "study", quick, watch=Watch(left=left.append))
    assert [(trial.state, trial.message) for trial in trials] == [("failed", "TypeError: x"), ("complete", "")]
    assert trials[0].parameters == parameters != trials[1].parameters
    assert left == ["a1"]


def test_a_start_that_was_cut_short_queues_nothing_twice(folder, monkeypatch):
    parameters = tuning._parameters(running(folder).params, SPACE)
    tell = optuna.Study.tell
    monkeypatch.setattr(optuna.Study, "tell", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        search(settings(trials=3), folder, "study", quick)
    monkeypatch.setattr(optuna.Study, "tell", tell)
    trials = search(settings(trials=3), folder, "study", quick)
    assert trials[0].parameters == parameters
    assert parameters not in [trial.parameters for trial in trials[1:]]


def test_a_trial_below_the_median_is_pruned_after_the_warm_up(folder):
    levels = iter([0.5, 0.6, 0.7, 0.55, 0.65, 0.3])
    told = []

    def objective(parameters, report):
        level = next(levels)
        for epoch in range(1, 6):
            report({"epoch": epoch, "val_mean_iou": level - 0.01 * epoch, "seconds": 1.0})
            told.append((level, epoch))
        history = [{"epoch": k, "val_mean_iou": level - 0.01 * k, "seconds": 1.0} for k in range(1, 6)]
        return result(history)

    pruner = {"startup_trials": 3, "warmup_epochs": 2}
    trials = search(settings(trials=6, pruner=pruner), folder, "study", objective)
    # The median of three at epoch 3 is 0.57; the fourth's best is 0.54. Then 0.64 is above; 0.29 is not.
    assert [trial.state for trial in trials] == ["complete"] * 3 + ["pruned", "complete", "pruned"]
    pruned = trials[3]
    assert (pruned.epochs, pruned.best_epoch, pruned.objective) == (3, 1, pytest.approx(0.54))
    assert pruned.message == "after epoch 3 its best was below the median of complete trials"
    assert (0.55, 2) in told and (0.55, 3) not in told
    assert best_of(trials).number == 3


def failing(*errors):
    """An objective that raises these in turn; None trains, and so does whatever comes after them."""
    left = list(errors)

    def objective(parameters, report):
        error = left.pop(0) if left else None
        if error is not None:
            report({"epoch": 1, "val_mean_iou": 0.1, "seconds": 60.0})
            raise error
        return quick(parameters, report)

    return objective


def test_the_search_goes_on_after_a_trial_that_fails(folder, caplog):
    # Three in a row, too: one of them all was complete before.
    errors = [
        FloatingPointError("the loss is nan"),
        None,
        MemoryError("16 slices"),
        TypeError("backend"),
        RuntimeError("driver"),
    ]
    trials = search(settings(trials=6), folder, "study", failing(*errors))
    assert [trial.state for trial in trials] == ["failed", "complete", "failed", "failed", "failed", "complete"]
    first = trials[0]
    assert first.message == "FloatingPointError: the loss is nan"
    assert (first.objective, first.best_epoch, first.epochs, first.minutes) == (None, None, 1, 1.0)
    told = {record.args[0]: record for record in caplog.records if record.levelname == "WARNING"}
    assert told[3].getMessage() == "trial 3 failed and is left out: MemoryError: 16 slices"
    # Where an error comes from that names no setting has to be seen.
    assert not told[3].exc_info and told[4].exc_info[0] is TypeError
    assert search(settings(trials=6), folder, "study", None) == trials


def test_failures_of_another_cause_than_settings_stop_the_search_and_do_not_count(folder):
    expected = search(settings(trials=2), folder, "sound", quick)
    for _ in range(2):  # mended or not
        with pytest.raises(
            ValueError, match=r"each of the first 3 trials failed, the last with: RuntimeError: c; expected one"
        ):
            failures = (RuntimeError("a"), RuntimeError("b"), RuntimeError("c"))
            search(settings(trials=20), folder, "study", failing(*failures, None))
    assert search(settings(trials=2), folder, "study", quick) == expected
    with pytest.raises(
        ValueError, match=r"each of the first 2 trials failed, the last with: RuntimeError: b; .*same command"
    ):
        search(settings(trials=2), folder, "another", failing(RuntimeError("a"), RuntimeError("b"), None))


def test_a_full_disk_ends_the_search_and_its_trial_goes_on_when_there_is_room(folder):
    expected = search(settings(trials=3), folder, "sound", quick)
    tried = []

    def objective(parameters, report):
        tried.append(parameters)
        if len(tried) == 2:
            raise OSError(28, "No space left on device")
        return quick(parameters, report)

    with pytest.raises(OSError, match="No space left"):
        search(settings(trials=3), folder, "study", objective)
    assert search(settings(trials=3), folder, "study", objective) == expected
    assert tried[1] == tried[2]


def test_without_a_complete_trial_there_is_no_best():
    failed = [Trial(k, "failed", {}, None, None, 0, 0.0, f"ValueError: {k}") for k in (1, 2)]
    with pytest.raises(ValueError, match=r"none of 2 trials completed \(trial 1: ValueError: 1; trial 2: .*goes on"):
        best_of(failed)


def test_the_earliest_of_equal_trials_is_the_best():
    trials = [Trial(k, "complete", {}, 0.5, 1, 1, 0.0, "") for k in (1, 2)]
    higher = Trial(3, "pruned", {}, 0.9, 1, 1, 0.0, "")
    assert best_of([*trials, higher]).number == 1


def test_no_trial_starts_after_the_time_is_over(folder, monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])

    def slow(parameters, report):
        now[0] += 90
        return quick(parameters, report)

    with caplog.at_level("INFO"):
        assert len(search(settings(max_minutes=2), folder, "study", slow)) == 2
    assert "no further trial after 3.0 minutes, of 2 allowed (tune.max_minutes)" in caplog.text
    assert len(search(settings(max_minutes=2), folder, "study", slow)) == 4


def test_two_searches_do_not_share_a_folder(folder):
    def objective(parameters, report):
        with pytest.raises(ValueError, match=r"tune.lock: database is locked; expected no other search at work"):
            search(settings(), folder, "study", quick)
        return quick(parameters, report)

    assert len(search(settings(trials=1), folder, "study", objective)) == 1
    assert len(search(settings(trials=2), folder, "study", quick)) == 2


def test_a_folder_that_cannot_be_written_is_no_other_search(folder):
    (folder / tuning.LOCK).mkdir()
    with pytest.raises(ValueError, match=r"tune.lock: unable to open .*; expected a file that can be written. Choose"):
        search(settings(), folder, "study", quick)


def test_the_watch_sees_every_trial_from_its_start_to_its_end(folder):
    told, runs = [], iter("abc")

    @contextlib.contextmanager
    def run(name, parameters):
        told.append((name, sorted(parameters)))
        try:
            yield next(runs)
        except BaseException as error:
            told.append(f"left by {type(error).__name__}")
            raise
        told.append("left")

    def epoch(row):
        told.append(row["epoch"])
        if told == [first, 1, 2]:
            raise KeyboardInterrupt

    first, second = (("trial 1", sorted(SPACE)), ("trial 2", sorted(SPACE)))
    watch = Watch(run, epoch, lambda trial: told.append(trial.state), lambda run: told.append(f"killed {run}"))
    objective = failing(None, None, ValueError("x"))
    with pytest.raises(KeyboardInterrupt):
        search(settings(trials=2), folder, "study", objective, watch)
    assert told == [first, 1, 2, "left by KeyboardInterrupt"]
    told.clear()
    search(settings(trials=2), folder, "study", objective, watch)
    assert told == ["killed a", first, 1, 2, 3, "complete", "left", second, 1, "failed", "left by _Failed"]


@given(st.integers(0, 2**31), st.integers(1, 1000))
def test_every_trial_of_every_seed_draws_its_own_numbers(seed, number):
    def first_draw(*of):
        return tuning._sampler(*of)._rng.rng.random_sample()

    assert first_draw(seed, number) == first_draw(seed, number)
    assert len({first_draw(seed, number), first_draw(seed, number + 1), first_draw(seed + 1, number)}) == 3


# --- the table


def test_the_table_has_the_best_first_and_failed_trials_last(tmp_path):
    own = {
        "loss.alpha": 0.5,
        "loss.name": "a",
        "model.widths": [8, 16],
        "training.max": None,
        "training.n": 4,
        "training.on": True,
    }
    trials = [
        Trial(1, "failed", own, None, None, 0, 0.0, "ValueError: x"),
        Trial(2, "complete", own | {"loss.alpha": 0.25, "training.n": 0.5}, 0.5, 7, 9, 1.5, ""),
        Trial(3, "pruned", own | {"training.max": 5}, 0.4, 2, 3, 0.5, "late"),
        Trial(4, "complete", own | {"model.widths": [16, 32]}, 0.6, 8, 9, 1.5, ""),
    ]
    table = trials_table(trials)
    assert table.columns.tolist() == [
        *("number", "state", "objective", "best_epoch", "epochs", "minutes", "message"),
        *own,
    ]
    assert table["number"].tolist() == [4, 2, 3, 1]
    assert table["model.widths"].tolist() == ["[16, 32]", "[8, 16]", "[8, 16]", "[8, 16]"]
    assert table["training.max"].tolist() == ["null", "null", "5", "null"]
    assert table["training.n"].tolist() == [4, 0.5, 4, 4]
    assert table["training.on"].tolist() == ["true"] * 4
    assert table["loss.alpha"].tolist() == [0.5, 0.25, 0.5, 0.5]
    assert table["loss.name"].tolist() == ["a"] * 4
    assert np.isnan(table["objective"].iloc[3]) and table["best_epoch"].isna().tolist() == [False] * 3 + [True]
    table.to_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table)


def test_choices_come_back_as_they_were_written(folder):
    # Python takes 1, 1.0 and True for one value.
    choices = {"model.widths": [[8, 16], [16, 32]], "training.max": [1, 1.0, True, None, "all"]}
    seen = {name: set() for name in choices}

    def objective(parameters, report):
        for name, value in parameters.items():
            seen[name].add(repr(value))
        report(scores(0.5)[0])
        return result(scores(0.5))

    trials = search(
        settings({name: {"choices": own} for name, own in choices.items()}, trials=12), folder, "s", objective
    )
    for name, own in choices.items():
        assert seen[name] == {repr(trial.parameters[name]) for trial in trials} == {repr(value) for value in own}


# --- real nets, of one layer


def one_layer(size, channels, classes, *, precision, width=4):
    keras = load_keras()
    x = inputs = keras.Input((*size, channels))
    x = keras.layers.Conv2D(width, 1)(x)
    x = keras.layers.Conv2D(classes, 1, activation="softmax")(x)
    return keras.Model(inputs, x, name="one_layer")


@pytest.fixture
def model_input(tmp_path, monkeypatch) -> ModelInput:
    monkeypatch.setitem(models.MODELS, "one_layer", models.Entry("one_layer", "One layer", one_layer))
    sides = {"train": ("1_t1", 4), "validation": ("2_t2", 2), "test": ("3_t2", 3)}
    rng = np.random.default_rng(0)
    root = tmp_path / "model_input"
    for name, n in sides.values():
        labels = np.sort(rng.integers(0, 4, (n, 8, 12)), axis=-1).astype(np.uint8)
        folder = root / "series" / name
        folder.mkdir(parents=True)
        # Test patients have no files: whoever reads them fails.
        if name != "3_t2":
            np.save(folder / "images.npy", (labels - 1.5).astype(np.float16))
            np.save(folder / "labels.npy", labels)
    manifest = {
        "format_version": FORMAT_VERSION,
        "content_hash": "0123456789abcdef",
        "leaky": False,
        "size": [8, 12],
        "classes": {"0": "background", "1": "vertebrae", "2": "canal", "3": "IVD"},
        "series": {name: {"n_slices": n} for name, n in sides.values()},
        "sides": {side: {name: list(range(n))} for side, (name, n) in sides.items()},
    }
    write_json(root / "manifest.json", manifest)
    return ModelInput.open(root)


REAL = {
    "model": {"name": "one_layer"},
    "loss": {},
    "training": {"epochs": 3, "batch_size": 2, "precision": "float32"},
    "augmentation": {"enabled": False},
}


def test_trials_train_nets_and_go_on_where_they_were_interrupted(model_input, folder, monkeypatch, caplog):
    fits, fit = [], training.fit

    def recorded(given_input, chosen, output, on_epoch):
        assert given_input.slices("test") == [] and len(given_input.slices("validation")) == 2
        assert set(output.parent.glob("*")) <= {output}, "of one trial at a time"
        fits.append((chosen, output))
        return fit(given_input, chosen, output=output, on_epoch=on_epoch)

    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", recorded)
    # The second trial, Optuna's third, shows that pruning passes through Keras.
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: self.number == 2 and self.user_attrs["minutes"] > 0)
    space = {
        "training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
        "model.width": {"choices": [3, 5]},
    }
    chosen = settings(space, trials=2)
    with pytest.raises(KeyboardInterrupt):
        tune(model_input, REAL, chosen, folder, Watch(epoch=stop))
    with caplog.at_level(logging.INFO):
        tuned = tune(model_input, REAL, chosen, folder)
    assert caplog.text.count("going on after epoch 2 of 3") == 1
    assert [(trial.state, trial.epochs) for trial in tuned.trials] == [("complete", 3), ("pruned", 1)]
    assert tuned.best == tuned.trials[0] and 0 < tuned.best.objective < 1
    assert tuned.study == study_name(model_input.manifest, REAL, chosen)
    assert fits[0] == fits[1] and len(fits) == 3
    for trial, (sections, output) in zip(tuned.trials, fits[1:], strict=True):
        assert sections["model"] == {"name": "one_layer", "width": trial.parameters["model.width"]}
        assert sections["training"] == REAL["training"] | {"learning_rate": trial.parameters["training.learning_rate"]}
        assert output.parent == folder / tuned.study
    assert fits[1][1] != fits[2][1]
    assert sorted(path.name for path in folder.iterdir()) == ["tune.db", "tune.lock"]


def test_test_patients_may_not_choose(model_input, folder):
    leaky = ModelInput(model_input.root, model_input.manifest | {"leaky": True})
    with pytest.raises(ValueError, match=r"model_input: its split has slices of one patient on several sides"):
        tune(leaky, REAL, settings({"loss.alpha": {"low": 0.2, "high": 0.8}}), folder)


def test_nothing_is_trained_for_a_space_that_is_wrong(model_input, tmp_path):
    with pytest.raises(ValueError, match=r"unknown setting loss.alfa"):
        tune(model_input, REAL, settings({"loss.alfa": {"low": 0.2, "high": 0.8}}), tmp_path / "tune")
    assert not (tmp_path / "tune").exists()


def test_studies_are_readable_while_nothing_runs(folder):
    search(settings(trials=1), folder, "study", quick)
    with contextlib.closing(sqlite3.connect(folder / tuning.STUDIES)) as connection:
        assert connection.execute("select count(*) from trials").fetchone() == (1,)
