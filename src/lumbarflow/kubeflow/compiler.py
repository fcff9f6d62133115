"""A graph as a KFP pipeline: compiled to YAML, run on this machine, or started on a server."""

from __future__ import annotations

import inspect
import json
import linecache
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lumbarflow.kubeflow.graph import KUBEFLOW_RUN, MLFLOW_RUN, Graph, Step, identifier

# A Kubeflow component is a function's source and types. Which parameters it takes, the configuration says.
_SOURCE = '''\
def {step}({parameters}{mlflow_run}: str = "", {kubeflow_run}: str = "") -> str:
    """{description}"""
    from lumbarflow.kubeflow.step import run_step

    given = {{{given}}}
    defaults = {defaults!r}
    return run_step({pipeline!r}, {selection!r}, {environment!r}, given, defaults, {mlflow_run}, {kubeflow_run})
'''
_LONGEST_WAIT_SECONDS = 3600  # before a retry
_ANSWER_SECONDS = 30


class MissingSDK(RuntimeError):
    """The extra with Kubeflow's SDK is not installed."""


def _kfp() -> Any:
    try:
        import kfp
        import kfp.kubernetes
    except ImportError as error:
        raise MissingSDK(
            f"Kubeflow's SDK cannot be imported ({error}); expected kfp and kfp-kubernetes. "
            "Install them with: pip install -c constraints.txt -e '.[kubeflow]'"
        ) from error
    return kfp


def make_pipeline(graph: Graph) -> Any:
    """The KFP pipeline (kfp.dsl.graph_component.GraphComponent) of a graph."""
    kfp = _kfp()
    components = {step.name: _component(graph, step) for step in graph.steps}

    def flow(*channels: Any) -> None:
        values = dict(zip(map(identifier, graph.parameters), channels, strict=True))
        tasks: dict[str, Any] = {}
        for step in graph.steps:
            run = (
                {MLFLOW_RUN: tasks[graph.steps[0].name].output}
                if tasks
                else {KUBEFLOW_RUN: kfp.dsl.PIPELINE_JOB_ID_PLACEHOLDER}
            )
            task = components[step.name](**values, **run)
            task.after(*(tasks[name] for name in step.after))
            _equip(task, graph, step)
            tasks[step.name] = task

    flow.__signature__ = inspect.Signature(
        [
            inspect.Parameter(
                identifier(name), inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=type(value)
            )
            for name, value in graph.parameters.items()
        ]
    )
    flow.__name__ = identifier(graph.name)
    return kfp.dsl.pipeline(name=graph.name, description=f"kedro run --pipeline={graph.pipeline}, in steps")(flow)


def _component(graph: Graph, step: Step) -> Any:
    """A step as a Python component. Its image has KFP's SDK, so nothing is installed when it starts."""
    return _kfp().dsl.component(
        _function(graph, step), base_image=graph.image, packages_to_install=[], install_kfp_package=False
    )


def _function(graph: Graph, step: Step) -> Callable[..., str]:
    source = _SOURCE.format(
        step=step.identifier,
        parameters="".join(f"{identifier(name)}: {type(value).__name__}, " for name, value in graph.parameters.items()),
        mlflow_run=MLFLOW_RUN,
        kubeflow_run=KUBEFLOW_RUN,
        description=f"{', '.join(step.nodes)}.",
        given=", ".join(f"{name!r}: {identifier(name)}" for name in graph.parameters),
        pipeline=graph.pipeline,
        defaults=graph.parameters,
        selection={step.by: [step.name]},
        environment=graph.environment,
    )
    # KFP reads the source back through inspect, which looks here for what lies in no file.
    file = f"<kubeflow step {graph.name} {step.name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names: dict[str, Any] = {"__name__": __name__}
    # Not with this module's postponed annotations: KFP wants types, not their names.
    exec(compile(source, file, "exec", dont_inherit=True), names)
    return names[step.identifier]


def _equip(task: Any, graph: Graph, step: Step) -> None:
    """Resources, retries, variables, secrets and volumes of a step."""
    from kfp import kubernetes

    asked = step.resources
    task.set_display_name(step.name)
    # KFP compares a step's inputs, not the scans and files that it reads: it would take old results for new ones. The
    # stores compare contents themselves, series by series, so a step with nothing to do is over soon.
    task.set_caching_options(False)
    task.set_cpu_request(asked.cpu).set_memory_request(asked.memory)
    if asked.gpus:
        task.set_accelerator_type(asked.gpu_type).set_accelerator_limit(asked.gpus)
    if asked.retries:
        task.set_retry(asked.retries, f"{asked.retry_seconds}s", 2.0, f"{_LONGEST_WAIT_SECONDS}s")
    for name, value in graph.variables.items():
        task.set_env_variable(name, value)
    for name, (secret, key) in graph.secrets.items():
        kubernetes.use_secret_as_env(task, secret, {key: name})
    for claim, path, sub_path in graph.volumes:
        kubernetes.mount_pvc(task, claim, path, sub_path)


