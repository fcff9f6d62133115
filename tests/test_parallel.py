"""Workers give the results of one process: none is lost, doubled or changed, and one failure is one series'."""

from __future__ import annotations

import builtins
import logging
import math
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import threadpoolctl

from lumbarflow import parallel
from lumbarflow.files import file_digest
from lumbarflow.imaging import Volume
from lumbarflow.parallel import Failure, Outcome, Workers, cores, raise_failures
from lumbarflow.store import RECORD, SeriesStore, Work

# Workers cannot import a test.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ONE = Workers(workers=1)
PROCESSES, THREADS = Workers("loky", 2), Workers("threading", 2)
EACH = pytest.mark.parametrize("workers", [ONE, THREADS, PROCESSES], ids=["one", "threads", "processes"])


@pytest.fixture(autouse=True)
def processes_at_once(monkeypatch):
    monkeypatch.setattr(parallel, "SECONDS_WORTH_PROCESSES", 0.0)


def times_ten(name, item):
    if item == 3:
        raise ValueError("three is too many")
    logging.getLogger("lumbarflow.somewhere").info("%s has %d", name, item)
    return item * 10


def kill_once(folder, name, item):
    """Its worker is killed while it works on `item`, the first time or, at item 0, always."""
    seen = Path(folder, name)
    if item in (0, 2) and (item == 0 or not seen.exists()):
        seen.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@EACH
def test_every_item_has_its_outcome_and_a_failure_is_its_own(workers, caplog):
    caplog.set_level(logging.INFO, logger="lumbarflow")
    items = {f"{n}_t2": n for n in range(1, 6)}
    outcomes = workers.run(times_ten, items, "count")
    assert len(outcomes) == 5
    found = {outcome.name: outcome for outcome in outcomes}
    assert {name: outcome.result for name, outcome in found.items()} == {
        "1_t2": 10, "2_t2": 20, "3_t2": None, "4_t2": 40, "5_t2": 50
    }  # fmt: skip
    assert [name for name, outcome in found.items() if outcome.failure] == ["3_t2"]
    assert found["3_t2"].failure.reason == "ValueError: three is too many"
    assert 'raise ValueError("three is too many")' in found["3_t2"].failure.traceback
    # What a worker says is in the one log, once.
    assert sorted(caplog.messages) == ["1_t2 has 1", "2_t2 has 2", "4_t2 has 4", "5_t2 has 5"]


@EACH
def test_outcomes_may_be_asked_for_in_order(workers):
    def slow_first(name, seconds):
        time.sleep(seconds)

    items = {"first": 0.3, "second": 0.0, "third": 0.1, "fourth": 0.0}
    assert [outcome.name for outcome in workers.run(slow_first, items, "wait", ordered=True)] == list(items)


