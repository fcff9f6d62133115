"""The public record from a server on this machine that behaves as badly as any: transfer, checks, unpacking."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import shutil
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pooch
import pytest

from lumbarflow import download
from lumbarflow.download import DownloadError, address, fetch, record_files, unpack, without_credentials

TRANSFER = {
    "connect_seconds": 20, "silence_seconds": 20, "attempts": 3, "wait_seconds": 0.01, "longest_wait_seconds": 2,
}  # fmt: skip
LIMITS = {"entries": 10, "entry_bytes": 10_000, "total_bytes": 20_000}
NOISE = np.random.default_rng(0).bytes(4000)


def zipped(*entries: tuple[Any, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive, pytest.MonkeyPatch.context() as quiet:
        quiet.setattr("warnings.warn", lambda *arguments, **options: None)  # of names that come twice
        for name, content in entries:
            # Of one date: the same bytes, and so the same tests, in every process.
            entry = zipfile.ZipInfo(name) if isinstance(name, str) else name
            archive.writestr(entry, content, compress_type=method if isinstance(name, str) else None)
    return file.getvalue()


IMAGES = zipped(("images/", b""), ("images/1_t1.mha", NOISE), ("images/2_t2.mha", b"two"), ("LICENSE", b"x"))
TABLE = b"new_file_name;subset\n1_t1;training\n"


def settings(base: str = "http://127.0.0.1:9", images: bytes = IMAGES, **changes: Any) -> dict[str, Any]:
    def row(name: str, content: bytes, **more: str) -> dict[str, Any]:
        return {"name": name, "bytes": len(content), "md5": hashlib.md5(content).hexdigest(), **more}

    rows = [row("images.zip", images, unpack="images"), row("overview.csv", TABLE)]
    given = {"source": base, "mirror": None, "licence": "L", "attribution": "A", "files": rows}
    return given | {"transfer": dict(TRANSFER), "limits": dict(LIMITS)} | changes


class Server:
    """Files under their names; `script` says what becomes of the next requests, then all are answered properly."""

    def __init__(self):
        self.files = {"images.zip": IMAGES, "overview.csv": TABLE}
        self.script: list[Callable[[BaseHTTPRequestHandler, bytes], None]] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.etag = '"1"'
        self.released = threading.Event()

    def asked(self, name: str = "images.zip") -> list[dict[str, str]]:
        """The headers of the requests for a file."""
        return [headers for path, headers in self.requests if path.endswith(f"/{name}")]


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append((self.path, dict(self.headers)))
            content = state.files.get(self.path.rpartition("/")[2], b"")
            (state.script.pop(0) if state.script else answer())(self, content)

        def log_message(self, *arguments) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address) -> None:
            pass  # clients that went away

    with Quiet(("127.0.0.1", 0), Handler) as running:
        Handler.server_state = state
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        state.url = f"http://127.0.0.1:{running.server_port}/spider"
        yield state
        state.released.set()
        running.shutdown()


def answer(upto: int | None = None, stall: bool = False, ranges: bool = True, **headers: str) -> Callable:
    """The file, or the rest that is asked for: whole, or `upto` so many bytes and then the end, or silence."""

    def reply(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        state, wanted = handler.server_state, handler.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and ranges else 0
        if handler.headers.get("If-Range", state.etag) != state.etag:
            start = 0
        said = {"ETag": state.etag, "Content-Length": str(len(content) - start)}
        if start:
            said["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.send_response(206 if start else 200)
        for name, value in (said | {key.replace("_", "-"): value for key, value in headers.items()}).items():
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content[start:][:upto])
        handler.wfile.flush()
        if stall:
            state.released.wait(5)

    return reply


def status(code: int, **headers: str) -> Callable:
    def reply(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return reply


@pytest.fixture
def folders(tmp_path) -> SimpleNamespace:
    return SimpleNamespace(raw=tmp_path / "raw", downloads=tmp_path / "raw/downloads")


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """Waits between attempts, which don't take time."""
    taken: list[float] = []
    monkeypatch.setattr("lumbarflow.download.time.sleep", taken.append)
    return taken