def compile_yaml(graph: Graph, path: Path) -> None:
    """Write the pipeline as KFP v2's YAML, `path` (*.yaml), and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _kfp().compiler.Compiler().compile(make_pipeline(graph), str(path))


def run_local(graph: Graph, arguments: Mapping[str, Any]) -> None:
    """Run the steps one after the other on this machine, in processes of their own, in the working directory.

    The graph is the same. Variables, secrets and volumes are the cluster's: this shell's take their place. Nothing is
    tried again, as somebody is looking on.

    Raises:
        RuntimeError: names a step that failed; its own log is above.
    """
    kfp = _kfp()
    from kfp import local

    steps = [replace(step, resources=replace(step.resources, retries=0)) for step in graph.steps]
    here = replace(graph, steps=tuple(steps), variables={}, secrets={}, volumes=())
    with tempfile.TemporaryDirectory() as outputs, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You may be attemping to run a task", category=RuntimeWarning)
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=outputs, raise_on_error=True)
        try:
            make_pipeline(here)(**{**_defaults(graph), **arguments})
        finally:
            # KFP runs every component that is called afterwards, elsewhere in this process, if it is not told.
            kfp.local.config.LocalExecutionConfig.instance = None


def submit(
    graph: Graph,
    arguments: Mapping[str, Any],
    host: str,
    experiment: str,
    namespace: str | None = None,
    run_name: str | None = None,
) -> str:
    """Upload the pipeline to a server, as a new version if it has one of that name, and start it.

    Args:
        host: the server's address. A bearer token for it is taken from the variable KFP_TOKEN.
        experiment: of Kubeflow; it is made if there is none.
        namespace: of a server with several users.
        run_name: pipeline and time of day if None.
    Returns:
        The id of Kubeflow's run.
    Raises:
        RuntimeError: the server does not answer, or not as expected.
    """
    kfp = _kfp()
    import kfp_server_api

    token = os.environ.get("KFP_TOKEN")
    options = {"namespace": namespace} if namespace else {}
    try:
        _look_for_server(host, token)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This client only works with", category=FutureWarning)
            path = Path(folder, f"{graph.name}.yaml")
            compile_yaml(graph, path)
            client = kfp.Client(host=host, existing_token=token, **options)
            return _upload_and_start(client, graph.name, path, arguments, experiment, namespace, run_name)
    except kfp_server_api.ApiException as error:
        raise RuntimeError(_refused(host, f"{error.status} {error.reason}: {error.body or 'nothing more'}")) from error


def _look_for_server(host: str, token: str | None) -> None:
    """Stop if Kubeflow doesn't answer: its client would ask five times, with a traceback each, before it says so."""
    import requests

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = requests.get(f"{host.rstrip('/')}/apis/v2beta1/healthz", headers=headers, timeout=_ANSWER_SECONDS)
    except requests.RequestException as error:
        raise RuntimeError(
            f"{host} does not answer ({error}); expected Kubeflow Pipelines there, at an address such as "
            "http://127.0.0.1:8888. Check --host."
        ) from error
    if not answer.ok:
        raise RuntimeError(_refused(host, f"{answer.status_code} {answer.reason}"))
    if "json" not in answer.headers.get("Content-Type", ""):
        raise RuntimeError(_refused(host, "a page for people, such as that of a login"))


def _refused(host: str, answer: str) -> str:
    return (
        f"{host} answered {answer}. Expected Kubeflow Pipelines there; check --host and --namespace, and the token in "
        "KFP_TOKEN if it wants one."
    )


def _upload_and_start(
    client: Any,
    name: str,
    path: Path,
    arguments: Mapping[str, Any],
    experiment: str,
    namespace: str | None,
    run_name: str | None,
) -> str:
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    # Not client.get_pipeline_id, which looks in no user's namespace.
    same_name = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    found = client.list_pipelines(filter=json.dumps({"predicates": [same_name]}), namespace=namespace).pipelines
    if found:
        pipeline_id = found[0].pipeline_id
        version = client.upload_pipeline_version(str(path), f"{name} {moment}", pipeline_id=pipeline_id)
    else:
        pipeline_id = client.upload_pipeline(str(path), name, namespace=namespace).pipeline_id
        version = client.list_pipeline_versions(pipeline_id).pipeline_versions[0]
    run = client.run_pipeline(
        client.create_experiment(experiment, namespace=namespace).experiment_id,
        run_name or f"{name} {moment[:19]}",
        pipeline_id=pipeline_id,
        version_id=version.pipeline_version_id,
        params=dict(arguments),
    )
    return run.run_id


def _defaults(graph: Graph) -> dict[str, Any]:
    return {identifier(name): value for name, value in graph.parameters.items()}
