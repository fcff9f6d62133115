"""Real servers on loopback: the registry behind `mlflow server`, over SQLite and PostgreSQL; `mlflow models serve`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest

from lumbarflow import registry
from lumbarflow.imaging import read_volume, write_volume
from lumbarflow.inference import Segmenter

pytestmark = pytest.mark.integration

POSTGRES = "LUMBARFLOW_TEST_POSTGRES"
NOWHERE = "s3://nowhere/model"  # of versions without a net; a server takes no local folder from a client

# The net, the tables and the other process of the tests against a SQLite file: what is registered here is the same.
_spec = importlib.util.spec_from_file_location("registry_helpers", Path(__file__).with_name("test_registry.py"))
helpers = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = helpers
_spec.loader.exec_module(helpers)
network, store, logged, scan_files = helpers.network, helpers.store, helpers.logged, helpers.scan_files


@pytest.fixture(scope="module")
def postgres_database(give_up) -> Iterator[str]:
    """Address of an empty database of the tests' own on the server that `.ci/postgres` starts."""
    import sqlalchemy

    if not (address := os.environ.get(POSTGRES)):
        give_up(f"no PostgreSQL: {POSTGRES} is not set; run: source .ci/postgres && start_postgres")
    name = f"lumbarflow_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    yield engine.url.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """An MLflow server that this process and those it starts use; it keeps artefacts too."""
    folder = tmp_path_factory.mktemp("server")
    database = f"sqlite:///{folder}/mlflow.db"
    if request.param == "postgresql":
        database = request.getfixturevalue("postgres_database")
    port = _free_port()
    uri, log = f"http://127.0.0.1:{port}", folder / "server.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen processes that nothing here asks for
        "MLFLOW_BACKEND_STORE_URI": database,  # not an argument: those are seen by everybody on the machine
    }
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    arguments += ["--artifacts-destination", str(folder / "artifacts")]
    before = os.environ.get("MLFLOW_TRACKING_URI")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, which can be ended as one
        )
    try:
        _wait_for(uri, process, log)
        mlflow.set_tracking_uri(uri)
        experiment = mlflow.create_experiment("tests")
        yield SimpleNamespace(uri=uri, log=log, database=database, experiment=experiment, client=mlflow.MlflowClient())
    finally:
        mlflow.set_tracking_uri(before)
        _end(process)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_for(uri: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    raise AssertionError(f"the server does not answer\n{log.read_text()}")


def _end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # whoever of the group is left
    process.wait(timeout=20)


def rest(server, path: str, **query: str) -> dict:
    """What a browser's page, or any other client, gets."""
    address = f"{server.uri}/api/2.0/mlflow/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(address, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture
def register(server, network):
    def register(mean, weights):
        figures = helpers.figures(scores=helpers.metrics(mean=mean), weights=weights)
        settings = helpers.registration("lumbar-unet")
        with mlflow.start_run(experiment_id=server.experiment):
            return registry.register(network, helpers.manifest(), figures, helpers.SETTINGS, settings)

    return register


@pytest.mark.timeout(900)
def test_versions_come_are_compared_are_pulled_and_go_back(server, register, network, tmp_path, scan_files, caplog):
    assert register(0.8, "a" * 32)["champion"] == "1"
    second = register(0.9, "b" * 32)
    # What the first was tested on was read from its artefacts, through the server.
    assert (second["version"], second["promoted"]) == ("2", True)
    assert "a paired Wilcoxon test over 2 test patients sees no difference" in second["reason"]
    assert register(0.85, "c" * 32)["champion"] == "2"

    found = {}
    for version in "123":
        found[version] = rest(server, "model-versions/get", name="lumbar-unet", version=version)["model_version"]
        assert found[version]["description"].startswith(f"# lumbar-unet, version {version}\n")
        assert "| canal | 0.900 [0.850, 0.950] | 0.50 |" in found[version]["description"]
    tags = {version: {tag["key"]: tag["value"] for tag in found[version]["tags"]} for version in found}
    assert [tags[version]["promotion"] for version in "123"] == ["promoted", "promoted", "kept back"]
    assert [tags[version].get("former_champion") for version in "123"] == ["none", "1", None]

    # In a process of its own, which knows the server's address and nothing else.
    source = helpers.assert_pulled_equals_pipeline(
        sys.executable,
        "models:/lumbar-unet@champion",
        network,
        tmp_path,
        scan_files,
        {"MLFLOW_TRACKING_URI": server.uri},
    )
    assert not source.is_relative_to(Path(registry.__file__).parent)

    settings = helpers.registration("lumbar-unet")
    with caplog.at_level("INFO"):
        assert registry.rollback(settings)["champion"] == "1"
    holder = rest(server, "registered-models/alias", name="lumbar-unet", alias="champion")["model_version"]
    assert str(holder["version"]) == "1"
    with pytest.raises(ValueError, match="version 1 was promoted when no version held the alias champion"):
        registry.rollback(settings)
    with pytest.raises(ValueError, match=rf"^{server.uri} has no registered model other; expected one"):
        registry.rollback(helpers.registration("other"))
    # The net that was rolled back does not come back by itself.
    assert "is the one of version 2, which was rolled back" in register(0.9, "b" * 32)["reason"]

    if password := urllib.parse.urlsplit(server.database).password:
        assert password not in caplog.text
        assert password not in server.log.read_text()


