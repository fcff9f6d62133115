"""The public SPIDER record: fetched over lines that break, checked, and unpacked so that no archive can do harm.

<downloads>/images.zip               a file of the record, once its size and checksum are right
<downloads>/images.zip.part          what has come of it so far; the next attempt, or run, goes on from there
<downloads>/images.zip.part.json     the server's mark of that version, so that two versions are never joined
<downloads>/images.zip.members.json  what it holds, once all of that is unpacked: the archive may then be deleted

pooch keeps the table of files, looks whether what is there has the right checksum, and moves a download to its place
only if it has. It begins each download anew, ties neither its size nor an archive's contents to anything, and logs
addresses as they are; so transfer and unpacking are done here. Source of the former: RFC 9110, sections 10.2.3
(Retry-After), 13.1.5 (If-Range) and 14 (ranges).
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from zipfile import BadZipFile, ZipFile, ZipInfo

from lumbarflow.files import PARTIAL, read_json, write_atomically, write_json
from lumbarflow.imaging import split_volume_name
from lumbarflow.parameters import check_names
from lumbarflow.progress import duration, track

if TYPE_CHECKING:
    import requests

logger = logging.getLogger(__name__)

SETTINGS = ("source", "mirror", "licence", "attribution", "files", "transfer", "limits")
TRANSFER = ("connect_seconds", "silence_seconds", "attempts", "wait_seconds", "longest_wait_seconds")
LIMITS = ("entries", "entry_bytes", "total_bytes")
FOLDERS = ("images", "masks")  # of the SPIDER layout; archives are unpacked to no other

FETCHED = "fetched"
THERE = "there already"
UNPACKED = "unpacked already"

_MIB = 1 << 20
_BLOCK = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MIRROR = "Name a server that has it with --params=download.mirror=URL."
# Answers after which the same request may succeed.
_PASSING = {408, 429, 500, 502, 503, 504}


class DownloadError(Exception):
    """A file that cannot be had or must not be used. `found`, `expected` and `remedy` are the parts of the message."""

    def __init__(self, file: str | Path, found: str, expected: str, remedy: str):
        super().__init__(f"{file}: {found}; expected {expected}. {remedy}")


class _Interruption(Exception):
    """A transfer that may go on: what happened, and after how many seconds the server wants to be asked again."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class RecordFile:
    """A file of the record.

    Attributes:
        name: of the file, and the end of its address.
        bytes: its size.
        md5: hex digest.
        unpack: of an archive, the folder of the SPIDER layout for its volumes; None for a table.
    """

    name: str
    bytes: int
    md5: str
    unpack: str | None = None

    def __post_init__(self):
        if not _NAME.fullmatch(str(self.name)):
            raise ValueError(f"download.files: name {self.name!r}; expected letters, digits, '.', '_' and '-'.")
        if type(self.bytes) is not int or self.bytes < 1 or not re.fullmatch("[0-9a-f]{32}", str(self.md5)):
            raise ValueError(
                f"download.files: {self.name} has bytes {self.bytes!r} and md5 {self.md5!r}; expected a whole number "
                "and 32 hexadecimal digits in quotes."
            )
        if self.unpack not in (None, *FOLDERS):
            raise ValueError(f"download.files: {self.name} is to be unpacked to {self.unpack!r}; expected {FOLDERS}.")


def record_files(settings: Mapping[str, Any]) -> list[RecordFile]:
    """The files of the record, as `download.files` lists them.

    Raises:
        ValueError: unknown settings, a name that is no file name or comes twice, no size, no md5, another folder.
    """
    check_names(settings, SETTINGS, "download")
    check_names(settings["transfer"], TRANSFER, "download.transfer")
    check_names(settings["limits"], LIMITS, "download.limits")
    for row in settings["files"]:
        check_names(row, RecordFile.__annotations__, "download.files")
    files = [RecordFile(**row) for row in settings["files"]]
    if len({file.name.lower() for file in files}) < len(files):
        raise ValueError("download.files: a name comes twice; expected each once.")
    return files


