"""Registration against a real SQLite store, with a net of hand-set weights."""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest

import lumbarflow
from lumbarflow import registry
from lumbarflow.backend import load_keras
from lumbarflow.files import value_digest
from lumbarflow.imaging import LabelMap, read_volume, write_volume
from lumbarflow.inference import Segmenter
from lumbarflow.promotion import ModelFacts
from lumbarflow.registry import Figures, check_settings, rollback

SETTINGS = {
    "size": [16, 12],
    "keep_aspect": True,
    "normalisation": "z_score",
    "percentiles": [0.5, 99.5],
    "batch_size": 2,
    # Above 0: what is served must be what was evaluated, with it.
    "test_time_augmentation": {"shift": 0.1, "rotation_degrees": 5.0},
}
SPACING = [1.0, 0.5]
# What promotion asks of a version (tests/test_promotion.py looks at each).
GOOD_ENOUGH = {
    "data_kind": "real",
    "leaky": False,
    "data_hash": "d" * 32,
    "split_hash": "s" * 32,
    "mean_foreground_dice": 0.9,
    "class_dice": {"vertebrae": 0.9375, "canal": 0.875, "IVD": 0.8875},
    "case_dice": {("x", "series 0"): 0.9, ("y", "series 1"): 0.8},
    "trained_on": frozenset({"a", "b", "c"}),
    "tested_on": frozenset({"x", "y"}),
}
RULES = {"class_tolerance": 0.0625, "paired_test": {"alpha": 0.05}}
DATA = {
    "synthetic": {"licence": "CC0-1.0", "attribution": "computed by the tests"},
    "real": {"licence": None, "attribution": None},
}


