"""Kubeflow: steps and their order by hand, the compiled YAML, runs on this machine, and a server of our own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from kedro.pipeline import Pipeline, node

from lumbarflow.kubeflow.cli import commands, load_graph
from lumbarflow.kubeflow.compiler import MissingSDK, compile_yaml, run_local, submit
from lumbarflow.kubeflow.graph import Graph, as_text, make_graph, nested
from lumbarflow.kubeflow.step import run_step
from lumbarflow.pipeline_registry import register_pipelines

ROOT = Path(__file__).parents[1]

RESOURCES = {"cpu": 2, "memory": "8Gi", "gpus": 0, "gpu_type": "nvidia.com/gpu", "retries": 2, "retry_seconds": 60}
SETTINGS = {
    "image": "registry/lumbarflow:1",
    "parameters": ["raw_dir", "training.epochs", "training.rate", "resume"],
    "environment": {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "SEED": 3, "GONE": None},
    "secrets": {"MLFLOW_TRACKING_PASSWORD": {"secret": "mlflow", "key": "password"}, "GONE": None},
    "volumes": {"data": {"claim": "scans", "path": "/lumbarflow/data", "sub_path": "data"}, "gone": None},
    "resources": RESOURCES,
    "steps": {"fit": {"gpus": 1, "memory": "32Gi", "retries": 0}, "of_another_pipeline": {"cpu": "500m"}},
}
VALUES = {"raw_dir": "data/01_raw", "training": {"epochs": 20, "rate": 0.001, "names": None}, "resume": True}


def one(*inputs):
    return inputs[0] if inputs else None


def make(inputs, outputs, name, namespace=None):
    return node(one, inputs, outputs, name=name, namespace=namespace)


# ingest writes what prepare, fit and score read; fit needs prepare; score needs fit; notify is in no namespace.
DIAMOND = Pipeline(
    [
        make("raw@volumes", "series", "read", "ingest"),
        make("series", "index", "index", "ingest"),
        make("index", "arrays", "resample", "prepare"),
        make(["arrays", "params:training"], "model", "train", "fit"),
        make(["model", "series"], "scores", "score", "evaluate"),
        make("scores", "said", "notify"),
        make(None, "raw@files", "write", "synthesize"),
    ]
)


def graph(pipeline=DIAMOND, values=VALUES, **changes) -> Graph:
    """The graph of a pipeline by SETTINGS and what differs from them."""
    return make_graph("train", pipeline, {**SETTINGS, **changes}, values)


# --- the graph ------------------------------------------------------------------------------------------------------


def test_a_namespace_is_a_step_and_waits_for_those_whose_data_it_reads():
    # raw@files and raw@volumes are two views of one data set: ingest waits for synthesize.
    assert {step.name: sorted(step.after) for step in graph().steps} == {
        "synthesize": [],
        "ingest": ["synthesize"],
        "prepare": ["ingest"],
        "fit": ["prepare"],
        "evaluate": ["fit", "ingest"],
        "notify": ["evaluate"],
    }
    assert [step.name for step in graph().steps] == ["synthesize", "ingest", "prepare", "fit", "evaluate", "notify"]
    steps = {step.name: step for step in graph().steps}
    assert steps["ingest"].nodes == ("ingest.read", "ingest.index")
    assert (steps["ingest"].by, steps["notify"].by) == ("namespaces", "node_names")


def test_a_step_comes_after_all_it_waits_for_though_its_first_node_could_run_before():
    # b's first node reads nothing, its second what a makes.
    late = Pipeline(
        [make(None, "x", "x", "b"), make(None, "y", "y", "a"), make(["x", "y"], "z", "z", "b")],
    )
    assert [(step.name, step.after) for step in graph(late).steps] == [("a", ()), ("b", ("a",))]


def test_steps_that_wait_for_each_other_are_named():
    circle = Pipeline([make(None, "x", "x", "a"), make("x", "y", "y", "b"), make("y", "z", "z", "a")])
    with pytest.raises(
        ValueError, match=r"pipeline train: the steps (a -> b -> a|b -> a -> b) wait for each other; .*Move"
    ):
        graph(circle)


def test_the_train_pipeline_has_six_steps_in_the_catalogs_order():
    train = graph(register_pipelines()["train"])
    assert {step.name: sorted(step.after) for step in train.steps} == {
        "synthesize": [],
        "ingest": ["synthesize"],
        "preprocess": ["ingest"],
        "fit": ["preprocess"],
        "evaluate": ["fit", "ingest", "preprocess"],
        "register": ["evaluate", "fit", "preprocess"],
    }


def test_every_registered_pipeline_can_be_steps():
    for name, pipeline in register_pipelines().items():
        steps = graph(pipeline).steps
        assert sorted(n for step in steps for n in step.nodes) == sorted(n.name for n in pipeline.nodes), name


def test_a_step_asks_for_what_all_do_unless_it_says_otherwise():
    asked = {step.name: step.resources for step in graph().steps}
    assert dataclasses.asdict(asked["ingest"]) == RESOURCES | {"cpu": "2"}
    assert dataclasses.asdict(asked["fit"]) == RESOURCES | {"cpu": "2", "memory": "32Gi", "gpus": 1, "retries": 0}
    assert as_text(graph()).splitlines()[3] == ("fit after prepare: 1 nodes, cpu 2, memory 32Gi, 1 x nvidia.com/gpu")


def test_variables_secrets_and_volumes_without_those_that_an_environment_takes_away():
    made = graph()
    assert made.variables == {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "SEED": "3"}
    assert made.secrets == {"MLFLOW_TRACKING_PASSWORD": ("mlflow", "password")}
    assert made.volumes == (("scans", "/lumbarflow/data", "data"),)


def test_names_and_the_image():
    assert graph().name == "lumbarflow-train"
    assert make_graph("train", DIAMOND, SETTINGS, VALUES, "spider").name == "lumbarflow-train-spider"
    assert make_graph("__default__", DIAMOND, SETTINGS, VALUES).name == "lumbarflow-train"
    assert make_graph("export_nnunet", DIAMOND, SETTINGS, VALUES).name == "lumbarflow-export-nnunet"
    assert make_graph("train", DIAMOND, SETTINGS, VALUES, image="mine:2").image == "mine:2"
    assert graph().image == "registry/lumbarflow:1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "x"}, r"unknown setting conf/base/kubeflow.yml.images; expected some of \['image', "),
        ({"image": None}, "kubeflow.yml names no image .* expected one there or with --image"),
        ({"resources": {"cpu": 1}}, "resources has no memory; expected"),
        ({"resources": RESOURCES | {"ram": 1}}, "unknown setting conf/base/kubeflow.yml resources.ram"),
        ({"resources": RESOURCES | {"memory": "8 GB"}}, "memory is '8 GB'; expected a quantity such as 2, 500m or 8Gi"),
        ({"resources": RESOURCES | {"gpus": True}}, "gpus is True; expected a whole number, 0 or more"),
        ({"steps": {"fit": {"retries": -1}}}, "retries is -1; expected a whole number"),
        ({"steps": {"fit": {"gpu": 1}}}, r"unknown setting conf/base/kubeflow.yml steps.fit.gpu; expected"),
        ({"parameters": ["training.epoch"]}, "no value for the parameter training.epoch, from which its type"),
        ({"parameters": ["training.names"]}, "no value for the parameter training.names"),
        ({"parameters": ["raw_dir", "raw.dir"]}, "parameter raw.dir would have the same name as raw_dir, raw_dir"),
        ({"parameters": ["mlflow_run"]}, "parameter mlflow_run would have the same name as the step's own mlflow_run"),
        ({"environment": {"A B": "x"}}, "environment has A B: 'x'; expected a variable's name and a text"),
        ({"environment": {"A": ["x"]}}, r"environment has A: \['x'\]; expected"),
        ({"volumes": {"data": {"claim": "x"}}}, r"volumes.data is {'claim': 'x'}; expected {claim: NAME, path: PATH}"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    values = VALUES | {"raw": {"dir": "x"}, "mlflow_run": "x"}
    with pytest.raises(ValueError, match=message):
        graph(values=values, **changes)


def test_a_secret_written_into_the_file_is_refused_and_not_repeated():
    with pytest.raises(
        ValueError, match="secrets.PASSWORD does not say where the value lies; .* never the value"
    ) as error:
        graph(secrets={"PASSWORD": "hunter2"})
    assert "hunter2" not in str(error.value)


def test_values_of_a_run_by_their_names_in_kfp():
    # As Kedro's --params hands them on: nested, and with 1 for a rate.
    given = {"training": {"epochs": 3, "rate": 1}, "raw_dir": 7, "resume": False}
    arguments = graph().arguments(given)
    assert arguments == {"training_epochs": 3, "training_rate": 1.0, "raw_dir": "7", "resume": False}
    assert [type(value) for value in arguments.values()] == [int, float, str, bool]
    assert graph().arguments({}) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training": {"batch": 3}}, r"--params sets training.batch, which is no parameter .*Add it to parameters in"),
        ({"training": {"epochs": "many"}}, "training.epochs to 'many'; expected int, as its default 20"),
        ({"training": {"epochs": True}}, "training.epochs to True; expected int"),
        ({"resume": 1}, "resume to 1; expected bool, as its default True"),
    ],
)
def test_a_value_that_does_not_fit_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        graph().arguments(given)


def test_dotted_names_become_sections_again():
    assert nested({"a.b.c": 1, "a.b.d": 2, "e": 3}) == {"a": {"b": {"c": 1, "d": 2}}, "e": 3}


def test_a_step_outside_a_project_says_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"is no Kedro project; .* Make it the image's WORKDIR"):
        run_step("train", {"namespaces": ["fit"]}, None, {}, {})


def test_without_the_sdk_one_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "kfp", None)
    with pytest.raises(MissingSDK, match=r"Kubeflow's SDK cannot be imported .*Install them with: pip .*\[kubeflow\]"):
        compile_yaml(graph(), tmp_path / "train.yaml")


# --- the compiled pipeline ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[dict, dict]:
    """The two documents of the YAML file: the pipeline, and what is Kubernetes's own."""
    path = tmp_path_factory.mktemp("compiled") / "new" / "train.yaml"
    compile_yaml(graph(), path)
    pipeline, platform = yaml.safe_load_all(path.read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_the_yaml_has_the_steps_in_their_order(compiled):
    pipeline, _ = compiled
    assert pipeline["schemaVersion"].startswith("2.")
    assert pipeline["pipelineInfo"]["name"] == "lumbarflow-train"
    tasks = pipeline["root"]["dag"]["tasks"]
    # synthesize opens MLflow's run: everybody waits for it, whoever reads its data.
    assert {name: sorted(task.get("dependentTasks", [])) for name, task in tasks.items()} == {
        "synthesize": [],
        "ingest": ["synthesize"],
        "prepare": ["ingest", "synthesize"],
        "fit": ["prepare", "synthesize"],
        "evaluate": ["fit", "ingest", "synthesize"],
        "notify": ["evaluate", "synthesize"],
    }


def test_all_steps_share_the_mlflow_run_of_the_first(compiled):
    tasks = compiled[0]["root"]["dag"]["tasks"]
    first = tasks["synthesize"]["inputs"]["parameters"]
    assert "mlflow_run" not in first
    assert first["kubeflow_run"]["runtimeValue"]["constant"] == "{{$.pipeline_job_uuid}}"
    for name in ("ingest", "prepare", "fit", "evaluate", "notify"):
        given = tasks[name]["inputs"]["parameters"]["mlflow_run"]["taskOutputParameter"]
        assert given == {"outputParameterKey": "Output", "producerTask": "synthesize"}


def test_parameters_have_types_and_the_configurations_defaults(compiled):
    pipeline, _ = compiled
    inputs = pipeline["root"]["inputDefinitions"]["parameters"]
    assert {name: (entry["parameterType"], entry["defaultValue"]) for name, entry in inputs.items()} == {
        "raw_dir": ("STRING", "data/01_raw"),
        "training_epochs": ("NUMBER_INTEGER", 20),
        "training_rate": ("NUMBER_DOUBLE", 0.001),
        "resume": ("BOOLEAN", True),
    }
    for task in pipeline["root"]["dag"]["tasks"].values():
        for name in inputs:
            assert task["inputs"]["parameters"][name] == {"componentInputParameter": name}


def test_resources_retries_and_no_caching(compiled):
    pipeline, _ = compiled
    tasks, executors = pipeline["root"]["dag"]["tasks"], pipeline["deploymentSpec"]["executors"]
    containers = {name: executor["container"] for name, executor in executors.items()}
    assert {container["image"] for container in containers.values()} == {"registry/lumbarflow:1"}
    asked = containers["exec-ingest"]["resources"]
    assert (asked["resourceCpuRequest"], asked["resourceMemoryRequest"]) == ("2", "8Gi")
    assert "accelerator" not in asked
    asked = containers["exec-fit"]["resources"]
    assert asked["resourceMemoryRequest"] == "32Gi"
    assert (asked["accelerator"]["resourceType"], asked["accelerator"]["resourceCount"]) == ("nvidia.com/gpu", "1")
    assert tasks["ingest"]["retryPolicy"]["maxRetryCount"] == 2
    assert tasks["ingest"]["retryPolicy"]["backoffDuration"] == "60s"
    assert "retryPolicy" not in tasks["fit"]
    # KFP would take results of other scans in the same folder for these.
    assert not any(task["cachingOptions"].get("enableCache") for task in tasks.values())


def test_data_and_mlflow_through_volumes_variables_and_secrets(compiled):
    pipeline, platform = compiled
    assert sorted(platform) == [
        f"exec-{name}" for name in ("evaluate", "fit", "ingest", "notify", "prepare", "synthesize")
    ]
    for name, executor in platform.items():
        (volume,), (secret,) = executor["pvcMount"], executor["secretAsEnv"]
        assert (volume["constant"], volume["mountPath"], volume["subPath"]) == ("scans", "/lumbarflow/data", "data")
        assert secret["secretName"] == "mlflow"
        assert secret["keyToEnv"] == [{"envVar": "MLFLOW_TRACKING_PASSWORD", "secretKey": "password"}]
        variables = pipeline["deploymentSpec"]["executors"][name]["container"]["env"]
        assert {entry["name"]: entry["value"] for entry in variables} == {
            "MLFLOW_TRACKING_URI": "http://mlflow:5000",
            "SEED": "3",
        }


def test_nothing_is_installed_when_a_step_starts(compiled):
    container = compiled[0]["deploymentSpec"]["executors"]["exec-fit"]["container"]
    assert "pip install" not in " ".join(container["command"])
    assert "run_step('train', {'namespaces': ['fit']}, None," in container["command"][-1]


def test_the_command_compiles_the_train_pipeline(tmp_path, monkeypatch):
    done = kedro(
        monkeypatch, "kubeflow", "compile", "--pipeline=train", "--env=spider",
        "--image=registry.example.org/lumbarflow:1", f"--output={tmp_path}/t.yaml",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == f"written: {tmp_path}/t.yaml"
    pipeline, platform = yaml.safe_load_all((tmp_path / "t.yaml").read_text())
    assert pipeline["pipelineInfo"]["name"] == "lumbarflow-train-spider"
    inputs = pipeline["root"]["inputDefinitions"]["parameters"]
    # Relative: the image's project lies elsewhere.
    assert inputs["raw_dir"]["defaultValue"] == "data/01_raw/spider"
    assert inputs["training_epochs"]["defaultValue"] == 20
    fit = pipeline["deploymentSpec"]["executors"]["exec-fit"]["container"]
    assert fit["image"] == "registry.example.org/lumbarflow:1"
    assert "{'namespaces': ['fit']}, 'spider'," in fit["command"][-1]
    mounts = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-fit"]["pvcMount"]
    assert [mount["mountPath"] for mount in mounts] == ["/lumbarflow/data", "/lumbarflow/mlruns"]


def test_an_environment_states_only_what_differs(tmp_path):
    from kedro.framework.startup import bootstrap_project

    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    text = "volumes: {mlruns: null}\nsteps: {fit: {gpus: 1}}\nenvironment: {A: b}\n"
    (tmp_path / "conf/spider/kubeflow.yml").write_text(text)
    bootstrap_project(ROOT)
    made = load_graph(tmp_path, "train", "spider", None)
    assert made.volumes == (("lumbarflow", "/lumbarflow/data", "data"),)
    assert made.variables == {"A": "b"}
    fit = next(step for step in made.steps if step.name == "fit")
    assert (fit.resources.gpus, fit.resources.memory) == (1, "16Gi")
    assert load_graph(tmp_path, "train", None, None).variables == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "--pipeline=trian"], "there is no pipeline trian; expected one of ['__default__', "),
        (["compile", "--output=train.json"], "--output is train.json; expected a name that ends in .yaml"),
        (["run-local", "--params=training.warmup_epochs=3"], "sets training.warmup_epochs, which is no parameter"),
    ],
)
def test_a_wrong_command_says_so_without_a_traceback(monkeypatch, arguments, message):
    done = kedro(monkeypatch, "kubeflow", *arguments)
    assert done.exit_code == 1
    assert message in done.output