# --- addresses


def without_credentials(text: str) -> str:
    """A text with the user names and passwords of its addresses left out.

    >>> without_credentials("from https://ann:secret@mirror.example/spider/")
    'from https://mirror.example/spider/'
    """
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def address(settings: Mapping[str, Any]) -> tuple[str, tuple[str, str] | None]:
    """The folder that files are fetched from, with a slash at its end, and user and password if it names them.

    Raises:
        ValueError: not the address of a folder.
    """
    given = str(settings["mirror"] or settings["source"])
    try:
        parts = urlsplit(given)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        # Not repeated: it may hold a password that nothing here recognises as one.
        raise ValueError(
            "download.mirror (or download.source) is not the address of a folder; expected such as "
            "https://server/spider, without '?' and '#'. User and password may stand in ~/.netrc."
        )
    login = (unquote(parts.username), unquote(parts.password or "")) if parts.username is not None else None
    return without_credentials(given).rstrip("/") + "/", login


# --- fetching


def fetch(settings: Mapping[str, Any], folder: Path, raw_dir: Path) -> dict[str, str]:
    """Bring the record's files to `folder`, as far as what they hold is not in `raw_dir`.

    Args:
        settings: the parameters `download`.
        folder: for the files as they are fetched.
        raw_dir: the folder in the SPIDER layout that they are to become.
    Returns:
        file name -> FETCHED, THERE or UNPACKED.
    Raises:
        ValueError: unusable settings.
        DownloadError: a server that doesn't have the file, has another one or gives up; no room; a table of somebody
            else's in the way.
    """
    import pooch
    import requests

    pooch.get_logger().setLevel(logging.WARNING)  # what it says is said here, in the voice of a run
    files = record_files(settings)
    base, login = address(settings)
    missing = [file for file in files if not _is_done(file, folder, raw_dir)]
    _check_room(missing, folder)
    registry = pooch.create(path=folder, base_url=base, registry={file.name: f"md5:{file.md5}" for file in files})
    outcomes = {file.name: UNPACKED for file in files}
    with requests.Session() as session:
        session.auth = login  # without one, requests looks into ~/.netrc
        for file in missing:
            transfer = _Transfer(file, session, settings["transfer"])
            try:
                registry.fetch(file.name, downloader=transfer)
            except ValueError as error:
                # pooch's own, which has removed the file; it ends with the md5 that was found.
                found = (re.findall(r"\b[0-9a-f]{32}\b", str(error)) or ["another"])[-1]
                remedy = (
                    "It is removed: give the same command again. Should that end likewise, the server has another file"
                )
                raise transfer.error(f"md5 {found}", f"{file.md5}, the record's", f"{remedy}. {_MIRROR}") from None
            outcomes[file.name] = FETCHED if transfer.used else THERE
    return outcomes


def _is_done(file: RecordFile, folder: Path, raw_dir: Path) -> bool:
    """Whether there is nothing to fetch, because what the file holds is in its place. (`unpack` compares contents.)"""
    if not file.unpack:
        return _is_placed(file, raw_dir)
    sizes = {name: size for name, (size, _) in _members(file, folder).items()}
    paths = {name: raw_dir / name for name in sizes}
    return bool(sizes) and all(path.is_file() and path.stat().st_size == sizes[name] for name, path in paths.items())


def _check_room(missing: Iterable[RecordFile], folder: Path) -> None:
    """Stop if the disk cannot hold what is still to come, and archives as large again once they are unpacked."""
    needed = 0
    for file in missing:
        there = [path for path in (folder / file.name, _part(folder, file)) if path.is_file()]
        needed += max(0, file.bytes - max((path.stat().st_size for path in there), default=0))
        needed += file.bytes if file.unpack else 0
    _require(needed, folder)


