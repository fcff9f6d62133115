"""Progress passes every item on, in a terminal and without one."""

from __future__ import annotations

import logging
import re
import sys

import pytest

from lumbarflow import progress
from lumbarflow.progress import track


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("items", [["a", "b", "c"], {"a": 1, "b": 2}.items(), range(4), []], ids=str)
def test_every_item_comes_once_in_order(monkeypatch, terminal, items):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(track(items, "ingest")) == list(items)


def test_a_terminal_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(track(range(3), "ingest", unit="slice"))
    shown = capsys.readouterr().err
    assert "ingest" in shown and "0/3" in shown and "slice" in shown


def test_elsewhere_lines_tell_how_far_it_is_but_not_too_often(monkeypatch, caplog):
    # One item takes 10 s: after 15 s have passed, that is at the 2nd and 4th of 6, a line follows; none at the last.
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with caplog.at_level(logging.INFO, logger="lumbarflow.progress"):
        list(track("abcdef", "ingest"))
    assert [re.sub(r"\s+", " ", line) for line in caplog.messages] == [
        "ingest: 2 of 6 series, about 40 s left",
        "ingest: 4 of 6 series, about 20 s left",
    ]
