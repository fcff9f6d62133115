"""A store does only the work whose key has changed, and an interruption costs the series in hand alone."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from lumbarflow.files import PARTIAL
from lumbarflow.imaging import LabelMap, write_volume
from lumbarflow.store import SeriesStore, SpiderLayoutStore, Work

LOG = "lumbarflow.store"


class Maker:
    """Makes Work and counts how often each series was made."""

    def __init__(self, make_pair, image="image.mha", mask="labels.mha"):
        self.image, self.mask = make_pair()
        self.names = image, mask
        self.made: list[str] = []

    def work(self, series: str, key: str, record: dict | None = None) -> Work:
        def make():
            self.made.append(series)
            files = dict(zip(self.names, (self.image, self.mask), strict=True))
            return files | {"record.json": {"series": series, "of": key} | (record or {})}

        return Work(key, make)


@pytest.fixture
def maker(make_pair):
    return Maker(make_pair)


@pytest.fixture
def spider_maker(make_pair):
    return Maker(make_pair, mask="mask.mha")


@pytest.fixture
def store(tmp_path):
    return SeriesStore(tmp_path / "series")


def fail():
    raise RuntimeError("interrupted")


def names(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_store_gives_back_what_was_made(store, maker):
    array = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    make = maker.work("1_t2", "k").make
    store.update({"1_t2": Work("k", lambda: make() | {"images.npy": array, "facts.json": [1, 2]})})
    assert store.series() == ["1_t2"]
    assert store.record("1_t2") == {"key": "k", "series": "1_t2", "of": "k"}
    assert np.array_equal(store.volume("1_t2", "image.mha").array, maker.image.array)
    labels = store.label_map("1_t2", "labels.mha")
    assert type(labels) is LabelMap and np.array_equal(labels.array, maker.mask.array)
    mapped = store.array("1_t2", "images.npy")
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
    assert np.array_equal(mapped, array) and mapped.dtype == np.float16
    assert json.loads(store.path("1_t2", "facts.json").read_text()) == [1, 2]


def test_a_store_that_is_not_there_is_empty(store):
    assert store.series() == [] and store.records() == {}


def test_records_are_read_one_at_a_time(store, maker, monkeypatch):
    store.update({name: maker.work(name, "k") for name in ("1_t1", "1_t2")})
    read = []
    monkeypatch.setattr(type(store), "record", lambda self, series: read.append(series) or {"series": series})
    records = store.records()
    assert not read and len(records) == 2
    values = iter(records.values())
    assert next(values) == {"series": "1_t1"} and read == ["1_t1"]
    # To a worker goes where they lie.
    assert len(pickle.dumps(records)) < 300
    monkeypatch.undo()
    assert records.get("3_t2") is None and "1_t2" in records


def test_only_what_has_changed_is_made(store, maker, caplog):
    store.update({name: maker.work(name, "k") for name in ("1_t1", "1_t2", "2_t2")})
    maker.made.clear()
    before = store.path("1_t1", "image.mha").stat().st_mtime_ns
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=LOG):
        update = store.update(
            {"1_t1": maker.work("1_t1", "k"), "1_t2": maker.work("1_t2", "new"), "3_t2": maker.work("3_t2", "k")},
            "ingest",
        )
    assert maker.made == update.made == ["1_t2", "3_t2"]
    assert update.reused == ["1_t1"] and update.removed == ["2_t2"]
    assert caplog.messages == ["ingest: 2 made, 1 unchanged and taken from the last run, 1 removed"]
    assert {name: record["of"] for name, record in store.records().items()} == {"1_t1": "k", "1_t2": "new", "3_t2": "k"}
    assert store.path("1_t1", "image.mha").stat().st_mtime_ns == before
    assert not (store.root / "2_t2").exists()


def test_files_of_an_outdated_series_do_not_linger(store, maker):
    store.update({"1_t2": maker.work("1_t2", "k")})
    store.update({"1_t2": Work("rejected", lambda: {"record.json": {}})})
    assert names(store.root) == {"1_t2/record.json"}


def test_a_record_may_forbid_its_reuse(store, maker, caplog):
    caplog.set_level(logging.INFO, logger=LOG)
    for _ in range(2):
        update = store.update({"1_t2": maker.work("1_t2", "k", {"key": None})}, "predict")
    assert maker.made == ["1_t2", "1_t2"]
    assert (update.made, update.failed) == ([], ["1_t2"])
    assert caplog.messages[-1] == "predict: 0 made, 0 unchanged and taken from the last run, 0 removed, 1 failed"


@pytest.mark.parametrize("content", ["", "{"])
def test_a_spoilt_record_is_made_again(store, maker, content):
    store.update({"1_t2": maker.work("1_t2", "k")})
    store.path("1_t2", "record.json").write_text(content)
    assert store.update({"1_t2": maker.work("1_t2", "k")}).made == ["1_t2"]


def test_an_interruption_costs_the_series_in_hand_alone(store, maker):
    store.update({"2_t2": maker.work("2_t2", "old")})
    work = {"1_t2": maker.work("1_t2", "k"), "2_t2": Work("k", fail), "3_t2": maker.work("3_t2", "k")}
    with pytest.raises(RuntimeError, match="interrupted"):
        store.update(work)
    assert {name: record["of"] for name, record in store.records().items()} == {"1_t2": "k", "2_t2": "old"}
    assert {path.name for path in store.root.iterdir()} == {"1_t2", "2_t2"}
    update = store.update(work | {"2_t2": maker.work("2_t2", "k")})
    assert update.made == ["2_t2", "3_t2"] and update.reused == ["1_t2"]


@pytest.fixture
def somebody_writes(monkeypatch):
    """Lets another run put a file into each folder that is removed, the given number of times."""
    remove, left = shutil.rmtree, []

    def removed(path, *args, **kwargs):
        remove(path, *args, **kwargs)
        if left and not Path(path).name.startswith(PARTIAL):
            left.pop()
            Path(path).mkdir()
            (Path(path) / "another's").touch()

    monkeypatch.setattr("lumbarflow.store.shutil.rmtree", removed)
    return left


def test_a_folder_in_which_another_run_writes_is_replaced(store, maker, somebody_writes):
    somebody_writes += [1, 2]
    assert store.update({"1_t2": maker.work("1_t2", "k")}).made == ["1_t2"]
    assert store.record("1_t2")["key"] == "k" and not store.path("1_t2", "another's").exists()


def test_a_folder_in_which_another_run_writes_all_the_time_is_an_error(store, maker, somebody_writes):
    somebody_writes += range(100)
    with pytest.raises(OSError, match="not empty"):
        store.update({"1_t2": maker.work("1_t2", "k")})
    assert {path.name for path in store.root.iterdir()} == {"1_t2"}


def test_a_value_that_cannot_be_written_leaves_no_folder(store):
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.update({"1_t2": Work("k", lambda: {"a.npy": np.ones(3), "record.json": {"mean": float("nan")}})})
    assert list(store.root.iterdir()) == []


def test_leftovers_of_a_killed_run_are_no_series_and_are_removed(store, maker):
    left = store.root / ".partial-abc"
    left.mkdir(parents=True)
    (left / "record.json").write_text('{"key": "k"}')
    assert store.series() == []
    store.update({"1_t2": maker.work("1_t2", "k")})
    assert {path.name for path in store.root.iterdir()} == {"1_t2"}


# --- the SPIDER layout ------------------------------------------------------------------------------------------------


@pytest.fixture
def spider(tmp_path):
    return SpiderLayoutStore(tmp_path / "01_raw")


def test_the_spider_layout(spider, spider_maker):
    spider.update({"1_t2_SPACE": spider_maker.work("1_t2_SPACE", "k")})
    expected = {"images/1_t2_SPACE.mha", "masks/1_t2_SPACE.mha", "anatomy/1_t2_SPACE.json"}
    assert names(spider.root) == expected
    assert spider.series() == ["1_t2_SPACE"] and spider.foreign_files() == []
    assert spider.record("1_t2_SPACE") == {"key": "k", "series": "1_t2_SPACE", "of": "k"}
    assert np.array_equal(spider.volume("1_t2_SPACE", "image.mha").array, spider_maker.image.array)
    assert spider.update({"1_t2_SPACE": spider_maker.work("1_t2_SPACE", "k")}).reused == ["1_t2_SPACE"]
    spider.update({})
    assert names(spider.root) == set()


def test_files_of_somebody_else_are_never_touched(spider, spider_maker):
    foreign = ["images/9_t2.mha", "masks/9_t2.mha", "images/1_t2.nrrd"]
    for name in foreign:
        write_volume(spider_maker.image, spider.root / name)
    (spider.root / "notes.txt").write_text("mine")
    before = {name: (spider.root / name).read_bytes() for name in names(spider.root)}
    assert spider.foreign_files() == ["images/1_t2.nrrd", "images/9_t2.mha", "masks/9_t2.mha"]
    spider.update({"1_t2": spider_maker.work("1_t2", "k")})
    # Ours is not among them, but one of the same name in another format is.
    assert spider.foreign_files() == ["images/1_t2.nrrd", "images/9_t2.mha", "masks/9_t2.mha"]
    spider.update({"1_t2": spider_maker.work("1_t2", "new")})
    spider.update({})
    assert {name: (spider.root / name).read_bytes() for name in names(spider.root)} == before


@pytest.mark.parametrize("lost", ["image.mha", "mask.mha"])
def test_a_series_that_lost_a_file_is_made_again(spider, spider_maker, lost):
    spider.update({"1_t2": spider_maker.work("1_t2", "k")})
    spider.path("1_t2", lost).unlink()
    assert spider.update({"1_t2": spider_maker.work("1_t2", "k")}).made == ["1_t2"]
    assert spider.path("1_t2", lost).is_file()


@pytest.mark.parametrize("earlier", [None, "old"])
def test_an_interrupted_series_is_its_own_and_made_again(spider, spider_maker, monkeypatch, earlier):
    if earlier:
        spider.update({"1_t2": spider_maker.work("1_t2", earlier)})

    def killed(volume, path):
        if type(volume) is LabelMap:
            fail()
        write_volume(volume, path)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="interrupted"):
        patch.setattr("lumbarflow.store.write_volume", killed)
        spider.update({"1_t2": spider_maker.work("1_t2", "k")})
    assert spider.path("1_t2", "image.mha").is_file()
    assert spider.foreign_files() == []
    # Not even with the earlier settings is it current: its image is the new one.
    assert spider.update({"1_t2": spider_maker.work("1_t2", earlier or "k")}).made == ["1_t2"]
    assert spider.record("1_t2")["key"] == (earlier or "k")


def test_other_formats_are_written_by_a_function(store):
    store.update({"1": Work("k", lambda: {"notes.txt": lambda path: path.write_text("x"), "record.json": {}})})
    assert store.path("1", "notes.txt").read_text() == "x"


def test_a_shared_folder_keeps_what_others_made(store, maker):
    store.update({"a": maker.work("a", "k")})
    update = store.update({"b": maker.work("b", "k")}, keep_others=True)
    assert (store.series(), update.removed) == (["a", "b"], [])
    assert store.update({"b": maker.work("b", "k")}).removed == ["a"]
