"""Anonymous memory of processes: what their own data take, without files that are mapped or cached. Linux tells it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

_PROC = Path("/proc")
_SECONDS_BETWEEN_CENSUSES = 0.2


def is_told() -> bool:
    return (_PROC / "self/status").exists()


def anonymous_kib(pid: int | str = "self") -> int:
    """RssAnon of a process; 0 of one that has ended."""
    try:
        text = (_PROC / str(pid) / "status").read_text()
    except OSError:
        return 0
    return int(next((line for line in text.splitlines() if line.startswith("RssAnon")), "RssAnon 0").split()[1])


def descendants(pid: int) -> list[int]:
    """The processes that one has started, those that these have started, and so on."""
    children: dict[int, list[int]] = {}
    for folder in _PROC.glob("[0-9]*"):
        try:
            # After the name, which is in brackets and may hold any of them: the state, then the parent.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = list(children.get(pid, []))
    for one in found:
        found += children.get(one, [])
    return found


class Watch:
    """Samples RssAnon of a process, and of it with all it has started, while the block runs.

    Attributes:
        samples: (time.monotonic(), KiB of the process, KiB of all).
    """

    def __init__(self, pid: int | str = "self", seconds_between: float = 0.005):
        self._pid, self._seconds = pid, seconds_between
        self.samples: list[tuple[float, int, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._thread.join()

    def peak_mib(self, start: float = 0.0, end: float = float("inf")) -> tuple[float, float]:
        """The highest of the process, and of all together, between two times."""
        kib = [sample[1:] for sample in self.samples if start <= sample[0] <= end]
        return tuple(max(column) / 1024 for column in zip(*kib, strict=True)) if kib else (0.0, 0.0)

    def _watch(self) -> None:
        others, counted = [], float("-inf")
        while not self._ended.wait(self._seconds):
            now = time.monotonic()
            if self._pid != "self" and now - counted > _SECONDS_BETWEEN_CENSUSES:
                others, counted = descendants(int(self._pid)), now
            own = anonymous_kib(self._pid)
            self.samples.append((now, own, own + sum(map(anonymous_kib, others))))