def test_the_longest_description_fits(server):
    # SQLite would take any length; PostgreSQL has a limit, in characters.
    server.client.create_registered_model("long")
    server.client.create_model_version("long", NOWHERE)
    card = registry._description("é" * 5000)
    assert len(card) == 5000
    server.client.update_model_version("long", "1", description=card)
    assert rest(server, "model-versions/get", name="long", version="1")["model_version"]["description"] == card


def test_former_champion_that_was_deleted_is_named(server):
    client = server.client
    client.create_registered_model("gone")
    for former in ("none", "1"):
        client.create_model_version("gone", NOWHERE, tags={"former_champion": former})
    client.set_registered_model_alias("gone", "champion", "2")
    client.delete_model_version("gone", "1")
    with pytest.raises(ValueError, match=r"version 1, which held the alias champion before version 2, is gone"):
        registry.rollback(helpers.registration("gone"))


@pytest.fixture
def served(logged, tmp_path) -> Iterator[SimpleNamespace]:
    """The model behind `mlflow models serve`, which may use one folder."""
    allowed, log, port = tmp_path / "allowed", tmp_path / "serve.log", _free_port()
    allowed.mkdir()
    uri = f"http://127.0.0.1:{port}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "LUMBARFLOW_ALLOWED_FOLDER": str(allowed),
        # It looks for uvicorn by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    arguments = ["-m", str(logged.folder), "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(uri, process, log)
        yield SimpleNamespace(uri=uri, allowed=allowed)
    finally:
        _end(process)


def _invoke(served: SimpleNamespace, inputs, params) -> tuple[int, dict]:
    """As the documentation's curl does."""
    request = urllib.request.Request(
        f"{served.uri}/invocations",
        json.dumps({"inputs": inputs, "params": params}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_served_model_answers_slices_and_paths_in_its_folder_alone(served, network, make_volume, tmp_path):
    from lumbarflow.networks import for_inference, load_model

    segmenter = Segmenter(for_inference(load_model(network)), helpers.SETTINGS)
    slices = helpers.contrast((3, 20, 30))
    status, answer = _invoke(served, slices.tolist(), {"pixel_spacing_mm": helpers.SPACING})
    assert status == 200
    np.testing.assert_array_equal(answer["predictions"], segmenter.labels(slices, tuple(helpers.SPACING)))

    volume = make_volume((15, 20, 17), values=helpers.contrast((15, 20, 17)))
    write_volume(volume, served.allowed / "scan.mha")
    write_volume(volume, tmp_path / "outside.mha")
    expected = segmenter.segment(volume).array
    assert len(np.unique(expected)) == 4
    status, answer = _invoke(served, str(served.allowed / "scan.mha"), {})
    assert status == 200
    np.testing.assert_array_equal(answer["predictions"]["labels"], expected)
    status, answer = _invoke(served, str(served.allowed / "scan.mha"), {"output_path": str(served.allowed)})
    assert status == 200
    np.testing.assert_array_equal(read_volume(answer["predictions"]["written"]).array, expected)

    for path in (tmp_path / "outside.mha", served.allowed / "../outside.mha"):
        status, answer = _invoke(served, str(path), {})
        assert status == 400 and "is not in the allowed folder" in answer["message"]
    status, answer = _invoke(served, str(served.allowed / "scan.mha"), {"output_path": str(tmp_path / "mask.mha")})
    assert status == 400 and not (tmp_path / "mask.mha").exists()
    status, answer = _invoke(served, slices.tolist(), {})
    assert status == 400 and "pixel_spacing_mm is missing" in answer["message"]