def test_two_threads_are_at_work_at_once_and_never_more():
    both, most = threading.Barrier(2, timeout=30), []
    busy = []

    def meet(name, _):
        busy.append(name)
        both.wait()  # each needs another one that is there
        most.append(len(busy))
        both.wait()
        busy.remove(name)

    outcomes = list(THREADS.run(meet, dict.fromkeys("abcdef"), "meet"))
    assert len(outcomes) == 6 and not any(outcome.failure for outcome in outcomes)
    assert set(most) == {2}


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(parallel, "core_count", lambda: 8)
    assert cores() == 8
    outcomes = Workers("threading", 3).run(lambda name, _: cores(), dict.fromkeys("abcd"), "count")
    assert [outcome.result for outcome in outcomes] == [2, 2, 2, 2]
    assert cores() == 8  # of this thread

    def in_process(name, _):
        import SimpleITK as sitk

        return cores(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads(), os.environ["OMP_NUM_THREADS"]

    outcomes = Workers("loky", 2).run(in_process, dict.fromkeys("ab"), "count")
    assert [outcome.result for outcome in outcomes] == [(4, 4, "1")] * 2


@EACH
def test_sums_do_not_depend_on_the_number_of_blas_threads(workers):
    def blas_threads(name, item):
        import threadpoolctl

        np.ones(2) @ np.ones(2)
        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        outcomes = workers.run(blas_threads, dict.fromkeys("abcd"), "count")
        assert [outcome.result for outcome in outcomes] == [{1}] * 4
        assert blas_threads("", None) == {2}  # of whoever comes after


def test_a_number_may_come_as_a_text():
    assert Workers.of({"backend": "loky", "workers": "4"}) == Workers("loky", 4)


def test_what_is_done_soon_is_done_without_other_processes(monkeypatch):
    monkeypatch.setattr(parallel, "SECONDS_WORTH_PROCESSES", 0.5)
    monkeypatch.setattr(parallel._Processes, "_used", -math.inf)

    def whose(name, seconds):
        time.sleep(seconds)
        return os.getpid()

    assert [outcome.result for outcome in PROCESSES.run(whose, {"a": 0, "b": 0, "c": 0}, "wait")] == [os.getpid()] * 3
    # After b, 0.3 seconds each: the two that are left would take 0.6.
    processes = [outcome.result for outcome in PROCESSES.run(whose, {"a": 0, "b": 0.6, "c": 0, "d": 0}, "wait")]
    assert processes[:2] == [os.getpid()] * 2 and os.getpid() not in processes[2:]
    # Now they are there.
    assert os.getpid() not in [outcome.result for outcome in PROCESSES.run(whose, {"a": 0, "b": 0}, "wait")]


def test_what_cannot_be_sent_is_done_here(caplog):
    caplog.set_level(logging.INFO, logger="lumbarflow")
    lock = threading.Lock()
    outcomes = list(PROCESSES.run(lambda name, item: (os.getpid(), lock.locked()), {"a": 1, "b": 2}, "evaluate"))
    assert [outcome.result for outcome in outcomes] == [(os.getpid(), False)] * 2
    (said,) = caplog.messages
    assert said.startswith("evaluate: in this process alone, others cannot be sent it (TypeError: cannot pickle")


def test_a_killed_worker_costs_nothing(tmp_path, caplog):
    items = {f"{n}_t2": n for n in range(1, 7)}
    outcomes = list(PROCESSES.run(partial(kill_once, str(tmp_path)), items, "count"))
    assert {outcome.name: outcome.result for outcome in outcomes} == items
    assert not any(outcome.failure for outcome in outcomes)
    assert "count: a worker was killed; 2_t2, which was in hand, is begun again" in caplog.messages


def test_a_worker_whose_memory_grows_is_replaced_without_a_word(recwarn):
    """What one scan needs may be more than loky lets a process keep."""
    warnings.simplefilter("always")

    def grow(name, item):
        builtins.kept = [*getattr(builtins, "kept", []), b"x" * 400_000_000]
        time.sleep(1.1)  # loky looks once a second
        return os.getpid()

    found = [outcome.result for outcome in PROCESSES.run(grow, dict.fromkeys("abcdef", 1), "count")]
    assert len(set(found)) > 2  # replaced indeed
    assert not recwarn.list


def test_whoever_kills_every_worker_fails_alone(tmp_path):
    items = {"a": 1, "b": 0, "c": 4, "d": 0, "e": 3}
    found = {outcome.name: outcome for outcome in PROCESSES.run(partial(kill_once, str(tmp_path)), items, "count")}
    assert {name for name, outcome in found.items() if outcome.failure} == {"b", "d"}
    assert {name: found[name].result for name in "ace"} == {"a": 1, "c": 4, "e": 3}
    assert found["b"].failure.reason.startswith("its worker was killed each time, as the system does when memory")


@EACH
def test_an_end_in_the_middle_leaves_no_worker_waiting(workers):
    """As when the run is interrupted with Ctrl-C."""
    outcomes = iter(workers.run(lambda name, item: item, dict.fromkeys("abcdefgh", 1), "count"))
    assert next(outcomes).result == 1
    outcomes.close()
    assert [outcome.result for outcome in workers.run(lambda name, item: item, {"a": 2, "b": 3}, "count", True)] == [
        2,
        3,
    ]


def digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_digest([path]) for path in folder.rglob("*") if path.is_file()}


