"""The README's pictures: the pipeline as it is registered, what the net makes of synthetic scans, and the viewer.

    python docs/pictures.py                 # after `kedro run --pipeline=train` in the current folder
    python docs/pictures.py --project DIR   # or in another
    python docs/pictures.py --only pipeline # needs no run: for whenever steps or what they read and write have changed

The viewer's page needs Chromium on the PATH and playwright, of the extra `dev`. The pictures go to docs/pictures, and
the same results give the same files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

from kedro.pipeline import Pipeline

if TYPE_CHECKING:
    import pandas as pd
    from kedro.config import OmegaConfigLoader
    from kedro.io import DataCatalog
    from matplotlib.figure import Figure

    from lumbarflow.model_input import ModelInput
    from lumbarflow.store import SeriesStore

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/pictures"
Span = tuple[float, float]
WHOLE = "train"
# Kedro's, as far as the catalog has them.
LAYERS = ("raw", "intermediate", "primary", "model_input", "models", "model_output", "reporting")


@dataclass(frozen=True)
class Flow:
    """Data that one step writes and the same others read.

    Attributes:
        writer: a step; "" if the data come from outside.
        layer: one of LAYERS.
        names: of the datasets.
        readers: steps, in their order; at last all pipelines outside that read results as one name, "report, viewer",
            where some of them read these.
    """

    writer: str
    layer: str
    names: tuple[str, ...]
    readers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.writer} > {self.layer}: {', '.join(self.names)} > {', '.join(self.readers) or 'nobody'}"


def steps_of(pipelines: Mapping[str, Pipeline], whole: str = WHOLE) -> dict[str, Pipeline]:
    """The registered pipelines that `whole` is made of, in the order in which they need one another.

    Raises:
        ValueError: some of its nodes are in none of them.
    """
    nodes = set(pipelines[whole].nodes)
    parts = {name: set(pipeline.nodes) for name, pipeline in pipelines.items() if set(pipeline.nodes) < nodes}
    # ingest is a step; a pipeline of ingest and preprocess would not be one.
    steps = {name for name, own in parts.items() if own and not any(other < own for other in parts.values() if other)}
    if lacking := nodes.difference(*(parts[name] for name in steps)):
        raise ValueError(
            f"nodes of {whole!r} that are in no other registered pipeline: {sorted(node.name for node in lacking)}; "
            "expected a pipeline for each of its steps. Register the one that they belong to."
        )
    written = {name: _names(pipelines[name].all_outputs()) for name in steps}
    read = {name: _names(pipelines[name].all_inputs()) for name in steps}
    # In the order of registration, where they do not need one another.
    order = [name for name in pipelines if name in steps]
    needs = {name: [other for other in order if other != name and written[other] & read[name]] for name in order}
    return {name: pipelines[name] for name in TopologicalSorter(needs).static_order()}


def flows_of(pipelines: Mapping[str, Pipeline], layers: Mapping[str, str], whole: str = WHOLE) -> list[Flow]:
    """What goes through `whole`, sorted by writer and by layer.

    Left out are parameters, and data that only one step touches: its own files, and copies for people. Shown are what
    pipelines outside read, such as the report, and all that a step writes of which nothing else would be shown.

    Args:
        pipelines: all that are registered.
        layers: dataset -> one of LAYERS.
        whole: which to draw.
    """
    steps = steps_of(pipelines, whole)
    nodes = set(pipelines[whole].nodes)
    written = {name: _names(pipeline.all_outputs()) for name, pipeline in steps.items()}
    everything = set().union(*written.values())
    read = {name: _names(pipeline.all_inputs()) for name, pipeline in steps.items()}
    # A comparison that starts with the same steps is no reader of what comes out of them.
    outside = {name: _names(own.inputs()) for name, own in pipelines.items() if not nodes & set(own.nodes)}
    outside = {name: datasets for name, datasets in outside.items() if datasets & everything}
    read[", ".join(outside)] = set().union(*outside.values())
    layer_of = {_name(dataset): layer for dataset, layer in layers.items()}

    grouped = defaultdict(list)
    for dataset in sorted(everything.union(*(read[name] for name in steps))):
        writer = next((name for name in steps if dataset in written[name]), "")
        readers = tuple(name for name in read if dataset in read[name] and name != writer)
        if len(readers) + (writer != "") > 1:
            grouped[writer, layer_of[dataset], readers].append(dataset)
    for step in steps:
        if not any(writer == step for writer, *_ in grouped):
            for dataset in sorted(written[step]):
                grouped[step, layer_of[dataset], ()].append(dataset)

    places = {name: place for place, name in enumerate(["", *steps])}
    flows = [Flow(writer, layer, tuple(names), readers) for (writer, layer, readers), names in grouped.items()]
    # What goes on to steps comes before what is only looked at.
    return sorted(
        flows,
        key=lambda flow: (
            places[flow.writer], LAYERS.index(flow.layer), not set(flow.readers) & set(steps), flow.names
        ),
    )  # fmt: skip


def _name(dataset: str) -> str:
    """Without Kedro's @: several views of the same files are one."""
    return dataset.partition("@")[0]


