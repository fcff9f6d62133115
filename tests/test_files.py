"""Files appear whole or not at all; digests follow contents."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from lumbarflow.files import (
    code_digest,
    file_digest,
    held_alone,
    read_json,
    value_digest,
    write_atomically,
    write_json,
)


def test_a_file_appears_whole_under_its_name(tmp_path):
    path = tmp_path / "new/folder/table.csv"

    def write(partial):
        assert partial.name.endswith("table.csv") and partial.parent == path.parent  # one rename away
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")

    write_atomically(path, write)
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def write(partial):
        partial.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", lambda partial: partial.write_text("x"))
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_folder_is_held_by_one_and_let_go_when_it_is_killed(tmp_path):
    folder = tmp_path / "new"
    code = (
        "import sys, time\nfrom lumbarflow.files import held_alone\n"
        "with held_alone(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=r"new: another process is writing to it; wait"), held_alone(folder):
            raise AssertionError("two at a time")
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    for _ in range(2):
        with held_alone(folder):
            (folder / "a").touch()
    assert (folder / "a").exists()


def test_a_folder_that_was_held_for_nothing_does_not_stay(tmp_path):
    with pytest.raises(ValueError, match="nothing to do"), held_alone(tmp_path / "new"):
        raise ValueError("nothing to do")
    assert not (tmp_path / "new").exists()
    with held_alone(tmp_path):
        pass
    assert tmp_path.exists()


def test_json_is_sorted_readable_and_comes_back(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ä": True}}
    write_json(tmp_path / "a.json", value)
    write_json(tmp_path / "b.json", {"a": {"ä": True}, "b": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert "ä" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_json_without_standard_meaning_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"dice": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_value_digests_ignore_the_order_of_keys_alone():
    digest = value_digest({"a": 1, "b": [1, 2]})
    assert digest == value_digest({"b": [1, 2], "a": 1})
    others = [{"a": 1, "b": [2, 1]}, {"a": "1", "b": [1, 2]}, {"a": 1, "b": [12]}, {"a": 1}]
    assert len({digest, *map(value_digest, others)}) == 5


def test_code_digests_ignore_comments_layout_and_docstrings_alone(tmp_path):
    def digest(text: str) -> str:
        (tmp_path / "code.py").write_text(text)
        return code_digest([tmp_path / "code.py"])

    first = digest('"""One."""\n\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    assert digest("def f( x ):  # why\n    return (x + 1)\n") == first
    assert digest("def f(x):\n    return x + 2\n") != first
    # A string that is no docstring is part of what the code does.
    assert digest("def f(x):\n    y = 'Doc.'\n    return x + 1\n") != first


def test_file_digests_follow_the_bytes(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    many = bytes(range(251)) * 5000  # more than one block
    first.write_bytes(many)
    second.write_bytes(b"yz")
    assert file_digest([first, second]) == hashlib.blake2b(many + b"yz", digest_size=16).hexdigest()
    assert file_digest([first, second]) != file_digest([second, first])
