"""Folders on other storage: what travels, what stays, in which order; in fsspec's memory and on an S3 server here."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import time
import uuid

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lumbarflow import storage
from lumbarflow.storage import StorageError, WorkingCopy, folder_of, is_remote, set_credentials


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def there(cache):
    """A folder of the memory's storage: (its address, its file system)."""
    address = f"memory://{uuid.uuid4().hex}/scans"
    yield address, fsspec.filesystem("memory")
    fsspec.filesystem("memory").store.clear()


def put(there, **files):
    address, filesystem = there
    for name, text in files.items():
        with filesystem.open(f"{address}/{name.replace('__', '/').replace('_json', '.json')}", "w") as file:
            file.write(text)


def held(there) -> dict[str, str]:
    address, filesystem = there
    root = filesystem._strip_protocol(address)
    return {path.removeprefix(f"{root}/"): filesystem.cat(path).decode() for path in filesystem.find(root)}


def texts(folder) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


class Watched:
    """A file system that keeps what was asked of it."""

    def __init__(self, filesystem):
        self.asked: list[tuple[str, str]] = []
        self._filesystem = filesystem

    def __getattr__(self, name):
        function = getattr(self._filesystem, name)

        def call(*arguments, **options):
            if name in ("get_file", "put_file", "rm_file"):
                address = next(a for a in arguments if "://" in str(a))
                self.asked.append((name, address.rsplit("scans/", 1)[1]))
            return function(*arguments, **options)

        return call if callable(function) else function


@pytest.fixture
def watched(there, monkeypatch):
    watched = Watched(there[1])
    monkeypatch.setattr(WorkingCopy, "_filesystem", lambda self: watched)
    return watched


@pytest.mark.parametrize(
    "path, remote",
    [("s3://bucket/x", True), ("memory://x", True), ("/data/x", False), ("x", False), ("file:///data/x", False)],
)
def test_what_is_on_another_storage(path, remote):
    assert is_remote(path) is remote


def test_a_folder_here_is_its_own_copy(tmp_path, cache):
    (tmp_path / "x").mkdir()
    for address in (tmp_path / "x", f"file://{tmp_path}/x", f"{tmp_path}/x/"):
        folder = WorkingCopy(address)
        assert folder.pull() == tmp_path / "x"
        folder.push()
        with folder.pushing() as path:
            assert path == tmp_path / "x"
    assert not cache.exists()
    (tmp_path / "x/a").touch()
    assert [folder.exists(name) for name in "ab"] == [True, False]


def test_files_and_their_folders():
    for file, folder, name in (("/a/b.mha", "/a", "b.mha"), ("/b.mha", "/", "b.mha"), ("b.mha", ".", "b.mha")):
        found, name_found = folder_of(file)
        assert (found.address, name_found) == (folder, name)
    assert folder_of("s3://bucket/a/b.mha")[0].address == "s3://bucket/a"


def test_only_what_differs_is_fetched(there, watched):
    put(there, a="1", b__c="2")
    folder = WorkingCopy(there[0])
    assert texts(folder.pull()) == {"a": "1", "b/c": "2"}
    assert sorted(watched.asked) == [("get_file", "a"), ("get_file", "b/c")]
    put(there, a="3")
    watched.asked.clear()
    assert texts(WorkingCopy(there[0]).pull()) == {"a": "3", "b/c": "2"}
    assert watched.asked == [("get_file", "a")]


def test_single_files_are_fetched_alone(there, watched):
    put(there, a="1", b="2")
    folder = WorkingCopy(there[0])
    folder.pull(["a", "absent"])
    assert texts(folder.path) == {"a": "1"}
    there[1].rm(f"{there[0]}/a")
    folder.pull(["a"])
    assert texts(folder.path) == {}, "a file that is gone there is not taken for one that is there"


def test_what_is_gone_there_is_removed_here_unless_it_was_changed_here(there):
    put(there, a="1", b="2")
    folder = WorkingCopy(there[0])
    folder.pull()
    (folder.path / "b").write_text("mine")
    there[1].rm([f"{there[0]}/a", f"{there[0]}/b"])
    assert texts(folder.pull()) == {"b": "mine"}
    folder.push()
    assert held(there) == {"b": "mine"}


def test_only_what_differs_is_sent_and_what_is_removed_is_removed_there(there, watched):
    folder = WorkingCopy(there[0])
    (folder.path / "b").mkdir(parents=True)
    (folder.path / "a").write_text("1")
    (folder.path / "b/c").write_text("2")
    (folder.path / "b/.partial-x").write_text("half")
    folder.push()
    assert held(there) == {"a": "1", "b/c": "2"}
    (folder.path / "a").unlink()
    (folder.path / "b/c").write_text("3")
    watched.asked.clear()
    folder.push()
    assert held(there) == {"b/c": "3"}
    assert watched.asked == [("rm_file", "a"), ("put_file", "b/c")]
    watched.asked.clear()
    folder.push()
    folder.pull()
    assert watched.asked == []


