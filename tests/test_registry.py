"""Promotion rules by hand and by property; registration against a real SQLite store, with a net of hand-set weights."""

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
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lumbarflow
from lumbarflow import registry
from lumbarflow.backend import load_keras
from lumbarflow.files import value_digest
from lumbarflow.inference import Segmenter
from lumbarflow.registry import ModelFacts, decide_promotion

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
CANDIDATE = ModelFacts(
    name="lumbar-unet",
    version="2",
    data_kind="real",
    leaky=False,
    data_hash="d" * 32,
    split_hash="s" * 32,
    mean_foreground_dice=0.9,
    trained_on=frozenset({"a", "b", "c"}),
    tested_on=frozenset({"x", "y"}),
)
CHAMPION = replace(CANDIDATE, version="1")
BY_HAND = r'mlflow\.MlflowClient\(\)\.set_registered_model_alias\("lumbar-unet", "champion", "2"\)'


# Decisions


@pytest.mark.parametrize(
    ("candidate", "champion", "promote", "reason"),
    [
        ({}, None, True, r"^There was no champion; its mean foreground Dice is 0\.9000\.$"),
        ({}, {}, True, r"Dice of 0\.9000 is not lower than the 0\.9000 of version 1, on the same test patients\.$"),
        ({"mean_foreground_dice": 0.91}, {}, True, r"Dice of 0\.9100 is not lower than the 0\.9000 of version 1"),
        ({"data_kind": "synthetic"}, {"data_kind": "synthetic"}, True, r"not lower"),
        ({"data_kind": "synthetic"}, None, True, r"There was no champion"),
        ({"mean_foreground_dice": 0.89}, {}, False, r"Dice of 0\.8900 is lower than the 0\.9000 of the champion .*"),
        ({"mean_foreground_dice": 0.9 - 1e-7}, {}, False, r"0\.8999999 is lower than the 0\.9000000 of the champion"),
        ({"mean_foreground_dice": math.nextafter(0.9, 0)}, {}, False, r"is lower than"),
        ({"leaky": True}, None, False, r"split without regard to patients.*A leaky model never becomes champion"),
        ({"leaky": True, "mean_foreground_dice": 1.0}, {"leaky": True}, False, r"never becomes champion"),
        ({"leaky": None}, None, False, r"lacks a usable leaky\. Run the training and its evaluation again"),
        ({"mean_foreground_dice": math.nan}, None, False, r"lacks a usable mean_foreground_dice\."),
        ({"mean_foreground_dice": None}, {}, False, r"lacks a usable mean_foreground_dice\."),
        ({"mean_foreground_dice": math.inf}, {}, False, r"lacks a usable mean_foreground_dice\."),
        ({"data_hash": ""}, {"data_hash": ""}, False, r"lacks a usable data_hash\."),
        ({"data_kind": "other", "split_hash": None}, {}, False, r"lacks a usable data_kind, split_hash\."),
        ({"trained_on": frozenset()}, {}, False, r"lacks a usable trained_on\."),
        ({"tested_on": frozenset()}, {}, False, r"lacks a usable tested_on\."),
        ({"tested_on": frozenset("abx")}, None, False, r"trained on 2 of its own test patients\. Run preprocess"),
        ({}, {"data_hash": None}, False, rf"the champion \(version 1\), which lacks a usable data_hash\. .*{BY_HAND}"),
        ({}, {"mean_foreground_dice": math.nan}, False, r"version 1\), which lacks a usable mean_foreground_dice"),
        ({"data_kind": "synthetic"}, {}, False, rf"from synthetic scans and the champion .* real ones\. .*{BY_HAND}"),
        ({"data_kind": "mixed"}, {}, False, r"from mixed scans and the champion \(version 1\) from real ones"),
        (
            {"data_hash": "e" * 32},
            {"data_kind": "synthetic"},
            False,
            rf"other data \(real, hash e{{8}}\) than the champion \(version 1\) \(synthetic, hash d{{8}}\).*{BY_HAND}",
        ),
        ({"split_hash": "t" * 32}, {}, False, rf"another split \(hash t{{8}}\) .* \(hash s{{8}}\).*{BY_HAND}"),
        ({}, {"trained_on": frozenset("axy")}, False, rf"trained on 2 of these test patients\. .*{BY_HAND}"),
    ],
)
def test_decision(candidate, champion, promote, reason):
    decision = decide_promotion(
        replace(CANDIDATE, **candidate), None if champion is None else replace(CHAMPION, **champion), "champion"
    )
    assert decision.promote is promote
    assert re.search(reason, decision.reason), decision.reason


