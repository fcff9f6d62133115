"""Writes what the pages below docs/reference say of parameters, catalog, pipelines, figures and classes, from the code.

    .venv/bin/python docs/reference.py

renews them; tests/test_docs.py fails where a page is not what this would write. A page holds what `TABLES[name]` gives
between `<!-- from the code: name -->` and `<!-- end -->`; the rest of it is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[1]
PAGES = Path(__file__).parent / "reference"
ENVIRONMENTS = ("base", "spider", "best", "paper")

# In the order of the flow of data.
LAYERS = ("raw", "intermediate", "primary", "model_input", "models", "model_output", "reporting")

# What the end of a parameter's name says of its unit.
UNITS = {
    "_mm": "mm", "_mm3": "mm³", "_ml": "ml", "_deg": "degrees", "_degrees": "degrees", "_minutes": "minutes",
    "_tolerance_pixels": "pixels", "_fraction": "share", "_share": "share", "epochs": "epochs",
}  # fmt: skip

# What the columns of the tables hold: meaning, unit, range. `tables_of_figures` fails if one is missing or too many.
FIGURES = {
    "dice": ("2 TP / (2 TP + FP + FN) of decided pixels", "", "0 to 1"),
    "iou": ("TP / (TP + FP + FN)", "", "0 to 1"),
    "precision": ("TP / (TP + FP)", "", "0 to 1"),
    "recall": ("TP / (TP + FN)", "", "0 to 1"),
    "f1": ("Dice by another name; it stands here because the paper's \"Dice\" is another one", "", "0 to 1"),
    "soft_dice": ("2 Σpy / (Σp + Σy), p the probability of the class, y its reference (0 or 1)", "", "0 to 1"),
    "asd_mm": ("symmetric average surface distance: mean over the area of both surfaces", "mm", "0 and more"),
    "hd95_mm": ("greater of the two directed 95th percentiles of the distances", "mm", "0 and more"),
    "nsd_1mm": ("share of both surfaces' area that lies within 1 mm of the other", "", "0 to 1"),
    "nsd_2mm": ("the same within 2 mm; tolerances: `evaluation.metrics.nsd_tolerances_mm`", "", "0 to 1"),
    "volume_error_ml": ("prediction minus reference", "ml", "any"),
    "relative_volume_error": ("the same as a share of the reference", "", "-1 and more"),
    "detection_rate": ("components of the reference that are found; of cases and pooled", "", "0 to 1"),
}  # fmt: skip
COLUMNS = {
    "series": ("`<patient>_<sequence>`", ""),
    "patient": ("the part of the series' name before `_`", ""),
    "slice": ("number of the slice, 0 at the patient's left", ""),
    "class": ("one of the four classes; in `metrics_by_class` also their `mean foreground`", ""),
    "scope": ("`pooled`, `case mean`, `slice mean`, or `ceiling`: perfect masks at the net's size", ""),
    "missing": ("the side that lacks the class: `reference`, `prediction`, `both`, or nothing", ""),
    "reference_voxels": ("size in the reference", "voxels"),
    "predicted_voxels": ("size in the prediction", "voxels"),
    "reference_components": ("components of the reference that are no specks; vertebrae and IVD alone", "count"),
    "predicted_components": ("the same of the prediction", "count"),
    "detected_components": ("components of the reference matched by a predicted one", "count"),
    "reference_specks": ("components below `minimum_component_mm3`, which nobody has to find", "count"),
    "predicted_specks": ("the same of the prediction", "count"),
    "whole": ("whether all slices of the series were tested", ""),
    "entropy": ("mean entropy of the pixels decided as the class: 0 is certain, 1 knows nothing", "share of ln 4"),
    "n_cases": ("cases that were tested; in `metrics_intervals` those with the class on either side", "count"),
    "n_slices": ("slices that were tested", "count"),
    "n_patients": ("patients that the draws are made of", "count"),
    "n_undefined": ("units without any figure of the class; in `paper_metrics` slices without a Dice", "count"),
    "n_undefined_draws": ("draws of patients that the figure could not be computed of", "count"),
    "n_missing_reference": ("units whose reference alone lacks the class", "count"),
    "n_missing_prediction": ("units whose prediction alone lacks it", "count"),
    "n_missing_both": ("units in which nobody has it", "count"),
    "n_overlap": ("units with a Dice", "count"),
    "n_soft_dice": ("units with a soft Dice", "count"),
    "n_surface": ("units with surface distances; in `paper_metrics` volumes with the class on both sides", "count"),
    "n_nsd": ("units with an NSD", "count"),
    "n_volume": ("units with a volume error", "count"),
    "n_relative_volume": ("units with a relative volume error", "count"),
    "n_detection": ("units with a detection rate", "count"),
    "metric": ("the figure that the row is of", ""),
    "value": ("the figure itself", "its own"),
    "low": ("lower end: of the 95 % interval, or of the bin", "its own"),
    "high": ("upper end", "its own"),
    "count": ("pixels whose probability of the class lies in the bin", "pixels"),
    "confidence": ("their mean probability of the class", ""),
    "frequency": ("the share of them that the reference gives the class", ""),
    "asd_pixels": ("the paper's ASD, over a stack of shuffled slices: never to be set beside mm", "pixels"),
    "nsd": ("the paper's NSD at 1 pixel, over the same stack", ""),
    "n_volumes": ("volumes that surfaces were looked for in: one stack, or each slice", "count"),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A key of a YAML file: its dotted name, its value as it is written ("" for a section), and its comments."""

    name: str
    value: str
    meaning: str

    @property
    def is_section(self) -> bool:
        return not self.value