def _require(needed: int, folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if needed > (free := shutil.disk_usage(there).free):
        raise DownloadError(
            folder,
            f"{_size(free)} free on its disk",
            f"at least {_size(needed)}",
            "Make room, or name a folder on another disk with --params=raw_dir=DIR.",
        )


def _part(folder: Path, file: RecordFile) -> Path:
    return folder / f"{file.name}.part"


class _Transfer:
    """A downloader for pooch: one file over HTTP, from where an earlier transfer ended."""

    def __init__(self, file: RecordFile, session: requests.Session, settings: Mapping[str, Any]):
        self.file, self.session, self.settings = file, session, settings
        self.used = False

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        """Fill `output_file`; pooch compares its checksum and moves it to its place, or deletes it."""
        self.used = True
        self.url, self.host = url, urlsplit(url).hostname
        self.part = _part(Path(output_file).parent, self.file)
        self.mark = self.part.with_name(f"{self.part.name}.json")
        self._take_up(Path(output_file))
        if have := self._have():
            logger.info("download: %s from %s, going on at %s", self.file.name, self.host, self._progress(have))
        else:
            logger.info("download: %s (%s) from %s", self.file.name, _size(self.file.bytes), self.host)
        fruitless = 0
        while (have := self._have()) < self.file.bytes:
            try:
                self._receive(have)
            except _Interruption as problem:
                fruitless = 0 if self._have() - have >= _MIB else fruitless + 1
                self._wait(problem, fruitless)
        os.replace(self.part, output_file)
        self.mark.unlink(missing_ok=True)

    def _take_up(self, own: Path) -> None:
        """Make pooch's temporary files of a run that was killed, which are empty or whole, partial ones again."""
        for left in own.parent.glob(f"tmp{'?' * 8}"):
            if left != own and left.stat().st_size == self.file.bytes:
                left.replace(self.part)
            elif left != own and not left.stat().st_size:
                left.unlink()

    def _have(self) -> int:
        """Bytes that have come; more than there can be are none."""
        have = self.part.stat().st_size if self.part.is_file() else 0
        if have > self.file.bytes:
            self._discard()
            return 0
        return have

    def _discard(self) -> None:
        for path in (self.part, self.mark):
            path.unlink(missing_ok=True)

    def _progress(self, have: int) -> str:
        return f"byte {have} of {self.file.bytes}"

    def _receive(self, have: int) -> None:
        """One request, for all bytes from number `have` on."""
        import requests
        from urllib3.exceptions import HTTPError, TimeoutError

        # Not compressed on the way: sizes and ranges are those of the file.
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if mark := self._known_mark():
                headers["If-Range"] = mark
        silence = self.settings["silence_seconds"]
        timeout = (self.settings["connect_seconds"], silence)
        # Causes are not passed on: what requests and urllib3 say repeats addresses, and servers redirect to such as
        # hold keys.
        try:
            with self.session.get(self.url, headers=headers, stream=True, timeout=timeout) as response:
                self._store(response, self._start(response, have))
        except requests.exceptions.SSLError:
            raise self.error("a certificate that nobody vouches for", "one that can be trusted") from None
        except (requests.exceptions.ReadTimeout, TimeoutError):
            raise _Interruption(f"{self.host} was silent for {duration(silence)}") from None
        except requests.exceptions.ConnectTimeout:
            raise _Interruption(f"no connection to {self.host} in {duration(timeout[0])}") from None
        except (requests.exceptions.ConnectionError, HTTPError):
            raise _Interruption(f"the connection to {self.host} broke") from None
        except requests.exceptions.RequestException as error:
            raise self.error(f"no answer that can be used ({type(error).__name__})", "the file") from None

    def _start(self, response: requests.Response, have: int) -> int:
        """The number of the first byte that an answer brings: `have`, or 0 from servers that begin anew."""
        status = response.status_code
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            self._discard()
            raise _Interruption(f"{self.host} has no byte {have}: to be fetched anew", 0.0)
        if status in _PASSING:
            raise _Interruption(f"{self.host} answers {_status(status)}", _retry_after(response))
        if status == HTTPStatus.PARTIAL_CONTENT and have:
            declared = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            if not declared or int(declared[1]) != have:
                found = f"bytes that begin elsewhere ({response.headers.get('Content-Range')})"
                raise self.error(found, f"byte {have} and those after it")
            if declared[2] not in ("*", str(self.file.bytes)):
                raise self._wrong_size(int(declared[2]))
            return have
        if status != HTTPStatus.OK:
            denied = status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
            raise self.error(_status(status), "the file", f"User and password go into ~/.netrc. {_MIRROR}" * denied)
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) != self.file.bytes:
            raise self._wrong_size(int(length))
        if have:
            logger.warning("download: %s begins anew, %s sends all of it or has changed it", self.file.name, self.host)
        return 0

    def _store(self, response: requests.Response, start: int) -> None:
        """Append an answer to the partial file, or begin that anew."""
        headers = response.headers
        # A weak mark stands for several versions, and so for no range of bytes.
        strong = [mark for mark in (headers.get("ETag"), headers.get("Last-Modified")) if mark and mark[:2] != "W/"]
        with self.part.open("ab" if start else "wb") as part:
            write_json(self.mark, {"url": self.url, "mark": strong[0] if strong else None})
            have = start
            with self._meter(start) as count:
                # read1 gives what has come: nothing of it is lost when the connection breaks after it.
                while block := response.raw.read1(_BLOCK, decode_content=False):
                    have += len(block)
                    if have > self.file.bytes:
                        break
                    part.write(block)
                    count(have)
        if have != self.file.bytes:  # without an error: the server holds this for the whole
            self._discard()
            raise self._wrong_size(have)

    @contextmanager
    def _meter(self, start: int) -> Iterator[Callable[[int], None]]:
        """What tells people how many MiB there are."""
        done, whole = start // _MIB, math.ceil(self.file.bytes / _MIB)
        with closing(track(range(whole - done), f"download {self.file.name}", "MiB", done=done)) as steps:
            next(steps)
            shown = done

            def count(have: int) -> None:
                nonlocal shown
                while shown < have // _MIB:
                    next(steps, None)
                    shown += 1

            yield count

    def _known_mark(self) -> str | None:
        """The server's mark of the version that the partial file is of; another server's means nothing to this one."""
        try:
            record = read_json(self.mark)
            return record["mark"] if record["url"] == self.url else None
        except (OSError, ValueError, KeyError):
            return None

    def _wait(self, problem: _Interruption, fruitless: int) -> None:
        """Let time pass before the next attempt.

        Raises:
            DownloadError: there have been enough, or the server asks for more time than is to be spent.
        """
        have, longest = self._have(), self.settings["longest_wait_seconds"]
        later = f"Give the same command again later: it goes on from {self._progress(have)}."
        if fruitless >= self.settings["attempts"]:
            raise self.error(f"{problem}, {fruitless} times with hardly a byte", "an answer", later)
        if problem.wait is not None and problem.wait > longest:
            asked = f"{problem}, asking for {duration(problem.wait)} until the next request"
            raise self.error(asked, f"at most {duration(longest)} (download.transfer.longest_wait_seconds)", later)
        wait = problem.wait
        if wait is None:
            wait = min(longest, self.settings["wait_seconds"] * 2.0 ** max(0, fruitless - 1))
        at = self._progress(have)
        logger.warning("download: %s: %s at %s; next attempt in %s", self.file.name, problem, at, duration(wait))
        time.sleep(wait)

    def _wrong_size(self, found: int) -> DownloadError:
        return self.error(f"{found} bytes", f"{self.file.bytes}, as the record has it")

    def error(self, found: str, expected: str, remedy: str = "") -> DownloadError:
        return DownloadError(f"{self.file.name} from {self.host}", found, expected, remedy or _MIRROR)


