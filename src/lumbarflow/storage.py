"""Folders on other storage: S3, Google Cloud and whatever else fsspec reaches, with a copy on this machine.

SimpleITK, memory maps and Keras want files, and our stores want folders in which things are renamed. So such a folder
is worked on in a copy: brought up to date before it is read (`pull`), and taken over when something was written
(`push`). Only what differs travels. A folder of this machine is its own copy, and both do nothing.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import sqlite3
import stat
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lumbarflow.files import PARTIAL, write_atomically
from lumbarflow.parallel import Outcomes
from lumbarflow.progress import track

logger = logging.getLogger(__name__)

# Where the copies lie, instead of the user's folder for such things.
CACHE = "LUMBARFLOW_CACHE"

_SEPARATOR = "://"
_TRANSFERS = 8  # at once
_UNSTEADY = (-1, -1)  # a file's status, if it changed while others were looked at
_PAUSE_TO_PUSH = 9  # so that a tenth of the time is spent on sending, at most
_TRIES = 5  # to read what others write to
# Of copies: data sets of one run may share one.
_LOCKS: defaultdict[Path, threading.RLock] = defaultdict(threading.RLock)
_ours: set[str] = set()  # protocols whose credentials are those of the configuration

# What storages call the mark that changes with a file's contents; the first that one has is taken.
_MARKS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "LastModified", "mtime", "modified", "created")


class StorageError(OSError):
    """A folder on another storage that cannot be reached or used, with what to do."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address on another storage."""
    protocol, separator, _ = str(path).partition(_SEPARATOR)
    return bool(separator) and protocol not in ("file", "local")


def joined(folder: str | Path, name: str) -> str:
    """The address, or path, of a file of a folder."""
    return f"{str(folder).rstrip('/')}/{name}"


def is_storage_error(error: BaseException | None) -> bool:
    """Whether an error comes from a storage that did not answer, and so says nothing of the file it was about."""
    while error is not None and not isinstance(error, StorageError):
        error = error.__cause__ or error.__context__
    return error is not None


def folder_of(file: str | Path, credentials: Mapping[str, Any] | None = None) -> tuple[WorkingCopy, str]:
    """The folder of a file at a path or an address, and the file's name in it."""
    folder, separator, name = str(file).rpartition("/")
    return WorkingCopy(folder or separator or ".", credentials), name


def cache_folder() -> Path:
    """Where copies lie: the variable LUMBARFLOW_CACHE, or `lumbarflow` in the user's cache folder."""
    if named := os.environ.get(CACHE):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().absolute() / "lumbarflow"


def set_credentials(credentials: Mapping[str, Any]) -> None:
    """Let every use of fsspec in this process have these.

    Args:
        credentials: protocol -> what its file system takes, e.g. {"s3": {"key": ..., "secret": ..., "client_kwargs":
            {"endpoint_url": ...}}}.
    Raises:
        ValueError: names what is not in that form, never what it holds.
    """
    import fsspec

    if not isinstance(credentials, Mapping):
        raise ValueError("credentials.yml: storage is no section; expected one per protocol, such as s3: {key: ...}.")
    for protocol in _ours - credentials.keys():  # of another environment, earlier in this process
        fsspec.config.conf.pop(protocol, None)
    for protocol, options in credentials.items():
        if not isinstance(options, Mapping):
            raise ValueError(
                f"credentials.yml: storage.{protocol} is no section; expected what fsspec's file system {protocol} "
                "takes, such as {key: ..., secret: ...} for s3."
            )
        fsspec.config.conf[protocol] = dict(options)
        _ours.add(protocol)


@contextmanager
def errors_told(address: str, what: str) -> Iterator[None]:
    """Let whatever a storage's library raises become one StorageError; `what` could not be done: read, or write."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        place = str(getattr(error, "filename", None) or "")
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or isinstance(error, sqlite3.Error) or place.startswith(str(cache_folder())):
            raise StorageError(
                f"{address}: its copy in {cache_folder()} cannot be used ({error}). Expected room there for what is "
                f"read and written; make some, or name another folder with {CACHE}."
            ) from error
        # What libraries say names requests and buckets, no secrets.
        raise StorageError(
            f"{address}: cannot {what} there ({type(error).__name__}: {error}). Expected a storage that answers and "
            f"lets you; check it, and storage.{address.partition(_SEPARATOR)[0]} in the environment's credentials.yml."
        ) from error


@dataclass(frozen=True)
class _Known:
    """A file as it was when both sides were last the same: the storage's mark; bytes and time of the copy."""

    mark: str
    size: int
    changed: int

    def is_of(self, path: Path) -> bool:
        return _status(path) == (self.size, self.changed)