def entries(path: Path) -> Iterator[Entry]:
    """Every key of a YAML file, sections before what they hold. Mappings in braces count as values."""
    text = path.read_text()
    lines = text.splitlines()

    def visit(node: yaml.MappingNode, above: str) -> Iterator[Entry]:
        for key, value in node.value:
            name = f"{above}{key.value}"
            meaning = _comments(lines, key.start_mark.line, value)
            if isinstance(value, yaml.MappingNode) and not value.flow_style:
                yield Entry(name, "", meaning)
                yield from visit(value, f"{name}.")
            elif isinstance(value, yaml.SequenceNode) and not value.flow_style:
                yield Entry(name, f"{len(value.value)} rows", meaning)
            else:
                written = text[value.start_mark.index : value.end_mark.index]
                yield Entry(name, " ".join(written.removeprefix(">-").split()) or "null", meaning)

    if (root := yaml.compose(text)) is not None:
        yield from visit(root, "")


def _comments(lines: list[str], line: int, value: yaml.Node) -> str:
    """What is said of a key: the comment lines directly above it, then the comment behind it or its value."""
    first = line
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    parts = [text.lstrip().lstrip("#").strip() for text in lines[first:line]]
    # A text of several lines ends where the next key, or its comment, begins.
    inline = value.style not in (">", "|") if isinstance(value, yaml.ScalarNode) else value.flow_style
    last = value.end_mark.line
    behind = (lines[last][value.end_mark.column :] if last < len(lines) else "") if inline else lines[line]
    if found := re.search(r"\s#\s(.*)", " " + behind):
        parts.append(found[1])
    # Lines of dashes head the sections of the catalog.
    return " ".join(part for part in parts if "---" not in part)


def configuration(environment: str) -> dict[str, Any]:
    """Catalog, globals and parameters of an environment without conf/local, with paths as they are written."""
    from kedro.config import OmegaConfigLoader
    from omegaconf import OmegaConf

    resolvers = {
        "oc.env": lambda name, default=None: default,
        "data_root": lambda: "data",
        "project": str,
        "artifact_location": lambda: None,
    }

    def forget() -> None:
        for name in resolvers:
            OmegaConf.clear_resolver(name)

    forget()  # Kedro keeps the first of each name for the whole process, whether ours or a run's
    try:
        loader = OmegaConfigLoader(
            conf_source=str(ROOT / "conf"),
            env=environment,
            base_env="base",
            default_run_env="base",
            merge_strategy={"parameters": "soft", "globals": "soft"},
            custom_resolvers=resolvers,
        )
        return {name: loader[name] for name in ("catalog", "globals", "parameters")}
    finally:
        forget()


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines) + "\n"