def test_the_command_is_announced_to_kedro():
    entry = '[project.entry-points."kedro.project_commands"]\nlumbarflow = "lumbarflow.kubeflow.cli:commands"'
    assert entry in (ROOT / "pyproject.toml").read_text()
    assert commands.commands["kubeflow"].commands.keys() == {"compile", "run-local", "submit"}


def kedro(monkeypatch, *arguments: str):
    """Kedro's own way to the command needs an installation that knows the plugin."""
    from kedro.framework.startup import bootstrap_project

    monkeypatch.chdir(ROOT)
    return CliRunner().invoke(commands, arguments, obj=bootstrap_project(ROOT))


# --- a server -------------------------------------------------------------------------------------------------------


class FakeKubeflow(ThreadingHTTPServer):
    """As much of the KFP API (v2beta1) as a client needs that uploads a pipeline and starts it. It keeps what came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.pipelines: dict[str, str] = {}  # name -> id
        self.versions: dict[str, list[str]] = {}  # pipeline's id -> versions' ids
        self.uploaded: list[str] = []  # the files
        self.experiments: dict[str, str] = {}
        self.runs: list[dict] = []
        self.tokens: set[str | None] = set()
        self.namespaces: set[str] = set()
        self.refuses = False
        self.asks_to_log_in = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: FakeKubeflow

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        path, query = self._asked()
        wanted = json.loads(query.get("filter", ["{}"])[0]).get("predicates", [{}])[0].get("stringValue")
        if path.endswith("/healthz"):
            self._answer({"multi_user": False})
        elif path.endswith("/versions"):
            ids = self.server.versions[path.split("/")[-2]]
            self._answer({"pipeline_versions": [{"pipeline_version_id": number} for number in ids]})
        elif path.endswith("/pipelines"):
            found = {name: number for name, number in self.server.pipelines.items() if name == wanted}
            self._answer({"pipelines": [{"pipeline_id": number} for number in found.values()]} if found else {})
        elif path.endswith("/experiments"):
            found = [number for name, number in self.server.experiments.items() if name == wanted]
            self._answer({"experiments": [{"experiment_id": number} for number in found]} if found else {})
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        path, query = self._asked()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        if path.endswith("/pipelines/upload"):
            self._keep(body)
            number = server.pipelines.setdefault(query["name"][0], f"pipeline-{len(server.pipelines)}")
            server.versions[number] = [f"{number}-version-0"]
            self._answer({"pipeline_id": number})
        elif path.endswith("/pipelines/upload_version"):
            self._keep(body)
            number = query["pipelineid"][0]
            server.versions[number].append(f"{number}-version-{len(server.versions[number])}")
            self._answer({"pipeline_id": number, "pipeline_version_id": server.versions[number][-1]})
        elif path.endswith("/experiments"):
            name = json.loads(body)["display_name"]
            number = server.experiments.setdefault(name, f"experiment-{len(server.experiments)}")
            self._answer({"experiment_id": number})
        elif path.endswith("/runs"):
            server.runs.append(json.loads(body))
            self._answer({"run_id": f"run-{len(server.runs) - 1}"})
        else:
            self.send_error(404)

    def _asked(self) -> tuple[str, dict]:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        self.server.tokens.add(self.headers.get("Authorization"))
        self.server.namespaces.update(query.get("namespace", []))
        if self.server.refuses:
            self.send_error(403, "Forbidden")
            raise ConnectionAbortedError
        return url.path, query

    def handle(self) -> None:
        with contextlib.suppress(ConnectionAbortedError):
            super().handle()

    def _keep(self, body: bytes) -> None:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        (part,) = message_from_bytes(head + body).get_payload()
        self.server.uploaded.append(part.get_payload(decode=True).decode())

    def _answer(self, values: dict) -> None:
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.server.asks_to_log_in else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def kubeflow(monkeypatch) -> Iterator[FakeKubeflow]:
    for name in ("KFP_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with FakeKubeflow() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_pipeline_is_uploaded_once_and_then_as_a_new_version(kubeflow, monkeypatch):
    monkeypatch.setenv("KFP_TOKEN", "letmein")
    made = graph()
    assert (
        submit(made, made.arguments({"training": {"epochs": 3}}), kubeflow.address, "trials", run_name="first")
        == "run-0"
    )
    assert submit(made, {}, kubeflow.address, "trials", namespace="radiology") == "run-1"
    assert kubeflow.pipelines == {"lumbarflow-train": "pipeline-0"}
    assert kubeflow.experiments == {"trials": "experiment-0"}
    first, second = kubeflow.runs
    assert first["display_name"] == "first"
    assert first["experiment_id"] == "experiment-0"
    assert first["runtime_config"]["parameters"] == {"training_epochs": 3}
    assert first["pipeline_version_reference"] == {
        "pipeline_id": "pipeline-0",
        "pipeline_version_id": "pipeline-0-version-0",
    }
    assert second["pipeline_version_reference"]["pipeline_version_id"] == "pipeline-0-version-1"
    assert second["display_name"].startswith("lumbarflow-train 20")
    assert kubeflow.tokens == {"Bearer letmein"}
    assert kubeflow.namespaces == {"radiology"}
    for text in kubeflow.uploaded:
        pipeline, _ = yaml.safe_load_all(text)
        assert list(pipeline["root"]["dag"]["tasks"]) == sorted(step.name for step in made.steps)


def test_the_command_submits(kubeflow, monkeypatch):
    done = kedro(
        monkeypatch, "kubeflow", "submit", f"--host={kubeflow.address}", "--params=training.epochs=60,raw_dir=/scans"
    )
    assert done.exit_code == 0, done.output
    assert "started: run run-0" in done.output
    (run,) = kubeflow.runs
    assert run["runtime_config"]["parameters"] == {"training_epochs": 60, "raw_dir": "/scans"}
    assert kubeflow.experiments == {"lumbarflow": "experiment-0"}


def test_a_server_that_refuses_or_is_not_there_is_named(kubeflow):
    kubeflow.refuses = True
    with pytest.raises(RuntimeError, match=r"http://127.0.0.1:\d+ answered 403 Forbidden.*KFP_TOKEN"):
        submit(graph(), {}, kubeflow.address, "trials")
    kubeflow.refuses, kubeflow.asks_to_log_in = False, True
    with pytest.raises(RuntimeError, match=r"answered a page for people, such as that of a login.*KFP_TOKEN"):
        submit(graph(), {}, kubeflow.address, "trials")
    with pytest.raises(RuntimeError, match=r"http://127.0.0.1:1 does not answer .*; expected Kubeflow Pipelines there"):
        submit(graph(), {}, "http://127.0.0.1:1", "trials")


# --- on this machine ------------------------------------------------------------------------------------------------

TINY = {
    "pyproject.toml": """
        [tool.kedro]
        package_name = "tiny"
        project_name = "tiny"
        kedro_init_version = "1.7.0"
        source_dir = "src"
        """,
    "src/tiny/__init__.py": "",
    "src/tiny/settings.py": """
        from omegaconf.resolvers import oc

        CONFIG_LOADER_ARGS = {"base_env": "base", "default_run_env": "local", "custom_resolvers": {"oc.env": oc.env}}
        """,
    "src/tiny/pipeline_registry.py": """
        import mlflow
        from kedro.pipeline import Pipeline, node


        def first(settings):
            mlflow.log_metric("epochs", settings["epochs"])
            return {"run": mlflow.active_run().info.run_id, **settings}


        def second(made):
            assert made["epochs"] < 5, "too many epochs for a test"
            return {**made, "second_run": mlflow.active_run().info.run_id}


        def register_pipelines():
            return {
                "tiny": Pipeline(
                    [
                        node(first, "params:training", "made", name="first", namespace="one"),
                        node(second, "made", "checked", name="second", namespace="two"),
                    ],
                    prefix_datasets_with_namespace=False,
                )
            }
        """,
    "conf/base/parameters.yml": "training: {epochs: 1, rate: 0.5, place: '${oc.env:PLACE}'}",
    "conf/base/catalog.yml": """
        made: {type: json.JSONDataset, filepath: data/made.json}
        checked: {type: json.JSONDataset, filepath: data/checked.json}
        """,
    "conf/base/mlflow.yml": "server: {mlflow_tracking_uri: 'sqlite:///mlflow.db'}",
    "conf/local/empty.yml": "",
}


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Graph:
    """A Kedro project of two steps, of which the second refuses five epochs."""
    import textwrap

    for name, text in TINY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", "this shell")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pipeline = Pipeline(
        [make("params:training", "made", "first", "one"), make("made", "checked", "second", "two")],
        prefix_datasets_with_namespace=False,
    )
    settings = SETTINGS | {"parameters": ["training.epochs", "training.rate"], "environment": {"PLACE": "the cluster"}}
    return make_graph("tiny", pipeline, settings, {"training": {"epochs": 1, "rate": 0.5}})


@pytest.mark.integration
def test_the_graph_runs_on_this_machine(tiny, tmp_path):
    run_local(tiny, {"training_epochs": 3})
    checked = json.loads((tmp_path / "data/checked.json").read_text())
    # A whole number stays one, on its way through Kubeflow's; the variables are this shell's, not the cluster's.
    assert (checked["epochs"], checked["rate"], checked["place"]) == (3, 0.5, "this shell")
    assert isinstance(checked["epochs"], int)
    assert checked["run"] == checked["second_run"], "the steps share MLflow's run"
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == checked["run"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"epochs": 3}


@pytest.mark.integration
def test_a_first_step_that_is_tried_again_goes_on_in_the_same_mlflow_run(tiny, tmp_path):
    import mlflow

    code = (
        "from lumbarflow.kubeflow.step import run_step\n"
        "print('run', run_step('tiny', {'namespaces': ['one']}, None, {}, {}, kubeflow_run='%s'))"
    )
    said = [
        subprocess.run([sys.executable, "-c", code % run], check=True, capture_output=True, text=True).stdout
        for run in ("first", "first", "second")
    ]
    first, again, second = (text.splitlines()[-1].removeprefix("run ") for text in said)
    assert first == again != second
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [client.get_run(run).data.tags["kubeflow_run"] for run in (first, second)] == ["first", "second"]


@pytest.mark.integration
def test_a_step_that_fails_stops_the_run_at_once(tiny, tmp_path, capfd):
    # Nothing is tried again: the graph would wait a minute first.
    with pytest.raises(RuntimeError, match="FAILURE.*'two'"):
        run_local(tiny, {"training_epochs": 5})
    assert capfd.readouterr().out.count("AssertionError: too many epochs for a test") == 1
    assert (tmp_path / "data/made.json").is_file()
    assert not (tmp_path / "data/checked.json").exists()


def copy_of_the_project(folder: Path, settings: dict) -> Path:
    folder.mkdir()
    for name in ("pyproject.toml", ".telemetry", "conf"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    (folder / "src").mkdir()
    (folder / "conf/local/parameters_small.yml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.long  # 4 minutes: eight processes, each with imports of its own
@pytest.mark.timeout(900)
def test_the_train_pipeline_in_steps_finds_what_kedro_run_finds(tmp_path, small_settings):
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    steps, whole = (copy_of_the_project(tmp_path / name, small_settings) for name in ("steps", "whole"))
    lines = {
        steps: ".venv/bin/kedro kubeflow run-local --pipeline=train",
        whole: ".venv/bin/kedro run --pipeline=train",
    }
    for folder, command in lines.items():
        _, *arguments = command.split()
        done = subprocess.run(
            [sys.executable, "-m", "kedro", *arguments, "--params=training.epochs=1"],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=800,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    for name in ("metrics_by_case", "metrics_by_class"):
        table = f"data/08_reporting/{name}.parquet"
        pd.testing.assert_frame_equal(pd.read_parquet(steps / table), pd.read_parquet(whole / table))
    # All steps in one MLflow run, with what `kedro run` leaves in its own, and the model of that run registered.
    import mlflow

    found = {}
    for folder in (steps, whole):
        client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
        (experiment,) = [e for e in client.search_experiments() if e.name == "lumbarflow"]
        (run,) = client.search_runs([experiment.experiment_id])
        (version,) = client.search_model_versions("name='lumbar-unet'")
        assert version.run_id == run.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.params["training.epochs"] == "1"
        found[folder.name] = (run.data.params.keys(), run.data.metrics.keys())
    assert found["steps"] == found["whole"]
