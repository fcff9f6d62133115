"""What people see while a run is under way: how far it is, how fast, and how long it will take.

A bar in a terminal, plain lines elsewhere. All that a run says has one voice:

- A line begins with what it is about, in lower case, then a colon and the figures with their units, and has no full
  stop unless it is several sentences: `preprocess: 5 made, 25 unchanged`. Done is the past participle.
- A scan is what `predict` is given; of a cohort it is a series, and a case once it is scored. A net is trained, a model
  is registered. What cannot be used is left out.
- INFO is what happened, WARNING what was left out or would surprise, ERROR what ends a run without its result.
- Whatever is left out is named once, by the step that does so: the file, what was found, what was expected, what to do.
  The summary at the end (see `lumbarflow.summary`) counts it, and says where the reasons stand.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0
SECONDS_OF_SILENCE = 60.0  # then a line says that an item is still being worked on
_SECONDS_BETWEEN_LOOKS = 1.0

# The loops that are under way, the innermost last; when any of them has last shown that it goes on; and, while there
# are bars, the console's log handlers with the streams that they had.
_loops: list[_Loop] = []
_last_sign = 0.0
_handlers: dict[logging.StreamHandler, Any] = {}


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(0.254), duration(36.2), duration(250), duration(3900)
    ('0.25 s', '36 s', '4 min 10 s', '1 h 5 min')
    """
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, things: str) -> str:
    """A number of things, given in the plural.

    >>> counted(2, "test patients"), counted(1, "test patients"), counted(1, "rows of masks"), counted(1, "series")
    ('2 test patients', '1 test patient', '1 row of masks', '1 series')
    """
    singular = re.sub(r"(?<!serie)s\b", "", things, count=1)
    return f"{number} {singular if number == 1 else things}"


def track(items: Collection[Item], description: str, unit: str = "series", done: int = 0) -> Iterator[Item]:
    """Iterate over `items`, telling how far it is.

    Args:
        items: anything with a length.
        description: what is being done, in a few words.
        unit: what the items are, in the plural.
        done: how many more there are that were done before, by a run that this one goes on from. They are counted, and
            do not make it look faster than it is.
    """
    if not items:
        return
    loop = (_Bar if _has_bars() else _Lines)(len(items), description, unit, done)
    try:
        for item in items:
            yield item
            loop.step()
    finally:
        loop.close()


def _has_bars() -> bool:
    """Whether somebody watches, and tqdm is there: a machine that only trains has what Keras needs, and no more."""
    if not sys.stderr.isatty():
        return False
    try:
        import tqdm  # noqa: F401
    except ImportError:
        return False
    return True


class _Loop:
    """How far a loop is; a thread looks at it from time to time, since one item may take minutes."""

    def __init__(self, count: int, description: str, unit: str, done: int):
        self.count, self.description, self.unit, self.before = count, description, unit, done
        self.done = 0
        self.started = self.stepped = _show_sign()
        self._closed = threading.Event()
        _loops.append(self)
        threading.Thread(target=self._watch, name=f"progress of {description}", daemon=True).start()

    def step(self) -> None:
        """One more item is done."""
        self.done += 1
        self.stepped = _show_sign()
        if self.done == 1:
            self._first = self.stepped

    def look(self) -> None:
        """Nothing may have happened since the last look."""

    def close(self) -> None:
        self._closed.set()
        if self in _loops:
            _loops.remove(self)

    def _watch(self) -> None:
        while not self._closed.wait(_SECONDS_BETWEEN_LOOKS):
            self.look()


def _show_sign() -> float:
    global _last_sign
    _last_sign = time.monotonic()
    return _last_sign


class _Bar(_Loop):
    def __init__(self, count: int, description: str, unit: str, done: int):
        from tqdm import tqdm

        shown = {"desc": description, "unit": unit, "leave": False, "dynamic_ncols": True}
        self._bar = tqdm(total=done + count, initial=done, **shown)
        super().__init__(count, description, unit, done)
        _log_above_bars()

    def step(self) -> None:
        super().step()
        self._bar.update()

    def look(self) -> None:
        self._bar.refresh()  # the time goes on

    def close(self) -> None:
        super().close()
        self._bar.close()
        _log_above_bars()


class _AboveBars:
    """A terminal's stream, whose lines would tear the bars otherwise."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self._stream):
            self._stream.write(text)
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _log_above_bars() -> None:
    """Give the console's log handlers a stream that spares the bars while there are any, and their own back after."""
    if any(isinstance(loop, _Bar) for loop in _loops):
        for handler in logging.getLogger().handlers:
            if getattr(handler, "stream", None) in (sys.stdout, sys.stderr):
                _handlers[handler] = handler.setStream(_AboveBars(handler.stream))
        return
    while _handlers:
        handler, stream = _handlers.popitem()
        handler.setStream(stream)


class _Lines(_Loop):
    def __init__(self, count: int, description: str, unit: str, done: int):
        super().__init__(count, description, unit, done)
        self.said = self.started

    def step(self) -> None:
        super().step()
        left = self.count - self.done
        if left and self.stepped - self.said >= SECONDS_BETWEEN_LINES:
            each = self._seconds_each()
            self._say(self.stepped, f"{duration(each)} each, about {duration(round(each * left))} left")

    def look(self) -> None:
        now = time.monotonic()
        # The innermost knows best what is being waited for.
        if _loops[-1:] == [self] and now - _last_sign >= SECONDS_OF_SILENCE:
            self._say(now, f"the next one has taken {duration(now - self.stepped)} so far")

    def _seconds_each(self) -> float:
        # The first item often has to wait for what all need, such as a net that is loaded or compiled.
        if self.done == 1:
            return self.stepped - self.started
        return (self.stepped - self._first) / (self.done - 1)

    def _say(self, now: float, what: str) -> None:
        global _last_sign
        self.said = _last_sign = now
        logger.info(
            "%s: %d of %d %s, %s", self.description, self.before + self.done, self.before + self.count, self.unit, what
        )
