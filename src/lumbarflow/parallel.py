"""Series worked on side by side, in processes of this machine (loky), in threads, or on a Dask cluster.

`Workers.run` hands out one series at a time, so that memory is that of one series a worker. What goes to a worker is a
function and where to find the series, never its voxels; the worker writes the result, and only what there is to say
of it comes back. So results depend neither on the backend nor on how many workers there are.

The processes are those of joblib's loky. They are driven one by one rather than through `joblib.Parallel`: this does
not tell which series were in hand when a worker was killed, and with Dask it waits forever for one that is lost.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import math
import pickle
import signal
import socket
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache
from queue import Queue
from typing import Any

from lumbarflow.backend import core_count
from lumbarflow.parameters import check_names
from lumbarflow.progress import counted

logger = logging.getLogger(__name__)

BACKENDS = ("loky", "threading", "dask")
# The section `parallel` of the configuration.
SETTINGS = ("backend", "workers", "scheduler")
ALL, LOCAL = "all", "local"

# Processes take a second or two of every core to start and import what they need: what is left has to take longer than
# this in one process, or is done in it.
SECONDS_WORTH_PROCESSES = 4.0
_SECONDS_TO_ANSWER = 10
# Then idle processes give their memory back.
_SECONDS_IDLE = 60

# The sums of NumPy's BLAS differ in the last bit with the number of its threads: work on series has one of them, in
# every process and however many workers there are.
_THREADS_OF_LIBRARIES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

_here = threading.local()


class WorkFailed(RuntimeError):
    """Some series failed for a reason that nobody foresaw; the others are done."""


@dataclass(frozen=True)
class Failure:
    """Why a series has no result: the exception in a line, and its traceback."""

    reason: str
    traceback: str = ""


@dataclass(frozen=True)
class Outcome:
    """Of one series: what the function returned, or a failure."""

    name: str
    result: Any = None
    failure: Failure | None = None
    log: list[logging.LogRecord] = field(default_factory=list)


class Outcomes:
    """Outcomes as they come, once, with their number: what `progress.track` needs."""

    def __init__(self, count: int, outcomes: Iterator[Outcome]):
        self._count, self._outcomes = count, outcomes

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Outcome]:
        return self._outcomes


@dataclass(frozen=True)
class Workers:
    """Who works on the series.

    Args:
        backend: one of BACKENDS.
        workers: how many, or "all": as many as this process may use cores. A Dask cluster of its own size has as many
            as it has threads.
        scheduler: address of a Dask cluster's scheduler, such as tcp://10.0.0.1:8786; "local" starts a cluster on this
            machine. The cluster's workers see the same files under the same paths.
    Raises:
        ValueError: something else.
    """

    backend: str = "loky"
    workers: int | str = ALL
    scheduler: str = LOCAL

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"parallel.backend is {self.backend!r}; expected one of {', '.join(BACKENDS)}")
        if self.workers != ALL and not (type(self.workers) is int and self.workers > 0):
            raise ValueError(f"parallel.workers is {self.workers!r}; expected a number from 1, or {ALL}")
        if self.scheduler != LOCAL and self.backend != "dask":
            raise ValueError(
                f"parallel.scheduler is {self.scheduler!r}, but parallel.backend {self.backend}; expected the backend "
                f"dask. Add parallel.backend=dask, or set the scheduler to {LOCAL}."
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Workers:
        """From the settings that SETTINGS names. Raises ValueError."""
        check_names(settings, SETTINGS, "parallel")
        if isinstance(workers := settings.get("workers"), str) and workers.isdigit():  # as Kubeflow's form gives it
            settings = {**settings, "workers": int(workers)}
        return cls(**settings)

    def run(
        self, function: Callable[[str, Any], Any], items: Mapping[str, Any], description: str, ordered: bool = False
    ) -> Outcomes:
        """Call `function(name, item)` for every item.

        An exception is that item's failure alone, and so is a worker that is killed whenever it has that item in hand
        (the system does so when memory runs out). What other workers had in hand then is begun again: what the function
        writes, it must be able to write twice.

        Args:
            function: for processes and Dask, anything that cloudpickle takes, like the items; what it does not take is
                done in this process.
            items: name -> what goes to the worker.
            description: what the log calls the work.
            ordered: outcomes come in the order of the items, else as they are ready.
        """
        alone = self.backend != "dask" and min(self._count(), len(items)) <= 1
        if alone:
            outcomes = (_outcome(function, name, item) for name, item in items.items())
        else:
            outcomes = self._side_by_side(function, deque(items.items()), description)
        return Outcomes(len(items), _with_one_blas_thread(_in_order(outcomes, items) if ordered else outcomes))

    def _count(self) -> int:
        return core_count() if self.workers == ALL else self.workers

    def _side_by_side(self, function: Callable, waiting: deque, description: str) -> Iterator[Outcome]:
        if self.backend == "loky" and not _Processes.are_there():
            # What is left will take as long as what is done, item for item.
            start, done, left = time.monotonic(), 0, 0.0
            while waiting and left < SECONDS_WORTH_PROCESSES:
                yield _outcome(function, *waiting.popleft())
                done += 1
                left = (time.monotonic() - start) / done * len(waiting)
        if not waiting:
            return
        if self.backend == "dask":
            pool = _Dask(self.scheduler, self._count())
        else:
            pool = {"loky": _Processes, "threading": _Threads}[self.backend](min(self._count(), len(waiting)))
        in_hand: dict[Future, tuple[str, Any]] = {}
        try:
            yield from _handed_out(pool, function, waiting, in_hand, description)
        except BaseException:
            pool.stop(in_hand)
            raise
        pool.close()


def _handed_out(
    pool: Any, function: Callable, waiting: deque, in_hand: dict[Future, tuple[str, Any]], description: str
) -> Iterator[Outcome]:
    # Names of those that were in hand when a worker was killed. Whose it was nobody knows: they come next, one at a
    # time, and a worker that is killed then was killed by the one it had.
    suspects: set[str] = set()
    here: list[str] = []
    while waiting or in_hand:
        while waiting and len(in_hand) < (1 if suspects else pool.size()):
            name, item = waiting.popleft()
            try:
                in_hand[pool.submit(function, name, item)] = name, item
            except BrokenExecutor:  # by what is in hand, or while it was idle; the next one is whole
                waiting.appendleft((name, item))
                break
            except _CannotBeSent as error:
                if not here:
                    logger.info("%s: in this process alone, others cannot be sent it (%s)", description, error)
                here.append(name)
                yield _outcome(function, name, item)
        for future in wait(in_hand, return_when=FIRST_COMPLETED).done:
            name, item = in_hand.pop(future)
            error = future.exception()
            if isinstance(error, BrokenExecutor) and name not in suspects:
                logger.warning("%s: a worker was killed; %s, which was in hand, is begun again", description, name)
                suspects.add(name)
                waiting.appendleft((name, item))
                continue
            suspects.discard(name)
            yield _told(future.result()) if error is None else Outcome(name, failure=_failure_of(error))


class StaysHere:
    """A function that is called in this process alone, or in threads of it, one at a time.

    Args:
        function: anything that can be called.
        reason: why, for the log.
    """

    def __init__(self, function: Callable, reason: str):
        self._function, self._reason, self._lock = function, reason, threading.Lock()

    def __call__(self, *args: Any) -> Any:
        with self._lock:
            return self._function(*args)

    def __reduce__(self) -> tuple:
        raise pickle.PicklingError(self._reason)


class _CannotBeSent(Exception):
    """Work that cannot be pickled."""


class _Threads:
    """Threads of this process."""

    def __init__(self, count: int):
        self._count = count
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="series")

    def size(self) -> int:
        return self._count

    def submit(self, function: Callable, name: str, item: Any) -> Future:
        return self._executor.submit(_in_thread, cores_each(self._count), function, name, item)

    def close(self) -> None:
        self._executor.shutdown()

    def stop(self, in_hand: Iterable[Future]) -> None:
        # A thread cannot be stopped: this process ends when the series in hand are done.
        self._executor.shutdown(wait=False, cancel_futures=True)


class _Processes:
    """Processes of this machine; they stay for a while, for the next step's series."""

    _used = -math.inf  # when they had work the last time

    def __init__(self, count: int):
        self._count = count

    @classmethod
    def are_there(cls) -> bool:
        return time.monotonic() - cls._used < _SECONDS_IDLE / 2

    def _executor(self) -> Any:
        from joblib.externals.loky import get_reusable_executor

        # loky puts another process in the place of one whose memory has grown, or that has been idle for too long when
        # work comes. Nothing is lost, and nobody has to know.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given to the executor")
        # Another one only if it differs or has lost a worker. The variables are read when the libraries are imported.
        return get_reusable_executor(self._count, timeout=_SECONDS_IDLE, env=dict.fromkeys(_THREADS_OF_LIBRARIES, "1"))

    def size(self) -> int:
        return self._count

    def submit(self, function: Callable, name: str, item: Any) -> Future:
        work = _packed(function, name, item)
        return self._executor().submit(_in_process, work, cores_each(self._count), _level())

    def close(self) -> None:
        type(self)._used = time.monotonic()

    def stop(self, in_hand: Iterable[Future]) -> None:
        self._executor().shutdown(wait=True, kill_workers=True)
        type(self)._used = -math.inf