class WorkingCopy:
    """A folder, and its copy on this machine.

    Args:
        address: a path, or an address such as s3://bucket/folder.
        credentials: what fsspec's file system takes; None for those of `set_credentials`.
    Attributes:
        address: as it was given.
        path: the folder on this machine, absolute for another storage; it need not exist.
        is_remote: whether it is a copy.
    """

    def __init__(self, address: str | Path, credentials: Mapping[str, Any] | None = None):
        self.is_remote = is_remote(address)
        self.address = str(address).rstrip("/") or "/"
        if not self.is_remote:
            self.path = Path(self.address.removeprefix("file://").removeprefix("local://"))
            return
        import fsspec

        self.protocol, _, place = str(address).partition(_SEPARATOR)
        # Kept, since another process, to which this one is sent, has its own settings of fsspec.
        self._options = dict(fsspec.config.conf.get(self.protocol, {}) if credentials is None else credentials)
        # Two servers may have buckets of the same name.
        server = (self._options.get("client_kwargs") or {}).get("endpoint_url") or self._options.get("endpoint_url")
        at = f"@{hashlib.blake2b(str(server).encode(), digest_size=4).hexdigest()}" if server else ""
        self._root = cache_folder() / f"{self.protocol}{at}"
        if self.protocol == "memory":  # to which a slash in front means nothing
            place = place.lstrip("/")
            self.address = f"memory{_SEPARATOR}{place}".rstrip("/")
        parts = place.removesuffix("/").split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise StorageError(f"{address}: no bucket and folder; expected {self.protocol}://BUCKET/FOLDER.")
        self.path = self._root.joinpath(*parts)

    def pull(self, names: Iterable[str] | None = None) -> Path:
        """Bring the copy up to date.

        What was written here and not yet taken over stays. If it has changed on the storage too, that counts, and
        nothing that was written here: parts of both would fit nobody.

        Args:
            names: only these files; None for all, and then those that are gone from the storage are removed here.
        Returns:
            `path`.
        Raises:
            StorageError: the storage does not answer or refuses, or is being written to all the time.
        """
        if not self.is_remote:
            return self.path
        names = None if names is None else list(names)
        with _LOCKS[self.path], errors_told(self.address, "read"), self._records() as records:
            # Until nothing has changed while it was fetched: else files of two versions would lie side by side.
            for _ in range(_TRIES):
                there, known = self._there(names), records.of(self.address, names)
                outdated = self._outdated(there, known)
                if outdated:
                    self._fetch(outdated, there, records)
                if not outdated or names is not None:
                    break
            else:
                raise StorageError(
                    f"{self.address}: changes while it is read; expected nobody to write there now. Try again later."
                )
            for name in (known if names is None else known.keys() & set(names)) - there.keys():
                if known[name].is_of(self.path / name):
                    (self.path / name).unlink()
                records.forget(joined(self.address, name))
        return self.path

    def push(self, names: Iterable[str] | None = None, remove: bool = True) -> None:
        """Take over what was written or removed here since the last time.

        JSON files, by which our stores know that something is complete, are removed first and written last, and only as
        they were when everything else was looked at: whoever reads the storage in between, or after an interruption,
        meets what is not there rather than what is half there, or half another's.

        Args:
            names: only these files; None for all.
            remove: also remove there what was removed here.
        Raises:
            StorageError: the storage does not answer or refuses, or the copy is gone. What is here stays, and the next
                push takes it over.
        """
        if not self.is_remote:
            return
        with _LOCKS[self.path], errors_told(self.address, "write"), self._records() as records:
            names = None if names is None else list(names)
            known = records.of(self.address, names)
            if known and not self.path.is_dir():
                raise StorageError(
                    f"{self.address}: its copy {self.path} is gone; nothing is removed there. Give the command again."
                )
            seen = self._seen({*self._here(), *known} if names is None else names)
            changed = [name for name, status in seen.items() if status and not _same(known.get(name), status)]
            gone = [name for name in known if remove and seen[name] is None]
            withdrawn = [name for name in changed if _is_last(name) and name in known]
            for name in sorted({*gone, *withdrawn}, key=lambda name: (not _is_last(name), name)):
                with suppress(FileNotFoundError):
                    self._filesystem().rm_file(joined(self.address, name))
                records.forget(joined(self.address, name))
            self._send([name for name in changed if not _is_last(name)], records)
            # What was made anew meanwhile waits for the next time, with what it speaks for.
            steady = [name for name in changed if _is_last(name) and _status(self.path / name) == seen[name]]
            self._send(steady, records)

    @contextmanager
    def pushing(self, seconds: float = 60, remove: bool = True) -> Iterator[Path]:
        """Take over what is written meanwhile: at intervals, so that a machine that dies costs little more, and at the
        end, whatever the end is.

        Args:
            seconds: of an interval. Nine times as long as the last push took, where that is more: a file that grows by
                and by, such as a large download, is sent whole each time.
            remove: as in `push`.
        """
        if not self.is_remote:
            yield self.path
            return
        over = threading.Event()

        def push_at_intervals() -> None:
            pause = seconds
            while not over.wait(pause):
                start = time.monotonic()
                try:
                    self.push(remove=remove)
                    error = None
                except StorageError as failure:
                    error = failure
                pause = max(seconds, _PAUSE_TO_PUSH * (time.monotonic() - start))
                if error:
                    logger.warning("%s Tried again in %.0f s.", error, pause)

        thread = threading.Thread(target=push_at_intervals, daemon=True)
        thread.start()
        try:
            yield self.path
        except BaseException:
            over.set()
            thread.join()
            try:
                self.push(remove=remove)
            except StorageError as error:  # the other error is the one to mend first
                logger.error("%s", error)
            raise
        over.set()
        thread.join()
        self.push(remove=remove)

    def exists(self, name: str | None = None) -> bool:
        """Whether the folder has this file, or without a name anything complete, there where it belongs."""
        if not self.is_remote:
            return any(self.path.rglob("*.json")) if name is None else (self.path / name).is_file()
        with errors_told(self.address, "read"):
            return any(name or _is_last(found) for found in self._there(None if name is None else [name]))

    def _filesystem(self) -> Any:
        import fsspec

        try:
            # What others have written since must be seen.
            return fsspec.filesystem(self.protocol, **{"use_listings_cache": False, **self._options})
        except (ImportError, ValueError) as error:
            raise StorageError(
                f"{self.address}: {error}. Expected a storage that fsspec reaches; for s3:// and gs:// run: "
                "pip install -c constraints.txt -e '.[s3]' (or .[gs])"
            ) from error

    def _there(self, names: Iterable[str] | None) -> dict[str, str]:
        """Name -> mark of the files on the storage."""
        filesystem = self._filesystem()
        found = {}
        if names is None:
            filesystem.invalidate_cache()
            root = filesystem._strip_protocol(self.address).rstrip("/")
            for path, details in filesystem.find(root, detail=True).items():
                name = path.removeprefix(root).lstrip("/")
                if details.get("type") == "file" and name and _is_plain(name):
                    found[name] = _mark(joined(self.address, name), details)
        else:
            for name in names:
                try:
                    found[name] = _mark(joined(self.address, name), filesystem.info(joined(self.address, name)))
                except FileNotFoundError:
                    continue
        return found

    def _here(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith(PARTIAL)]
            for name in files:
                if not name.startswith(PARTIAL):
                    yield Path(folder, name).relative_to(self.path).as_posix()

    def _seen(self, names: Iterable[str]) -> dict[str, tuple[int, int] | None]:
        """What the files are at one moment, JSON files at its beginning and its end alike."""
        last, others = sorted(filter(_is_last, names)), sorted(name for name in names if not _is_last(name))
        before = {name: _status(self.path / name) for name in last}
        seen = {name: _status(self.path / name) for name in others}
        for name, status in before.items():
            seen[name] = status if _status(self.path / name) == status else _UNSTEADY
        return seen

    def _outdated(self, there: Mapping[str, str], known: Mapping[str, _Known]) -> list[str]:
        outdated = {
            name
            for name, mark in there.items()
            if name not in known or known[name].mark != mark or not (self.path / name).is_file()
        }
        unsent = {name for name in there if (self.path / name).is_file() and not _known_is_of(known, name, self.path)}
        if conflicts := sorted(outdated & unsent):
            first = joined(self.address, conflicts[0])
            logger.warning(
                "%s has changed there and here; here it is replaced, with all that was not taken over", first
            )
            outdated |= unsent
        return sorted(outdated, key=lambda name: (_is_last(name), name))

    def _fetch(self, names: Sequence[str], there: Mapping[str, str], records: _Records) -> None:
        def fetch(name: str) -> str | None:
            address, local = joined(self.address, name), self.path / name
            try:
                write_atomically(local, lambda partial: self._filesystem().get_file(address, str(partial)))
            except FileNotFoundError:  # removed there since it was listed
                return None
            return name

        for name in filter(_is_last, names):  # they speak for what is about to be replaced
            records.forget(joined(self.address, name))
            (self.path / name).unlink(missing_ok=True)
        for part in (False, True):
            chosen = [name for name in names if _is_last(name) == part]
            for name in filter(None, _at_once(fetch, chosen, f"fetch {self.address}")):
                records.remember(joined(self.address, name), there[name], _status(self.path / name))

    def _send(self, names: Sequence[str], records: _Records) -> None:
        def send(name: str) -> tuple[str, str, tuple[int, int]] | None:
            local, address, filesystem = self.path / name, joined(self.address, name), self._filesystem()
            status = _status(local)  # before: what changes while it travels is sent again
            try:
                filesystem.put_file(str(local), address)
            except FileNotFoundError:
                if local.is_file():
                    raise
                return None  # removed meanwhile by whoever works here
            return address, _mark(address, filesystem.info(address)), status

        for sent in filter(None, _at_once(send, names, f"send {self.address}")):
            records.remember(*sent)

    @contextmanager
    def _records(self) -> Iterator[_Records]:
        self._root.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._root / "files.sqlite", timeout=60)) as connection:
            yield _Records(connection)