def registration(name="lumbar-unet", **changes):
    return {"name": name, "alias": "champion", "promotion": RULES, "data": DATA} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aliases": "x"}, r"unknown setting registration\.aliases; expected some of \['name', 'alias', 'promotion'"),
        ({"promotion": RULES | {"tolerance": 0}}, r"unknown setting registration\.promotion\.tolerance"),
        ({"promotion": RULES | {"paired_test": {"alpha": 0, "p": 1}}}, r"registration\.promotion\.paired_test\.p"),
        ({"promotion": RULES | {"class_tolerance": -0.1}}, r"promotion\.class_tolerance is -0\.1; expected .* 0 to 1"),
        ({"promotion": RULES | {"paired_test": {"alpha": 5}}}, r"promotion\.paired_test\.alpha is 5; expected"),
        ({"data": DATA | {"mixed": {}}}, r"unknown setting registration\.data\.mixed; .*\['synthetic', 'real'\]"),
        ({"data": {"real": {"license": "MIT"}}}, r"unknown setting registration\.data\.real\.license"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(changes, message):
    check_settings(registration())
    with pytest.raises(ValueError, match=message):
        check_settings(registration(**changes))


# Registration


def manifest(**changes):
    patients = {"7_t1": "Ann", "7_t2": "Ann", "8_t2": "Ben", "9_t2": "Cid", "10_t2": "Dan"}
    spacings = {"7_t1": [2.0, 1.5], "10_t2": [1.25, 1.75]}
    series = {
        name: {
            "patient": patient,
            "sequence": name.partition("_")[2],
            "pixel_spacing_mm": spacings.get(name, [1.5, 1.625]),
        }
        for name, patient in patients.items()
    }
    return {
        "format_version": 1,
        "size": [16, 12],
        "data_kind": "synthetic",
        "leaky": False,
        "split_method": "patient",
        "data_hash": "d" * 32,
        "split_hash": "s" * 32,
        "content_hash": "c" * 32,
        "settings": {"labels": {"method": "direct", "table": {"vertebrae": [1, 2, 3, 101], "canal": [100], "IVD": []}}},
        "series": series,
        "sides": {
            "train": {"7_t1": [0, 1], "7_t2": [0]},
            "validation": {"8_t2": [0]},
            "test": {"9_t2": [0, 1], "10_t2": [3]},
        },
    } | changes


def metrics(mean=0.9, vertebrae=0.92):
    # As `metrics_by_class` has them, with another scope that must not be taken for the pooled one.
    pooled = {"background": 0.99, "vertebrae": vertebrae, "canal": 0.9, "IVD": 0.88, "mean foreground": mean}
    rows = [{"class": name, "scope": "pooled", "dice": np.float64(dice)} for name, dice in pooled.items()]
    return rows + [{"class": name, "scope": "case mean", "dice": 0.1, "n_cases": np.int64(2)} for name in pooled]


def by_case(sides, dice=0.9):
    """As `metrics_by_case` has them: every class of every test series."""
    series = manifest()["series"]
    names = ("background", "vertebrae", "canal", "IVD")
    return [
        {"series": name, "patient": series[name]["patient"], "class": label, "dice": np.float64(dice)}
        for name in sides["test"]
        for label in names
    ]


def intervals():
    names = ("background", "vertebrae", "canal", "IVD", "mean foreground")
    rows = [("pooled", name, "dice", 0.9, 0.85, 0.95) for name in names]
    rows += [("case mean", name, "asd_mm", 0.5, 0.25, math.nan) for name in names[1:4]]
    return [
        dict(zip(("scope", "class", "metric", "value", "low", "high"), row, strict=True)) | {"n_patients": np.int64(2)}
        for row in rows
    ]


def figures(sides=None, scores=None, dice=0.9, weights="w" * 32):
    return Figures(scores or metrics(), by_case(sides or manifest()["sides"], dice), intervals(), weights)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A net that tells four bands of normalised intensity apart, and that takes neighbours into account."""
    keras = load_keras()
    image = keras.Input((16, 12, 1))
    blurred = keras.layers.Conv2D(1, 3, padding="same", use_bias=False)
    decide = keras.layers.Conv2D(4, 1, activation="softmax")
    net = keras.Model(image, decide(blurred(image)))
    blurred.set_weights([np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32).reshape(3, 3, 1, 1) / 16])
    # argmax of k x - c_k switches at x = c_(k+1) - c_k: -0.5, 0 and 0.5.
    decide.set_weights([10 * np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4), 10 * np.float32([0, 0.5, 0.5, 0])])
    path = tmp_path_factory.mktemp("network") / "whatever.keras"
    net.save(path)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A SQLite store; one for all tests, since making it costs seconds. MLflow's globals are put back."""
    folder = tmp_path_factory.mktemp("store")
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    experiment = mlflow.create_experiment("tests", artifact_location=str(folder / "artifacts"))
    yield SimpleNamespace(experiment=experiment, database=folder / "mlflow.db", client=mlflow.MlflowClient())
    assert mlflow.active_run() is None
    mlflow.set_tracking_uri(before)


@pytest.fixture
def register(store, network, request):
    """Register under a name of the test's own, in a run of its own."""
    name = request.node.name

    def register(path=network, *, scores=None, weights="w" * 32, run_id=None, settings=SETTINGS, **changes):
        made_from = manifest(**changes)
        said = figures(made_from["sides"], scores, weights=weights)
        arguments = (path, made_from, said, settings, registration(name))
        if run_id is not None:
            return registry.register(*arguments, run_id=run_id)
        with mlflow.start_run(experiment_id=store.experiment):
            return registry.register(*arguments)

    register.name = name
    return register


def champion(store, name):
    """Version that holds the alias, or None. (The SQLite store says 1, others "1".)"""
    version = store.client.get_registered_model(name).aliases.get("champion")
    return version and str(version)


def test_first_version_becomes_champion(store, register):
    record = register()
    name = register.name
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    run = store.client.get_run(record["run_id"])
    assert record == {
        "name": name,
        "version": "1",
        "alias": "champion",
        "promoted": True,
        "reason": "There was no champion; its mean foreground Dice is 0.9000.",
        "champion": "1",
        "mean_foreground_dice": 0.9,
        "run_id": run.info.run_id,
        "model_uri": f"models:/{name}/1",
        "load": f'mlflow.pyfunc.load_model("models:/{name}@champion")',
    }
    version = store.client.get_model_version_by_alias(name, "champion")
    assert (str(version.version), version.run_id) == ("1", record["run_id"])
    sides = {"train": ["Ann"], "validation": ["Ben"], "test": ["Cid", "Dan"]}
    digests = {side: sorted(value_digest(patient) for patient in patients) for side, patients in sides.items()}
    assert version.tags == {
        "run_id": record["run_id"],
        "lumbarflow_version": lumbarflow.__version__,
        "data_kind": "synthetic",
        "data_hash": "d" * 32,
        "split_method": "patient",
        "split_hash": "s" * 32,
        "content_hash": "c" * 32,
        "leaky": "false",
        "weights": "w" * 32,
        "mean_foreground_dice": "0.9",
        "dice_vertebrae": "0.92",
        "dice_canal": "0.9",
        "dice_IVD": "0.88",
        "train_patients": f"1 ({value_digest(digests['train'])})",
        "validation_patients": f"1 ({value_digest(digests['validation'])})",
        "test_patients": f"2 ({value_digest(digests['test'])})",
        "promotion": "promoted",
        "promotion_reason": record["reason"],
        "former_champion": "none",
    }
    tags = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
    assert tags == {
        "registered_version": f"{name} 1",
        "promotion": "promoted",
        "promotion_reason": record["reason"],
    }


def test_alias_moves_to_an_equal_model_and_stays_before_a_worse_one(store, register):
    assert register()["promoted"]
    equal = register()
    assert (equal["version"], equal["promoted"], equal["champion"]) == ("2", True, "2")
    worse = register(scores=metrics(mean=math.nextafter(0.9, 0)))
    assert (worse["version"], worse["promoted"], worse["champion"]) == ("3", False, "2")
    assert worse["load"] == f'mlflow.pyfunc.load_model("models:/{register.name}/3")'
    assert champion(store, register.name) == "2"
    tags = store.client.get_model_version(register.name, "3").tags
    assert tags["promotion"] == "kept back"
    assert tags["promotion_reason"] == worse["reason"]
    assert "is lower than" in worse["reason"]


def test_champions_patients_are_read_from_its_model(store, register):
    # The same hashes, but the champion's training took in Dan, whom the candidate is tested on.
    sides = {"train": {"7_t1": [0], "10_t2": [0]}, "validation": {"8_t2": [0]}, "test": {"9_t2": [0]}}
    assert register(sides=sides)["promoted"]
    record = register()
    assert not record["promoted"]
    assert "trained on 1 of these test patients" in record["reason"]
    assert champion(store, register.name) == "1"


def test_choosing_weights_by_a_patient_is_training_on_it(register):
    sides = manifest()["sides"]
    record = register(sides=sides | {"validation": {"9_t2": [1]}})
    assert not record["promoted"]
    assert "trained on 1 of its own test patients" in record["reason"]
    assert record["champion"] is None


def test_leaky_model_gets_no_alias_even_where_there_is_none(store, register):
    record = register(leaky=True, split_method="slice")
    assert (record["version"], record["promoted"], record["champion"]) == ("1", False, None)
    assert champion(store, register.name) is None


def test_model_without_a_figure_is_registered_and_kept_back(store, register):
    record = register(scores=metrics(mean=float("nan"), vertebrae=float("nan")))
    assert not record["promoted"] and record["mean_foreground_dice"] is None
    json.dumps(record, allow_nan=False)
    assert store.client.get_model_version(register.name, "1").tags["dice_vertebrae"] == "nan"


def test_someone_elses_champion_is_not_replaced(store, register):
    store.client.create_registered_model(register.name)
    store.client.create_model_version(register.name, source="file:///somewhere/else")
    store.client.set_registered_model_alias(register.name, "champion", "1")
    record = register()
    assert (record["version"], record["promoted"], record["champion"]) == ("2", False, "1")
    assert re.search(r"cannot be compared with the champion \(version 1\), which lacks", record["reason"])
    assert champion(store, register.name) == "1"


def test_alias_of_a_version_that_is_gone_is_not_moved(store, register):
    register()
    # SQL stores take the alias away with the version; others don't, which only the database can be made to show.
    with sqlite3.connect(store.database) as database:
        database.execute(
            "UPDATE model_versions SET current_stage = 'Deleted_Internal' WHERE name = ?", (register.name,)
        )
    record = register()
    assert (record["version"], record["promoted"], record["champion"]) == ("2", False, "1")
    assert "cannot be compared with the champion (version 1)" in record["reason"]


def test_deleting_the_champion_makes_room(store, register):
    register()
    store.client.delete_model_version(register.name, "1")
    assert register(scores=metrics(mean=0.5))["champion"] == "2"


def test_model_can_be_logged_to_a_finished_run(store, register):
    with mlflow.start_run(experiment_id=store.experiment) as run:
        pass
    with mlflow.start_run(experiment_id=store.experiment) as other:
        record = register(run_id=run.info.run_id)
        assert mlflow.active_run().info.run_id == other.info.run_id
    assert record["run_id"] == run.info.run_id
    assert store.client.get_model_version(register.name, "1").run_id == run.info.run_id
    assert store.client.get_run(run.info.run_id).info.status == "FINISHED"
    assert "registered_version" not in store.client.get_run(other.info.run_id).data.tags


def test_nothing_of_the_process_is_changed(store, register, capfd):
    path, variables = list(sys.path), dict(os.environ)
    register()
    assert sys.path == path
    assert dict(os.environ) == variables
    # Neither progress bars nor announcements of versions. (MLflow's log level is the package's business.)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert not re.search(r"it/s|Created version|Successfully registered", printed.err)


def test_model_that_does_not_predict_is_not_registered(store, register, tmp_path):
    broken = tmp_path / "broken.keras"
    broken.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"broken\.keras: not readable as a net .* It was not registered\. Run: kedro"):
        register(broken)
    with pytest.raises(mlflow.MlflowException, match="not found"):
        store.client.get_registered_model(register.name)


def test_missing_things_are_named(store, register, tmp_path):
    with pytest.raises(ValueError, match=r"absent\.keras: no such file; expected a trained net\. Run: kedro run"):
        register(tmp_path / "absent.keras")
    for name in ("batch_size", "test_time_augmentation"):
        with pytest.raises(ValueError, match=rf"settings lack \['{name}'\]; expected \['size'"):
            register(settings={key: value for key, value in SETTINGS.items() if key != name})
    rows = [row for row in metrics() if row["scope"] != "pooled" or row["class"] != "canal"]
    with pytest.raises(ValueError, match=r"lacks \['canal'\] of the scope 'pooled'\. Run: kedro run --pipeline=eval"):
        register(scores=rows)


def test_without_a_run_there_is_nothing_to_log_to(store, network):
    with pytest.raises(ValueError, match=r"no MLflow run is active; expected one.*Start one or pass run_id"):
        registry.register(network, manifest(), figures(), SETTINGS, registration("none"))


def test_cases_must_be_those_of_the_test_patients(store, network):
    def register(rows):
        with mlflow.start_run(experiment_id=store.experiment):
            registry.register(network, manifest(), replace(figures(), by_case=rows), SETTINGS, registration("none"))

    rows = by_case(manifest()["sides"])
    expected = r"expected the test series, each with vertebrae, canal, IVD\. Run: kedro run --pipeline=evaluate"
    with pytest.raises(ValueError, match=r"metrics_by_case has 1 of the 2 test series and 0 others; " + expected):
        register(rows[:4])
    with pytest.raises(ValueError, match=r"metrics_by_case has 2 of the 2 test series and 0 others; " + expected):
        register(rows[:-1])
    with pytest.raises(ValueError, match=r"metrics_by_case has 2 of the 2 test series and 1 others; " + expected):
        register(rows + [rows[0] | {"series": "7_t1"}])


def test_figures_must_have_intervals(store, network):
    rows = [row for row in intervals() if row["class"] != "IVD" or row["scope"] != "pooled"]
    lacking = replace(figures(), intervals=rows)
    with (
        mlflow.start_run(experiment_id=store.experiment),
        pytest.raises(
            ValueError, match=r"metrics_intervals lacks the Dice of \['IVD'\] of the scope 'pooled'\. Run: kedro"
        ),
    ):
        registry.register(network, manifest(), lacking, SETTINGS, registration("none"))


@pytest.fixture
def register_facts(store, request, monkeypatch):
    """Register versions without nets, from facts good enough and what differs: what happens after a model is logged."""
    name = request.node.name
    known = {}

    def log_facts(path, manifest, figures, segmenter_settings, settings):
        registry._ensure_registered(store.client, name)
        version = store.client.create_model_version(name, "file:///somewhere", tags={"weights": figures.weights})
        known[str(version.version)] = ModelFacts(name, str(version.version), **(GOOD_ENOUGH | path))
        return known[str(version.version)], {}

    def facts_of_champion(client, name, alias):
        return known.get(champion(store, name))

    def register(weights="w" * 32, **changes):
        with mlflow.start_run(experiment_id=store.experiment):
            return registry.register(changes, manifest(), figures(weights=weights), SETTINGS, registration(name))

    monkeypatch.setattr(registry, "log_model", log_facts)
    monkeypatch.setattr(registry, "_champion", facts_of_champion)
    monkeypatch.setattr(registry, "model_card", lambda record, name, version, verdict: verdict)
    register.name = name
    return register


def test_champion_that_changes_meanwhile_is_compared_with_anew(store, register_facts, monkeypatch, caplog):
    name = register_facts.name
    for dice in (0.7, 0.8):
        register_facts(mean_foreground_dice=dice)
    store.client.set_registered_model_alias(name, "champion", "1")
    decide = registry.decide_promotion
    compared = []

    def someone_else_promotes(candidate, champion, alias, rules):
        compared.append(champion.version)
        store.client.set_registered_model_alias(name, "champion", "2")
        return decide(candidate, champion, alias, rules)

    monkeypatch.setattr(registry, "decide_promotion", someone_else_promotes)
    with caplog.at_level("INFO"):
        record = register_facts(mean_foreground_dice=0.75)
    assert compared == ["1", "2"]
    assert (record["promoted"], record["champion"]) == (False, "2")
    assert champion(store, name) == "2"
    version = store.client.get_model_version(name, "3")
    assert version.tags["promotion"] == "kept back"
    assert "0.7500 is lower than the 0.8000" in version.tags["promotion_reason"]
    assert version.description == f"kept back. {record['reason']}"
    assert "former_champion" not in version.tags
    assert "champion was given to another version meanwhile" in caplog.text


# Rollback


@pytest.fixture
def promoted(store, request):
    """A registered model of a few versions, each promoted over the one before, without nets: rollbacks read none."""
    name = request.node.name

    def make(versions):
        store.client.create_registered_model(name)
        for version in range(1, versions + 1):
            tags = {"promotion": "promoted", "former_champion": str(version - 1) if version > 1 else "none"}
            store.client.create_model_version(name, source="file:///somewhere", tags=tags)
        store.client.set_registered_model_alias(name, "champion", str(versions))

    make.name, make.settings = name, registration(name)
    return make


def test_rollback_puts_the_former_champion_back_and_the_next_one_the_one_before(store, promoted, caplog):
    promoted(3)
    with caplog.at_level("INFO"):
        record = rollback(promoted.settings)
    name = promoted.name
    assert datetime.now(UTC) - datetime.fromisoformat(record.pop("at")) < timedelta(minutes=1)
    undo = f'mlflow.MlflowClient().set_registered_model_alias("{name}", "champion", "3")'
    assert json.loads(json.dumps(record)) == {
        "name": name,
        "alias": "champion",
        "champion": "2",
        "rolled_back": "3",
        "undo": undo,
        "load": f'mlflow.pyfunc.load_model("models:/{name}@champion")',
    }
    assert champion(store, name) == "2"
    assert f"{name} version 2 is champion again, in place of version 3. To undo it: {undo}" in caplog.text
    tags = {version: store.client.get_model_version(name, version).tags for version in "123"}
    when = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
    assert re.fullmatch(rf"{when}, to version 2", tags["3"].pop("rolled_back"))
    assert re.fullmatch(rf"{when}, in place of version 3", tags["2"].pop("reinstated"))
    assert tags == {
        "1": {"promotion": "promoted", "former_champion": "none"},
        "2": {"promotion": "promoted", "former_champion": "1"},
        "3": {"promotion": "promoted", "former_champion": "2"},
    }

    assert rollback(promoted.settings)["champion"] == "1"
    assert champion(store, name) == "1"
    with pytest.raises(
        ValueError, match=r"version 1 was promoted when no version held the alias champion; expected a f"
    ):
        rollback(promoted.settings)
    assert champion(store, name) == "1"


def test_rollback_starts_from_whoever_holds_the_alias_now(store, promoted):
    promoted(3)
    name = promoted.name
    store.client.set_registered_model_alias(name, "champion", "2")  # an operator's doing
    record = rollback(promoted.settings)
    assert (record["rolled_back"], record["champion"]) == ("2", "1")
    # Put back by hand, and replaced; then it comes back as any former champion, and is no longer one rolled back.
    store.client.set_registered_model_alias(name, "champion", "3")
    assert rollback(promoted.settings)["champion"] == "2"
    assert "rolled_back" not in store.client.get_model_version(name, "2").tags


def test_rollback_says_why_it_cannot(store, promoted):
    name = promoted.name
    by_hand = rf'set_registered_model_alias\("{name}", "champion", "VERSION"\)\.$'
    with pytest.raises(
        ValueError, match=rf"^sqlite://\S+mlflow\.db has no registered model {name}; expected.*Register"
    ):
        rollback(promoted.settings)
    promoted(3)
    store.client.delete_model_version(name, "2")
    with pytest.raises(ValueError, match=rf"version 2, which held .* before version 3, is gone from .*{by_hand}"):
        rollback(promoted.settings)
    assert "rolled_back" not in store.client.get_model_version(name, "3").tags
    store.client.create_model_version(name, source="file:///somewhere", tags={"promotion": "kept back"})
    store.client.set_registered_model_alias(name, "champion", "4")
    with pytest.raises(ValueError, match=rf"version 4 holds .* does not say who held it before; expected .*{by_hand}"):
        rollback(promoted.settings)
    store.client.delete_registered_model_alias(name, "champion")
    with pytest.raises(ValueError, match=rf"no version of {name} holds the alias champion; expected one .*{by_hand}"):
        rollback(promoted.settings)
    with pytest.raises(ValueError, match="unknown setting registration.aliases"):
        rollback(promoted.settings | {"aliases": "x"})


def test_rollback_stops_if_the_alias_moves_meanwhile(store, promoted, monkeypatch):
    promoted(3)
    name, tags_of = promoted.name, registry._version_tags

    def someone_else_moves_it(client, name, version):
        client.set_registered_model_alias(name, "champion", "1")
        return tags_of(client, name, version)

    monkeypatch.setattr(registry, "_version_tags", someone_else_moves_it)
    with pytest.raises(
        ValueError, match=r"left version 3 while this went on; expected it to stay\. Nothing was changed"
    ):
        rollback(promoted.settings)
    assert champion(store, name) == "1"
    assert "rolled_back" not in store.client.get_model_version(name, "3").tags


def test_net_that_was_rolled_back_does_not_come_back_by_itself(store, register_facts):
    name = register_facts.name
    register_facts(mean_foreground_dice=0.8, weights="a" * 32)
    register_facts(weights="b" * 32)
    assert store.client.get_model_version(name, "2").tags["former_champion"] == "1"
    rollback(registration(name))
    # A training that goes on from its last checkpoint is the same net: its figures are better than version 1's, still.
    record = register_facts(weights="b" * 32)
    assert (record["version"], record["promoted"], record["champion"]) == ("3", False, "1")
    assert "Its net is the one of version 2, which was rolled back." in record["reason"]
    # Another net is compared with the reinstated champion.
    record = register_facts(mean_foreground_dice=0.85, weights="c" * 32)
    assert (record["version"], record["promoted"], record["champion"]) == ("4", True, "4")
    assert "is not lower than the 0.8000 of version 1" in record["reason"]
    assert rollback(registration(name))["champion"] == "1"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("sqlite:////home/folder/mlflow.db", "sqlite:////home/folder/mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("https://user:secret@host:5000/mlflow?token=secret", "https://host:5000/mlflow"),
        ("postgresql+pg8000://user:sec@ret@host/mlflow?password=secret", "postgresql+pg8000://host/mlflow"),
        ("postgresql://user:se#cr?e/t@host/mlflow", "postgresql://host/mlflow"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_no_password_of_the_registry_is_shown(monkeypatch, address, shown):
    monkeypatch.setattr(mlflow, "get_registry_uri", lambda: address)
    assert registry._registry() == shown


def test_no_password_is_logged_with_an_error_of_the_server(monkeypatch, caplog):
    def fails(address):
        raise mlflow.MlflowException("API request to https://user:se/c?ret@host:5000/api/2.0 failed with exception x")

    monkeypatch.setattr(registry, "_holder", lambda *_: "1")
    monkeypatch.setattr(registry, "_version_tags", lambda *_: {})
    monkeypatch.setattr(mlflow.artifacts, "load_dict", fails)
    assert registry._champion(None, "lumbar-unet", "champion").missing()
    assert "made from (API request to https://host:5000/api/2.0 failed with exception x)" in caplog.text


def test_telemetry_is_off():
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert is_telemetry_disabled()


# The model as logged


@pytest.fixture(scope="module")
def logged(store, network, tmp_path_factory):
    """Folder of a registered model, pulled."""
    with mlflow.start_run(experiment_id=store.experiment) as run:
        name = "logged"
        mlflow.set_tags({"git_commit": "0123456789abcdef", "git_changed": "true"})
        record = registry.register(network, manifest(), figures(), SETTINGS, registration(name))
    folder = tmp_path_factory.mktemp("pulled")
    mlflow.artifacts.download_artifacts(artifact_uri="models:/logged@champion", dst_path=str(folder))
    return SimpleNamespace(folder=folder, record=record, run=run)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def test_model_holds_these_files_and_no_pickle(logged):
    files = files_of(logged.folder)
    code = {name for name in files if name.startswith("code/")}
    assert set(files) - code == {
        "MLmodel",
        "artifacts/cases.json",
        "artifacts/model_card.md",
        "artifacts/network.keras",
        "artifacts/network.onnx",
        "artifacts/patients.json",
        "artifacts/segmenter.json",
        "conda.yaml",
        "input_example.json",
        "python_env.yaml",
        "registered_model_meta",
        "requirements.txt",
        "serving.py",
        "serving_input_example.json",
    }
    package = Path(lumbarflow.__file__).parent
    parts = (path.relative_to(package.parent) for path in package.rglob("*") if path.is_file())
    sources = {path.as_posix() for path in parts if "__pycache__" not in path.parts}
    assert code == {f"code/{name}" for name in sources}
    with zipfile.ZipFile(files["artifacts/network.keras"]) as archive:
        assert set(archive.namelist()) == {"config.json", "metadata.json", "model.weights.h5"}
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents |= {name: path.read_bytes() for name, path in files.items() if not name.endswith(".keras")}
    for name, content in contents.items():
        # Pickle's protocol 2 and later begin so; the flavour of a pickled model has the entry `python_model`.
        assert not re.match(rb"\x80[\x02-\x05]", content), name
    assert b"python_model:" not in contents["MLmodel"]
    assert b"loader_module: mlflow.pyfunc.loaders.code_model" in contents["MLmodel"]


def test_model_tells_of_no_patient_and_no_folder_of_this_machine(logged, network):
    for name, path in files_of(logged.folder).items():
        if name.startswith("code/") or name.endswith(".keras"):
            continue
        text = path.read_text(errors="replace")  # the graph's weights are no text, its names are
        assert not re.search(r"Ann|Ben|Cid|Dan|\b7_t1|\b10_t2", text), name
        assert str(network.parent) not in text and str(Path(lumbarflow.__file__).parent) not in text, name
    digests = json.loads((logged.folder / "artifacts/patients.json").read_text())
    assert digests["train"] == [value_digest("Ann")]  # two series, one patient
    assert digests["test"] == sorted([value_digest("Cid"), value_digest("Dan")])
    cases = json.loads((logged.folder / "artifacts/cases.json").read_text())
    dice = {"vertebrae": 0.9, "canal": 0.9, "IVD": 0.9}
    assert cases == {
        value_digest("9_t2"): {"patient": value_digest("Cid"), "dice": dice},
        value_digest("10_t2"): {"patient": value_digest("Dan"), "dice": dice},
    }


def test_requirements_are_pinned_names_and_versions(logged):
    from importlib.metadata import version

    lines = (logged.folder / "requirements.txt").read_text().splitlines()
    names = ["mlflow", "numpy", "scipy", "SimpleITK", "pydicom", "onnxruntime"]
    assert lines == [f"{name}=={version(name)}" for name in names]


def test_a_net_that_onnx_cannot_express_is_served_by_keras(store, register, tmp_path):
    from lumbarflow import models, networks

    atlas = models.build("atlas", (16, 12), 1, 4)
    networks.save_model(atlas, tmp_path / "atlas.keras")
    record = register(tmp_path / "atlas.keras")
    model = mlflow.pyfunc.load_model(record["model_uri"])
    segmenter = Segmenter(atlas, SETTINGS)
    slices = contrast((3, 20, 30))
    expected = segmenter.probabilities(slices, tuple(SPACING))
    given = {"pixel_spacing_mm": SPACING, "output": "probabilities"}
    np.testing.assert_array_equal(model.predict(slices, params=given), expected)
    requirements = mlflow.artifacts.load_text(f"{record['model_uri']}/requirements.txt")
    assert "keras==" in requirements and "tensorflow==" in requirements and "onnxruntime" not in requirements


def test_pulled_digest_tells_nets_and_what_computes_them(store, register, network, monkeypatch):
    keras = load_keras()
    other = keras.saving.load_model(network)
    other.set_weights([2 * weight for weight in other.get_weights()])
    path = network.with_name("other.keras")
    other.save(path)
    for net in (network, network, path):
        register(net)
    monkeypatch.setattr(registry, "_graph", lambda path: None)  # as versions were before there were graphs
    register(network)
    pulled = [registry.pull(f"models:/{register.name}/{version}") for version in "1234"]
    first, again, others, earlier = (model.digest for model in pulled)
    assert first == again and len({first, others, earlier}) == 3
    # Its net is a Keras model still, and computes the same.
    slices = contrast((3, 20, 30))
    expected, found = (model.segmenter.probabilities(slices, tuple(SPACING)) for model in (pulled[0], pulled[3]))
    assert isinstance(pulled[3].segmenter.model, keras.Model)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_segmenter_record(logged):
    record = json.loads((logged.folder / "artifacts/segmenter.json").read_text())
    assert record["settings"] == SETTINGS
    assert record["classes"] == {"0": "background", "1": "vertebrae", "2": "canal", "3": "IVD"}
    assert record["origin"]["run_id"] == logged.run.info.run_id
    assert record["origin"]["leaky"] is False and record["origin"]["data_hash"] == "d" * 32
    assert record["origin"]["git_commit"] == "0123456789abcdef"
    table = {"vertebrae": [1, 2, 3, 101], "canal": [100], "IVD": []}
    assert record["preparation"] == {"labels": {"method": "direct", "table": table}}
    assert {"class": "canal", "scope": "pooled", "dice": 0.9} in record["metrics_by_class"]
    canal = {"scope": "pooled", "class": "canal", "metric": "dice", "value": 0.9, "low": 0.85, "high": 0.95}
    assert canal | {"n_patients": 2} in record["metrics_intervals"]
    assert record["data"] == {"synthetic": DATA["synthetic"]}
    assert record["cohort"] == {
        "sides": {
            "train": {"patients": 1, "series": 2, "slices": 3},
            "validation": {"patients": 1, "series": 1, "slices": 1},
            "test": {"patients": 2, "series": 2, "slices": 3},
        },
        "sequences": {"t1": 1, "t2": 4},
        "pixel_spacing_mm": [[1.25, 1.5], [2.0, 1.75]],
    }


def test_card_is_the_versions_description_and_lies_beside_the_net(store, logged):
    version = store.client.get_model_version("logged", "1")
    assert version.description.startswith("# logged, version 1\n")
    assert 'load_model("models:/logged/1")' in version.description
    assert f"promoted. {logged.record['reason']}" in version.description
    assert "| canal | 0.900 [0.850, 0.950] | 0.50 |" in version.description
    assert "commit `0123456789ab` with changes" in version.description
    card = (logged.folder / "artifacts/model_card.md").read_text()
    # What was not known yet when the model was logged is all that it lacks.
    known = version.description.replace("# logged, version 1", "# logged").replace("logged/1", "logged/VERSION")
    start, end = known.index("## Promotion"), known.index("## Data")
    assert card == known[:start] + known[end:]


def test_a_card_that_is_too_long_says_where_its_rest_is():
    line = "0123456789" * 8 + "\n"
    assert registry._description(line * 61) == line * 61  # 4941
    short = registry._description(line * 80)
    assert len(short) <= 5000
    assert short.startswith(line * 60)
    assert short.endswith("8901234567890123456789\n\nThe rest stands in model_card.md, among the model's artefacts.\n")


def test_input_example_is_recorded_and_works(logged):
    model = mlflow.pyfunc.load_model(str(logged.folder))
    example = json.loads((logged.folder / "serving_input_example.json").read_text())
    slices = np.array(example["inputs"])
    assert slices.shape == (2, 24, 20)
    assert example["params"] == {"pixel_spacing_mm": [2.0, 1.5], "output": "labels"}
    assert model.predict(slices, params=example["params"]).shape == (2, 24, 20)


# What runs where the model is pulled: a process that shares nothing with this one but a folder.
PULLED = """
import json, sys
from pathlib import Path

class NoKedro:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("kedro", "kedro_mlflow", "kedro_datasets"):
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, NoKedro())
import mlflow
import numpy as np

folder, model = Path(sys.argv[1]), mlflow.pyfunc.load_model(sys.argv[2])
params = {"pixel_spacing_mm": [1.0, 0.5]}
slices = np.load(folder / "slices.npy")
np.save(folder / "labels.npy", model.predict(slices, params=params))
np.save(folder / "probabilities.npy", model.predict(slices, params=params | {"output": "probabilities"}))
paths = [str(folder / name) for name in ("scan.nii.gz", "absent.mha", "exam")]
answers = model.predict(paths, params={"output_path": str(folder / "masks")})
numbered = model.predict(paths[0], params={"labels": "instances", "test_time_augmentation": "off"})
np.save(folder / "numbered.npy", numbered["labels"])
(folder / "answers.json").write_text(json.dumps(answers))
import lumbarflow
(folder / "seen.json").write_text(json.dumps({"lumbarflow": lumbarflow.__file__, "modules": sorted(sys.modules)}))
"""


def contrast(shape):
    """Noise with a bright block in it, which neither blur nor test-time augmentation averages away."""
    values = np.random.default_rng(1).integers(0, 900, shape).astype(np.int16)
    values[(..., *(slice(n * 3 // 10, n * 7 // 10) for n in shape[1:]))] += 900
    return values


@pytest.fixture
def scan_files(tmp_path, make_volume, make_dicom):
    """An oblique volume as a NIfTI file and as a folder of DICOM; returns the volume."""
    volume = make_volume((15, 20, 17), values=contrast((15, 20, 17)))
    write_volume(volume, tmp_path / "scan.nii.gz")
    make_dicom(tmp_path / "exam", volume)
    return volume


def assert_pulled_equals_pipeline(python, model_uri, network, folder, volume, environment=None):
    """Predict in another process, started in `folder`, and compare voxel by voxel with the pipeline's Segmenter."""
    slices = contrast((3, 20, 30))
    np.save(folder / "slices.npy", slices)
    (folder / "pulled.py").write_text(PULLED)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLFLOW", "KERAS"))}
    environment = inherited | {"MLFLOW_DISABLE_TELEMETRY": "true"} | (environment or {})
    subprocess.run([python, "pulled.py", str(folder), model_uri], cwd=folder, env=environment, check=True, timeout=600)
    from lumbarflow.networks import for_inference, load_model

    segmenter = Segmenter(for_inference(load_model(network)), SETTINGS)
    labels = np.load(folder / "labels.npy")
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(labels, segmenter.labels(slices, tuple(SPACING)))
    np.testing.assert_array_equal(
        np.load(folder / "probabilities.npy"), segmenter.probabilities(slices, tuple(SPACING))
    )
    expected = segmenter.segment(read_volume(folder / "scan.nii.gz")).array
    assert set(np.unique(expected)) == {0, 1, 2, 3}
    answers = json.loads((folder / "answers.json").read_text())
    assert [sorted(answer)[0] for answer in answers] == ["direction", "error", "direction"]
    for answer, name in ((answers[0], "scan_seg.nii.gz"), (answers[2], "exam_1_seg.nii.gz")):
        assert answer["written"] == str(folder / "masks" / name)
        mask = read_volume(answer["written"], LabelMap)
        np.testing.assert_array_equal(mask.array, expected)
        np.testing.assert_allclose(mask.direction, volume.direction, atol=1e-6)
    plain = segmenter.with_test_time_augmentation({}).segment(read_volume(folder / "scan.nii.gz")).array
    numbered = np.load(folder / "numbered.npy")
    np.testing.assert_array_equal(np.digitize(numbered, [1, 100, 101]), plain)  # ids -> classes
    seen = json.loads((folder / "seen.json").read_text())
    assert not {"kedro", "kedro_mlflow", "keras", "tensorflow"} & set(seen["modules"])
    return Path(seen["lumbarflow"])


def test_pulled_model_needs_neither_kedro_nor_the_checkout(store, logged, network, tmp_path, scan_files):
    source = assert_pulled_equals_pipeline(
        sys.executable,
        "models:/logged@champion",
        network,
        tmp_path,
        scan_files,
        {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()},
    )
    assert source.is_relative_to(store.database.parent / "artifacts")


@pytest.mark.integration
def test_pulled_model_works_with_its_recorded_requirements_alone(logged, network, tmp_path, scan_files):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python]
    subprocess.run([*install, "--requirement", logged.folder / "requirements.txt"], check=True, timeout=1200)
    source = assert_pulled_equals_pipeline(python, str(logged.folder), network, tmp_path, scan_files)
    assert source == logged.folder / "code" / "lumbarflow" / "__init__.py"