def test_a_version_without_facts_lacks_all_of_them():
    facts = "data_kind, leaky, data_hash, split_hash, mean_foreground_dice, trained_on, tested_on"
    decision = decide_promotion(CANDIDATE, ModelFacts("lumbar-unet", "1"), "champion")
    assert not decision.promote
    assert f"which lacks a usable {facts}." in decision.reason


def facts(version):
    patients = st.frozensets(st.sampled_from("abcxyz"), max_size=3)
    return st.builds(
        ModelFacts,
        name=st.just("lumbar-unet"),
        version=st.just(version),
        data_kind=st.sampled_from(["real", "synthetic", "mixed", None]),
        leaky=st.sampled_from([False, False, False, True, None]),
        data_hash=st.sampled_from(["d", "e"]),
        split_hash=st.sampled_from(["s", "t"]),
        mean_foreground_dice=st.one_of(st.sampled_from([0.8, 0.9, math.nan, None]), st.floats(0, 1)),
        trained_on=st.one_of(st.none(), patients),
        tested_on=st.one_of(st.none(), patients),
    )


@given(candidate=facts("2"), champion=st.none() | facts("1"))
def test_whatever_gets_the_alias_has_earned_it(candidate, champion):
    decision = decide_promotion(candidate, champion, "champion")
    assert decision.reason.endswith(".")
    if not decision.promote:
        return
    assert candidate.leaky is False
    assert 0 <= candidate.mean_foreground_dice <= 1
    assert not candidate.trained_on & candidate.tested_on
    if champion is not None:
        assert (candidate.data_hash, candidate.split_hash) == (champion.data_hash, champion.split_hash)
        assert candidate.mean_foreground_dice >= champion.mean_foreground_dice
        assert not champion.trained_on & candidate.tested_on
        assert candidate.data_kind == "real" or champion.data_kind != "real"


@given(candidate=facts("2"), dice=st.floats(0, 1))
def test_equal_models_follow_each_other(candidate, dice):
    # Whatever may become the first champion may replace an equal one.
    candidate = replace(candidate, mean_foreground_dice=dice)
    first = decide_promotion(candidate, None, "champion").promote
    assert decide_promotion(candidate, replace(candidate, version="1"), "champion").promote is first


# Registration


