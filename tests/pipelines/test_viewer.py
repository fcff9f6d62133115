"""Pages of single cases, from what an evaluation has left; and the report's links to them."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest

from lumbarflow import viewer
from lumbarflow.files import write_json
from lumbarflow.imaging import LabelMap, Orientation, Volume, to_sagittal
from lumbarflow.pipelines.report.nodes import _pages
from lumbarflow.store import SeriesStore, Work

NAMES = ("3_t1", "3_t2", "5_t1", "5_t2")


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """Another library than NiiVue, since packing that takes seconds."""
    monkeypatch.setattr(viewer, "niivue", lambda: viewer.Niivue("bGli", "ipyniivue 0", "Copyright"))


@pytest.fixture
def evaluated(project):
    """What ingest, fit and evaluate leave of four cases; each is found worse than the one before it."""
    # As a scanner stores it: the file's axes are neither in the order of the sagittal ones nor in their direction.
    stored = np.zeros((8, 20, 6), np.uint8)
    stored[1:5, 4:16, 1:5], stored[5:7, 4:16, 1:5] = 1, 2
    grid = {"spacing_mm": (4.0, 1.1, 0.9), "origin_mm": (3.0, -8.0, 5.0), "direction": np.eye(3)}
    reference, orientation = to_sagittal(LabelMap(stored, **grid))
    assert orientation != Orientation((0, 1, 2), (False, False, False))
    geometry = {name: np.asarray(value).tolist() for name, value in grid.items()}
    series, predictions = {}, {}
    for missed, name in enumerate(NAMES):
        found = stored.copy()
        found[:, : 4 + missed] = 0
        image = Volume(reference.array * np.int16(9), reference.spacing_mm, reference.origin_mm, reference.direction)
        record = {"patient": name[0], "orientation": orientation.to_dict(), "geometry": geometry}
        series[name] = {"record.json": record, "labels.mha": reference, "image.mha": image}
        predictions[name] = {"record.json": {"model": "w1"}, "labels.mha": LabelMap(found, **grid)}
    folder = project / "data"
    for path, entries in (("02_intermediate/series", series), ("07_model_output/predictions", predictions)):
        work = {name: Work("key", lambda files=files: files) for name, files in entries.items()}
        SeriesStore(folder / path).update(work)
    manifest = {
        "format_version": 1,
        "size": [8, 8],
        "data_kind": "synthetic",
        "series": {name: {"patient": name[0]} for name in NAMES},
        "sides": {"train": {}, "validation": {}, "test": {name: list(range(6)) for name in NAMES}},
        "content_hash": "c",
    }
    write_json(folder / "05_model_input/manifest.json", manifest)
    write_json(folder / "06_models/training_record.json", {"weights": "w1", "content_hash": "c"})
    write_json(folder / "08_reporting/evaluation_summary.json", {"weights": "w1", "content_hash": "c"})
    rows = [
        {"series": name, "patient": name[0], "class": of, "dice": 0.9 - 0.1 * missed, "whole": True}
        for missed, name in enumerate(NAMES)
        for of in ("background", "vertebrae", "canal", "IVD")
    ]
    pd.DataFrame(rows).to_parquet(folder / "08_reporting/metrics_by_case.parquet")
    return folder


def test_pages_of_the_cases_that_the_report_shows_are_written(kedro_run, evaluated, caplog):
    with caplog.at_level(logging.INFO):
        catalog = kedro_run("viewer")
    pages = catalog.load("viewer_pages")
    # Best, median and worst.
    assert sorted(pages) == ["3_t1.html", "5_t1.html", "5_t2.html"]
    assert "3 of 4 cases: 3_t1, 5_t1, 5_t2" in caplog.text
    page = pages["5_t1.html"]()
    assert page == (evaluated / "08_reporting/viewer/5_t1.html").read_text(encoding="utf-8")
    assert "<h1>5_t1</h1>" in page and page.count(">0.700</td>") == 3 and viewer.model_of(page) == "w1"


def test_one_case_or_all_of_them(kedro_run, evaluated):
    assert list(kedro_run("viewer", case="3_t2").load("viewer_pages")) == ["3_t2.html"]
    # Earlier pages stay, and are linked while they are of the model at hand.
    pages = kedro_run("viewer", case="all").load("viewer_pages")
    assert sorted(pages) == [f"{name}.html" for name in NAMES]

    def not_read():
        raise UnicodeDecodeError("utf-8", b"\x89", 0, 1, "a picture")

    older = {"2_t1.html": lambda: pages["3_t1.html"]().replace('content="w1"', 'content="w0"'), "5_t2.png": not_read}
    assert _pages(pages | older, "w1") == list(NAMES)


def test_an_unknown_case_is_told_with_those_there_are(kedro_run, evaluated):
    with pytest.raises(ValueError, match="no test case '9_t9'; expected 'shown', 'all' or one of 3_t1, 3_t2, 5_t1, 5"):
        kedro_run("viewer", case="9_t9")


def test_figures_of_another_model_have_no_pages(kedro_run, evaluated):
    write_json(evaluated / "06_models/training_record.json", {"weights": "w2", "content_hash": "c"})
    with pytest.raises(ValueError, match="evaluation_summary: its figures are of another model"):
        kedro_run("viewer")
    assert not (evaluated / "08_reporting/viewer").exists()