class _Dask:
    """Workers of a Dask cluster; its scheduler gives a lost worker's series to another one."""

    def __init__(self, scheduler: str, count: int):
        self._client = _dask_client(scheduler, count)
        self._executor = self._client.get_executor(pure=False)

    def size(self) -> int:
        # Of today: clusters grow and shrink. Without any worker one series waits for the first.
        return max(1, sum(self._client.nthreads().values()))

    def submit(self, function: Callable, name: str, item: Any) -> Future:
        return self._executor.submit(_in_process, _packed(function, name, item), 1, _level())

    def close(self) -> None:
        self._executor.shutdown()

    def stop(self, in_hand: Iterable[Future]) -> None:
        for future in in_hand:
            future.cancel()
        self._executor.shutdown(wait=False)


@cache
def _dask_client(scheduler: str, count: int) -> Any:
    """One for all steps of a run; Dask closes it with the process."""
    try:
        import dask
        from distributed import Client, LocalCluster
        from distributed.comm import get_address_host_port
    except ImportError as error:
        raise ValueError(
            "parallel.backend is dask, and Dask is not installed; run: pip install -c constraints.txt -e '.[dask]'"
        ) from error
    # It tells of every worker that comes and goes, and warns of nets, which are larger than what it is used to.
    logging.getLogger("distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Sending large graph", module="distributed")
    if scheduler == LOCAL:
        # No dashboard, which would listen on a port; no limit of memory, at which Dask kills a worker.
        # Workers read the level before anything else could tell them.
        with dask.config.set({"distributed.nanny.pre-spawn-environ.DASK_LOGGING__DISTRIBUTED": "error"}):
            cluster = LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address=None,
                memory_limit=0,
                silence_logs=logging.ERROR,
            )
        return Client(cluster, set_as_default=False)
    try:
        # A client that finds nobody would go on looking for him, long after it said so.
        socket.create_connection(get_address_host_port(scheduler), timeout=_SECONDS_TO_ANSWER).close()
        return Client(scheduler, set_as_default=False, timeout=_SECONDS_TO_ANSWER)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"parallel.scheduler is {scheduler!r}, and nothing answers there ({error}); expected the address of a Dask "
            "scheduler, such as tcp://10.0.0.1:8786. See what `dask scheduler` prints when it starts."
        ) from error


