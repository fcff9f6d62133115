"""Writing files so that a reader never meets a half-written one, and hashing what they hold."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# What is not yet whole is called so.
PARTIAL = ".partial-"


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it; on any error nothing is left behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name keeps its ending: several writers choose the format by it. Made here and not by tempfile, whose files
    # nobody but their owner can read: outputs follow the user's umask.
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(4)}{path.name}")
    partial.touch(exist_ok=False)
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def held_alone(folder: str | Path) -> Iterator[None]:
    """Keep a folder for one user at a time; the system lets it go when this process ends, however it ends.

    It is made where it is missing, and does not stay if nothing is put into it.

    Where the system or the file system knows no such locks, nothing is kept.

    Raises:
        BlockingIOError: somebody else has it.
    """
    folder = Path(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:  # on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, f"{folder}: another process is writing to it; wait for its end, or name another folder"
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is still empty


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values are equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def value_digest(value: Any) -> str:
    """Hex digest of a JSON-able value; the order of dictionary keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def array_digest(*arrays: np.ndarray) -> str:
    """Hex digest of some arrays' bytes, in the order given."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def source_digest(*modules: ModuleType) -> str:
    """Hex digest of some modules' code: results made by other code than today's are outdated."""
    return code_digest(module.__file__ for module in modules)


def code_digest(paths: Iterable[str | Path]) -> str:
    """Hex digest of what some Python files do: comments, layout and docstrings don't count.

    It is taken from the syntax tree, whose form is Python's: another minor version of Python gives another digest.
    """
    return _code_digest(tuple((str(path), *_state(path)) for path in paths))


def _state(path: str | Path) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_mtime_ns, state.st_size


# Parsing takes some hundred milliseconds, and a run asks several times.
@functools.lru_cache(maxsize=64)
def _code_digest(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path, *_ in files:
        tree = ast.parse(Path(path).read_bytes())
        for part in ast.walk(tree):
            if isinstance(part, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(part, clean=False):
                del part.body[0]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def file_digest(paths: Iterable[str | Path]) -> str:
    """Hex digest of the bytes of some files, in the order given."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
