"""Folders on other storage: S3, Google Cloud and whatever else fsspec reaches, with a copy on this machine.

SimpleITK, memory maps and Keras want files, and our stores want folders in which things are renamed. So such a folder
is worked on in a copy: brought up to date before it is read (`pull`), and taken over when something was written
(`push`). Only what differs travels. A folder of this machine is its own copy, and both do nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lumbarflow.files import PARTIAL, write_atomically
from lumbarflow.progress import track

logger = logging.getLogger(__name__)

# Where the copies lie, instead of the user's folder for such things.
CACHE = "LUMBARFLOW_CACHE"

_SEPARATOR = "://"
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

    for protocol, options in credentials.items():
        if not isinstance(options, Mapping):
            raise ValueError(
                f"credentials.yml: storage.{protocol} is no section; expected what fsspec's file system {protocol} "
                "takes, such as {key: ..., secret: ...} for s3."
            )
        fsspec.config.conf[protocol] = dict(options)


@contextmanager
def errors_told(address: str, what: str) -> Iterator[None]:
    """Let whatever a storage's library raises become one StorageError; `what` could not be done: read, or write."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        # What libraries say names requests and buckets, no secrets.
        raise StorageError(
            f"{address}: cannot {what} there ({type(error).__name__}: {error}). Expected a storage that answers and "
            f"lets you; check it, and storage.{address.partition(_SEPARATOR)[0]} in conf/local/credentials.yml."
        ) from error


@dataclass(frozen=True)
class _Known:
    """A file as it was when both sides were last the same: the storage's mark; bytes and time of the copy."""

    mark: str
    size: int
    changed: int

    def is_of(self, path: Path) -> bool:
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size, self.changed)


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
        self._lock = threading.Lock()
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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def pull(self, names: Iterable[str] | None = None) -> Path:
        """Bring the copy up to date.

        What was written here and not yet taken over stays, unless it has changed on the storage too: then that counts.

        Args:
            names: only these files; None for all, and then those that are gone from the storage are removed here.
        Returns:
            `path`.
        Raises:
            StorageError: the storage does not answer or refuses.
        """
        if not self.is_remote:
            return self.path
        with self._lock, errors_told(self.address, "read"), self._records() as records:
            there, known = self._there(names), records.below(self.address)
            outdated = [
                name
                for name, mark in there.items()
                if name not in known or known[name].mark != mark or not (self.path / name).is_file()
            ]
            for name in track(outdated, f"fetch {self.address}", "files") if len(outdated) > 1 else outdated:
                self._fetch(name, there[name], known.get(name), records)
            for name in (known.keys() if names is None else known.keys() & set(names)) - there.keys():
                if known[name].is_of(self.path / name):
                    (self.path / name).unlink()
                records.forget(joined(self.address, name))
        return self.path

    def push(self, names: Iterable[str] | None = None) -> None:
        """Take over what was written or removed here since the last time.

        JSON files, by which our stores know that something is complete, are removed first and written last: whoever
        reads the storage in between, or after an interruption, meets what is not there rather than what is half there.

        Args:
            names: only these files; None for all.
        Raises:
            StorageError: the storage does not answer or refuses. What is here stays, and the next push takes it over.
        """
        if not self.is_remote:
            return
        with self._lock, errors_told(self.address, "write"), self._records() as records:
            known = records.below(self.address)
            names = sorted({*self._here(), *known} if names is None else names, key=lambda name: (_is_last(name), name))
            there = [name for name in names if (self.path / name).is_file()]
            changed = [name for name in there if name not in known or not known[name].is_of(self.path / name)]
            gone = [name for name in names if name in known and name not in set(there)]
            for name in reversed(sorted([*gone, *(n for n in changed if n in known and _is_last(n))], key=_is_last)):
                self._remove(name, records)
            for name in changed:
                self._send(name, records)

    @contextmanager
    def pushing(self, seconds: float = 60) -> Iterator[Path]:
        """Take over what is written meanwhile: at intervals, so that a machine that dies costs no more than that, and
        at the end, whatever the end is."""
        if not self.is_remote:
            yield self.path
            return
        over = threading.Event()

        def push_at_intervals() -> None:
            while not over.wait(seconds):
                try:
                    self.push()
                except StorageError as error:
                    logger.warning("%s Tried again in %.0f s.", error, seconds)

        thread = threading.Thread(target=push_at_intervals, daemon=True)
        thread.start()
        try:
            yield self.path
        finally:
            over.set()
            thread.join()
            self.push()

    def exists(self, name: str) -> bool:
        """Whether the folder has this file, there where it belongs."""
        if not self.is_remote:
            return (self.path / name).is_file()
        with errors_told(self.address, "read"):
            return bool(self._there([name]))

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
                    found[name] = _mark(details)
        else:
            for name in names:
                try:
                    found[name] = _mark(filesystem.info(joined(self.address, name)))
                except FileNotFoundError:
                    continue
        return found

    def _here(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith(PARTIAL)]
            for name in files:
                if not name.startswith(PARTIAL):
                    yield Path(folder, name).relative_to(self.path).as_posix()

    def _fetch(self, name: str, mark: str, had: _Known | None, records: _Records) -> None:
        local = self.path / name
        if local.is_file() and (had is None or not had.is_of(local)):
            logger.warning("%s has changed there and here; here it is replaced", joined(self.address, name))
        write_atomically(local, lambda partial: self._filesystem().get_file(joined(self.address, name), str(partial)))
        records.remember(joined(self.address, name), mark, local.stat())

    def _send(self, name: str, records: _Records) -> None:
        local, filesystem = self.path / name, self._filesystem()
        try:
            status = local.stat()  # before: what changes while it travels is sent again
            filesystem.put_file(str(local), joined(self.address, name))
        except FileNotFoundError:
            if local.is_file():
                raise
            return  # removed meanwhile by whoever works here
        records.remember(joined(self.address, name), _mark(filesystem.info(joined(self.address, name))), status)

    def _remove(self, name: str, records: _Records) -> None:
        with suppress(FileNotFoundError):
            self._filesystem().rm_file(joined(self.address, name))
        records.forget(joined(self.address, name))

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

    def below(self, folder: str) -> dict[str, _Known]:
        start = joined(folder, "")
        # "0" comes right after "/": all addresses that begin so, by the index.
        rows = self._connection.execute(
            "SELECT address, mark, size, changed FROM files WHERE address >= ? AND address < ?",
            (start, start[:-1] + "0"),
        )
        return {address.removeprefix(start): _Known(*values) for address, *values in rows}

    def remember(self, address: str, mark: str, status: os.stat_result) -> None:
        with self._connection:
            self._connection.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)",
                (address, mark, status.st_size, status.st_mtime_ns),
            )

    def forget(self, address: str) -> None:
        with self._connection:
            self._connection.execute("DELETE FROM files WHERE address = ?", (address,))


def _is_last(name: str) -> bool:
    """Whether a file says of others that they are complete."""
    return name.endswith(".json")


def _is_plain(name: str) -> bool:
    """Whether a name stays below its folder when it is one on this machine."""
    return not any(part in ("", ".", "..") for part in name.split("/")) and "\\" not in name


def _mark(details: Mapping[str, Any]) -> str:
    mark = next((details[name] for name in _MARKS if details.get(name) is not None), "")
    # Memory's storage lists seconds, and gives a time when it is asked for one file.
    return f"{mark.timestamp() if isinstance(mark, datetime) else mark} {details.get('size')}"
