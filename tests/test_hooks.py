"""The first and the last lines of a run, over catalogs of a few entries."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from kedro.framework.hooks.manager import _create_hook_manager
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline, node
from kedro.runner import SequentialRunner
from kedro_datasets.json import JSONDataset
from kedro_datasets.pandas import CSVDataset

from lumbarflow import hooks
from lumbarflow.datasets import SeriesStoreDataset
from lumbarflow.store import Work

INDEX = pd.DataFrame({"patient": ["1", "1"], "n_slices": [4, 5]})
REPORT = pd.DataFrame({"outcome": ["accepted", "accepted", "rejected"], "found": ["", "", "no mask"]})
MANIFEST = {
    "data_kind": "real",
    "series": {"1_t1": {"patient": "1"}},
    "sides": {"train": {"1_t1": [0, 1]}, "validation": {}, "test": {}},
}


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    """Run some functions as the nodes of a pipeline with the hooks; the lines that were logged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hooks.tracking, "tag_run", lambda tags: None)
    monkeypatch.setattr(hooks.tracking, "git_commit", lambda path: {"git_commit": "abc"})
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr(hooks, "time", SimpleNamespace(monotonic=lambda: next(now)))
    caplog.set_level(logging.INFO, logger="lumbarflow")
    catalog = DataCatalog(
        {
            "ingested_series": SeriesStoreDataset(path=f"{tmp_path}/data/series", description="ingest"),
            "ingest_report": CSVDataset(filepath=f"{tmp_path}/data/ingest_report.csv"),
            "ingest_report_csv": CSVDataset(filepath=f"{tmp_path}/data/08_reporting/ingest_report.csv"),
            "series_index": CSVDataset(filepath=f"{tmp_path}/data/series_index.csv"),
            "run_times": JSONDataset(filepath=f"{tmp_path}/data/run_times.json"),
        }
    )
    run_hooks = hooks.RunHooks()

    def run(*nodes, names=("ingest",), given=None, **run_params) -> list[str]:
        caplog.clear()
        for name, data in (given or {}).items():
            catalog[name] = data
        manager = _create_hook_manager()
        manager.register(run_hooks)
        pipeline = Pipeline(list(nodes))
        run_params = {"pipeline_names": list(names), "project_path": str(tmp_path), **run_params}
        about = {"run_params": run_params, "pipeline": pipeline, "catalog": catalog}
        manager.hook.before_pipeline_run(**about)
        try:
            result = SequentialRunner().run(pipeline, catalog, manager)
        except Exception as error:
            manager.hook.on_pipeline_error(error=error, **about)
            raise
        manager.hook.after_pipeline_run(run_result=result, **about)
        return lines()

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "lumbarflow.hooks"]

    run.catalog, run.lines = catalog, lines
    return run


def ingest(series):
    return {name: Work("k", lambda: {"record.json": {}}) for name in series}


INGEST = (
    node(ingest, "names", "ingested_series", name="ingest.ingest_series"),
    node(lambda series: (REPORT, REPORT), "ingested_series", ["ingest_report", "ingest_report_csv"], name="report"),
    node(lambda report: INDEX, "ingest_report", "series_index", name="index"),
)


def test_a_run_ends_with_what_was_read_left_out_and_written_and_with_what_is_next(run):
    given = {"names": ["1_t1", "1_t2", "2_t2"]}
    assert run(*INGEST, given=given) == [
        "--- ingest finished in 1 min 40 s",
        "read: 2 series of 1 patient, 9 slices",
        "left out: 1 of 3 series (reasons: data/08_reporting/ingest_report.csv)",
        "written: data (2 files), data/08_reporting (1 file), data/series (3 series)",
        "see data/08_reporting/ingest_report.csv",
        "next: kedro run --pipeline=preprocess",
    ]
    # Given again, it says that nothing was done again.
    assert "data/series (3 series, all unchanged)" in run(*INGEST, given=given)[3]
    assert "data/series (4 series, 3 unchanged)" in run(*INGEST, given={"names": [*given["names"], "3_t2"]})[3]