class _Records:
    """What is the same here and on the storage, in a table: several processes work on one copy."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection
        with connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS files (address TEXT PRIMARY KEY, mark TEXT, size INTEGER, changed INTEGER)"
            )

    def of(self, folder: str, names: Sequence[str] | None = None) -> dict[str, _Known]:
        """Name -> what is known, of these files or of all below a folder."""
        start = joined(folder, "")
        query = "SELECT address, mark, size, changed FROM files WHERE "
        if names is None:
            # "0" comes right after "/": all addresses that begin so, by the index.
            rows = self._connection.execute(f"{query} address >= ? AND address < ?", (start, start[:-1] + "0"))
        else:
            rows = (row for name in names for row in self._connection.execute(f"{query} address = ?", (start + name,)))
        return {address.removeprefix(start): _Known(*values) for address, *values in rows}

    def remember(self, address: str, mark: str, status: tuple[int, int]) -> None:
        with self._connection:
            self._connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", (address, mark, *status))

    def forget(self, address: str) -> None:
        with self._connection:
            self._connection.execute("DELETE FROM files WHERE address = ?", (address,))


def _is_last(name: str) -> bool:
    """Whether a file says of others that they are complete."""
    return name.endswith(".json")


def _is_plain(name: str) -> bool:
    """Whether a name stays below its folder when it is one on this machine."""
    return not any(part in ("", ".", "..") for part in name.split("/")) and "\\" not in name


def _mark(address: str, details: Mapping[str, Any]) -> str:
    mark = next((details[name] for name in _MARKS if details.get(name)), None)
    if mark is None:
        raise StorageError(
            f"{address}: its storage does not say when a file has changed; expected one such as s3 or gs."
        )
    # Memory's storage lists seconds, and gives a time when it is asked for one file.
    return f"{mark.timestamp() if isinstance(mark, datetime) else mark} {details.get('size')}"


def _status(path: Path) -> tuple[int, int] | None:
    """Bytes of a file and when it was changed, in nanoseconds; None if there is no such file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _same(known: _Known | None, status: tuple[int, int]) -> bool:
    return known is not None and status == (known.size, known.changed)


def _known_is_of(known: Mapping[str, _Known], name: str, folder: Path) -> bool:
    return name in known and known[name].is_of(folder / name)


def _at_once(function: Callable[[str], Any], names: Sequence[str], description: str) -> Iterator[Any]:
    """Results of several transfers at a time: each waits for the network more than anything else."""
    if len(names) < 2:
        yield from map(function, names)
        return
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        yield from track(Outcomes(len(names), pool.map(function, names)), description, "files")