def cores() -> int:
    """Cores for the work in hand: those that this process may use, shared out where several series are worked on."""
    return getattr(_here, "cores", None) or core_count()


def cores_each(count: int) -> int:
    """Of `count` workers on this machine."""
    return max(1, core_count() // count)


def raise_failures(failures: Mapping[str, Failure], total: int, description: str, unit: str = "series") -> None:
    """If there are any, raise WorkFailed with the reasons, and the first one's traceback as a note."""
    if not failures:
        return
    shown = [f"{name}: {failure.reason}" for name, failure in failures.items()]
    reasons = "; ".join([*shown[:3], *(["..."] if shown[3:] else [])])
    error = WorkFailed(
        f"{description}: {len(failures)} of {counted(total, unit)} failed ({reasons}); the others did not. Mend or "
        "remove what failed, and give the same command again."
    )
    error.add_note(next(iter(failures.values())).traceback)
    raise error


def _one_blas_thread() -> Any:
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def _with_one_blas_thread(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """The same; of the whole run rather than of each item, since threads share the setting."""
    # Closing this one closes what it hands on, and so stops the workers.
    with _one_blas_thread(), contextlib.closing(outcomes):
        yield from outcomes


def _in_order(outcomes: Iterator[Outcome], names: Iterable[str]) -> Iterator[Outcome]:
    early: dict[str, Outcome] = {}
    for name in names:
        while name not in early:
            outcome = next(outcomes)
            early[outcome.name] = outcome
        yield early.pop(name)


def _outcome(function: Callable[[str, Any], Any], name: str, item: Any) -> Outcome:
    try:
        return Outcome(name, function(name, item))
    except Exception as error:
        return Outcome(name, failure=_failure_of(error))


def _failure_of(error: BaseException) -> Failure:
    if isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker":
        return Failure(
            "its worker was killed each time, as the system does when memory runs out; try parallel.workers=1",
            str(error),
        )
    return Failure(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


def _in_thread(cores: int, function: Callable, name: str, item: Any) -> Outcome:
    _here.cores = cores
    return _outcome(function, name, item)


def _packed(function: Callable, name: str, item: Any) -> bytes:
    import cloudpickle

    try:
        return cloudpickle.dumps((function, name, item))
    except Exception as error:  # each type has its own way to say so
        raise _CannotBeSent(f"{type(error).__name__}: {error}") from error


def _in_process(work: bytes, cores: int, level: int) -> Outcome:
    _settle(cores)
    _here.cores = cores
    function, name, item = pickle.loads(work)
    with _log_of_this_thread(level) as log:
        outcome = _outcome(function, name, item)
    return replace(outcome, log=log)


@cache
def _settle(cores: int) -> None:
    """What holds for the whole worker process, once."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(cores)
    _one_blas_thread()  # of Dask's workers nobody knows what they were started with
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches every process of the terminal. It is for the one that handed out the work, which stops us.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _level() -> int:
    return logging.getLogger(__package__).getEffectiveLevel()


@contextlib.contextmanager
def _log_of_this_thread(level: int) -> Iterator[list[logging.LogRecord]]:
    """What a worker says of a series goes back with the outcome, into the one log of the run."""
    ours, kept = logging.getLogger(__package__), Queue()
    handler = logging.handlers.QueueHandler(kept)  # makes records that can be pickled
    thread = threading.get_ident()
    handler.addFilter(lambda record: record.thread == thread)
    ours.setLevel(level)
    ours.propagate = False
    ours.addHandler(handler)
    records: list[logging.LogRecord] = []
    try:
        yield records
    finally:
        ours.removeHandler(handler)
        while not kept.empty():
            records.append(kept.get())


def _told(outcome: Outcome) -> Outcome:
    for record in outcome.log:
        logging.getLogger(record.name).handle(record)
    return replace(outcome, log=[])
