"""Every folder in a bucket: an S3 server on loopback, credentials from Kedro's, and a machine that has nothing yet."""

from __future__ import annotations

import logging
import shutil

import fsspec
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from kedro.io import DatasetError

from lumbarflow import storage
from lumbarflow.files import file_digest

BUCKET = "spine"
SHORT = {"epochs": 1}


@pytest.fixture(scope="module")
def server():
    """Address of an S3 server of our own."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server, project, tmp_path, monkeypatch):
    """A bucket, whose credentials only Kedro's configuration has: (its file system, a fresh copy of this machine)."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(fsspec.config, "conf", {})
    options = {"key": "me", "secret": "hush", "client_kwargs": {"endpoint_url": server, "region_name": "eu-central-1"}}
    (project / "conf/local/credentials.yml").write_text(yaml.safe_dump({"storage": {"s3": options}}))
    filesystem = fsspec.filesystem("s3", use_listings_cache=False, **options)
    filesystem.mkdir(BUCKET)
    monkeypatch.setenv("LUMBARFLOW_DATA", f"s3://{BUCKET}/data")
    yield filesystem
    filesystem.rm(BUCKET, recursive=True)


@pytest.fixture
def memory(raw, tmp_path, monkeypatch):
    """The file system of this process's memory, with raw scans."""
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(raw), "/raw", recursive=True)
    yield filesystem
    filesystem.rm("/", recursive=True)


def artifacts() -> set[str]:
    """Names of what the runs have given MLflow."""
    import mlflow

    runs = mlflow.search_runs(experiment_names=["lumbarflow"])["run_id"]
    return {file.path for run in runs for file in mlflow.MlflowClient().list_artifacts(run)}


@pytest.mark.integration
@pytest.mark.usefixtures("quick_nets")
def test_a_run_in_a_bucket_finds_what_one_here_finds(bucket, raw, project, kedro_run, caplog):
    bucket.put(str(raw), f"{BUCKET}/raw", recursive=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LUMBARFLOW_DATA", str(project / "data"))
        for pipeline in ("ingest", "preprocess", "fit"):
            here = kedro_run(pipeline, raw_dir=str(raw), training=SHORT)
    for pipeline in ("ingest", "preprocess", "fit", "evaluate", "register"):
        there = kedro_run(pipeline, raw_dir=f"s3://{BUCKET}/raw", training=SHORT)
        shutil.rmtree(project / "cache")  # the next step runs on another machine

    assert there.load("model_input").manifest == here.load("model_input").manifest
    (server,) = (project / "cache").glob("s3@*")
    arrays = [path.relative_to(project / "data") for path in (project / "data/05_model_input").rglob("*.npy")]
    assert len(arrays) == 10
    for name in arrays:
        assert file_digest([server / BUCKET / "data" / name]) == file_digest([project / "data" / name]), name
    weights = [catalog.load("model").get_weights() for catalog in (here, there)]
    assert all((one == other).all() for one, other in zip(*weights, strict=True))
    assert bucket.ls(f"{BUCKET}/data/06_models/training"), "what an interrupted training goes on from"
    assert set(there.load("metrics_by_case")["series"]) == set(there.load("predictions").series())

    masks = kedro_run("predict", scans=f"s3://{BUCKET}/raw/images", output=f"s3://{BUCKET}/masks")
    found = {path.removeprefix(f"{BUCKET}/masks/") for path in bucket.find(f"{BUCKET}/masks")}
    # The last is what says that a scan need not be segmented again.
    assert {"1_t2_seg.nii.gz", "predictions.csv", ".predictions/1_t2.json"} <= found
    assert len(masks.load("prediction_index")) == 5

    assert "metrics_by_case.csv" in artifacts()
    said = " ".join(caplog.messages)
    assert "hush" not in said
    assert f"s3://{BUCKET}/data/08_reporting" in said


def test_a_run_in_this_process_memory(memory, kedro_run, monkeypatch, tmp_path):
    monkeypatch.setenv("LUMBARFLOW_DATA", "memory://data")
    for pipeline in ("ingest", "preprocess"):
        catalog = kedro_run(pipeline, raw_dir="memory://raw", parallel={"workers": 1})
        shutil.rmtree(tmp_path / "cache")
    assert len(catalog.load("model_input").manifest["series"]) == 5
    assert memory.exists("/data/05_model_input/manifest.json")


def test_without_credentials_one_error_says_where_they_belong(bucket, project, kedro_run):
    (project / "conf/local/credentials.yml").write_text("")
    with pytest.raises(DatasetError, match=r"s3://spine/raw/images: cannot read there .*check .*storage.s3 in"):
        kedro_run("ingest", raw_dir=f"s3://{BUCKET}/raw")


def test_a_storage_that_fails_for_a_moment_rejects_no_series(memory, kedro_run, monkeypatch):
    real = MemoryFileSystem.get_file

    def get_file(filesystem, address, local):
        if address.endswith("2_t2.nrrd"):
            raise ConnectionResetError("503 SlowDown")
        real(filesystem, address, local)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    with pytest.raises(DatasetError, match="memory://raw/images: cannot read there .*503 SlowDown"):
        kedro_run("ingest", raw_dir="memory://raw", parallel={"workers": 1})