def test_others_never_read_a_half_of_something_as_a_whole(there, watched):
    folder = WorkingCopy(there[0])
    folder.path.mkdir(parents=True)
    for text in "12":
        for name in ("a.npy", "record.json", "z.npy"):
            (folder.path / name).write_text(text * len(text))
        watched.asked.clear()
        folder.push()
        *first, last = watched.asked
        if text == "2":
            assert first.pop(0) == ("rm_file", "record.json")
        assert sorted(first) == [("put_file", "a.npy"), ("put_file", "z.npy")], "side by side, in any order"
        assert last == ("put_file", "record.json")


def test_what_was_not_sent_is_sent_by_the_next_run(there, monkeypatch):
    folder = WorkingCopy(there[0])
    folder.path.mkdir(parents=True)
    for name in "ab":
        (folder.path / name).write_text(name)
    real = MemoryFileSystem.put_file

    def break_at_b(filesystem, local, address):
        if address.endswith("b"):
            raise ConnectionResetError("gone")
        return real(filesystem, local, address)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "put_file", break_at_b)
        with pytest.raises(StorageError, match=r"scans: cannot write there \(ConnectionResetError: gone\). .*check"):
            folder.push()
    assert held(there) == {"a": "a"}
    again = WorkingCopy(there[0])
    again.pull()
    again.push()
    assert held(there) == {"a": "a", "b": "b"}


def test_a_change_on_both_sides_is_told_of(there, caplog):
    put(there, a="1")
    folder = WorkingCopy(there[0])
    folder.pull()
    (folder.path / "a").write_text("mine")
    put(there, a="theirs")
    assert texts(folder.pull()) == {"a": "theirs"}
    assert "scans/a has changed there and here; here it is replaced" in caplog.text


def test_what_takes_long_to_send_is_sent_less_often(there, monkeypatch):
    folder, begun, twice = WorkingCopy(there[0]), [], threading.Event()

    def slow_push(**_):
        begun.append(time.monotonic())
        if len(begun) == 2:
            twice.set()
        time.sleep(0.05)

    monkeypatch.setattr(folder, "push", slow_push)
    with folder.pushing(0.01):
        assert twice.wait(30)
    assert begun[1] - begun[0] >= 0.05 + 9 * 0.05


def test_it_is_taken_over_while_the_work_goes_on_and_when_it_fails(there):
    folder = WorkingCopy(there[0])
    with pytest.raises(RuntimeError, match="the work"), folder.pushing(0.01) as path:
        path.mkdir(parents=True)
        (path / "a").write_text("1")
        for _ in range(500):
            if held(there) == {"a": "1"}:
                break
            time.sleep(0.01)
        assert held(there) == {"a": "1"}
        (path / "b").write_text("2")
        raise RuntimeError("the work")
    assert held(there) == {"a": "1", "b": "2"}


