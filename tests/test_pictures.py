"""The pictures of the README: drawn from the registered pipelines and a run's results, and up to date."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline, node
from matplotlib.text import Text

from lumbarflow.imaging import LabelMap, Orientation, Volume
from lumbarflow.model_input import ModelInput
from lumbarflow.pipeline_registry import register_pipelines
from lumbarflow.store import SeriesStore, Work

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/pictures.py")
pictures = importlib.util.module_from_spec(_spec)
sys.modules["pictures"] = pictures  # dataclasses look their module up
_spec.loader.exec_module(pictures)


def step(*nodes: tuple[list[str], list[str]]) -> Pipeline:
    """A pipeline of nodes that read and write the datasets named."""

    def nothing(*_):
        raise AssertionError("nothing is run")

    return Pipeline(
        [node(nothing, inputs, outputs, name=f"to_{outputs[0].partition('@')[0]}") for inputs, outputs in nodes]
    )


@pytest.fixture
def pipelines() -> dict[str, Pipeline]:
    """Load, fit and score make up `train`; registered in another order than they run."""
    load = step((["params:load", "files", "shared"], ["scans@written"]))
    fit = step((["scans@read", "params:fit"], ["net", "log", "log_csv"]))
    score = step((["net", "scans@read", "shared", "own"], ["cases", "figure"]), (["cases"], ["table"]))
    train = load + fit + score
    comparison = load + step((["log", "table"], ["compared"]))
    report = step((["log", "cases", "cases_of_others"], ["page"]))
    others = {"comparison": comparison, "report": report, "others": step((["elsewhere"], ["there"]))}
    return {"score": score, "fit": fit, "load": load, "fit_and_score": fit + score, "train": train, **others}


LAYERS = {
    "shared": "raw", "files": "raw", "scans@written": "raw", "scans@read": "raw", "net": "models", "log": "models",
    "log_csv": "reporting", "cases": "model_output", "figure": "reporting", "table": "reporting", "own": "raw",
}  # fmt: skip


def test_steps_are_the_smallest_registered_parts_in_the_order_they_run(pipelines):
    assert list(pictures.steps_of(pipelines)) == ["load", "fit", "score"]


def test_a_node_that_is_in_no_step_stops_the_drawing(pipelines):
    del pipelines["fit"], pipelines["fit_and_score"]
    with pytest.raises(ValueError, match=r"nodes of 'train' that are in no other registered pipeline: \['to_net'\]"):
        pictures.steps_of(pipelines)


def test_what_several_steps_or_a_pipeline_outside_touch_is_drawn(pipelines):
    # Not drawn: parameters, the steps' own files (files, log_csv, own, figure), what passes between the nodes of one
    # step and the comparison, which shares a step, reads (table).
    assert pictures.describe(pictures.flows_of(pipelines, LAYERS)).splitlines() == [
        " > raw: shared > load, score",
        "load > raw: scans > fit, score",
        "fit > models: net > score",
        "fit > models: log > report",
        "score > model_output: cases > report",
    ]


def test_pipelines_outside_are_one_reader(pipelines):
    pipelines["viewer"] = step((["scans@read"], ["viewed"]))
    flows = pictures.flows_of(pipelines, LAYERS)
    assert [flow.names for flow in flows if "report, viewer" in flow.readers] == [("scans",), ("log",), ("cases",)]


def test_data_with_the_same_ends_share_a_line_and_the_last_step_shows_all_it_writes(pipelines):
    del pipelines["report"]
    pipelines["score"] = step((["net", "log"], ["table", "figure"]))
    pipelines["train"] = pipelines["load"] + pipelines["fit"] + pipelines["score"]
    del pipelines["fit_and_score"]
    assert pictures.describe(pictures.flows_of(pipelines, LAYERS)).splitlines() == [
        "load > raw: scans > fit",
        "fit > models: log, net > score",
        "score > reporting: figure, table > nobody",
    ]


def test_the_picture_has_a_box_for_each_step_below_what_it_reads_and_above_what_it_writes(pipelines):
    figure = pictures.pipeline_figure(pictures.flows_of(pipelines, LAYERS))
    (axis,) = figure.axes
    y = {text.get_text(): text.get_position()[1] for text in axis.texts}
    order = ["shared", "load", "scans", "fit", "net", "log", "score", "cases", "report"]
    assert sorted(order, key=y.get) == order
    # A line joins the one down into a box by a dot: shared does so at load and score.
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in dots] == [2, 2, 1, 1, 1]


@pytest.fixture(scope="module")
def registered() -> list[pictures.Flow]:
    catalog = pictures.load_configuration(ROOT)["catalog"]
    layers = {name: entry["metadata"]["kedro-viz"]["layer"] for name, entry in catalog.items()}
    return pictures.flows_of(register_pipelines(), layers)


def test_the_picture_shows_all_steps_of_the_main_job(registered):
    steps = ["synthesize", "ingest", "preprocess", "fit", "evaluate", "register"]
    assert list(dict.fromkeys(flow.writer for flow in registered)) == steps
    ends = {name: (flow.writer, flow.readers) for flow in registered for name in flow.names}
    assert ends["model"] == ("fit", ("evaluate", "register"))
    assert ends["registration"] == ("register", ())
    assert not {"metrics_by_case_csv", "training_folder", "raw_masks", "params:ingest"} & ends.keys()


def test_every_text_of_the_picture_has_room(registered):
    figure = pictures.pipeline_figure(registered)
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    room = {name: pictures.PITCH - 13 for flow in registered for name in ["\n".join(flow.names)]}
    widths = {text.get_text(): text.get_window_extent().width / scale for text in figure.findobj(Text)}
    assert room.keys() <= widths.keys()
    assert {text: width for text, width in widths.items() if width > room.get(text, np.inf)} == {}
    steps = [name for name in register_pipelines() if name in widths]
    assert max(widths[name] for name in steps) < pictures.BOX[0] - 6


def test_the_committed_picture_of_the_pipeline_is_up_to_date(registered):
    path = pictures.FOLDER / "pipeline.svg"
    description = ElementTree.parse(path).find(".//{http://purl.org/dc/elements/1.1/}description").text
    assert description == pictures.describe(registered), "run `python docs/pictures.py --only pipeline`"


def test_committed_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in pictures.FOLDER.iterdir()}
    assert "pipeline.svg" in sizes
    assert {name: size for name, size in sizes.items() if size >= 300_000} == {}


def test_a_drawing_of_the_same_pipelines_has_the_same_bytes(tmp_path):
    first, second = (tmp_path / name for name in ("first", "second"))
    for folder in (first, second):
        pictures.main(["--only", "pipeline", "--output", str(folder)])
    drawn = (first / "pipeline.svg").read_bytes()
    assert drawn == (second / "pipeline.svg").read_bytes()
    assert b"matplotlib.org" not in drawn and b"<dc:date>" not in drawn


@pytest.fixture
def results(tmp_path) -> DataCatalog:
    """Three T1 series and one of T2 SPACE, three slices each, as bright as the patient's number says."""
    reference = np.zeros((3, 6, 8), np.uint8)
    reference[1:, 0:4, 0:4], reference[1:, 0:4, 5:7], reference[1:, 5:, 0:4] = 1, 2, 3
    reference[1, 4] = 1  # the slice with the most of it
    geometry = {"spacing_mm": (0.8, 0.5, 4.0), "origin_mm": (0, 0, 0), "direction": np.eye(3)}
    orientation = Orientation((0, 1, 2), (False, False, False)).to_dict()
    series, predictions = (SeriesStore(tmp_path / name) for name in ("series", "predictions"))
    sequences = {"1_t1": "t1", "1_t2_SPACE": "t2_SPACE", "2_t1": "t1", "3_t1": "t1"}
    dice = {"1_t1": 0.9, "1_t2_SPACE": 0.7, "2_t1": 0.6, "3_t1": 0.8}
    known, found = {}, {}
    for name in sequences:
        record = {"patient": name[0], "orientation": orientation, "class_counts": [[1, 1, 1, 1]] * 3}
        image = Volume(reference * float(name[0]), **geometry)
        volumes = {"labels.mha": LabelMap(reference, **geometry), "image.mha": image}
        known[name] = Work("k", lambda contents={"record.json": record} | volumes: contents)
        found[name] = Work("k", lambda: {"record.json": {}, "labels.mha": LabelMap(reference, **geometry)})
    series.update(known)
    predictions.update(found)
    manifest = {
        "size": [6, 8],
        "data_kind": "synthetic",
        "series": {name: {"sequence": sequence} for name, sequence in sequences.items()},
        "sides": {"test": {name: [0, 1, 2] for name in sequences}},
    }
    by_case = pd.DataFrame({"series": list(dice), "class": "canal", "dice": dice.values()})
    names = {"model_input": ModelInput(tmp_path, manifest), "metrics_by_case": by_case}
    names |= {"predictions": predictions, "ingested_series": series}
    return DataCatalog({name: MemoryDataset(value, copy_mode="assign") for name, value in names.items()})