def files_of(number):
    if number == 4:
        raise RuntimeError("a disk that is full")
    array = np.random.default_rng(number).normal(size=(3, 4, 5)).astype(np.float32)
    volume = Volume(array, (0.5, 0.7, 4.0), (1.0, 2.0, 3.0), np.eye(3))
    return {"image.nii.gz": volume, "images.npy": array, RECORD: {"number": number}}


@pytest.mark.parametrize("workers", [THREADS, PROCESSES], ids=["threads", "processes"])
def test_a_store_is_the_same_to_the_byte(workers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = {f"{n}_t2": Work(str(n), partial(files_of, n)) for n in (3, 1, 5, 2)}
    made = SeriesStore("one").update(work, workers=ONE).made
    assert SeriesStore("many").update(work, workers=workers).made == made == ["3_t2", "1_t2", "5_t2", "2_t2"]
    assert digests(tmp_path / "many") == digests(tmp_path / "one")
    assert len(digests(tmp_path / "one")) == 4 * 3


@EACH
def test_a_series_that_fails_is_named_when_the_others_are_made(workers, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lumbarflow.store")
    store = SeriesStore(tmp_path / "series")
    work = {f"{n}_t2": Work(str(n), partial(files_of, n)) for n in (4, 1, 2)}
    with pytest.raises(
        parallel.WorkFailed, match=r"^ingest: 1 of 3 series failed \(4_t2: RuntimeError: a disk"
    ) as caught:
        store.update(work, "ingest", workers=workers)
    assert "in files_of" in caught.value.__notes__[0]
    assert store.series() == ["1_t2", "2_t2"] and {path.name for path in store.root.iterdir()} == {"1_t2", "2_t2"}
    assert caplog.messages[-1] == "ingest: 2 made, 0 unchanged and taken from the last run, 0 removed, 1 failed"


def test_a_killed_worker_leaves_a_store_whole(tmp_path):
    def make(number):
        def kill_the_first_time(path):
            if number == 2 and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)  # with its files half written
            path.write_text("whole")

        return files_of(number) | {"notes.txt": kill_the_first_time}

    store = SeriesStore(tmp_path / "series")
    names = [f"{n}_t2" for n in (1, 2, 3, 5)]
    update = store.update({name: Work(name, partial(make, int(name[0]))) for name in names}, workers=PROCESSES)
    assert (tmp_path / "killed").exists() and update.made == store.series() == names
    assert {path.name for path in store.root.iterdir()} == set(names)
    assert {store.path(name, "notes.txt").read_text() for name in names} == {"whole"}


def test_a_store_that_is_sent_away_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(SeriesStore("series"))
    monkeypatch.chdir("/")
    assert pickle.loads(sent).root == tmp_path / "series"


def test_failures_are_named():
    raise_failures({}, 3, "ingest")
    failures = {f"{n}_t2": Failure(f"ValueError: {n}", f"line {n}") for n in range(1, 6)}
    with pytest.raises(parallel.WorkFailed) as caught:
        raise_failures(failures, 9, "predict", "scans")
    assert str(caught.value) == (
        "predict: 5 of 9 scans failed (1_t2: ValueError: 1; 2_t2: ValueError: 2; 3_t2: ValueError: 3; ...); the others "
        "did not. Mend or remove what failed, and give the same command again."
    )
    assert caught.value.__notes__ == ["line 1"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"backend": "spark"}, "parallel.backend is 'spark'; expected one of loky, threading, dask"),
        ({"workers": 0}, "parallel.workers is 0; expected a number from 1, or all"),
        ({"workers": True}, "parallel.workers is True; expected a number from 1, or all"),
        ({"workers": "many"}, "parallel.workers is 'many'; expected a number from 1, or all"),
        (
            {"scheduler": "tcp://h:1"},
            "parallel.scheduler is 'tcp://h:1', but parallel.backend loky; expected the backend",
        ),
        ({"cores": 2}, "unknown setting parallel.cores; expected some of"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Workers.of(settings)


def test_no_outcomes_of_nothing():
    assert list(PROCESSES.run(times_ten, {}, "count")) == []
    assert Outcome("a").failure is None


def test_dask_has_to_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"Dask is not installed; run: pip install .*\[dask\]'"):
        list(Workers("dask", 3).run(times_ten, {"1_t2": 1}, "count"))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "somewhere"])