# --- the record


def test_the_record_is_spiders():
    import yaml

    conf = Path(__file__).parents[1] / "conf"
    given = yaml.safe_load((conf / "base/parameters_download.yml").read_text())["download"]
    files = record_files(given)
    assert {file.name: file.bytes for file in files} == {
        "images.zip": 3_700_562_886, "masks.zip": 58_222_897, "overview.csv": 119_856,
        "radiological_gradings.csv": 34_417,
    }  # fmt: skip
    assert [file.unpack for file in files] == ["images", "masks", None, None]
    assert address(given) == ("https://zenodo.org/records/10159290/files/", None)
    real = yaml.safe_load((conf / "spider/parameters_register.yml").read_text())["registration"]["data"]["real"]
    assert (given["licence"], given["attribution"]) == (real["licence"], real["attribution"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "../x.zip"}, r"name '\.\./x\.zip'; expected letters, digits"),
        ({"name": "OVERVIEW.csv"}, "a name comes twice"),
        ({"bytes": "12"}, "images.zip has bytes '12' and md5"),
        ({"md5": 12}, "and md5 12; expected a whole number and 32 hexadecimal digits"),
        ({"unpack": ".."}, r"to be unpacked to '\.\.'; expected"),
        ({"sha1": "0"}, r"unknown setting download\.files\.sha1"),
    ],
)
def test_tables_that_cannot_be_used(row, message):
    given = settings()
    given["files"][0] |= row
    with pytest.raises(ValueError, match=message):
        record_files(given)


def test_misspelt_settings_are_named():
    with pytest.raises(ValueError, match="unknown setting download.transfer.tries"):
        record_files(settings(transfer=TRANSFER | {"tries": 1}))


@pytest.mark.parametrize(
    ("mirror", "expected"),
    [
        ("http://h:8080/a", ("http://h:8080/a/", None)),
        ("https://ann:p%40ss@h/a/", ("https://h/a/", ("ann", "p@ss"))),
        ("https://token@h", ("https://h/", ("token", ""))),
    ],
)
def test_addresses_and_their_credentials_are_kept_apart(mirror, expected):
    assert address(settings(mirror=mirror)) == expected


@pytest.mark.parametrize("mirror", ["ftp://h/secret", "/secret", "http://u:a/secret@h/", "http://h/?key=secret", "x"])
def test_what_is_no_address_is_not_repeated(mirror):
    with pytest.raises(ValueError, match="not the address of a folder; expected such as https://") as error:
        address(settings(mirror=mirror))
    assert "secret" not in str(error.value)


def test_credentials_are_left_out_of_texts():
    text = "from http://ann:se@cret@h:80/a, https://h/b@c and ann@h.org"
    assert without_credentials(text) == "from http://h:80/a, https://h/b@c and ann@h.org"


# --- the transfer


def test_files_come_whole_once_and_are_then_left_alone(server, folders, caplog):
    given = settings(server.url)
    with caplog.at_level(logging.INFO):
        assert fetch(given, folders.downloads, folders.raw) == {"images.zip": "fetched", "overview.csv": "fetched"}
    assert (folders.downloads / "images.zip").read_bytes() == IMAGES
    assert sorted(path.name for path in folders.downloads.iterdir()) == ["images.zip", "overview.csv"]
    assert re.search(r"images\.zip \(4\.\d+ kB\) from 127\.0\.0\.1", caplog.text)
    assert fetch(given, folders.downloads, folders.raw) == dict.fromkeys(
        ("images.zip", "overview.csv"), "there already"
    )
    assert len(server.requests) == 2


