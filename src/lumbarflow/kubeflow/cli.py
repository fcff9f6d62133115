"""`kedro kubeflow`: compile a pipeline for Kubeflow, try it on this machine, or start it on a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from kedro.framework.cli.utils import _split_params, env_option

if TYPE_CHECKING:
    from kedro.framework.startup import ProjectMetadata

    from lumbarflow.kubeflow.graph import Graph


def load_graph(project: Path, pipeline: str, env: str | None, image: str | None) -> Graph:
    """The graph of a registered pipeline, by the configuration in a project's folder."""
    from kedro.framework.project import pipelines, settings

    from lumbarflow.kubeflow.graph import make_graph

    # The project's own loader, and kubeflow.yml, which nobody else reads: an environment states only what differs.
    arguments = settings.CONFIG_LOADER_ARGS
    loader = settings.CONFIG_LOADER_CLASS(
        conf_source=str(Path(project, settings.CONF_SOURCE)),
        env=env,
        **{
            **arguments,
            "config_patterns": {**arguments.get("config_patterns", {}), "kubeflow": ["kubeflow*"]},
            "merge_strategy": {**arguments.get("merge_strategy", {}), "kubeflow": "soft"},
        },
    )
    if pipeline not in pipelines:
        raise ValueError(f"there is no pipeline {pipeline}; expected one of {sorted(pipelines)}.")
    # Globals first: the parameters have folders as paths of this machine, and the image has its own.
    values = {**loader["parameters"], **loader["globals"]}
    return make_graph(pipeline, pipelines[pipeline], loader["kubeflow"], values, env, image)


def _told(work: Callable[..., Any]) -> Callable[..., Any]:
    """Errors that say what to do, without the way that led there."""
    from functools import wraps

    @wraps(work)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return work(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            raise click.ClickException(str(error)) from error

    return run


_pipeline = click.option("--pipeline", "-p", default="train", show_default=True, help="A registered Kedro pipeline.")
_image = click.option("--image", help="Container image of the steps, in the place of the one in kubeflow.yml.")
_params = click.option(
    "--params",
    default="",
    type=click.UNPROCESSED,
    callback=_split_params,
    help="Values of the pipeline's parameters, as for `kedro run`: raw_dir=DIR,training.epochs=60.",
)


@click.group(name="Kubeflow")
def commands() -> None:
    """Kedro's pipelines on Kubeflow."""


@commands.group(name="kubeflow")
def kubeflow_commands() -> None:
    """Run a pipeline on Kubeflow Pipelines, a step for each namespace of its nodes."""


@kubeflow_commands.command(name="compile")
@_pipeline
@env_option
@_image
@click.option("--output", "-o", type=click.Path(path_type=Path), help="The file; PIPELINE.yaml if not given.")
@click.pass_obj
@_told
def compile_command(
    metadata: ProjectMetadata, pipeline: str, env: str | None, image: str | None, output: Path | None
) -> None:
    """Write a pipeline as KFP v2's YAML."""
    from lumbarflow.kubeflow.compiler import compile_yaml
    from lumbarflow.kubeflow.graph import as_text

    output = output or Path(f"{pipeline}.yaml")
    if output.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--output is {output}; expected a name that ends in .yaml.")
    graph = load_graph(metadata.project_path, pipeline, env, image)
    compile_yaml(graph, output)
    click.echo(f"{as_text(graph)}\nwritten: {output}")


@kubeflow_commands.command(name="run-local")
@_pipeline
@env_option
@_params
@click.pass_obj
@_told
def run_local_command(metadata: ProjectMetadata, pipeline: str, env: str | None, params: Mapping[str, Any]) -> None:
    """Run the steps of the Kubeflow pipeline on this machine, without a cluster or containers."""
    from lumbarflow.kubeflow.compiler import run_local

    graph = load_graph(metadata.project_path, pipeline, env, None)
    run_local(graph, graph.arguments(params))


@kubeflow_commands.command(name="submit")
@_pipeline
@env_option
@_image
@_params
@click.option("--host", required=True, help="Address of the Kubeflow Pipelines server. KFP_TOKEN has its token.")
@click.option("--experiment", default="lumbarflow", show_default=True, help="Kubeflow's experiment.")
@click.option("--namespace", help="Kubernetes namespace, on a server with several users.")
@click.option("--run-name", help="Of the run in Kubeflow.")
@click.pass_obj
@_told
def submit_command(
    metadata: ProjectMetadata,
    pipeline: str,
    env: str | None,
    image: str | None,
    params: Mapping[str, Any],
    host: str,
    experiment: str,
    namespace: str | None,
    run_name: str | None,
) -> None:
    """Upload a pipeline to a server and start it."""
    from lumbarflow.kubeflow.compiler import submit

    graph = load_graph(metadata.project_path, pipeline, env, image)
    click.echo(f"started: run {submit(graph, graph.arguments(params), host, experiment, namespace, run_name)}")