def _names(datasets: set[str]) -> set[str]:
    return {_name(dataset) for dataset in datasets if not dataset.startswith("param")}


def describe(flows: Sequence[Flow]) -> str:
    """A line for each; the picture carries it, so that a test sees whether it is up to date."""
    return "\n".join(map(str, flows))


# Sizes in points.
PITCH, BOX, LINE, GAP = 123, (98, 28), 14, 8
INK, GREY, BAND, PAPER = "#24292f", "#57606a", "#e9ecf0", "#ffffff"


def pipeline_figure(flows: Sequence[Flow]) -> Figure:
    """Steps go down from left to right. Data stand right of and below the step that writes them; a line leads from them
    to the right, with a dot where it joins the line down into a step that reads them. A step that writes nothing, as
    the pipelines outside, has a dashed box."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    writers = dict.fromkeys(flow.writer for flow in flows if flow.writer)
    names = list(writers | dict.fromkeys(name for flow in flows for name in flow.readers))
    columns = {name: GAP + BOX[0] / 2 + place * PITCH for place, name in enumerate(names)}
    rows, boxes, bottom = _places(flows, names)
    width = max(columns.values()) + BOX[0] / 2 + GAP

    figure = Figure(figsize=(width / 72, bottom / 72), facecolor=PAPER)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(bottom, 0))
    axis.set_axis_off()

    def rectangle(left: float, top: float, right: float, low: float, zorder: float, **style) -> None:
        shape = "round,pad=0,rounding_size=5"
        axis.add_patch(
            FancyBboxPatch((left, top), right - left, low - top, boxstyle=shape, zorder=zorder, clip_on=False, **style)
        )

    def line(x: Sequence[float], y: Sequence[float]) -> None:
        axis.plot(x, y, color=GREY, linewidth=1, solid_capstyle="round", zorder=1, clip_on=False)

    bands = defaultdict(list)
    for flow, place in zip(flows, rows, strict=True):
        bands[flow.writer, flow.layer] += place
    for (_, layer), ends in bands.items():
        top, low = min(ends) - GAP / 2 + 1, max(ends) + GAP / 2 - 1
        rectangle(GAP, top, width - GAP, low, 0, facecolor=BAND, edgecolor="none")
        axis.text(2 * GAP, (top + low) / 2, layer.replace("_", "\n"), color=GREY, fontsize=9.5, va="center", zorder=3)

    for flow, (top, low) in zip(flows, rows, strict=True):
        y, start = (top + low) / 2, columns.get(flow.writer, GAP + BOX[0] / 2)
        ends = [columns[name] for name in flow.readers]
        line([start, max([start + GAP, *ends])], [y, y])
        axis.plot(ends, [y] * len(ends), color=GREY, marker="o", markersize=4.5, linestyle="", zorder=3)
        rectangle(start + 6, top, start + PITCH - 5, low, 2, facecolor=PAPER, edgecolor=GREY, linewidth=0.8)
        axis.text(
            start + PITCH / 2, y, "\n".join(flow.names), color=INK, fontsize=10.3, linespacing=1.15, ha="center",
            va="center", zorder=3,
        )  # fmt: skip
        if flow.writer:
            line([start, start], [boxes[flow.writer][1], y])
    for name, x in columns.items():
        (top, low), filled = boxes[name], name in writers
        rectangle(
            x - BOX[0] / 2, top, x + BOX[0] / 2, low, 4, edgecolor=INK, linewidth=1.2,
            facecolor=INK if filled else PAPER, linestyle="-" if filled else "--",
        )  # fmt: skip
        axis.text(
            x, (top + low) / 2, name.replace(", ", "\n"), color=PAPER if filled else INK, fontsize=11.5, weight="bold",
            linespacing=1.15, ha="center", va="center", zorder=5,
        )  # fmt: skip
        reached = [sum(place) / 2 for flow, place in zip(flows, rows, strict=True) if name in flow.readers]
        if reached:
            line([x, x], [min(reached), top])
            axis.plot([x], [top - 3], color=GREY, marker="v", markersize=5.5, zorder=3)
    caption = f"kedro run --pipeline={WHOLE}: its steps, and the data between them by layer"
    if set(columns) - writers.keys():
        caption += "; dashed: reads the results"
    axis.text(2 * GAP, bottom - GAP - BOX[1] / 2, caption, color=GREY, fontsize=9.5, va="center", zorder=3)
    return figure


def _places(flows: Sequence[Flow], names: Sequence[str]) -> tuple[list[Span], dict[str, Span], float]:
    """Top and bottom of every flow and of every box, and the bottom of the picture: a step is above what it writes."""
    rows, boxes, y = [], {}, float(GAP)
    for name in ("", *names):
        if name:
            top = y + (GAP if rows else 0)
            boxes[name] = (top, top + BOX[1] + LINE * name.count(", "))
            y = boxes[name][1] + 1.5 * GAP
        for flow in flows:
            if flow.writer == name:
                rows.append((y, y + LINE * len(flow.names) + 5))
                y = rows[-1][1] + GAP
    return rows, boxes, y - GAP / 2


RESULTS = ("predictions", "ingested_series", "metrics_by_case", "model_input")


def synthetic_results(catalog: DataCatalog) -> tuple[SeriesStore, SeriesStore, pd.DataFrame, ModelInput]:
    """What `RESULTS` names in the catalog of a project in which `train` has run, on synthetic scans.

    Raises:
        ValueError: results are missing, or the scans are not all synthetic.
    """
    if missing := [name for name in RESULTS if not catalog.exists(name)]:
        raise ValueError(
            f"{Path.cwd()} has no {', '.join(missing)}; expected what the pipeline {WHOLE} leaves there. Run "
            f"`kedro run --pipeline={WHOLE}`, or name a project in which it has run with --project."
        )
    *results, model_input = map(catalog.load, RESULTS)
    if (kind := model_input.manifest["data_kind"]) != "synthetic":
        raise ValueError(
            f"the scans of this project are {kind}; expected synthetic ones, since the pictures are published. "
            "Name another project with --project."
        )
    return *results, model_input


def segmentation_figure(catalog: DataCatalog) -> Figure:
    """Of each MRI sequence the median test case, with reference, prediction and where they differ.

    Args and errors: see `synthetic_results`.
    """
    import matplotlib.style

    from lumbarflow.figures import overlay_figure
    from lumbarflow.pipelines.evaluate.nodes import choose_overlays

    predictions, series, by_case, model_input = synthetic_results(catalog)
    sequences = {name: model_input.manifest["series"][name]["sequence"] for name in by_case["series"].unique()}
    overlays = []
    for sequence in sorted(set(sequences.values())):
        own = by_case[by_case["series"].map(sequences) == sequence]
        (_, median, _), table = choose_overlays(predictions, series, own, model_input)
        chosen = table.set_index("case").loc["median"]
        count = len(series.record(chosen["series"])["class_counts"])
        title = f"{sequence.replace('_', ' ').upper()}: sagittal slice {chosen['slice'] + 1} of {count}"
        overlays.append(replace(median, title=f"{title}, mean Dice of the scan {chosen['dice']:.3f}"))
    # Dark around dark scans, and small, so that letters can be read at a README's width.
    with matplotlib.style.context("dark_background"):
        figure = overlay_figure(overlays)
    figure.set_size_inches(9.6, 2.75 * len(overlays))
    return figure


def load_configuration(project: Path) -> OmegaConfigLoader:
    from kedro.config import OmegaConfigLoader

    from lumbarflow.settings import CONFIG_LOADER_ARGS

    return OmegaConfigLoader(conf_source=str(project / "conf"), **CONFIG_LOADER_ARGS)


def load_catalog(project: Path) -> DataCatalog:
    """Its paths are relative to the project, in which it has to be made and used."""
    from kedro.io import DataCatalog

    return DataCatalog.from_config(load_configuration(project)["catalog"])


def draw_pipeline(folder: Path) -> Path:
    """Write pipeline.svg, with `describe` of what it shows in it."""
    import matplotlib

    from lumbarflow.pipeline_registry import register_pipelines

    catalog = load_configuration(ROOT)["catalog"]
    layers = {name: entry["metadata"]["kedro-viz"]["layer"] for name, entry in catalog.items()}
    flows = flows_of(register_pipelines(), layers)
    path = folder / "pipeline.svg"
    # Letters as paths: the picture looks the same wherever it is shown. Without salt, the ids differ at every drawing.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "lumbarflow"}):
        metadata = {"Title": f"kedro run --pipeline={WHOLE}", "Description": describe(flows), "Date": None}
        pipeline_figure(flows).savefig(path, metadata=metadata | {"Creator": None})
    return path


def draw_segmentation(folder: Path, project: Path) -> Path:
    """Write segmentation.png, from the results of a project."""
    from lumbarflow.figures import png

    with contextlib.chdir(project):
        figure = segmentation_figure(load_catalog(project))
    return _save_small(png(figure, dpi=100), folder / "segmentation.png")


def draw_viewer(folder: Path, project: Path) -> Path:
    """Write viewer.png, the viewer's page of the median case as Chromium shows it.

    Raises:
        FileNotFoundError: there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    from lumbarflow.pipelines.evaluate.nodes import choose_overlays
    from lumbarflow.pipelines.viewer.nodes import write_pages

    program = shutil.which("chromium")
    if program is None:
        raise FileNotFoundError(
            "no chromium on the PATH; expected one, to show the viewer's page. Install it (apt-get install chromium), "
            "or draw the other pictures with --only."
        )
    with contextlib.chdir(project):
        catalog = load_catalog(project)
        results = synthetic_results(catalog)
        _, cases = choose_overlays(*results)
        settings = {"case": cases.set_index("case").loc["median", "series"]}
        trained = (catalog.load("training_record"), catalog.load("evaluation_summary"))
        (make_page,) = write_pages(*results, *trained, settings).values()
        text = make_page()
    arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        page.set_content(text)
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        page.wait_for_timeout(500)  # until the canvas is drawn
        picture = page.screenshot()
        browser.close()
    return _save_small(picture, folder / "viewer.png")


def _save_small(picture: bytes, path: Path) -> Path:
    """A PNG in so few colours that no eye sees it, less than half as large: noise does not compress."""
    from PIL import Image

    small = Image.open(io.BytesIO(picture)).convert("RGB")
    small.quantize(160, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", type=Path, default=Path.cwd(), help="a project in which `train` has run")
    parser.add_argument("--only", choices=["pipeline", "segmentation", "viewer"], help="one of the pictures")
    parser.add_argument("--output", type=Path, default=FOLDER)
    chosen = parser.parse_args(arguments)
    folder, project = chosen.output.resolve(), chosen.project.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if chosen.only in (None, "pipeline"):
        print(draw_pipeline(folder))
    if chosen.only in (None, "segmentation"):
        print(draw_segmentation(folder, project))
    if chosen.only in (None, "viewer"):
        print(draw_viewer(folder, project))


if __name__ == "__main__":
    main()
