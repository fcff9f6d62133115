"""The download pipeline against a mirror on this machine, and what comes after it."""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

SERIES = ("1_t1", "1_t2", "2_t2_SPACE")


@pytest.fixture
def record(write_scan, tmp_path_factory) -> Path:
    """A record of three series, packed as the public one is."""
    folder, raw = tmp_path_factory.mktemp("record"), tmp_path_factory.mktemp("raw")
    for seed, series in enumerate(SERIES):
        write_scan(raw, series, seed)
    for name in ("images", "masks"):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for path in sorted((raw / name).iterdir()):
                archive.write(path, f"{name}/{path.name}")
    rows = [f"{series},training\n" for series in SERIES]
    (folder / "overview.csv").write_text("new_file_name,subset\n" + "".join(rows))
    return folder


@pytest.fixture
def mirror(record, monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=record)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def small_record(project, record) -> None:
    """That record in the place of the public one, in the environment for real scans."""
    rows = [
        {"name": path.name, "bytes": path.stat().st_size, "md5": hashlib.md5(path.read_bytes()).hexdigest()}
        | ({"unpack": path.stem} if path.suffix == ".zip" else {})
        for path in sorted(record.iterdir())
    ]
    file = project / "conf/spider/parameters_small_record.yml"
    file.write_text(yaml.safe_dump({"download": {"files": rows}}))


def test_the_record_comes_and_ingest_finds_its_series(kedro_run, project, mirror, small_record, caplog):
    address = mirror.replace("://", "://ann:s3cret@")
    with caplog.at_level(logging.INFO):
        catalog = kedro_run("download", "spider", download={"mirror": address})
    raw = project / "data/01_raw/spider"
    assert sorted(path.name for path in (raw / "masks").iterdir()) == [f"{series}.mha" for series in SERIES]
    record = catalog.load("download_record")
    assert record["licence"] == "CC-BY-4.0" and "van der Graaf" in record["attribution"]
    assert [(row["name"], row["outcome"]) for row in record["files"]] == [
        ("images.zip", "fetched"), ("masks.zip", "fetched"), ("overview.csv", "fetched"),
    ]  # fmt: skip
    said = caplog.text
    assert "3 images and 3 masks (CC-BY-4.0), 7 files of it new" in said
    assert "see data/01_raw/spider/downloads/download_record.json" in said
    assert f"next: kedro run --pipeline=ingest --env=spider --params=download.mirror={mirror}" in said
    written = "".join(path.read_text() for path in (raw / "downloads").glob("*.json"))
    assert "s3cret" not in said + written and b"s3cret" not in (project / "mlflow.db").read_bytes()

    # The same command again asks for nothing: this server has no such folder.
    caplog.clear()
    with caplog.at_level(logging.INFO):
        kedro_run("download", "spider", download={"mirror": f"{mirror}/gone"})
    assert "download: 0 files fetched, 3 here already" in caplog.text
    assert "3 images and 3 masks (CC-BY-4.0), 0 files of it new" in caplog.text

    index = kedro_run("ingest", "spider").load("series_index")
    assert tuple(sorted(index["series"])) == SERIES
    assert index["listed"].all()


def test_real_scans_are_not_put_among_synthetic_ones(kedro_run, mirror):
    with pytest.raises(ValueError, match=r"data/01_raw: the folder of synthetic scans; expected .* --env=spider, or"):
        kedro_run("download", download={"mirror": mirror})
