"""A copy of the project in a temporary folder, and runs of its pipelines there."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from lumbarflow import models
from lumbarflow.backend import load_keras
from lumbarflow.imaging import LabelMap, Volume, write_volume

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without runs: creating one takes seconds, copying it none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """The project's configuration in a folder of its own, with MLflow's store there too."""
    for name in ("pyproject.toml", ".telemetry", "conf"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / "src").mkdir()
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def make_small(project: Path, small_settings: dict[str, Any]) -> Callable[[str], None]:
    """Put the small settings into an environment of the project."""

    def write(environment: str) -> None:
        folder = project / "conf" / environment
        folder.mkdir(exist_ok=True)
        (folder / "parameters_small.yml").write_text(yaml.safe_dump(small_settings))

    return write


@pytest.fixture
def kedro_run(project: Path, make_small: Callable[[str], None]) -> Callable[..., Any]:
    """Run a pipeline as `kedro run` does, and return its catalog."""
    import mlflow
    from kedro.framework.hooks import hook_impl
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project
    from kedro_mlflow.framework.hooks import mlflow_hook

    make_small("local")
    bootstrap_project(project)
    former = mlflow.get_tracking_uri()

    class Seen:
        @hook_impl
        def after_catalog_created(self, catalog):
            self.catalog = catalog

    def run(pipeline: str, environment: str | None = None, **parameters: Any) -> Any:
        # kedro-mlflow's one hook object remembers the last run's id; in a process of its own it has none.
        mlflow_hook.run_id = None
        while mlflow.active_run():
            mlflow.end_run()
        with KedroSession.create(project_path=project, env=environment, runtime_params=parameters) as session:
            seen = Seen()  # the run's own catalog: to make another one takes a second
            session._hook_manager.register(seen)
            session.run(pipeline_names=[pipeline])
            return seen.catalog

    yield run
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(former)


@pytest.fixture
def quick_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer in the place of every net that is trained by gradient, for tests of pipelines that train several.

    The net that the parameters name is built first: what it refuses stays refused.
    """
    for name, entry in models.MODELS.items():
        if entry.adapt is None:
            monkeypatch.setitem(models.MODELS, name, models.Entry(name, entry.title, _one_layer_for(entry.build)))


def _one_layer_for(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)  # its signature says which settings there are
    def one_layer(size, channels, classes, *, precision, **settings):
        build(size, channels, classes, precision=precision, **settings)
        keras = load_keras()
        inputs = keras.Input((*size, channels))
        return keras.Model(inputs, keras.layers.Conv2D(classes, 1, activation="softmax")(inputs), name="one_layer")

    return one_layer


def _write_scan(root: Path, series: str, seed: int = 0, suffix: str = ".mha") -> None:
    """A small scan in the SPIDER layout: a vertebra, a disc and the canal."""
    mask = np.zeros((4, 12, 10), np.uint8)
    mask[:, 1:4, 2:5], mask[:, 5:7, 2:5], mask[:, 1:10, 6:8] = 1, 201, 100
    image = mask * 7 + np.random.default_rng(seed).integers(0, 20, mask.shape)
    # Sagittal as it lies: slices to the right, rows downwards, columns backwards.
    grid = ((0.7, 0.9, 4.0), (10.0, -20.0, 30.0), [[0, 0, -1], [1, 0, 0], [0, -1, 0]])
    write_volume(Volume(image.astype(np.int16), *grid), root / "images" / f"{series}{suffix}")
    write_volume(LabelMap(mask, *grid), root / "masks" / f"{series}{suffix}")


@pytest.fixture
def write_scan() -> Callable[..., None]:
    return _write_scan


@pytest.fixture
def raw(tmp_path_factory) -> Path:
    """Five series of four patients in five file formats, and a row of the overview without files."""
    root = tmp_path_factory.mktemp("raw")
    rows = []
    for number, (series, suffix) in enumerate(
        [("1_t1", ".mha"), ("1_t2", ".nii.gz"), ("2_t2", ".nrrd"), ("3_t2_SPACE", ".mhd"), ("4_t2", ".nii")]
    ):
        _write_scan(root, series, number, suffix)
        rows.append({"new_file_name": series, "subset": "training"})
    rows.append({"new_file_name": "77_t1", "subset": "validation"})
    pd.DataFrame(rows).to_csv(root / "overview.csv", index=False)
    return root