def series(folder, version):
    """Write a series of two files anew, as a store does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("image.npy", "record.json"):
        (folder / name).write_text(version)


@pytest.mark.parametrize("moment", ["image.npy", "record.json"])
def test_a_series_that_is_made_anew_while_it_is_sent_is_never_published_in_halves(there, monkeypatch, moment):
    folder = WorkingCopy(there[0])
    series(folder.path, "first")
    folder.push()
    series(folder.path, "the second")
    real, made = storage._status, []

    def status(path):
        found = real(path)
        if path.name == moment and not made:
            made.append(True)
            series(folder.path, "the very last")
        return found

    monkeypatch.setattr(storage, "_status", status)
    folder.push()
    assert made and "record.json" not in held(there)
    folder.push()
    assert held(there) == {"image.npy": "the very last", "record.json": "the very last"}


def test_a_series_that_another_machine_makes_anew_is_read_whole(there, monkeypatch):
    put(there, image="first", record_json="first")
    real, made = MemoryFileSystem.get_file, []

    def get_file(filesystem, address, local):
        real(filesystem, address, local)
        if not made:
            made.append(True)
            put(there, image="second", record_json="second")

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    assert texts(WorkingCopy(there[0]).pull()) == {"image": "second", "record.json": "second"}


def test_a_folder_that_is_written_to_all_the_time_is_not_read(there, monkeypatch):
    put(there, image="1")
    real, count = MemoryFileSystem.get_file, iter(range(100))

    def get_file(filesystem, address, local):
        real(filesystem, address, local)
        put(there, image=str(next(count)))

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    with pytest.raises(StorageError, match="scans: changes while it is read; expected nobody to write there now"):
        WorkingCopy(there[0]).pull()


def test_of_two_versions_none_is_put_together(there):
    folder = WorkingCopy(there[0])
    series(folder.path, "p1")
    folder.push()
    series(folder.path, "mine")
    put(there, record_json="theirs")  # with the same image as before
    assert texts(folder.pull()) == {"image.npy": "p1", "record.json": "theirs"}


def test_an_interrupted_pull_is_taken_up_again_and_removes_nothing_there(there, monkeypatch):
    put(there, image="1", record_json="1")
    folder = WorkingCopy(there[0])
    folder.pull()
    put(there, image="2", record_json="2")

    def refuse(*arguments, **options):
        raise ConnectionResetError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "get_file", refuse)
        with pytest.raises(StorageError, match="cannot read there"):
            folder.pull()
    assert "record.json" not in texts(folder.path), "it spoke for another image"
    folder.push()
    assert held(there) == {"image": "2", "record.json": "2"}
    assert texts(folder.pull()) == held(there)


def test_a_copy_that_was_cleaned_up_removes_nothing_there(there):
    put(there, a="1")
    folder = WorkingCopy(there[0])
    with pytest.raises(StorageError, match="copy .* is gone; nothing is removed there"), folder.pushing():
        shutil.rmtree(folder.pull())
    assert held(there) == {"a": "1"}


def test_a_folder_can_be_kept_from_losing_anything(there):
    put(there, a="1", b="2")
    folder = WorkingCopy(there[0])
    with folder.pushing(remove=False):
        (folder.pull() / "a").unlink()
    assert held(there) == {"a": "1", "b": "2"}


def test_the_works_own_error_is_the_one_that_is_told(there, monkeypatch, caplog):
    def refuse(*arguments, **options):
        raise ConnectionResetError("gone")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    folder = WorkingCopy(there[0])
    with pytest.raises(ValueError, match="NaN"), folder.pushing():
        series(folder.path, "first")
        raise ValueError("NaN")
    assert "cannot write there (ConnectionResetError: gone)" in caplog.text


def test_two_data_sets_of_one_folder_send_a_file_once(there, watched):
    one, other = WorkingCopy(there[0]), WorkingCopy(there[0])
    series(one.path, "first")
    threads = [threading.Thread(target=folder.push) for folder in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(watched.asked) == [("put_file", "image.npy"), ("put_file", "record.json")]


def test_a_storage_that_marks_no_change_is_refused(there, monkeypatch):
    put(there, a="1")
    monkeypatch.setattr(storage, "_MARKS", ("ETag",))
    with pytest.raises(StorageError, match="scans/a: its storage does not say when a file has changed"):
        WorkingCopy(there[0]).pull()


def test_a_cache_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"its copy in .*/file cannot be used .*LUMBARFLOW_CACHE"):
        WorkingCopy("memory://a/b").pull()


def test_whether_anything_complete_is_there_is_known_without_fetching_it(there, watched):
    folder = WorkingCopy(there[0])
    put(there, image="1")
    assert not folder.exists()
    put(there, s__record_json="1")
    assert folder.exists()
    assert watched.asked == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a\\..\\x"])
def test_a_name_that_leads_out_of_the_folder_is_passed_over(there, name):
    address, filesystem = there
    put(there, a="1")
    found = {f"{filesystem._strip_protocol(address)}/{name}": {"type": "file", "size": 1}}
    watched = filesystem.find(address, detail=True)
    assert len(watched) == 1
    folder = WorkingCopy(address)

    class Evil:
        invalidate_cache = staticmethod(filesystem.invalidate_cache)
        _strip_protocol = staticmethod(filesystem._strip_protocol)
        find = staticmethod(lambda *a, **k: found)

    folder._filesystem = Evil
    folder.pull()
    assert not folder.path.exists()


@pytest.mark.parametrize("address", ["s3://", "s3:///x", "s3://bucket/../x", "s3://bucket//x"])
def test_an_address_without_a_plain_place_is_refused(address, cache):
    with pytest.raises(StorageError, match=r"no bucket and folder; expected s3://BUCKET/FOLDER"):
        WorkingCopy(address)


def test_a_storage_that_nobody_knows_is_named(cache):
    with pytest.raises(StorageError, match=r"cloud9://x/y: Protocol not known: cloud9.* Expected a storage that"):
        WorkingCopy("cloud9://x/y").pull()


def test_buckets_of_two_servers_have_copies_of_their_own(cache):
    one, two = ({"client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}"}} for port in (1, 2))
    paths = {WorkingCopy("s3://bucket/x", options).path for options in (one, two, {})}
    assert len(paths) == 3
    assert all(path.is_relative_to(cache) and path.parts[-2:] == ("bucket", "x") for path in paths)


def test_credentials_hold_for_the_process_and_travel_with_the_folder(cache, monkeypatch):
    monkeypatch.setattr(fsspec.config, "conf", {})
    set_credentials({"s3": {"key": "me", "secret": "hush"}})
    sent = pickle.dumps(WorkingCopy("s3://bucket/x"))
    monkeypatch.setattr(fsspec.config, "conf", {})
    assert pickle.loads(sent)._options == {"key": "me", "secret": "hush"}
    set_credentials({"s3": {"key": "me"}})
    set_credentials({})
    assert fsspec.config.conf == {}, "of another environment, earlier in this process"
    with pytest.raises(ValueError, match="storage is no section"):
        set_credentials("hush")
    with pytest.raises(ValueError, match="storage.s3 is no section; expected what fsspec's file system s3") as error:
        set_credentials({"s3": "hush"})
    assert "hush" not in str(error.value)


def test_copies_lie_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv(storage.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / "lumbarflow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / ".cache/lumbarflow"
    assert os.path.isabs(storage.cache_folder())