def test_a_scheduler_that_does_not_answer_is_named(address):
    with pytest.raises(ValueError, match=f"parallel.scheduler is '{address}', and nothing answers there"):
        list(Workers("dask", scheduler=address).run(times_ten, {"1_t2": 1}, "count"))


@pytest.fixture(scope="module")
def dask_address() -> Iterator[str]:
    """A cluster of two workers that somebody else has started."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, silence_logs=logging.CRITICAL
    ) as cluster:
        yield cluster.scheduler_address


@pytest.mark.integration
def test_a_killed_worker_of_a_dask_cluster_costs_nothing(dask_address, tmp_path, monkeypatch):
    """Killed from outside, with a series half written."""

    def make(number):
        def wait_for_the_end(path):
            path.write_text("half")
            if number == 2 and not (tmp_path / "pid").exists():
                (tmp_path / "pid.new").write_text(str(os.getpid()))
                (tmp_path / "pid.new").rename(tmp_path / "pid")
                time.sleep(60)
            path.write_text("whole")

        return files_of(number) | {"notes.txt": wait_for_the_end}

    def kill():
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    monkeypatch.chdir(tmp_path)  # the cluster's workers are elsewhere
    numbers = [1, 2, 3, 5, 6, 7, 8]
    work = {f"{n}_t2": Work(str(n), partial(make, n)) for n in numbers}
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    update = SeriesStore("many").update(work, workers=Workers("dask", scheduler=dask_address))
    killer.join(timeout=10)
    assert not killer.is_alive() and update.made == [f"{n}_t2" for n in numbers] and not update.failed
    SeriesStore("one").update(work, workers=ONE)
    assert digests(tmp_path / "many") == digests(tmp_path / "one") and len(digests(tmp_path / "one")) == 4 * 7


@pytest.mark.integration
def test_on_dask_a_failure_is_one_items_own(dask_address, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lumbarflow")
    workers = Workers("dask", scheduler=dask_address)
    found = {outcome.name: outcome for outcome in workers.run(times_ten, {f"{n}_t2": n for n in (1, 2, 3)}, "count")}
    assert (found["1_t2"].result, found["2_t2"].result, found["3_t2"].result) == (10, 20, None)
    assert found["3_t2"].failure.reason == "ValueError: three is too many"
    assert sorted(caplog.messages) == ["1_t2 has 1", "2_t2 has 2"]
    # Dask gives up on what has killed four workers.
    items = {"a": 1, "b": 0, "c": 3}
    outcomes = {outcome.name: outcome for outcome in workers.run(partial(kill_once, str(tmp_path)), items, "count")}
    assert outcomes["b"].failure.reason.startswith("its worker was killed each time")
    assert (outcomes["a"].result, outcomes["c"].result) == (1, 3)


@pytest.mark.integration
def test_without_an_address_dask_has_a_cluster_here():
    def where(name, item):
        return os.getpid(), cores()

    outcomes = Workers("dask", 2).run(where, dict.fromkeys("abcd"), "count", ordered=True)
    processes, threads = zip(*(outcome.result for outcome in outcomes), strict=True)
    assert os.getpid() not in processes and threads == (1, 1, 1, 1)
