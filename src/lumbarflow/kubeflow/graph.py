"""A Kedro pipeline as the steps of a Kubeflow pipeline, in plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from graphlib import CycleError, TopologicalSorter
from typing import Any

from kedro.pipeline import Pipeline

from lumbarflow.parameters import check_names

FILE = "conf/base/kubeflow.yml"
SETTINGS = ("image", "parameters", "volumes", "environment", "secrets", "resources", "steps")
# The handle on MLflow's run, which the first step hands on to the others, and that on Kubeflow's, by which it finds the
# former again when it is tried again.
MLFLOW_RUN, KUBEFLOW_RUN = "mlflow_run", "kubeflow_run"

_QUANTITY = re.compile(r"\d+(\.\d+)?([numkMGTPE]|[KMGTPE]i)?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Resources:
    """What a step asks of the cluster; quantities as Kubernetes writes them ("500m", "8Gi")."""

    cpu: str
    memory: str
    gpus: int
    gpu_type: str
    retries: int
    retry_seconds: int

    def __post_init__(self) -> None:
        for name in ("cpu", "memory"):
            # YAML reads cpu: 2 as a number.
            object.__setattr__(self, name, str(getattr(self, name)))
            if not _QUANTITY.fullmatch(getattr(self, name)):
                raise ValueError(
                    f"{FILE}: {name} is {getattr(self, name)!r}; expected a quantity such as 2, 500m or 8Gi."
                )
        for name in ("gpus", "retries", "retry_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{FILE}: {name} is {value!r}; expected a whole number, 0 or more.")


@dataclass(frozen=True)
class Step:
    """Nodes that run in one container.

    Attributes:
        name: the nodes' namespace; the node's own name if it has none.
        nodes: their names, in an order in which they can run.
        by: how a Kedro session selects them: "namespaces" or "node_names".
        after: the steps whose data sets these nodes read.
        resources: what the step asks for.
    """

    name: str
    nodes: tuple[str, ...]
    by: str
    after: tuple[str, ...]
    resources: Resources

    @property
    def identifier(self) -> str:
        """The name as Python and KFP can have it."""
        return identifier(self.name)


@dataclass(frozen=True)
class Graph:
    """A Kubeflow pipeline.

    Attributes:
        pipeline, environment: Kedro's names; the environment may be None for Kedro's default.
        steps: in an order in which they can run. The first opens MLflow's run, and all others wait for that.
        parameters: dotted name -> default.
        image: that every step runs in.
        variables: environment variable -> value, of all steps.
        secrets: environment variable -> (secret, key), of all steps.
        volumes: (claim, path in the container, path in the claim), of all steps.
    """

    pipeline: str
    environment: str | None
    steps: tuple[Step, ...]
    parameters: dict[str, Any]
    image: str
    variables: dict[str, str]
    secrets: dict[str, tuple[str, str]]
    volumes: tuple[tuple[str, str, str], ...]

    @property
    def name(self) -> str:
        """Of the pipeline in Kubeflow, in the letters that it takes."""
        parts = ["lumbarflow", "train" if self.pipeline == "__default__" else self.pipeline, self.environment]
        return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts if part)

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values of a run, in sections as Kedro's --params gives them, under their names in KFP.

        Raises:
            ValueError: names a value that is no parameter of the pipeline, or not of its default's type.
        """
        flat = _flat(given)
        if unknown := sorted(set(flat) - set(self.parameters)):
            raise ValueError(
                f"--params sets {unknown[0]}, which is no parameter of the Kubeflow pipeline; expected some of "
                f"{list(self.parameters)}. Add it to parameters in {FILE}."
            )
        return {identifier(name): _like(self.parameters[name], value, name) for name, value in flat.items()}


def identifier(name: str) -> str:
    """`training.epochs` -> `training_epochs`."""
    return re.sub(r"\W", "_", name)


