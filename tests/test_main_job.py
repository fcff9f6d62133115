"""The commands of the README as a newcomer gives them, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
KEDRO = ROOT / ".venv/bin/kedro"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", ".telemetry", "conf", "src"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    shutil.rmtree(folder / "conf/local")
    (folder / "conf/local").mkdir()
    return folder


def kedro(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    # As a newcomer's shell has it. (conftest.py's one thread is for many short tests beside each other.)
    ours = ("MLFLOW_TRACKING_URI", "TF_NUM_INTRAOP_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [KEDRO, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=3000
    )


def ends_with_a_champion(clone: Path, *options: str) -> float:
    """Returns its mean foreground Dice on the test patients."""
    done = kedro(clone, "run", "--pipeline=train", *options)
    assert done.returncode == 0, done.stderr
    # Neither TensorFlow nor any other tool has talked over the run's own log.
    assert done.stderr == ""
    summary = json.loads((clone / "data/08_reporting/evaluation_summary.json").read_text())
    registration = json.loads((clone / "data/08_reporting/registration.json").read_text())
    assert registration["promoted"]
    assert (clone / "mlflow.db").is_file(), "the store lies in the project"
    lines = done.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if "train finished" in line)
    assert "mean foreground Dice" in lines[start + 1]
    assert "next: kedro mlflow ui" in lines[-1]
    return summary["mean_foreground_dice"]


@pytest.mark.integration
def test_a_short_first_run_ends_with_a_champion(clone, small_settings):
    # Whether it learns is asked of the whole run below, and of the small one in pipelines/test_train.py.
    (clone / "conf/local/parameters.yml").write_text(yaml.safe_dump(small_settings))
    ends_with_a_champion(clone, "--params=training.epochs=2")


@pytest.mark.long
@pytest.mark.timeout(3000)  # 4 minutes with AVX512-BF16, a quarter of an hour without
def test_the_whole_default_run_reaches_what_the_readme_says(clone):
    (clone / "conf/local/parameters.yml").unlink(missing_ok=True)
    assert ends_with_a_champion(clone) >= 0.90


@pytest.mark.integration
def test_kedro_viz_previews_every_result_of_the_run(clone):
    done = kedro(clone, "viz", "build", "--include-previews")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert " W " not in done.stdout
    main = json.loads((clone / "build/api/pipelines/__default__").read_text())
    results = {node["name"]: node["id"] for node in main["nodes"] if node.get("layer") == "reporting"}
    assert {"metrics_by_class", "evaluation_summary", "overlays_figure", "registration"} <= set(results)
    for name, node in results.items():
        assert json.loads((clone / "build/api/nodes" / node).read_text())["preview"], name
