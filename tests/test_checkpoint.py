from __future__ import annotations

import json
import os
import zipfile

import numpy as np
import pytest

from lumbarflow.checkpoint import Checkpoint

STATE = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7, np.int64), np.array([1, 2], np.uint32)]
BEST = [np.array([0.5, -0.5], np.float32)]
PROGRESS = {"key": "abc", "history": [{"epoch": 1, "loss": 0.1}], "finished": None}


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(first, second, strict=True)
    )


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "training" / "checkpoint.npz"
    Checkpoint(PROGRESS, STATE, BEST).write(path)
    found = Checkpoint.read(path)
    assert found.progress == PROGRESS
    assert same(found.state, STATE)
    assert same(found.best, BEST)
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint.npz"]


def test_more_than_ten_variables_keep_their_order(tmp_path):
    state = [np.array(k) for k in range(12)]
    Checkpoint(PROGRESS, state, []).write(tmp_path / "c.npz")
    assert [int(value) for value in Checkpoint.read(tmp_path / "c.npz").state] == list(range(12))


def test_no_file_is_no_checkpoint(tmp_path):
    assert Checkpoint.read(tmp_path / "c.npz") is None


def test_a_write_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "c.npz"
    Checkpoint(PROGRESS, STATE, BEST).write(path)

    def half(file, **arrays):
        file.write(b"PK half an archive")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="No space left"):
        Checkpoint(PROGRESS | {"key": "other"}, STATE, BEST).write(path)
    assert Checkpoint.read(path).progress["key"] == "abc"
    assert os.listdir(tmp_path) == ["c.npz"]


@pytest.mark.parametrize("kept", [0, 40, 0.5, 0.98])
def test_a_damaged_file_is_refused(tmp_path, kept):
    path = tmp_path / "c.npz"
    Checkpoint(PROGRESS, STATE, BEST).write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"c.npz: not a whole checkpoint .* set training.resume to false"):
        Checkpoint.read(path)


def test_a_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "c.npz"
    Checkpoint(PROGRESS, STATE, BEST).write(path)
    changed = bytearray(path.read_bytes())
    place = bytes(changed).index(STATE[0].tobytes())
    changed[place + 5] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        Checkpoint.read(path)


def test_another_format_is_refused(tmp_path):
    path = tmp_path / "c.npz"
    text = json.dumps({"format_version": 99}).encode()
    np.savez(path, progress=np.frombuffer(text, np.uint8))
    with pytest.raises(ValueError, match="format_version 99; expected 1"):
        Checkpoint.read(path)


def test_nothing_in_it_is_pickled(tmp_path):
    Checkpoint(PROGRESS, STATE, BEST).write(tmp_path / "c.npz")
    with zipfile.ZipFile(tmp_path / "c.npz") as archive:
        # NumPy marks pickled arrays by the dtype object in their header.
        assert not any(b"|O" in archive.read(name)[:128] for name in archive.namelist())
    np.savez(tmp_path / "evil.npz", progress=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        Checkpoint.read(tmp_path / "evil.npz")
