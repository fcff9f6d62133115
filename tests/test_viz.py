"""Kedro-Viz as people use it: the groups it draws, its static site and its server, in a browser."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from kedro.config import OmegaConfigLoader
from kedro.io import AbstractDataset

from lumbarflow.config import _is_no_absent_file
from lumbarflow.labels import CLASSES
from lumbarflow.pipeline_registry import register_pipelines

ROOT = Path(__file__).parents[1]
LAYERS = ["raw", "intermediate", "primary", "model_input", "models", "model_output", "reporting"]
STEPS = ["synthesize", "ingest", "preprocess", "fit", "evaluate", "register"]

# The commands of docs/how-to/kedro-viz.md, as they stand there.
RUN = ".venv/bin/kedro viz run"
BUILD = ".venv/bin/kedro viz build --include-previews"
OTHER_TYPEFACE = r"sed -i '/fonts\.g/d' build/index.html"
SERVE = "python3 -m http.server --bind 127.0.0.1 --directory build 4142"

BIRTH_DATE, PATIENT = "1947-11-04", "Leakova"
PATIENCE_MS = 120_000  # shared machines are slow


def test_every_node_is_in_the_group_of_its_pipeline():
    pipelines = register_pipelines()
    assert [group.name for group in pipelines["train"].group_nodes_by("namespace")] == STEPS
    for name, pipeline in pipelines.items():
        groups = {group.name: group.dependencies for group in pipeline.group_nodes_by("namespace")}
        assert set(groups) <= set(pipelines), "no node outside a group"
        assert name in groups or name in ("train", "__default__")
        list(TopologicalSorter(groups).static_order())  # raises where two groups wait for each other


def test_tables_that_may_name_patients_have_no_preview():
    catalog = configuration(ROOT)["catalog"]
    for name in ("raw_overview", "prediction_index", "scan_predictions", "scan_measurements"):
        assert catalog[name]["metadata"]["kedro-viz"]["preview"] is False
    # A cohort's table is shown by its first rows, never as a whole.
    for name, entry in catalog.items():
        shown = entry["metadata"]["kedro-viz"]
        if re.search(r"Parquet|CSV", str(entry)) and shown.get("preview", True):
            assert shown["preview_args"]["nrows"] == (
                20 if re.search("case|slice|series|split|report|audit$", name) else 100
            )


def test_a_preview_of_a_file_to_come_is_no_warning_but_any_other_failure_is():
    def said(error: Exception) -> bool:
        record = logging.LogRecord("viz", logging.WARNING, "", 0, "%s: %s: %s", ("split", "Error", error), None)
        return _is_no_absent_file(record)

    wrapped, broken = ValueError("while loading"), ValueError("while loading")
    wrapped.__cause__, broken.__cause__ = FileNotFoundError("split.parquet"), PermissionError("split.parquet")
    assert not said(FileNotFoundError("split.parquet"))
    assert not said(wrapped)
    assert said(broken)
    assert said(KeyError("nrows"))
    assert _is_no_absent_file(logging.LogRecord("viz", logging.WARNING, "", 0, "no arguments", None, None))


def test_the_commands_of_the_page_are_those_run_here():
    text = (ROOT / "docs/how-to/kedro-viz.md").read_text()
    # A block whose comment says why is left to its reader.
    text = re.sub(r"<!-- not run in CI: \S[^>]*-->\n```bash\n.*?\n```", "", text, flags=re.DOTALL)
    assert re.findall(r"```bash\n(.*?)\n```", text, flags=re.DOTALL) == [RUN, BUILD, OTHER_TYPEFACE, SERVE]


def configuration(folder: Path) -> OmegaConfigLoader:
    from lumbarflow.settings import CONFIG_LOADER_ARGS

    return OmegaConfigLoader(conf_source=str(folder / "conf"), env="local", **CONFIG_LOADER_ARGS)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with some results, written by the catalog's own data sets."""
    folder = tmp_path_factory.mktemp("viz")
    for name in ("pyproject.toml", ".telemetry", "conf", "src"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    shutil.rmtree(folder / "conf/local")
    (folder / "conf/local").mkdir()
    by_class = pd.DataFrame({"class": CLASSES, "scope": "pooled", "dice": [0.96875, 0.8125, 0.875, 0.765625]})
    results = {
        "metrics_by_class": by_class,
        "metrics_by_class_csv": by_class,
        "metrics_by_case": pd.DataFrame({"series": [f"{n}_t2" for n in range(30)], "dice": np.linspace(0, 1, 30)}),
        "evaluation_summary": {"mean_foreground_dice": 0.8177},
        "overlays_figure": drawing(),
        "report_markdown": "# Report\n\nmetrics_by_class\n",
        "raw_overview": pd.DataFrame({"new_file_name": ["1_t2"], "birth_date": [BIRTH_DATE]}),
        "scan_predictions": pd.DataFrame({"scan": [f"{PATIENT}/exam_1"], "outcome": ["segmented"]}),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        catalog = configuration(folder)["catalog"]
        for name, data in results.items():
            # Without the wrapper that sends it to MLflow too.
            AbstractDataset.from_config(name, catalog[name].get("dataset", catalog[name])).save(data)
    return folder


def drawing() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([0, 1], [1, 0])
    return figure


def shell(command: str, port: int | None = None) -> dict[str, Any]:
    """Arguments for subprocess: a command of the page, with the programs of this environment."""
    command = command.replace(".venv/bin/", f"{ROOT}/.venv/bin/").replace("4142", str(port))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "KEDRO_ENV")
    }
    return {"args": ["bash", "-c", command], "env": environment}