def test_a_truncated_transfer_goes_on_where_it_ended(server, folders, naps, caplog):
    server.script = [answer(upto=1000), answer(upto=500)]
    fetch(settings(server.url), folders.downloads, folders.raw)
    assert (folders.downloads / "images.zip").read_bytes() == IMAGES
    asked = [(headers.get("Range"), headers.get("If-Range")) for headers in server.asked()]
    assert asked == [(None, None), ("bytes=1000-", '"1"'), ("bytes=1500-", '"1"')]
    assert f"the connection to 127.0.0.1 broke at byte 1000 of {len(IMAGES)}; next attempt in" in caplog.text
    assert naps == [0.01, 0.02]


def test_a_stalled_transfer_is_asked_to_go_on(server, folders, caplog):
    server.script = [answer(upto=1000, stall=True)]
    given = settings(server.url, transfer=TRANSFER | {"silence_seconds": 0.4, "attempts": 20})
    fetch(given, folders.downloads, folders.raw)
    assert (folders.downloads / "images.zip").read_bytes() == IMAGES
    # Busy machines may fall silent by themselves.
    assert (server.asked()[0].get("Range"), server.asked()[-1].get("Range")) == (None, "bytes=1000-")
    assert "127.0.0.1 was silent for 0.4 s at byte 1000" in caplog.text


def test_the_next_run_goes_on_from_what_one_has_left(server, folders, naps):
    server.script = [answer(upto=700), status(500), status(503)]
    with pytest.raises(DownloadError, match=r"HTTP 503 Service Unavailable, 3 times with hardly a byte; expected an "
                       r"answer\. Give the same command again later: it goes on from byte 700 of"):  # fmt: skip
        fetch(settings(server.url), folders.downloads, folders.raw)
    assert (folders.downloads / "images.zip.part").read_bytes() == IMAGES[:700]
    assert not (folders.downloads / "images.zip").exists()
    fetch(settings(server.url), folders.downloads, folders.raw)
    assert server.asked()[-1]["Range"] == "bytes=700-"
    assert (folders.downloads / "images.zip").read_bytes() == IMAGES
    assert naps == [0.01, 0.02]


def test_attempts_that_bring_something_are_not_counted(server, folders, naps, monkeypatch):
    monkeypatch.setattr(download, "_MIB", 1000)
    server.script = [answer(upto=1000), status(500), status(500), answer(upto=1000), status(500), status(500)]
    fetch(settings(server.url), folders.downloads, folders.raw)
    assert len(server.asked()) == 7
    assert naps == [0.01, 0.01, 0.02] * 2


def test_the_server_says_when_to_come_back(server, folders, naps):
    later = datetime.now(UTC) + timedelta(seconds=50)
    given = settings(server.url, transfer=TRANSFER | {"longest_wait_seconds": 60})
    server.script = [
        status(429, Retry_After="1"), status(503, Retry_After=format_datetime(later, usegmt=True)),
    ]  # fmt: skip
    fetch(given, folders.downloads, folders.raw)
    assert naps[0] == 1.0 and 30 < naps[1] <= 50 and len(naps) == 2
    shutil.rmtree(folders.raw)
    server.script = [status(429, Retry_After="3600")]
    with pytest.raises(
        DownloadError,
        match=r"429 Too Many Requests, asking for 1 h 0 min until the next request; expected at most 1 min 0 s .* 0 of",
    ):
        fetch(given, folders.downloads, folders.raw)


def test_waits_grow_up_to_the_longest(server, folders, naps):
    server.script = [status(500)] * 4 + [status(502, Retry_After="soon")]
    transfer = TRANSFER | {"attempts": 6, "wait_seconds": 0.5}
    fetch(settings(server.url, transfer=transfer), folders.downloads, folders.raw)
    assert naps == [0.5, 1, 2, 2, 2]