def plain(text: str) -> str:
    """A comment as a cell: no part of it is markup, but for code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;").replace("|", "\\|") for p in parts)


def code(value: Any) -> str:
    return f"`{value}`" if value != "" else ""


def unit(name: str) -> str:
    ends = sorted((end for end in UNITS if name.endswith(end)), key=len)
    return UNITS[ends[-1]] if ends else ""


def parameters() -> str:
    """Every parameter of conf/base, file by file."""
    globals_ = configuration("base")["globals"]
    parts = []
    for path in sorted((ROOT / "conf/base").glob("parameters*.yml")):
        rows = []
        for entry in entries(path):
            value = re.sub(r"\$\{globals:(\w+)\}", lambda found: globals_[found[1]], entry.value)
            value = re.sub(r"^\$\{project:(.*)\}$", r"\1", value)
            short = re.search(r"\$\{runtime_params:(\w+),([^{}]*)\}", value)
            meaning = entry.meaning
            if short:
                value = short[2]
                if short[1] != entry.name:
                    meaning = f"{meaning.rstrip('.')}. Short on the command line: `{short[1]}=`."
            name = f"**`{entry.name}`**" if entry.is_section else code(entry.name)
            rows.append([name, code(value), unit(entry.name), plain(meaning)])
        parts.append(f"## `{path.name}`\n\n" + table(["parameter", "default", "unit", "meaning"], rows))
    return "\n".join(parts)


def flat(values: Any, above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if not isinstance(values, dict) or not values:
        return {above: values}
    return {
        name: value
        for key, inner in values.items()
        for name, value in flat(inner, f"{above}.{key}" if above else key).items()
    }


def environments() -> str:
    """What spider, best and paper change of base, globals included."""
    found = {}
    for environment in ENVIRONMENTS:
        loaded = configuration(environment)
        folders = {f"globals: {name}": value for name, value in loaded["globals"].items()}
        found[environment] = folders | flat(loaded["parameters"])
    base = found["base"]
    # Kedro reads files in no particular order: by section, and within one as it is written.
    names = dict.fromkeys(name for values in found.values() for name in values)
    names = sorted(names, key=lambda name: name.split(".")[0])
    # Paths of the parameters follow from the globals.
    changed = [
        name
        for name in names
        if name not in ("raw_dir", "registration.data.real.attribution")
        and any(values.get(name) != base.get(name) for values in found.values())
    ]
    rows = [
        [code(name), *(code(_yaml(found[environment].get(name))) for environment in ENVIRONMENTS)] for name in changed
    ]
    return table(["", *ENVIRONMENTS], rows)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def pipelines() -> dict[str, Any]:
    from lumbarflow.pipeline_registry import register_pipelines

    return {name: pipeline for name, pipeline in register_pipelines().items() if name != "__default__"}


def owners(found: dict[str, Any]) -> dict[str, str]:
    """Node -> the smallest pipeline that has it."""
    owner = {}
    for name, pipeline in sorted(found.items(), key=lambda item: -len(item[1].nodes)):
        owner |= {node.name: name for node in pipeline.nodes}
    return owner


def catalog() -> str:
    """Every entry, layer by layer."""
    found = pipelines()
    owner = owners(found)
    nodes = {node.name: node for pipeline in found.values() for node in pipeline.nodes}.values()
    said = {entry.name: entry.meaning for entry in entries(ROOT / "conf/base/catalog.yml")}
    layers: dict[str, list[list[str]]] = {}
    for name, entry in configuration("base")["catalog"].items():
        inner = entry.get("dataset", entry) if "mlflow" in entry["type"] else entry
        path = inner.get("filepath") or inner.get("path") or inner.get("model_uri", "")
        makers = sorted({f"`{owner[node.name]}`" for node in nodes if name in node.outputs})
        readers = sorted({f"`{owner[node.name]}`" for node in nodes if name in node.inputs})
        kind = code(inner["type"].removeprefix("lumbarflow.datasets.")) + (
            ", in MLflow too" if inner is not entry else ""
        )
        what = "<br>".join(filter(None, [kind, code(path), plain(said[name])]))
        row = [code(name), what, ", ".join(makers), ", ".join(readers)]
        layers.setdefault(entry["metadata"]["kedro-viz"]["layer"], []).append(row)
    header = ["entry", "type, path", "made by", "read by"]
    return "\n".join(f"## {layer.replace('_', ' ')}\n\n" + table(header, layers[layer]) for layer in LAYERS)


def pipeline_pages() -> str:
    """Every pipeline: what it is for, its command, what it starts from and ends in, its nodes in order."""
    import importlib

    found = pipelines()
    owner = owners(found)
    parts = []
    for name, pipeline in sorted(found.items()):
        own = [node for node in pipeline.nodes if owner[node.name] == name]
        before = list(dict.fromkeys(owner[node.name] for node in pipeline.nodes if owner[node.name] != name))
        if own:
            create = importlib.import_module(f"lumbarflow.pipelines.{name}.pipeline").create_pipeline
            purpose = inspect.getdoc(create)
        else:
            purpose = "The main job, from raw volumes to a registered model; what `kedro run` alone does."
        free = sorted(item for item in pipeline.inputs() if not item.startswith("param"))
        text = f"## {name}\n\n{purpose}\n\n`.venv/bin/kedro run --pipeline={name}`\n\n"
        if before:
            text += f"Runs {', '.join(f'[{step}](#{step})' for step in before)}{' before it' if own else ''}.\n\n"
        text += f"- starts from: {', '.join(map(code, free)) or 'nothing but parameters'}\n"
        text += f"- leaves: {', '.join(map(code, sorted(pipeline.outputs()))) or 'nothing'}\n\n"
        rows = [
            [
                code(node.name.removeprefix(f"{name}.")),
                ", ".join(map(code, node.inputs)),
                ", ".join(map(code, node.outputs)),
            ]
            for node in own
        ]
        parts.append(text + (table(["node", "from", "to"], rows) if rows else ""))
    return "\n".join(parts)


def tables_of_figures() -> dict[str, list[str]]:
    """Catalog entry -> columns of its table, of a scoring of two tiny cases."""
    from lumbarflow import evaluation, paper_protocol, uncertainty

    settings = configuration("base")["parameters"]
    reference = np.repeat(np.arange(4, dtype=np.uint8), 4).reshape(2, 2, 4)
    case = evaluation.Case("1_t2", "1", reference, reference, (4.0, 1.0, 1.0), np.arange(2))
    scored = evaluation.evaluate_cases({case.series: lambda: case}, settings["evaluation"])
    paper = paper_protocol.paper_scores([(reference, np.eye(4)[reference])], settings["paper_protocol"])
    found = {
        "metrics_by_slice": scored.by_slice,
        "metrics_by_case": scored.by_case,
        "metrics_by_class": scored.by_class,
        "metrics_intervals": scored.intervals,
        "reliability": uncertainty.reliability_table(scored.reliability),
        "paper_metrics": paper,
    }
    columns = {name: list(frame.columns) for name, frame in found.items()}
    there, described = {name for names in columns.values() for name in names}, {*FIGURES, *COLUMNS}
    if there != described:
        raise ValueError(
            f"docs/reference.py describes {sorted(described - there)}, which no table has, and not "
            f"{sorted(there - described)}; expected one line for each column in FIGURES or COLUMNS"
        )
    return columns


def figures() -> str:
    """The figures with unit, range and what stands where a structure is missing, from metrics.CONVENTION."""
    from lumbarflow.metrics import CONVENTION

    def value(number: float | None) -> str:
        return "by its formula" if number is None else "undefined" if np.isnan(number) else f"{number:g}"

    tables_of_figures()
    rows = []
    for name, (meaning, unit_, span) in FIGURES.items():
        convention = CONVENTION["nsd" if name.startswith("nsd_") else name]
        rows.append([code(name), meaning, unit_, span, *map(value, convention)])
    return table(["figure", "meaning", "unit", "range", "missing in reference", "in prediction", "in both"], rows)


def columns() -> str:
    """Which columns each table has, and what those that are no figures mean."""
    found = tables_of_figures()
    has = [[code(name), ", ".join(map(code, names))] for name, names in found.items()]
    described = [[code(name), meaning, unit_] for name, (meaning, unit_) in COLUMNS.items()]
    return table(["table", "columns"], has) + "\n" + table(["column", "meaning", "unit"], described)


def classes() -> str:
    """The classes with their colours and the ids that become them."""
    from lumbarflow.labels import CLASSES, PALETTE

    ids = configuration("base")["parameters"]["labels"]["table"]
    rows = []
    for number, name in enumerate(CLASSES):
        colour = PALETTE[name]
        swatch = f'<span class="swatch" style="background: {colour}"></span> `{colour}`'
        rows.append([str(number), name, swatch, ", ".join(str(i) for i in ids.get(name, [0]))])
    return table(["class", "name", "colour", "ids that become it"], rows)


def palette() -> str:
    """Every colour of labels.py that is no class's."""
    from lumbarflow import labels

    source = ast.parse(inspect.getsource(labels))
    names = [node.targets[0].id for node in source.body if isinstance(node, ast.Assign)]
    rows = []
    for name in names:
        value = getattr(labels, name)
        if isinstance(value, str) and re.fullmatch("#[0-9A-Fa-f]{6}", value):
            rows.append([code(name), f'<span class="swatch" style="background: {value}"></span> `{value}`'])
    return table(["name in labels.py", "colour"], rows) if rows else ""


TABLES = {
    "parameters": parameters,
    "environments": environments,
    "catalog": catalog,
    "pipelines": pipeline_pages,
    "figures": figures,
    "columns": columns,
    "classes": classes,
    "palette": palette,
}
_PART = re.compile(r"(<!-- from the code: (\w+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)


def renewed(page: str) -> str:
    """The text of a page with what the code says now."""
    return _PART.sub(lambda part: f"{part[1]}\n{TABLES[part[2]]()}\n{part[4]}", page)


def main() -> None:
    for path in sorted(PAGES.glob("*.md")):
        page = path.read_text()
        if (new := renewed(page)) != page:
            path.write_text(new)
            print(f"renewed {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