def manifest(**changes):
    series = {"7_t1": "Ann", "7_t2": "Ann", "8_t2": "Ben", "9_t2": "Cid", "10_t2": "Dan"}
    return {
        "format_version": 1,
        "size": [16, 12],
        "data_kind": "synthetic",
        "leaky": False,
        "split_method": "patient",
        "data_hash": "d" * 32,
        "split_hash": "s" * 32,
        "content_hash": "c" * 32,
        "settings": {"labels": {"canal": [100]}},
        "series": {name: {"patient": patient} for name, patient in series.items()},
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

    def register(path=network, *, scores=None, run_id=None, settings=SETTINGS, **changes):
        arguments = (path, manifest(**changes), scores or metrics(), settings, {"name": name, "alias": "champion"})
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
        "mean_foreground_dice": "0.9",
        "dice_vertebrae": "0.92",
        "dice_canal": "0.9",
        "dice_IVD": "0.88",
        "train_patients": f"1 ({value_digest(digests['train'])})",
        "validation_patients": f"1 ({value_digest(digests['validation'])})",
        "test_patients": f"2 ({value_digest(digests['test'])})",
        "promotion": "promoted",
        "promotion_reason": record["reason"],
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
    with pytest.raises(ValueError, match=r"does not predict .*it was not registered\. Check the \.keras file"):
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
        registry.register(network, manifest(), metrics(), SETTINGS, {"name": "none", "alias": "champion"})


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
        record = registry.register(network, manifest(), metrics(), SETTINGS, {"name": name, "alias": "champion"})
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
        "artifacts/network.keras",
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
    sources = {path.relative_to(package.parent).as_posix() for path in package.rglob("*.py")}
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
        text = path.read_text()
        assert not re.search(r"Ann|Ben|Cid|Dan|\b7_t1|\b10_t2", text), name
        assert str(network.parent) not in text and str(Path(lumbarflow.__file__).parent) not in text, name
    digests = json.loads((logged.folder / "artifacts/patients.json").read_text())
    assert digests["train"] == [value_digest("Ann")]  # two series, one patient
    assert digests["test"] == sorted([value_digest("Cid"), value_digest("Dan")])


def test_requirements_are_pinned_names_and_versions(logged):
    from importlib.metadata import version

    lines = (logged.folder / "requirements.txt").read_text().splitlines()
    assert lines == [f"{name}=={version(name)}" for name in ("mlflow", "tensorflow", "keras", "numpy", "SimpleITK")]


def test_segmenter_record(logged):
    record = json.loads((logged.folder / "artifacts/segmenter.json").read_text())
    assert record["settings"] == SETTINGS
    assert record["classes"] == {"0": "background", "1": "vertebrae", "2": "canal", "3": "IVD"}
    assert record["origin"]["run_id"] == logged.run.info.run_id
    assert record["origin"]["leaky"] is False and record["origin"]["data_hash"] == "d" * 32
    assert record["preparation"] == {"labels": {"canal": [100]}}
    assert {"class": "canal", "scope": "pooled", "dice": 0.9} in record["metrics_by_class"]


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
import lumbarflow
(folder / "seen.json").write_text(json.dumps({"lumbarflow": lumbarflow.__file__, "modules": sorted(sys.modules)}))
"""


def assert_pulled_equals_pipeline(python, model_uri, network, folder, environment=None):
    """Predict in another process, started in `folder`, and compare voxel by voxel with the pipeline's Segmenter."""
    slices = np.random.default_rng(1).integers(0, 900, (3, 20, 30)).astype(np.int16)
    slices[:, 6:14, 9:21] += 900  # neither blur nor test-time augmentation averages this away
    np.save(folder / "slices.npy", slices)
    (folder / "pulled.py").write_text(PULLED)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLFLOW", "KERAS"))}
    environment = inherited | {"MLFLOW_DISABLE_TELEMETRY": "true"} | (environment or {})
    subprocess.run([python, "pulled.py", str(folder), model_uri], cwd=folder, env=environment, check=True, timeout=600)
    from lumbarflow.networks import load_model

    segmenter = Segmenter(load_model(network), SETTINGS)
    labels = np.load(folder / "labels.npy")
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(labels, segmenter.labels(slices, tuple(SPACING)))
    np.testing.assert_array_equal(
        np.load(folder / "probabilities.npy"), segmenter.probabilities(slices, tuple(SPACING))
    )
    seen = json.loads((folder / "seen.json").read_text())
    assert not {"kedro", "kedro_mlflow"} & set(seen["modules"])
    return Path(seen["lumbarflow"])


def test_pulled_model_needs_neither_kedro_nor_the_checkout(store, logged, network, tmp_path):
    source = assert_pulled_equals_pipeline(
        sys.executable,
        "models:/logged@champion",
        network,
        tmp_path,
        {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()},
    )
    assert source.is_relative_to(store.database.parent / "artifacts")


@pytest.mark.integration
def test_pulled_model_works_with_its_recorded_requirements_alone(logged, network, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")
    requirements = str(logged.folder / "requirements.txt")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True, timeout=1200)
    working = tmp_path / "working"
    working.mkdir()
    source = assert_pulled_equals_pipeline(python, str(logged.folder), network, working)
    assert source == logged.folder / "code" / "lumbarflow" / "__init__.py"