def test_what_the_run_made_itself_it_has_not_read(run):
    ready = SimpleNamespace(manifest=MANIFEST)
    use = node(lambda model_input: "x", "model_input", "used", name="use")
    words = "read: real slices, 2 of 1 patient to train, 0 of 0 patients to validate, 0 of 0 patients to test"
    assert words in run(use, names=["fit"], given={"model_input": ready})
    make = node(lambda: ready, None, "model_input", name="make")
    assert not [line for line in run(make, use, names=["fit"]) if line.startswith("read")]


def test_the_next_command_is_about_the_same_data(run):
    nothing = node(lambda: 1, None, "one", name="nothing")
    lines = run(nothing, names=["fit"], env="spider", runtime_params={"raw_dir": "/s", "training": {"epochs": 2}})
    assert lines[-1] == "next: kedro run --pipeline=evaluate --env=spider --params=raw_dir=/s,training.epochs=2"
    # Kedro hands on a set: the last one is the last in the order of the work.
    lines = run(nothing, names=["preprocess", "ingest"])
    assert (lines[0], lines[-1]) == ("--- ingest + preprocess finished in 1 min 40 s", "next: kedro run --pipeline=fit")


def test_a_report_comes_next_only_when_there_is_something_to_report(run, tmp_path):
    nothing = node(lambda: 1, None, "one", name="nothing")
    assert "next: kedro run --pipeline=train" in run(nothing, names=["leakage"])[-1]
    run.catalog["evaluation_summary"] = JSONDataset(filepath=f"{tmp_path}/data/evaluation_summary.json")
    assert "next: kedro run --pipeline=train" in run(nothing, names=["leakage"])[-1]
    run.catalog.save("evaluation_summary", {})
    assert run(nothing, names=["leakage"])[-1] == "next: kedro run --pipeline=report"


def test_a_part_of_a_pipeline_goes_on_with_the_rest_and_keeps_no_time(run):
    lines = run(*INGEST[:1], given={"names": ["1_t1"]}, to_nodes=["ingest.ingest_series"], env="best")
    assert lines[0] == "--- a part of ingest finished in 1 min 40 s"
    assert lines[-1] == "next: kedro run --pipelines=ingest --env=best (the rest; what is done stays)"
    assert not run.catalog.exists("run_times")
    run(*INGEST[:1], given={"names": ["1_t1"]})
    assert run.catalog.load("run_times")["ingest"]["git_commit"] == "abc"


def test_the_default_pipeline_has_a_name(run):
    lines = run(node(lambda: 1, None, "one", name="nothing"), names=())
    assert lines[0] == "--- train finished in 1 min 40 s"
    assert list(run.catalog.load("run_times")) == ["train"]


def test_a_failed_run_names_its_step_and_what_is_kept(run, caplog):
    def fail(report):
        raise ValueError("all of them")

    with pytest.raises(ValueError, match="all of them"):
        run(*INGEST[:2], node(fail, "ingest_report", "series_index", name="ingest.index"), given={"names": ["1_t1"]})
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "lumbarflow.hooks"]
    assert lines == [
        ("ERROR", "--- ingest failed after 1 min 40 s, in the step ingest.index; what was done until then is kept"),
        ("INFO", "left out: 1 of 3 series (reasons: data/08_reporting/ingest_report.csv)"),
        ("INFO", "written: data (1 file), data/08_reporting (1 file), data/series (1 series)"),
        ("INFO", "next: do what the error below says, and give the same command again, which goes on from there"),
    ]
    # An entry that cannot be loaded is the trouble of the step that needs it.
    with pytest.raises(Exception, match="series_index"):
        run(node(len, "series_index", "count", name="fit.count"), names=["fit"])
    assert "--- fit failed after 1 min 40 s, in the step fit.count" in caplog.text


