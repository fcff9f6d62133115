"""The words that close a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from lumbarflow import summary
from lumbarflow.scans import FoundScans
from lumbarflow.store import Update
from lumbarflow.summary import LEFT_OUT, READ, RESULTS, next_step, options, shown, written


def report(*outcomes: str, found: str = "") -> pd.DataFrame:
    return pd.DataFrame({"outcome": outcomes, "found": found})


def test_what_came_out():
    figures = {"mean_foreground_dice": 0.92345, "dice_background": 0.99, "dice_canal": 0.9, "dice_IVD": 0.8}
    evaluated = RESULTS["evaluation_summary"](figures | {"test_slices": 72, "test_patients": 2})
    assert evaluated == (
        "mean foreground Dice 0.9234 on 72 slices of 2 test patients (canal 0.9000, IVD 0.8000)"
    )  # fmt: skip
    version = {"name": "lumbar-unet", "version": "4", "alias": "champion", "promoted": False}
    assert RESULTS["registration"](version) == "registered: lumbar-unet version 4, does not hold champion"


def test_what_was_read():
    index = pd.DataFrame({"series": ["1_t1", "1_t2", "2_t2"], "patient": ["1", "1", "2"], "n_slices": [4, 5, 6]})
    assert READ["series_index"](index) == "3 series of 2 patients, 15 slices"
    manifest = {
        "data_kind": "synthetic",
        "series": {"1_t1": {"patient": "1"}, "1_t2": {"patient": "1"}, "2_t2": {"patient": "2"}},
        "sides": {"train": {"1_t1": [0, 1], "1_t2": [2]}, "validation": {}, "test": {"2_t2": [0, 4]}},
    }
    assert READ["model_input"](SimpleNamespace(manifest=manifest)) == (
        "synthetic slices, 3 of 1 patient to train, 0 of 0 patients to validate, 2 of 1 patient to test"
    )


def test_what_was_left_out_is_counted():
    ingest = pd.concat([report("accepted", "rejected", "accepted"), report("ignored", "ignored", found="not a volume")])
    assert LEFT_OUT["ingest_report"](ingest) == "1 of 3 series, 2 x not a volume"
    assert LEFT_OUT["external_report"](report("accepted", "rejected", "absent")) == "2 of 3 masks"
    assert LEFT_OUT["screen_table"](report("run", "failed: x", "run")) == "1 of 3 rows of the screen"
    assert LEFT_OUT["scan_predictions"](report("segmented", "kept", "failed")) == (
        "2 of the 3 scans that the output folder knows"
    )
    assert LEFT_OUT["tune_trials"](pd.DataFrame({"state": ["complete", "failed"]})) == "1 of 2 trials"
    assert LEFT_OUT["scans"](FoundScans([], {"other files": 2})) == "2 other files"


@pytest.mark.parametrize(
    ("reasons", "words"),
    [
        (["", "few", "few"], "2 of 3 slices (few)"),
        (["", "few", "few", "beyond"], "3 of 4 slices (2 few, 1 beyond)"),
        (["", ""], ""),
    ],
)
def test_slices_are_left_out_for_a_reason(reasons, words):
    index = pd.DataFrame({"reason": reasons, "kept": [not reason for reason in reasons]})
    assert LEFT_OUT["slice_index"](index) == words


def test_nothing_left_out_is_not_a_word():
    assert LEFT_OUT["ingest_report"](report("accepted")) == ""
    assert LEFT_OUT["external_report"](report("accepted")) == ""
    assert LEFT_OUT["screen_table"](report("run")) == ""
    assert LEFT_OUT["scan_predictions"](report("segmented")) == ""
    assert LEFT_OUT["tune_trials"](pd.DataFrame({"state": ["complete", "pruned"]})) == ""
    assert LEFT_OUT["scans"](FoundScans()) == ""


def test_every_pipeline_has_a_next_step_or_none_on_purpose():
    from lumbarflow.pipeline_registry import register_pipelines

    pipelines = register_pipelines()
    assert set(summary.NEXT) == set(pipelines)
    for name in pipelines:
        following = next_step(name, "", evaluated=True)
        assert bool(following) == (summary.NEXT[name] is not None)
        if following.startswith("kedro run --pipeline="):
            assert following.removeprefix("kedro run --pipeline=") in pipelines


def test_every_pipeline_has_something_to_say():
    from lumbarflow.pipeline_registry import register_pipelines

    said = {*RESULTS, *READ, *LEFT_OUT}
    for name, pipeline in register_pipelines().items():
        # These two only write or move something: `synthesize` its folder, `rollback` the alias.
        assert said & pipeline.datasets() or name in ("synthesize", "rollback"), name


def test_all_entries_that_are_spoken_of_are_those_of_pipelines():
    from lumbarflow.pipeline_registry import register_pipelines

    entries = {name for pipeline in register_pipelines().values() for name in pipeline.datasets()}
    assert {*RESULTS, *READ, *LEFT_OUT, *summary.REASONS, *summary.REASONS.values(), *summary.TO_LOOK_AT} <= entries


def test_the_next_command_has_the_options_of_this_one():
    assert next_step("ingest", " --env=spider --params=raw_dir=/s", evaluated=False) == (
        "kedro run --pipeline=preprocess --env=spider --params=raw_dir=/s"
    )
    assert next_step("train", " --env=spider", evaluated=True) == (
        "kedro mlflow ui (runs, models), kedro viz run (the pipeline), kedro run --pipeline=report --env=spider (all "
        "figures on one page)"
    )


def test_a_report_needs_an_evaluated_model():
    assert next_step("leakage", "", evaluated=True) == "kedro run --pipeline=report"
    assert next_step("leakage", "", evaluated=False) == "kedro run --pipeline=train (the model that a report is about)"


@pytest.mark.parametrize(
    ("environment", "parameters", "text"),
    [
        (None, {}, ""),
        ("spider", {}, " --env=spider"),
        (None, {"raw_dir": "/s", "training": {"epochs": 60}}, " --params=raw_dir=/s,training.epochs=60"),
        (None, {"raw_dir": "my scans", "overwrite": True}, " --params='raw_dir=my scans,overwrite=true'"),
        (None, {"preprocess": {"size": [64, 64]}}, " --params=... (the same as now)"),
        (None, {"raw_dir": "a,b"}, " --params=... (the same as now)"),
    ],
)  # fmt: skip
def test_options_as_a_shell_takes_them(environment, parameters, text):
    assert options(environment, parameters) == text


def test_paths_are_relative_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "data/x.csv") == "data/x.csv"
    assert shown(Path("data/x.csv")) == "data/x.csv"
    assert shown(tmp_path.parent / "x.csv") == (tmp_path.parent / "x.csv").as_posix()


def test_what_was_written_folder_by_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input").mkdir()
    stores = [
        (tmp_path / "raw", "series", Update(reused=["a", "b"])),
        (tmp_path / "masks", "scans", Update(made=["a", "b"], reused=["c"], failed=["d"], removed=["e"])),
        (tmp_path / "nets", "nets", Update(made=["a"])),
    ]
    files = [tmp_path / name for name in ("masks/t.csv", "z/a.csv", "z/b.csv", "masks/.records/i.parquet", "input")]
    assert written(stores, files) == [
        "input",
        "masks (3 scans, 1 unchanged, 1 file)",
        "nets (1 net)",
        "raw (2 series, all unchanged)",
        "z (2 files)",
    ]
