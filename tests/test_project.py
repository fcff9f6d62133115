"""The project as its users meet it: names, layers, environments, imports and the texts that promise commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kedro.config import OmegaConfigLoader

ROOT = Path(__file__).parents[1]
PIPELINES = {
    "synthesize", "ingest", "preprocess", "fit", "evaluate", "register", "train", "__default__", "report", "leakage",
    "baselines", "evaluate_external", "export_nnunet", "apta_audit", "screen", "recipes", "tune", "rollback",
    "predict", "viewer", "download",
}  # fmt: skip
CATALOG = {
    "series_index", "ingest_report", "slice_index", "split", "model_input", "model", "training_history", "predictions",
    "metrics_by_class", "metrics_by_case",
}  # fmt: skip
LAYERS = ["raw", "intermediate", "primary", "model_input", "models", "model_output", "reporting"]


def in_a_process(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("ci, stops", [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_what_is_not_there_fails_a_test_in_ci_alone(give_up, monkeypatch, ci, stops):
    monkeypatch.setenv("CI", ci)
    # Both are caught: a skip where a failure is due would else skip this test.
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception), match="no hammer") as raised:
        give_up("no hammer")
    assert raised.type is stops


@pytest.fixture(scope="module")
def pipelines():
    from lumbarflow.pipeline_registry import register_pipelines

    return register_pipelines()


def configuration(environment: str = "local") -> OmegaConfigLoader:
    from lumbarflow.settings import CONFIG_LOADER_ARGS

    patterns = {"mlflow": ["mlflow*"]}
    return OmegaConfigLoader(
        conf_source=str(ROOT / "conf"), env=environment, config_patterns=patterns, **CONFIG_LOADER_ARGS
    )


def test_the_public_pipelines_are_there_and_train_is_the_default(pipelines):
    assert set(pipelines) == PIPELINES
    assert pipelines["__default__"].nodes == pipelines["train"].nodes
    steps = ("synthesize", "ingest", "preprocess", "fit", "evaluate", "register")
    assert {n.name for n in pipelines["train"].nodes} == {n.name for s in steps for n in pipelines[s].nodes}


@pytest.mark.parametrize("environment", ["base", "spider", "best"])
def test_every_row_of_screen_and_recipes_can_be_trained_in_every_environment_split_by_patient(environment):
    from lumbarflow.comparison import plan_rows

    parameters = configuration(environment)["parameters"]
    shared = {name: parameters[name] for name in ("model", "loss", "training", "augmentation")}
    for table in ("screen", "recipes"):
        rows = parameters[table]["rows"]
        plan = plan_rows({"content_hash": "abc"}, shared, rows, table)
        assert set(plan) == {name for name, changes in rows.items() if not isinstance(changes, str)}
    screened, final = (parameters[table]["rows"]["paper_recipe"]["training"] for table in ("screen", "recipes"))
    assert screened == {name: final[name] for name in screened}


def test_every_data_set_of_the_pipelines_is_a_catalog_entry_with_a_layer(pipelines):
    catalog = configuration()["catalog"]
    used = {name for pipeline in pipelines.values() for name in pipeline.datasets() if not name.startswith("param")}
    assert used == set(catalog)
    assert set(catalog) >= CATALOG
    for name, entry in catalog.items():
        assert entry["metadata"]["kedro-viz"]["layer"] in LAYERS, name


def test_layers_follow_the_flow_of_data(pipelines):
    # Kedro-Viz draws no layers at all when one of them feeds an earlier one.
    catalog = configuration()["catalog"]

    def rank(name: str) -> int:
        return LAYERS.index(catalog[name]["metadata"]["kedro-viz"]["layer"])

    for node in {node for pipeline in pipelines.values() for node in pipeline.nodes}:
        sources = [rank(name) for name in node.inputs if not name.startswith("param")]
        assert not sources or max(sources) <= min((rank(name) for name in node.outputs), default=len(LAYERS)), node.name


@pytest.mark.parametrize("environment", ["local", "spider", "best", "paper"])
def test_every_parameter_that_a_node_takes_is_configured(pipelines, environment):
    parameters = configuration(environment)["parameters"]
    inputs = {name for pipeline in pipelines.values() for name in pipeline.inputs()}
    taken = {name.removeprefix("params:") for name in inputs if name.startswith("params:")}
    for name in taken:
        value = parameters
        for part in name.split("."):
            assert part in value, name
            value = value[part]


def test_spider_states_only_what_differs_from_base():
    base, spider = configuration()["parameters"], configuration("spider")["parameters"]
    assert spider["preprocess"] == base["preprocess"] | {"size": [256, 256]}
    assert {**base["registration"], "data": None} == {**spider["registration"], "data": None}
    different = dict.fromkeys(("preprocess", "raw_dir", "registration"))
    assert spider | different == base | different
    assert spider["split"]["method"] == "patient"


def test_environments_for_real_scans_state_their_licence_and_source():
    spider = configuration("spider")["parameters"]["registration"]
    assert spider["data"]["real"]["licence"] == "CC-BY-4.0"
    assert re.search(r"van der Graaf .*10\.1038/s41597-024-03090-w", spider["data"]["real"]["attribution"])
    assert configuration("best")["parameters"]["registration"] == spider
    assert configuration("paper")["parameters"]["registration"] == spider
    # Whoever's scans are read in other environments: nobody else's licence is claimed for them.
    assert configuration()["parameters"]["registration"]["data"]["real"] == {"licence": None, "attribution": None}


def test_best_differs_from_spider_in_what_the_screen_has_measured():
    spider, best = configuration("spider")["parameters"], configuration("best")["parameters"]
    assert best["preprocess"] == spider["preprocess"] and best["split"] == spider["split"]
    assert best["training"] == spider["training"] | {"learning_rate": 2e-3, "warmup_epochs": 1}
    moved = {"shift": 0.02, "rotation_degrees": 3.0}
    assert best["evaluation"] == spider["evaluation"] | {"test_time_augmentation": moved}
    # They are rows of the screen.
    rows = spider["screen"]["rows"]
    assert rows["double_rate_with_warm_up"] == {"training": {"learning_rate": 2e-3, "warmup_epochs": 1}}
    assert rows["shifted_and_rotated"] == {"evaluation": {"test_time_augmentation": moved}}


def test_the_paper_environment_is_the_papers_protocol():
    base, paper = configuration()["parameters"], configuration("paper")["parameters"]
    assert paper["split"] == {
        "method": "slice", "seed": 0, "validation_fraction": 0.1, "test_fraction": 0.1, "validation_is_test": True,
    }  # fmt: skip
    assert (paper["preprocess"]["size"], paper["preprocess"]["keep_aspect"]) == ([256, 256], False)
    assert paper["preprocess"]["normalisation"] == "column_l2"
    assert (paper["loss"]["gamma"], paper["loss"]["alpha"], paper["loss"]["dice_over"]) == (4, 0.6, "pooled")
    training = paper["training"]
    assert (training["batch_size"], training["epochs"], training["patience"]) == (8, 100, 20)
    assert (training["learning_rate"], training["learning_rate_schedule"]) == (1e-3, "constant")
    assert not paper["augmentation"]["enabled"]
    # It measures the same: only data, net and training are the paper's.
    for section in ("evaluation", "paper_protocol", "report", "baselines", "leakage"):
        assert paper[section] == base[section]


def test_published_figures_agree_with_each_other():
    # F1 = 2 IoU / (1 + IoU) holds for T2 SPACE; a slip of the pen in the table would break it.
    published = configuration()["parameters"]["report"]["published"]
    rows = published["paper"]["rows"]
    assert len(rows) == 12 and len(published["baselines"]) == 13
    for row in rows:
        if row["data"] == "T2 SPACE":
            assert row["f1"] == pytest.approx(2 * row["iou"] / (1 + row["iou"]), abs=1e-4), row
        assert 0 < row["asd"] < 0.06 and 0.98 < row["nsd"] < 1


def test_looking_at_the_project_does_not_import_tensorflow():
    code = (
        "import sys\n"
        "from kedro.framework.cli.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    sys.argv = ['kedro', *command.split()]\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        assert not end.code, end.code\n"
        "    loaded = {'tensorflow', 'keras', 'jax', 'torch'} & set(sys.modules)\n"
        "    assert not loaded, (command, loaded)\n"
        "    print('finished', command)\n"
    )
    commands = ("registry list", "catalog resolve-patterns", "catalog describe-datasets")
    done = in_a_process(code, *commands)
    assert done.returncode == 0, done.stderr
    assert [line.removeprefix("finished ") for line in done.stdout.splitlines() if line.startswith("finished")] == [
        *commands
    ]
    assert done.stderr == "", "a command that only looks has nothing to say on stderr"


def test_kedro_viz_loads_the_project_without_tensorflow():
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kedro_viz.server import load_and_populate_data\n"
        "load_and_populate_data(Path.cwd())\n"
        "from kedro_viz.data_access import data_access_manager as access\n"
        "names = {node.name for node in access.nodes.as_list()}\n"
        "assert {'train_model', 'model_input', 'metrics_by_class'} <= names, names\n"
        "loaded = {'tensorflow', 'keras'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr


def test_importing_the_domain_modules_needs_neither_kedro_nor_mlflow():
    modules = [
        path.stem
        for path in (ROOT / "src/lumbarflow").glob("*.py")
        if path.stem not in ("config", "hooks", "settings", "pipeline_registry", "serving", "__init__")
    ]
    assert "imaging" in modules
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1].split(','):\n    importlib.import_module('lumbarflow.' + name)\n"
        "loaded = {'kedro', 'mlflow', 'SimpleITK'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = in_a_process(code, ",".join(modules))
    assert done.returncode == 0, done.stderr


def test_nothing_phones_home():
    assert yaml.safe_load((ROOT / ".telemetry").read_text()) == {"consent": False}
    code = "import os, lumbarflow; print(os.environ['MLFLOW_DISABLE_TELEMETRY'], os.environ['KEDRO_DISABLE_TELEMETRY'])"
    assert in_a_process(code).stdout.split() == ["true", "true"]


def test_a_named_server_wins_over_the_default_store(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(ROOT / "src")  # from any folder of the project
    default = configuration()["mlflow"]
    assert default["server"]["mlflow_tracking_uri"] == f"sqlite:///{ROOT.as_posix()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999")
    named = configuration("spider")["mlflow"]
    assert named["server"]["mlflow_tracking_uri"] == "http://127.0.0.1:5999"
    assert named["tracking"]["experiment"]["create_experiment_kwargs"]["artifact_location"] is None


def test_constraints_are_names_and_versions_only_and_cover_the_dependencies():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    for line in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in pins}
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'^    "([A-Za-z0-9-]+)>=', project, flags=re.MULTILINE)
    assert len(named) > 8
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in named} <= pinned


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- test command -->\n```bash\n(.+?)\n```", readme, flags=re.DOTALL)
    assert block is not None
    assert block[1].startswith("python3 -m venv .venv && ")
    # Whole files to each core: their fixtures are dear.
    assert block[1].endswith(".venv/bin/pytest -n auto --dist loadfile")
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_ci_goes_on_to_install_postgresql_where_there_is_none():
    # As .ci/run does, in a shell that stops at failures; find fails where the folder is missing.
    script = 'set -euo pipefail; source .ci/postgres; find() { return 1; }; found=$(postgres_programs); echo "[$found]"'
    shell = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (shell.returncode, shell.stdout) == (0, "[]\n"), shell.stderr


def test_parameters_named_in_the_texts_can_be_given(monkeypatch):
    # Through Kedro's own parser, which splits at commas and so takes no lists.
    from kedro.framework.cli.utils import _split_params

    parameters = configuration("spider")["parameters"]
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    given = [text for path in texts for text in re.findall(r"--params=([^\s`]+)", path.read_text())]
    # Some parameters, and some entries of the catalog, have a short name there.
    short = {
        name
        for path in (ROOT / "conf/base").glob("*.yml")
        for name in re.findall(r"runtime_params:(\w+)", path.read_text())
    }
    assert len(given) >= 2
    for text in given:
        for name, value in _split_params(None, None, text.replace("DIR", "some/folder")).items():
            assert name in parameters or name in short, name
            assert not isinstance(value, dict) or set(value) <= set(parameters[name]), name


def test_pipelines_named_in_the_readme_exist():
    commands = re.findall(r"kedro run --pipeline=(\w+)(?: --env=(\w+))?", (ROOT / "README.md").read_text())
    assert commands
    for pipeline, environment in commands:
        assert pipeline in PIPELINES
        assert not environment or (ROOT / "conf" / environment).is_dir()


@pytest.mark.parametrize(
    "given, root",
    [
        (None, "data"),
        ("", "data"),
        ("/spine/", "/spine"),
        ("~/spine", "/home/me/spine"),
        ("s3://b/data/", "s3://b/data"),
    ],
)
def test_one_variable_moves_all_folders(monkeypatch, given, root):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("LUMBARFLOW_DATA", raising=False)
    if given is not None:
        monkeypatch.setenv("LUMBARFLOW_DATA", given)
    loader = settings_loader("spider")
    assert loader["globals"]["work_dir"] == f"{root}/spider"
    catalog = loader["catalog"]
    assert catalog["ingested_series"]["path"] == f"{root}/spider/02_intermediate/series"
    whole = root if "://" in root or root.startswith("/") else f"{ROOT}/{root}"
    assert catalog["raw_masks"]["path"] == f"{whole}/01_raw/spider/masks"


def settings_loader(environment):
    from kedro.config import OmegaConfigLoader

    from lumbarflow.settings import CONFIG_LOADER_ARGS

    return OmegaConfigLoader(str(ROOT / "conf"), env=environment, **CONFIG_LOADER_ARGS)


def test_git_and_the_image_pass_over_credentials():
    for name in ("conf/local/credentials.yml", "conf/spider/credentials.yml", "conf/mine/credentials_s3.yml"):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0, name
    assert subprocess.run(["git", "check-ignore", "-q", "conf/base/credentials.yml"], cwd=ROOT).returncode == 1
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines.index("!conf") < lines.index("conf/*/credentials*.yml") < lines.index("!conf/base/credentials.yml")
