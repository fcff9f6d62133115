"""A folder with one sub-folder per series, brought up to date by doing only the work whose key has changed.

Every step that prepares data series by series (ingest, preprocessing) keeps its results so. A series' folder appears
by one rename when it is complete: an interrupted run loses the series in hand and nothing else. Several workers (see
`lumbarflow.parallel`) may write to one store at once, each a series of its own.
"""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lumbarflow.files import PARTIAL, read_json, write_json
from lumbarflow.imaging import LabelMap, Volume, read_volume, write_volume
from lumbarflow.parallel import Outcome, Outcomes, Workers, raise_failures
from lumbarflow.progress import track

logger = logging.getLogger(__name__)

RECORD = "record.json"

_TRIES = 5  # to replace a folder in which another run writes


@dataclass(frozen=True)
class Work:
    """What a series' folder should hold, and how to make it.

    Attributes:
        key: digest of everything the result depends on (contents of the inputs, parameters).
        make: returns file name -> Volume, LabelMap, NumPy array, JSON-able value or, for other formats, a function that
            writes the file it is given the path of; `record.json` must be among them. It may be sent to a worker: what
            it holds on to is where things are, not what is in them.
        done: called when a result that may be used again is in its place, e.g. to clear what `make` worked with.
    """

    key: str
    make: Callable[[], Mapping[str, Any]]
    done: Callable[[], Any] | None = None


@dataclass
class Update:
    """What an update did: names of the series made anew, taken from the last run, removed as no longer named, and of
    those that failed: their records forbid their own reuse."""

    made: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class SeriesStore:
    """Read and update such a folder. Reading is lazy: only what is asked for is loaded.

    Args:
        root: the folder; it need not exist yet.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def __reduce__(self) -> tuple:
        # A worker may have another working directory.
        return type(self), (self.root.absolute(),)

    def series(self) -> list[str]:
        """Names of the complete series, sorted."""
        return sorted(path.parent.name for path in self.root.glob(f"[!.]*/{RECORD}"))

    def path(self, series: str, name: str) -> Path:
        return self.root / series / name

    def record(self, series: str) -> dict:
        return read_json(self.path(series, RECORD))

    def records(self) -> Records:
        return Records(self)

    def volume(self, series: str, name: str) -> Volume:
        return read_volume(self.path(series, name))

    def label_map(self, series: str, name: str) -> LabelMap:
        return read_volume(self.path(series, name), LabelMap)

    def array(self, series: str, name: str) -> np.ndarray:
        """A memory-mapped, read-only array."""
        return np.load(self.path(series, name), mmap_mode="r")

    def update(
        self,
        work: Mapping[str, Work],
        description: str = "series",
        keep_others: bool = False,
        unit: str = "series",
        workers: Workers | None = None,
    ) -> Update:
        """Make what is missing or outdated, keep what is current, remove series that `work` doesn't name.

        Args:
            work: series -> Work.
            description: what progress and log call the work.
            keep_others: don't remove: several pipelines keep their results in this folder.
            unit: what progress calls the series, if they are something else.
            workers: make several at once. None for what takes all cores itself, such as trainings: one after the other
                in this process.
        Raises:
            parallel.WorkFailed: `make` raised something, or its worker was killed; the other series are made. Without
                `workers`, the first exception as it is, and the series that come after it are not made.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self._clear()
        update = Update()
        for series in self.series():
            if series not in work and not keep_others:
                self._remove(series)
                update.removed.append(series)
        outdated = {series: item for series, item in work.items() if self._key(series) != item.key}
        update.reused = [series for series in work if series not in outdated]
        if workers is None:
            outcomes = Outcomes(
                len(outdated), (Outcome(series, self._written(series, item)) for series, item in outdated.items())
            )
        else:
            outcomes = workers.run(self._written, outdated, description)
        keys, failures = {}, {}
        for outcome in track(outcomes, description, unit, done=len(update.reused)):
            if outcome.failure:
                failures[outcome.name] = outcome.failure
            keys[outcome.name] = outcome.result
        # In the order of the work, whichever was ready first.
        for series, item in outdated.items():
            (update.made if keys[series] == item.key else update.failed).append(series)
        if workers is not None:
            self._clear()
        logger.info(
            "%s: %d made, %d unchanged and taken from the last run, %d removed%s",
            description, len(update.made), len(update.reused), len(update.removed),
            f", {len(update.failed)} failed" if update.failed else "",
        )  # fmt: skip
        raise_failures(
            {series: failures[series] for series in update.failed if series in failures}, len(work), description, unit
        )
        return update

    def _written(self, series: str, work: Work) -> str | None:
        """Make a series, and return the key that its record has then."""
        # A worker that was thought to be lost may have made it after all.
        if self._key(series) != work.key:
            self._write(series, work)
        return self._key(series)

    def _clear(self) -> None:
        """Remove what a run or a worker that was killed has left."""
        for left in self.root.glob(f"{PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _key(self, series: str) -> str | None:
        try:
            return self.record(series).get("key")
        except (OSError, ValueError):
            return None

    def _remove(self, series: str) -> None:
        shutil.rmtree(self.root / series)

    def _write(self, series: str, work: Work) -> None:
        # Made first: another process that updates this folder clears away partial ones.
        files = work.make()
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.root))
        try:
            for name, value in files.items():
                if isinstance(value, Volume):
                    write_volume(value, partial / name)
                elif isinstance(value, np.ndarray):
                    np.save(partial / name, value, allow_pickle=False)
                elif name == RECORD:
                    # A record may forbid its own reuse (key None): a failure that could pass, such as a full disk.
                    write_json(partial / name, {"key": work.key, **value})
                elif callable(value):
                    value(partial / name)
                else:
                    write_json(partial / name, value)
            partial.chmod(0o755)
            _replace_folder(partial, self.root / series)
            if work.done is not None and self._key(series) == work.key:
                work.done()
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(new: Path, old: Path) -> None:
    """Put a folder in another's place, whatever another run writes or fetches there meanwhile."""
    for left in reversed(range(_TRIES)):
        shutil.rmtree(old, ignore_errors=True)
        try:
            new.rename(old)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not left:
                raise


