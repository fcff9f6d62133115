"""What a step of a Kubeflow pipeline does in its container: a part of a Kedro run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumbarflow.kubeflow.graph import KUBEFLOW_RUN, nested

if TYPE_CHECKING:
    from kedro.framework.session import KedroSession


def run_step(
    pipeline: str,
    selection: Mapping[str, list[str]],
    environment: str | None,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    mlflow_run: str = "",
    kubeflow_run: str = "",
) -> str:
    """Run a part of a pipeline in a Kedro session of its own, within an MLflow run that other steps share.

    Args:
        pipeline: its name as registered.
        selection: {"namespaces": [...]} or {"node_names": [...]}.
        environment: of Kedro; None for its default.
        given: dotted name -> value. Those that are as in `defaults` are left to the configuration.
        defaults: dotted name -> value when the pipeline was compiled.
        mlflow_run: the id of MLflow's run; "" opens a new one, unless one of this Kubeflow run is there already.
        kubeflow_run: the id of Kubeflow's run, which a new run is tagged with; "" if there is none.
    Returns:
        The id of MLflow's run; "" if the configuration tracks no run of this pipeline.
    Raises:
        RuntimeError: the working directory is in no Kedro project.
    """
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project
    from kedro.utils import find_kedro_project

    project = find_kedro_project(Path.cwd())
    if project is None:
        raise RuntimeError(
            f"{Path.cwd()} is no Kedro project; expected the step to start in this project's folder. Make it the "
            "image's WORKDIR, as the Dockerfile does."
        )
    bootstrap_project(project)
    # A parameter that is given counts as somebody's wish: a raw_dir, say, as scans that nobody may make up.
    changed = {name: value for name, value in given.items() if value != defaults[name]}
    with KedroSession.create(project_path=project, env=environment, runtime_params=nested(changed)) as session:
        mlflow_run = mlflow_run or _begun(session, kubeflow_run)
        if mlflow_run:
            # MLflow's own variable: whoever starts a run without naming one continues this.
            os.environ["MLFLOW_RUN_ID"] = mlflow_run
        session.run(pipeline_names=[pipeline], **selection)
    if mlflow_run:
        return mlflow_run
    import mlflow

    run = mlflow.last_active_run()
    return run.info.run_id if run else ""


def _begun(session: KedroSession, kubeflow_run: str) -> str:
    """The MLflow run that an earlier try of this step opened; "" if none has, and then a new one is tagged."""
    if not kubeflow_run:
        return ""
    import mlflow

    session.load_context()  # tells MLflow the server and the experiment
    if found := mlflow.search_runs(filter_string=f"tags.{KUBEFLOW_RUN} = '{kubeflow_run}'", output_format="list"):
        return found[0].info.run_id
    os.environ["MLFLOW_RUN_CONTEXT"] = json.dumps({KUBEFLOW_RUN: kubeflow_run})  # tags of every run opened from here
    return ""