def test_a_stopped_run_says_so_at_the_end_of_the_process(run, monkeypatch):
    at_exit, ended = [], []
    monkeypatch.setattr(hooks.atexit, "register", lambda function, *given: at_exit.append((function, given)))
    monkeypatch.setattr(hooks.atexit, "unregister", lambda function: at_exit.clear())
    monkeypatch.setattr(hooks.tracking, "end_killed", lambda: ended.append(True))

    def stop(series):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(*INGEST[:1], node(stop, "ingested_series", "count", name="ingest.count"), given={"names": ["1_t1"]})
    ((function, given),) = at_exit
    assert function(*given) is None and ended
    assert run.lines() == [
        "--- ingest stopped after 1 min 40 s, in the step ingest.count; what was done until then is kept",
        "written: data/series (1 series)",
        "next: give the same command again, which goes on from there",
    ]
    # A run that ends has nothing to say later, whichever way it ends.
    run(*INGEST[:1])
    assert not at_exit
    with pytest.raises(KeyError, match="broken"):
        run(node(lambda: {}["broken"], None, "x", name="fail"))
    assert not at_exit


def test_a_storage_that_refuses_keeps_no_other_folder_from_being_taken_over(tmp_path, monkeypatch, caplog):
    from kedro.io import DataCatalog, DatasetError

    from lumbarflow.datasets import FolderDataset

    released = []

    class Folder(FolderDataset):
        def _release(self):
            released.append(self._folder.address)
            if "bad" in self._folder.address:
                raise OSError("503 SlowDown")

    catalog = DataCatalog({name: Folder(path=f"{tmp_path}/{name}") for name in ("bad", "good")})
    run = hooks.RunHooks()
    for name in ("bad", "good"):
        run.after_dataset_loaded(name, None)
    run.on_pipeline_error({}, catalog)  # the run's own error is the one that is told
    assert len(released) == 2 and "503 SlowDown" in caplog.text
    with pytest.raises(DatasetError, match="503 SlowDown"):
        run.after_pipeline_run({}, catalog)


class Loader(dict):
    """As much of Kedro's configuration as the hook looks at."""

    def __init__(self, folder, credentials=None, **parameters):
        super().__init__(credentials=credentials or {})
        self.conf_source, self.base_env, self.runtime_params = str(folder), "base", parameters


def test_every_use_of_fsspec_has_the_credentials_of_the_configuration(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setattr(fsspec.config, "conf", {})
    options = {"key": "me", "secret": "hush"}
    loader = Loader(tmp_path, {"storage": {"s3": options}, "mlflow": {"of": "others"}})
    hooks.RunHooks().after_context_created(SimpleNamespace(config_loader=loader))
    assert fsspec.config.conf == {"s3": options}


def test_what_the_command_line_gives_in_vain_stops_the_run_before_it_begins(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/parameters_a.yml").write_text("preprocess:\n  size: [128, 128]\n")
    (tmp_path / "base/parameters_b.yml").write_text("viewer:\n  case: ${runtime_params:case,shown}\n")

    def give(**parameters):
        loader = Loader(tmp_path, **parameters)
        hooks.RunHooks().after_context_created(SimpleNamespace(config_loader=loader))

    give()
    give(case="all", preprocess={"size": [96, 64]})
    with pytest.raises(ValueError, match=r"preprocess.size is 96; expected a list such as \[128, 128\]"):
        give(preprocess={"size": 96})
    with pytest.raises(
        ValueError, match=r"setting --params.preproces; expected some of \['case', 'preprocess', 'viewer'\]"
    ):
        give(preproces={"size": [96, 64]})


def test_nothing_large_is_kept_until_the_end(run):
    import gc
    import weakref

    class Model:
        pass

    alive = []

    def make():
        model = Model()
        alive.append(weakref.ref(model))
        return model

    def look():
        gc.collect()
        alive.append(alive[0]())

    use = node(lambda model: 1, "large", "used", name="use")
    run(node(make, None, "large", name="make"), use, node(lambda used: look(), "used", None, name="look"))
    assert alive[1] is None


def test_entries_without_a_file_are_nothing_written(run):
    lines = run(node(lambda: 1, None, "one", name="nothing"))
    assert lines == ["--- ingest finished in 1 min 40 s", "next: kedro run --pipeline=preprocess"]


def test_files_elsewhere_have_their_whole_path(run, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    lines = run(node(lambda: INDEX, None, "series_index", name="index"))
    assert f"written: {Path(tmp_path, 'data').as_posix()} (1 file)" in lines