def _retry_after(response: requests.Response) -> float | None:
    """Seconds until the server wants to be asked again; None if it doesn't say."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (moment.astimezone(UTC) - datetime.now(UTC)).total_seconds())


def _status(status: int) -> str:
    known = status in list(HTTPStatus)
    return f"HTTP {status} {HTTPStatus(status).phrase}" if known else f"HTTP {status}"


def _size(count: float) -> str:
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_each:
            return f"{count / bytes_each:.3g} {unit}"
    return f"{count:.0f} bytes"


# --- into the SPIDER layout


def unpack(settings: Mapping[str, Any], folder: Path, raw_dir: Path) -> dict[str, dict[str, int]]:
    """Put the fetched files in their places below `raw_dir`; what is there already stays.

    Returns:
        file name -> how many files of it were "new" and "unchanged".
    Raises:
        DownloadError: an archive that is damaged or not to be trusted, files of somebody else in the way, no room.
    """
    counts = {}
    for file in record_files(settings):
        if file.unpack:
            counts[file.name] = _unpack_archive(file, folder, raw_dir, settings["limits"])
        else:
            counts[file.name] = _place_table(file, folder, raw_dir)
    return counts


def _is_placed(file: RecordFile, raw_dir: Path) -> bool:
    """Whether a table is in its place; another one there is an error."""
    import pooch

    path = raw_dir / file.name
    if not path.exists():
        return False
    if (found := pooch.file_hash(str(path), alg="md5")) != file.md5:
        raise _in_the_way(path, f"md5 {found}", f"{file.md5}, the record's")
    return True


def _in_the_way(path: Path, found: str, expected: str) -> DownloadError:
    remedy = "Nothing is overwritten: move or delete it, or name another folder with --params=raw_dir=DIR."
    return DownloadError(path, found, expected, remedy)


def _place_table(file: RecordFile, folder: Path, raw_dir: Path) -> dict[str, int]:
    if _is_placed(file, raw_dir):
        return {"new": 0, "unchanged": 1}
    write_atomically(raw_dir / file.name, partial(shutil.copyfile, folder / file.name))
    return {"new": 1, "unchanged": 0}


def _list(folder: Path, file: RecordFile) -> Path:
    return folder / f"{file.name}.members.json"


def _members(file: RecordFile, folder: Path) -> dict[str, list[int]]:
    """Path below raw_dir -> size and CRC-32 of what an archive was unpacked to; nothing if it never wholly was."""
    try:
        record = read_json(_list(folder, file))
        return record["files"] if record["md5"] == file.md5 else {}
    except (OSError, ValueError, KeyError):
        return {}


def _unpack_archive(file: RecordFile, folder: Path, raw_dir: Path, limits: Mapping[str, float]) -> dict[str, int]:
    archive = folder / file.name
    if not archive.exists():  # deleted, as people may once it is unpacked
        members = _members(file, folder)
        if not members or _missing(members, file, raw_dir):
            remedy = "Give the same command again, which fetches it."
            raise DownloadError(archive, "neither it nor all that it holds", "one of both", remedy)
        return {"new": 0, "unchanged": len(members)}
    try:
        with ZipFile(archive) as opened:
            entries = checked_entries(opened, file, limits)
            members = {name: [entry.file_size, entry.CRC] for name, entry in entries.items()}
            missing = _missing(members, file, raw_dir)
            _require(sum(entries[name].file_size for name in missing), raw_dir)
            for left in (raw_dir / file.unpack).glob(f"{PARTIAL}*"):  # an interrupted run's
                left.unlink()
            unchanged = len(members) - len(missing)
            for name in track(missing, f"unpack {file.name}", "volumes", done=unchanged):
                write_atomically(raw_dir / name, partial(_extract, opened, entries[name]))
    except (BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _bad_archive(file, f"damaged ({error})", "a zip archive with intact entries") from None
    write_json(_list(folder, file), {"md5": file.md5, "files": members})
    logger.info("download: %s holds %d volumes, %d of them new", file.name, len(members), len(missing))
    return {"new": len(missing), "unchanged": unchanged}


def _bad_archive(file: RecordFile, found: str, expected: str) -> DownloadError:
    remedy = (
        "It is the file that download.files names by its md5: find out whose that is before you use anything of it."
    )
    return DownloadError(file.name, found, expected, remedy)


def checked_entries(archive: ZipFile, file: RecordFile, limits: Mapping[str, float]) -> dict[str, ZipInfo]:
    """The volumes of an archive by the path below the raw folder that they go to.

    All go to the one folder `file.unpack` whichever they lie in; what is no volume, or is hidden, is passed over.

    Raises:
        DownloadError: any entry that leads out of the folder, is a link or encrypted, more or larger ones than the
            limits say, two that would become one file.
    """
    listed = archive.infolist()
    if len(listed) > limits["entries"]:
        raise _bad_archive(file, f"{len(listed)} entries", f"at most {limits['entries']} (download.limits.entries)")
    chosen: dict[str, ZipInfo] = {}
    names: dict[str, str] = {}
    for entry in listed:
        _check_entry(file, entry, limits)
        folders = entry.filename.split("/")
        name = folders.pop()
        hidden = name.startswith(".") or "__MACOSX" in folders
        if not entry.is_dir() and not hidden and split_volume_name(name)[1]:
            if not _NAME.fullmatch(name):
                raise _bad_archive(file, f"a volume called {name!r}", "letters, digits, '.', '_' and '-'")
            # Without case, as some file systems compare names.
            if other := names.get(name.lower()):
                raise _bad_archive(file, f"both {other} and {entry.filename}", "volumes of different names")
            names[name.lower()] = entry.filename
            chosen[f"{file.unpack}/{name}"] = entry
    total = sum(entry.file_size for entry in chosen.values())
    if total > limits["total_bytes"]:
        most = f"at most {_size(limits['total_bytes'])} (download.limits.total_bytes)"
        raise _bad_archive(file, f"{_size(total)} once unpacked", most)
    if not chosen:
        raise _bad_archive(file, "no volumes", "the record's")
    if passed_over := sum(not entry.is_dir() for entry in listed) - len(chosen):
        logger.info("download: %s holds %d other files, which are passed over", file.name, passed_over)
    return chosen


def _check_entry(file: RecordFile, entry: ZipInfo, limits: Mapping[str, float]) -> None:
    """What an archive of volumes has no reason to hold; even where it would do no harm, the archive is not the one."""
    name = entry.orig_filename  # as it is stored: zipfile mends some of the following
    if name.startswith("/") or ".." in name.split("/") or re.search(r"[\\:\x00-\x1f]", name):
        raise _bad_archive(file, f"an entry called {name!r}", "paths that stay in their folder")
    # The kind of file, where Unix made the archive; 0 elsewhere.
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _bad_archive(file, f"{name} is a link or a device", "files and folders")
    if entry.flag_bits & 0x41:
        raise _bad_archive(file, f"{name} is encrypted", "plain entries")
    if entry.file_size > limits["entry_bytes"]:
        most = f"at most {_size(limits['entry_bytes'])} (download.limits.entry_bytes)"
        raise _bad_archive(file, f"{name} has {_size(entry.file_size)}", most)


def _extract(archive: ZipFile, entry: ZipInfo, path: Path) -> None:
    # zipfile gives no more than the declared bytes, whatever an entry holds, and compares the CRC at their end.
    with archive.open(entry) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, _MIB)
        if target.tell() != entry.file_size:
            raise BadZipFile(f"{entry.filename} holds {target.tell()} bytes, declared are {entry.file_size}")


def _missing(members: Mapping[str, list[int]], file: RecordFile, raw_dir: Path) -> list[str]:
    """Those of an archive's files that are not there.

    Raises:
        DownloadError: one is there with other contents. Files get their names when they are whole: it is somebody's.
    """
    there = [name for name in members if (raw_dir / name).exists()]
    for name in track(there, f"check {file.unpack}", "volumes"):
        path, (size, crc) = raw_dir / name, members[name]
        if (found := path.stat().st_size) != size:
            raise _in_the_way(path, f"{found} bytes", f"the {size} of the record's")
        if _crc(path) != crc:
            raise _in_the_way(path, "other contents", "the record's")
    return [name for name in members if name not in set(there)]


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_MIB):
            crc = zlib.crc32(block, crc)
    return crc