def test_a_server_that_knows_no_ranges_sends_all_again(server, folders, naps, caplog):
    server.script = [answer(upto=1000), answer(ranges=False)]
    fetch(settings(server.url), folders.downloads, folders.raw)
    assert (folders.downloads / "images.zip").read_bytes() == IMAGES
    assert "images.zip begins anew, 127.0.0.1 sends all of it" in caplog.text
    assert len(server.asked()) == 2


def test_two_versions_are_never_joined(server, folders, naps):
    def other_version(handler, content):
        server.etag = '"2"'
        answer()(handler, content)

    server.script = [answer(upto=1000), other_version]
    fetch(settings(server.url), folders.downloads, folders.raw)
    assert server.asked()[1]["If-Range"] == '"1"'
    assert (folders.downloads / "images.zip").read_bytes() == IMAGES


def test_another_server_goes_on_without_the_first_ones_mark(server, folders, naps):
    folders.downloads.mkdir(parents=True)
    (folders.downloads / "images.zip.part").write_bytes(IMAGES[:300])
    mark = '{"url": "https://elsewhere/images.zip", "mark": "\\"7\\""}'
    (folders.downloads / "images.zip.part.json").write_text(mark)
    fetch(settings("http://nobody.invalid", mirror=server.url), folders.downloads, folders.raw)
    assert (server.asked()[0]["Range"], "If-Range" in server.asked()[0]) == ("bytes=300-", False)
    assert (folders.downloads / "images.zip").read_bytes() == IMAGES


def test_a_weak_mark_is_none(server, folders, naps):
    server.script = [answer(upto=1000, ETag='W/"1"')]
    fetch(settings(server.url), folders.downloads, folders.raw)
    assert "If-Range" not in server.asked()[1]


@pytest.mark.parametrize(
    ("part", "script", "asked"),
    [
        (IMAGES, [], []),  # whole, but for its new name
        (IMAGES + b"more", [], [None]),
        (b"", [], [None]),
        (IMAGES[:50], [status(416)], ["bytes=50-", None]),
    ],
)
def test_odd_partial_files(server, folders, naps, part, script, asked):
    folders.downloads.mkdir(parents=True)
    (folders.downloads / "images.zip.part").write_bytes(part)
    server.script = script
    fetch(settings(server.url), folders.downloads, folders.raw)
    assert [headers.get("Range") for headers in server.asked()] == asked
    assert (folders.downloads / "images.zip").read_bytes() == IMAGES


def test_a_run_that_was_killed_before_the_last_check_loses_nothing(server, folders):
    folders.downloads.mkdir(parents=True)
    (folders.downloads / "tmpab_0cd12").write_bytes(IMAGES)
    (folders.downloads / "tmp00000000").touch()
    fetch(settings(server.url), folders.downloads, folders.raw)
    assert sorted(path.name for path in folders.downloads.iterdir()) == ["images.zip", "overview.csv"]
    assert server.asked() == []


def test_another_size_is_another_file(server, folders):
    server.files["images.zip"] = b"please log in"
    message = rf"images.zip from 127\.0\.0\.1: 13 bytes; expected {len(IMAGES)}, as the record has it\. Name a server"
    with pytest.raises(DownloadError, match=message):
        fetch(settings(server.url), folders.downloads, folders.raw)
    server.script = [answer(Content_Length="")]  # found out at the end
    with pytest.raises(DownloadError, match=message):
        fetch(settings(server.url), folders.downloads, folders.raw)
    server.files["images.zip"] = IMAGES + b"more"
    server.script = [answer(Content_Length="")]
    with pytest.raises(DownloadError, match=f"{len(IMAGES) + 4} bytes; expected {len(IMAGES)}"):
        fetch(settings(server.url), folders.downloads, folders.raw)
    assert list(folders.downloads.iterdir()) == []
    # At once, before what has come is given up.
    (folders.downloads / "images.zip.part").write_bytes(IMAGES[:50])
    server.script = [answer(ranges=False)]
    with pytest.raises(DownloadError, match=f"{len(IMAGES) + 4} bytes; expected {len(IMAGES)}"):
        fetch(settings(server.url), folders.downloads, folders.raw)
    assert (folders.downloads / "images.zip.part").read_bytes() == IMAGES[:50]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("bytes 0-99/{size}", r"bytes that begin elsewhere \(bytes 0-99/\d+\); expected byte 50 and those after"),
        ("", r"bytes that begin elsewhere \(None\)"),
        ("bytes 50-99/100", "100 bytes; expected"),
    ],
)
def test_a_range_that_was_not_asked_for(server, folders, said, message):
    folders.downloads.mkdir(parents=True)
    (folders.downloads / "images.zip.part").write_bytes(IMAGES[:50])
    server.script = [answer(Content_Range=said.format(size=len(IMAGES)))]
    with pytest.raises(DownloadError, match=message):
        fetch(settings(server.url), folders.downloads, folders.raw)
    assert (folders.downloads / "images.zip.part").read_bytes() == IMAGES[:50]