def make_graph(
    name: str,
    pipeline: Pipeline,
    settings: Mapping[str, Any],
    values: Mapping[str, Any],
    environment: str | None = None,
    image: str | None = None,
) -> Graph:
    """The steps of a pipeline, one for each namespace.

    Args:
        name, pipeline: as registered.
        settings: of kubeflow.yml.
        values: of the configuration, in sections: where the parameters' defaults are looked up.
        environment: of Kedro.
        image: in the place of the settings' one.
    Raises:
        ValueError: names the setting that is wrong, or steps that wait for each other.
    """
    check_names(settings, SETTINGS, FILE)
    groups = {group.name: group for group in pipeline.group_nodes_by("namespace")}
    common, single = settings.get("resources") or {}, settings.get("steps") or {}
    names = [field.name for field in fields(Resources)]
    check_names(common, names, f"{FILE} resources")
    if missing := [field for field in names if field not in common]:
        raise ValueError(f"{FILE}: resources has no {missing[0]}; expected {names}.")
    for step, changes in single.items():
        check_names(changes or {}, names, f"{FILE} steps.{step}")
    try:
        order = [*TopologicalSorter({group.name: group.dependencies for group in groups.values()}).static_order()]
    except CycleError as error:
        raise ValueError(
            f"pipeline {name}: the steps {' -> '.join(reversed(error.args[1]))} wait for each other; expected "
            "namespaces that can run one after the other. Move a node to another namespace."
        ) from None
    steps = [
        Step(
            step,
            tuple(groups[step].nodes),
            "namespaces" if groups[step].type == "namespace" else "node_names",
            tuple(groups[step].dependencies),
            Resources(**{**common, **(single.get(step) or {})}),
        )
        for step in order
    ]
    image = image or settings.get("image")
    if not image:
        raise ValueError(f"{FILE} names no image for the steps to run in; expected one there or with --image=...")
    return Graph(
        name,
        environment,
        tuple(steps),
        _parameters(settings.get("parameters") or (), values),
        image,
        _variables(settings.get("environment") or {}),
        _secrets(settings.get("secrets") or {}),
        _volumes(settings.get("volumes") or {}),
    )


def as_text(graph: Graph) -> str:
    """The steps in a line each, for people: what they wait for and what they ask for."""
    lines = []
    for step in graph.steps:
        asked = asdict(step.resources)
        gpus = f", {step.resources.gpus} x {step.resources.gpu_type}" if step.resources.gpus else ""
        after = f" after {', '.join(step.after)}" if step.after else ""
        lines.append(f"{step.name}{after}: {len(step.nodes)} nodes, cpu {asked['cpu']}, memory {asked['memory']}{gpus}")
    return "\n".join(lines)


def _parameters(names: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    taken: dict[str, str] = {name: f"the step's own {name}" for name in (MLFLOW_RUN, KUBEFLOW_RUN)}
    parameters = {}
    for name in names:
        value: Any = values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            raise ValueError(
                f"{FILE}: the configuration has no value for the parameter {name}, from which its type would follow; "
                "expected a name in sections, such as training.epochs. Correct it or take it out."
            )
        if (short := identifier(name)) in taken:
            raise ValueError(f"{FILE}: the parameter {name} would have the same name as {taken[short]}, {short}.")
        taken[short] = name
        parameters[name] = value
    return parameters


def _variables(settings: Mapping[str, Any]) -> dict[str, str]:
    kept = {name: value for name, value in settings.items() if value is not None}
    for name, value in kept.items():
        if not _VARIABLE.fullmatch(name) or isinstance(value, (Mapping, list, bool)):
            raise ValueError(f"{FILE}: environment has {name}: {value!r}; expected a variable's name and a text.")
    return {name: str(value) for name, value in kept.items()}


def _secrets(settings: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    kept = {name: value for name, value in settings.items() if value is not None}
    for name, value in kept.items():
        # The value itself is not repeated: somebody may have written the secret here.
        if not _VARIABLE.fullmatch(name) or not isinstance(value, Mapping) or set(value) != {"secret", "key"}:
            raise ValueError(
                f"{FILE}: secrets.{name} does not say where the value lies; expected {{secret: NAME, key: KEY}} of a "
                "Kubernetes secret, never the value."
            )
    return {name: (str(value["secret"]), str(value["key"])) for name, value in kept.items()}


def _volumes(settings: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    volumes = []
    for name, value in settings.items():
        if value is None:
            continue
        if not isinstance(value, Mapping) or not {"claim", "path"} <= set(value) <= {"claim", "path", "sub_path"}:
            raise ValueError(
                f"{FILE}: volumes.{name} is {value!r}; expected {{claim: NAME, path: PATH}}, and sub_path if it is a "
                "folder of the claim."
            )
        volumes.append((str(value["claim"]), str(value["path"]), str(value.get("sub_path") or "")))
    return tuple(volumes)


def _flat(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{section}{name}.") if isinstance(value, Mapping) else {f"{section}{name}": value}
    return flat


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names -> sections, as Kedro wants run-time parameters."""
    sections: dict[str, Any] = {}
    for name, value in values.items():
        *parts, last = name.split(".")
        section = sections
        for part in parts:
            section = section.setdefault(part, {})
        section[last] = value
    return sections


def _like(default: Any, value: Any, name: str) -> Any:
    kind = type(default)
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) in (int, float):
        return str(value)  # a folder named by a number
    if type(value) is not kind:
        raise ValueError(f"--params sets {name} to {value!r}; expected {kind.__name__}, as its default {default!r}.")
    return value