def test_the_segmentation_shows_the_median_case_of_each_sequence(results):
    figure = pictures.segmentation_figure(results)
    titles = [axis.get_title(loc="left") for axis in figure.axes[::4]]
    assert titles == [
        "T1: sagittal slice 2 of 3, mean Dice of the scan 0.800\nimage",
        "T2 SPACE: sagittal slice 2 of 3, mean Dice of the scan 0.700\nimage",
    ]
    # Class 3 of patients 3 and 1.
    assert [axis.images[0].get_array().max() for axis in figure.axes[::4]] == [9, 3]


def test_pictures_of_real_scans_are_refused(results):
    results.load("model_input").manifest["data_kind"] = "mixed"
    with pytest.raises(ValueError, match="the scans of this project are mixed; expected synthetic ones"):
        pictures.segmentation_figure(results)


def test_what_a_run_has_not_left_is_named_with_the_command(results):
    lacking = DataCatalog({name: results.get(name) for name in ("model_input", "ingested_series", "predictions")})
    with pytest.raises(ValueError, match="has no metrics_by_case; .* Run `kedro run --pipeline=train`"):
        pictures.segmentation_figure(lacking)


def test_the_viewers_picture_asks_for_a_browser(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no chromium on the PATH; .*apt-get install chromium"):
        pictures.draw_viewer(tmp_path, ROOT)


def test_the_segmentation_is_a_picture_of_few_colours_without_the_version_that_drew_it(results, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "load_catalog", lambda _: results)
    path = pictures.draw_segmentation(tmp_path, ROOT)
    file = path.read_bytes()
    width, height, depth, colour = struct.unpack(">IIBB", file[16:26])
    assert (width, height, depth, colour) == (960, 550, 8, 3)  # 3: a palette
    assert b"Software" not in file
    assert pictures.draw_segmentation(tmp_path, ROOT).read_bytes() == file