def test_a_wrong_checksum_is_one_error_and_no_file(server, folders):
    server.files["images.zip"] = IMAGES[:-1] + b"?"
    found, expected = hashlib.md5(server.files["images.zip"]).hexdigest(), hashlib.md5(IMAGES).hexdigest()
    message = (
        rf"^images\.zip from 127\.0\.0\.1: md5 {found}; expected {expected}, the record's\. It is removed: give the s"
    )
    with pytest.raises(DownloadError, match=message) as error:
        fetch(settings(server.url), folders.downloads, folders.raw)
    assert error.value.__suppress_context__
    assert list(folders.downloads.iterdir()) == []
    assert len(server.asked()) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (404, "HTTP 404 Not Found; expected the file. Name a server that has it with --params=download.mirror=URL"),
        (403, r"HTTP 403 Forbidden; expected the file\. User and password go into ~/\.netrc\. Name"),
        (418, "HTTP 418 I'm a Teapot"),
    ],
)
def test_answers_that_will_not_change_are_not_asked_for_again(server, folders, code, message):
    server.script = [status(code)]
    with pytest.raises(DownloadError, match=message):
        fetch(settings(server.url), folders.downloads, folders.raw)
    assert len(server.requests) == 1


def test_nobody_answers(folders, naps, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(DownloadError, match="the connection to 127.0.0.1 broke, 3 times with hardly a byte"):
        fetch(settings("http://127.0.0.1:1/a"), folders.downloads, folders.raw)


def test_credentials_are_sent_and_never_said(server, folders, naps, caplog, capfd):
    mirror = server.url.replace("://", "://ann:s3cret@")
    server.script = [status(500), answer(upto=10), status(302, Location="/key-k3y/images.zip")]
    with caplog.at_level(logging.DEBUG, logger="lumbarflow"):
        fetch(settings(mirror=mirror), folders.downloads, folders.raw)
        server.script, server.files["overview.csv"] = [status(302, Location="/key-k3y")] * 40, b""
        (folders.downloads / "overview.csv").unlink()
        with pytest.raises(DownloadError, match="no answer that can be used .TooManyRedirects.; expected the f") as e:
            fetch(settings(mirror=mirror), folders.downloads, folders.raw)
    assert server.asked()[0]["Authorization"] == "Basic YW5uOnMzY3JldA=="
    said = caplog.text + str(capfd.readouterr()) + repr(e.value) + repr(e.value.__cause__)
    assert "127.0.0.1" in said and "s3cret" not in said and "k3y" not in said
    assert e.value.__suppress_context__
    assert not pooch.get_logger().isEnabledFor(logging.INFO)  # it would say whole addresses


def test_no_room(server, folders, monkeypatch):
    free = SimpleNamespace(free=2 * len(IMAGES) + len(TABLE) - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(DownloadError, match=r"(\S+) kB free on its disk; expected at least \1 kB\. Make room"):
        fetch(settings(server.url), folders.downloads, folders.raw)
    assert server.requests == []
    folders.downloads.mkdir(parents=True)
    (folders.downloads / "images.zip.part").write_bytes(IMAGES[:1])  # one byte less to come
    fetch(settings(server.url), folders.downloads, folders.raw)


def test_a_table_in_the_way_is_noticed_before_anything_comes(server, folders):
    folders.raw.mkdir()
    (folders.raw / "overview.csv").write_text("mine")
    with pytest.raises(DownloadError, match="overview.csv: md5 .*, the record's. Nothing is overwritten: move or del"):
        fetch(settings(server.url), folders.downloads, folders.raw)
    assert server.requests == []
    assert (folders.raw / "overview.csv").read_text() == "mine"


# --- unpacking


def put(folders: SimpleNamespace, images: bytes = IMAGES) -> None:
    folders.downloads.mkdir(parents=True, exist_ok=True)
    (folders.downloads / "images.zip").write_bytes(images)
    (folders.downloads / "overview.csv").write_bytes(TABLE)


def test_the_spider_layout(folders, caplog):
    # In whichever folder volumes lie; what systems leave in archives is none.
    images = zipped(("spider/Images/1_t1.mha", NOISE), ("2_t2.nii.gz", b"2"), ("__MACOSX/images/._1_t1.mha", b""),
                    ("images/.hidden.mha", b""), ("__MACOSX/images/3_t1.mha", b""), ("a.txt", b""))  # fmt: skip
    put(folders, images)
    with caplog.at_level(logging.INFO):
        counts = unpack(settings(images=images), folders.downloads, folders.raw)
    assert counts == {"images.zip": {"new": 2, "unchanged": 0}, "overview.csv": {"new": 1, "unchanged": 0}}
    files = {path.relative_to(folders.raw).as_posix() for path in folders.raw.rglob("*") if path.is_file()}
    assert files == {"images/1_t1.mha", "images/2_t2.nii.gz", "overview.csv"} | {
        f"downloads/{name}" for name in ("images.zip", "overview.csv", "images.zip.members.json")
    }
    assert (folders.raw / "images/1_t1.mha").read_bytes() == NOISE
    assert (folders.raw / "overview.csv").read_bytes() == TABLE
    assert "images.zip holds 4 other files, which are passed over" in caplog.text


def test_what_is_there_stays_and_what_is_missing_comes(folders):
    put(folders)
    unpack(settings(), folders.downloads, folders.raw)
    (folders.raw / "images/2_t2.mha").unlink()
    left = folders.raw / "images/.partial-x2_t2.mha"  # of an interrupted run
    left.write_bytes(b"tw")
    before = (folders.raw / "images/1_t1.mha").stat()
    assert unpack(settings(), folders.downloads, folders.raw) == {
        "images.zip": {"new": 1, "unchanged": 1}, "overview.csv": {"new": 0, "unchanged": 1},
    }  # fmt: skip
    after = (folders.raw / "images/1_t1.mha").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert (folders.raw / "images/2_t2.mha").read_bytes() == b"two" and not left.exists()


def test_interrupted_unpacking_goes_on(folders, monkeypatch):
    put(folders)
    extract = download._extract

    def interrupted(archive, entry, path):
        path.write_bytes(b"t")
        if entry.filename.endswith("2_t2.mha"):
            raise KeyboardInterrupt
        extract(archive, entry, path)

    monkeypatch.setattr(download, "_extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(settings(), folders.downloads, folders.raw)
    assert [path.name for path in (folders.raw / "images").iterdir()] == ["1_t1.mha"]
    monkeypatch.undo()
    assert unpack(settings(), folders.downloads, folders.raw)["images.zip"] == {"new": 1, "unchanged": 1}


@pytest.mark.parametrize(("mine", "message"), [(b"TWO", "other contents"), (b"mine", "4 bytes; expected the 3 of")])
def test_files_of_somebody_else_are_not_overwritten(folders, mine, message):
    put(folders)
    (folders.raw / "images").mkdir()
    (folders.raw / "images/2_t2.mha").write_bytes(mine)
    with pytest.raises(DownloadError, match=f"2_t2.mha: {message}.*Nothing is overwritten"):
        unpack(settings(), folders.downloads, folders.raw)
    assert [path.read_bytes() for path in (folders.raw / "images").iterdir()] == [mine]


def test_an_archive_may_be_deleted_once_it_is_unpacked(server, folders):
    given = settings(server.url)
    fetch(given, folders.downloads, folders.raw)
    unpack(given, folders.downloads, folders.raw)
    (folders.downloads / "images.zip").unlink()
    (folders.downloads / "overview.csv").unlink()
    assert fetch(given, folders.downloads, folders.raw) == dict.fromkeys(
        ("images.zip", "overview.csv"), "unpacked already"
    )
    assert unpack(given, folders.downloads, folders.raw)["images.zip"] == {"new": 0, "unchanged": 2}
    assert len(server.requests) == 2
    (folders.raw / "images/1_t1.mha").unlink()
    with pytest.raises(DownloadError, match="neither it nor all that it holds; expected one of both. Give the same"):
        unpack(given, folders.downloads, folders.raw)
    assert fetch(given, folders.downloads, folders.raw)["images.zip"] == "fetched"
    assert unpack(given, folders.downloads, folders.raw)["images.zip"] == {"new": 1, "unchanged": 1}
    # Another version of the record is another archive.
    given["files"][0]["md5"] = "0" * 32
    with pytest.raises(DownloadError, match="expected 00000"):
        fetch(given, folders.downloads, folders.raw)


def link(name: str, kind: int = stat.S_IFLNK) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
    return entry


MALICIOUS = {
    "absolute": ([("/etc/1_t1.mha", b"x")], r"called '/etc/1_t1\.mha'; expected paths that stay in their folder"),
    "outwards": ([("images/../../1_t1.mha", b"x")], r"called 'images/\.\./\.\./1_t1\.mha'"),
    "drive": ([("C:1_t1.mha", b"x")], "an entry called 'C:1_t1.mha'"),
    "backslash": ([("..\\1_t1.mha", b"x")], "called '.*1_t1.mha'; expected paths that stay"),
    "outwards, though passed over": ([("../notes.txt", b"x"), ("1_t1.mha", b"x")], r"called '\.\./notes\.txt'"),
    "link": ([(link("images/1_t1.mha"), b"/etc/passwd")], "1_t1.mha is a link or a device; expected files and fold"),
    "device": ([(link("1_t1.mha", stat.S_IFBLK), b"")], "is a link or a device"),
    "twice": ([("a/1_t1.mha", b"x"), ("b/1_t1.mha", b"x")], "both a/1_t1.mha and b/1_t1.mha; expected volumes of diff"),
    "case": ([("1_t2_space.mha", b"x"), ("1_t2_SPACE.mha", b"x")], "both 1_t2_space.mha and 1_t2_SPACE.mha"),
    "odd name": ([("images/1 t1\u202e.mha", b"x")], "a volume called .*; expected letters, digits"),
    "many": ([(f"{number}_t1.mha", b"x") for number in range(11)], "11 entries; expected at most 10 .download.limits"),
    "large": ([("1_t1.mha", bytes(10_001))], "1_t1.mha has 10 kB; expected at most 10 kB .download.limits.entry_byt"),
    "large together": ([(f"{n}_t1.mha", bytes(7000)) for n in range(3)], "21 kB once unpacked; expected at most 20 kB"),
    "nothing": ([("readme.txt", b"x")], "no volumes; expected the record's"),
}  # fmt: skip


def refused(folders: SimpleNamespace, images: bytes, message: str) -> None:
    put(folders, images)
    outside = {path for path in folders.raw.parent.rglob("*") if path != folders.raw / "images"}
    with pytest.raises(DownloadError, match=message):
        unpack(settings(images=images), folders.downloads, folders.raw)
    assert {path for path in folders.raw.parent.rglob("*") if path != folders.raw / "images"} == outside


@pytest.mark.parametrize("kind", MALICIOUS)
def test_malicious_archives_leave_nothing(folders, kind):
    entries, message = MALICIOUS[kind]
    refused(folders, zipped(*entries), f"images.zip: .*{message}")


def edited(archive: bytes, change: Callable[[bytearray, int, int], None]) -> bytes:
    """An archive of one entry with its headers changed: where the local and the central one begin."""
    content = bytearray(archive)
    change(content, content.index(b"PK\3\4"), content.index(b"PK\1\2"))
    return bytes(content)


def test_encrypted_entries(folders):
    def encrypt(content, local, central):
        content[local + 6] |= 1
        content[central + 8] |= 1

    refused(folders, edited(zipped(("1_t1.mha", b"x")), encrypt), "1_t1.mha is encrypted; expected plain entries")


def test_an_entry_that_holds_more_than_it_says(folders):
    def understate(content, local, central):
        for place in (local + 22, central + 24):
            content[place : place + 4] = (100).to_bytes(4, "little")

    bomb = edited(zipped(("1_t1.mha", bytes(5_000_000))), understate)
    written = []
    with pytest.MonkeyPatch.context() as watch:
        copy = shutil.copyfileobj
        watch.setattr(
            "shutil.copyfileobj", lambda source, target, *more: (copy(source, target), written.append(target.tell()))
        )
        refused(
            folders, bomb, "images.zip: damaged .Bad CRC-32 for file '1_t1.mha'.; expected a zip archive with intact"
        )
    assert max(written, default=0) <= 100


def test_an_entry_that_holds_less_than_it_says(folders):
    def overstate(content, local, central):
        for place in (local + 22, central + 24):
            content[place : place + 4] = (9000).to_bytes(4, "little")

    refused(folders, edited(zipped(("1_t1.mha", NOISE)), overstate), "1_t1.mha holds 4000 bytes, declared are 9000")


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (IMAGES[:-30], "damaged .File is not a zip file"),
        (IMAGES.replace(NOISE[100:200], bytes(100)), "damaged .Bad CRC-32 for file 'images/1_t1.mha'"),
        (edited(zipped(("1_t1.mha", NOISE)), lambda content, local, central: content.__setitem__(central + 10, 9)),
         "damaged .That compression method is not supported"),
    ],
)  # fmt: skip
def test_damaged_archives(folders, archive, message):
    refused(folders, archive, f"images.zip: {message}")


def test_no_room_to_unpack(folders, monkeypatch):
    put(folders)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4002))
    with pytest.raises(DownloadError, match="4 kB free on its disk; expected at least 4 kB"):
        unpack(settings(), folders.downloads, folders.raw)
    assert not (folders.raw / "images").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4003))
    unpack(settings(), folders.downloads, folders.raw)


def test_how_far_it_is_is_shown_in_mib(server, folders, naps, monkeypatch):
    shown = []

    def track(items, description, unit, done=0):
        shown.append((len(items), description, unit, done))
        for item in items:
            yield item
            shown.append(f"{description} + 1")

    monkeypatch.setattr(download, "track", track)
    monkeypatch.setattr(download, "_MIB", 1000)
    size = len(IMAGES)
    assert 4000 < size < 5000
    server.script = [answer(upto=2500)]
    fetch(settings(server.url), folders.downloads, folders.raw)
    step = "download images.zip + 1"
    assert shown[:6] == [
        (5, "download images.zip", "MiB", 0),
        step,
        step,
        (3, "download images.zip", "MiB", 2),
        step,
        step,
    ]