@pytest.fixture(scope="module")
def site(project) -> tuple[Path, str]:
    """The static site as Kedro-Viz writes it, and what it said meanwhile."""
    done = subprocess.run(**shell(BUILD), cwd=project, capture_output=True, text=True, timeout=600)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "build files have been added" in said, said
    return project / "build", said


@contextmanager
def served(command: str, folder: Path, port: int) -> Iterator[str]:
    """The address of a server that runs while the block does."""
    address = f"http://127.0.0.1:{port}/"
    with (folder / f"server-{port}.log").open("w+") as log:
        # A session of its own: Kedro-Viz's server is a child of the process that is started here.
        process = subprocess.Popen(
            **shell(command, port), cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + PATIENCE_MS / 1000
            while not answers(port):
                log.seek(0)
                assert process.poll() is None and time.monotonic() < deadline, log.read()
                time.sleep(0.1)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Kedro-Viz takes none above 49151, where systems may look for free ones."""
    first = 20_000 + os.getpid() % 10_000  # tests run side by side
    return next(port for port in range(first, 49_151) if not answers(port))


@pytest.mark.integration
def test_the_site_has_every_node_with_its_layer_type_and_preview(site):
    folder, said = site
    assert "circular dependency" not in said
    assert "Warning" not in said
    warnings = re.findall(r"\d\d W (.*)", said)
    assert all("kedro_pipeline_events.json not found" in line for line in warnings), "there was no run here"
    pipelines = {path.name: json.loads(path.read_text()) for path in (folder / "api/pipelines").iterdir()}
    assert set(pipelines) == set(register_pipelines())
    assert pipelines["train"]["layers"] == LAYERS
    details = {}
    for pipeline in pipelines.values():
        assert pipeline["layers"], "a cycle among layers hides them all"
        for node in pipeline["nodes"]:
            if node["type"] == "modularPipeline":
                continue
            details[node["name"]] = detail = json.loads((folder / "api/nodes" / node["id"]).read_text())
            if node["type"] == "data":
                assert node["layer"] in LAYERS, node["name"]
                assert detail.get("type") or detail["original_type"], node["name"]
    kinds = {name: detail["preview_type"] for name, detail in details.items() if detail.get("preview")}
    assert kinds == {
        "metrics_by_class": "TablePreview",
        "metrics_by_class_csv": "TablePreview",
        "metrics_by_case": "TablePreview",
        "evaluation_summary": "JSONPreview",
        "overlays_figure": "ImagePreview",
        "report_markdown": "TextPreview",
    } | dict.fromkeys(tables_that_may_be_absent(), "TablePreview")
    assert details["metrics_by_class_csv"]["type"].endswith("MlflowCSVDataset")
    assert len(details["metrics_by_case"]["preview"]["data"]) == 20


def tables_that_may_be_absent() -> list[str]:
    return [
        name
        for name, entry in configuration(ROOT)["catalog"].items()
        if "OptionalCSV" in str(entry) and name != "raw_overview"
    ]


@pytest.mark.integration
def test_the_site_tells_nothing_of_patients_nor_anything_to_others(site):
    texts = [path.read_bytes() for path in site[0].rglob("*") if path.is_file() and "assets" not in path.parts]
    assert len(texts) > 100
    for secret in (BIRTH_DATE, PATIENT):
        assert not any(secret.encode() in text for text in texts), secret
    assert "heap" not in (site[0] / "index.html").read_text(), "telemetry"


@pytest.mark.integration
@pytest.mark.timeout(900)
def test_the_static_site_in_a_browser(project, site, page, artefacts):
    subprocess.run(**shell(OTHER_TYPEFACE), cwd=project, check=True)
    port = free_port()
    with served(SERVE, project, port) as address:
        look_around(page, address, artefacts, "viz-site")


@pytest.mark.integration
@pytest.mark.timeout(900)
def test_the_server_in_a_browser(project, page, artefacts):
    # Kedro-Viz has no switch for its typeface: the page does without.
    page.route("https://fonts.googleapis.com/**", lambda route: route.abort())
    port = free_port()
    with served(f"{RUN} --no-browser --host 127.0.0.1 --port {port}", project, port) as address:
        # Offline it takes no other version for newer.
        version = page.request.get(f"{address}api/version").json()
        assert not version["is_outdated"] and version["latest"] == version["installed"]
        look_around(page, address, artefacts, "viz-server")


def look_around(page, address: str, artefacts: Path, name: str) -> None:
    """Open the pipeline train, its groups, and the previews of a table, a figure and the summary."""
    from playwright.sync_api import expect

    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)

    def drawn(node: str):
        return page.locator(f'[data-node-fullname="{node}"]')

    def choose(node: str) -> None:
        page.locator(f'[data-test="node-list-tree-item--row--{node}"]').click()
        expect(page.get_by_role("heading", name=node, exact=True)).to_be_visible()

    page.goto(address)
    page.locator(".feature-hints__close").click()  # a picture without a name, before the drawing
    pipelines = page.locator('[data-test="kedro-pipeline-selector"]')
    pipelines.get_by_role("button").click()
    pipelines.get_by_role("option", name="train", exact=True).click()
    expect(page).to_have_url(re.compile("pid=train"))
    for group in STEPS:
        expect(drawn(group)).to_be_visible()
    expect(drawn("train_model")).to_have_count(0)
    page.screenshot(path=artefacts / f"{name}-train.png")

    page.get_by_role("button", name="Expand all modular pipelines").click()
    for node in ("synthesize_scans", "ingest_series", "prepare_series", "train_model", "score_cases", "register_model"):
        expect(drawn(node)).to_be_visible()
    page.screenshot(path=artefacts / f"{name}-train-expanded.png")

    choose("metrics_by_class")
    expect(page.get_by_text("pandas.ParquetDataset")).to_be_visible()
    page.get_by_role("button", name="Expand preview").click()
    expect(page.get_by_text("Previewing first 4 rows")).to_be_visible()
    for dice in ("0.8125", "0.875", "0.765625"):
        expect(page.get_by_role("cell", name=dice, exact=True).last).to_be_visible()
    page.screenshot(path=artefacts / f"{name}-metrics.png")
    page.get_by_role("button", name="Back", exact=True).click()

    choose("overlays_figure")
    figure = page.get_by_role("img", name="Preview visualization")
    expect(figure).to_be_visible()
    assert figure.evaluate("image => image.naturalWidth") > 100
    page.screenshot(path=artefacts / f"{name}-figure.png")
    choose("evaluation_summary")
    expect(page.get_by_text("0.8177")).to_be_visible()