class Records(Mapping[str, dict]):
    """Series -> record of a store, each read when it is asked for: those of a large cohort would fill the memory."""

    def __init__(self, store: SeriesStore):
        self._store = store

    def __getitem__(self, series: str) -> dict:
        try:
            return self._store.record(series)
        except FileNotFoundError:
            raise KeyError(series) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.series())

    def __len__(self) -> int:
        return len(self._store.series())


class SpiderLayoutStore(SeriesStore):
    """The same for a folder in the SPIDER layout: a series' files go to images/, masks/ and anatomy/.

    The record lies in `anatomy/<series>.json`. Files of series without a record belong to somebody else and are never
    touched.
    """

    FOLDERS = {"image.mha": ("images", ".mha"), "mask.mha": ("masks", ".mha"), RECORD: ("anatomy", ".json")}

    def series(self) -> list[str]:
        return sorted(path.stem for path in self.root.glob("anatomy/[!.]*.json"))

    def path(self, series: str, name: str) -> Path:
        folder, suffix = self.FOLDERS[name]
        return self.root / folder / f"{series}{suffix}"

    def foreign_files(self) -> list[str]:
        """Images, masks and an overview that this store did not write, relative to the folder."""
        series = self.series()
        own = {self.path(name, file) for name in series for file in ("image.mha", "mask.mha")}
        found = [path for folder in ("images", "masks") for path in self.root.glob(f"{folder}/[!.]*")]
        if not series:  # an overview beside series of its own was made from their records
            found += self.root.glob("overview.csv")
        return sorted(path.relative_to(self.root).as_posix() for path in found if path not in own)

    def _key(self, series: str) -> str | None:
        # Files in a folder that people use may be gone while their record is still there.
        whole = all(self.path(series, name).is_file() for name in self.FOLDERS)
        return super()._key(series) if whole else None

    def _remove(self, series: str) -> None:
        for name in ("image.mha", "mask.mha", RECORD):
            self.path(series, name).unlink(missing_ok=True)

    def _write(self, series: str, work: Work) -> None:
        # Each file appears by its own rename. The record comes first, without its key, and again last, with it: a
        # series that an interruption cut short is then known as this store's, and made again.
        files = dict(work.make())
        record = files.pop(RECORD)
        write_json(self.path(series, RECORD), {**record, "key": None})
        for name, value in files.items():
            write_volume(value, self.path(series, name))
        write_json(self.path(series, RECORD), {"key": work.key, **record})
