"""Progress passes every item on, in a terminal and without one, and says how fast and how long."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from lumbarflow import progress
from lumbarflow.progress import counted, duration, track


@pytest.fixture
def open_terminal(monkeypatch):
    """A function that makes one screen of standard output and standard error, as in a terminal, and returns it.

    (To be called in the test: pytest changes both streams between the setup of a test and its call.)
    """

    def open_it() -> io.StringIO:
        screen = io.StringIO()
        screen.isatty = lambda: True
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return open_it


@pytest.fixture
def clock(monkeypatch):
    """A clock in a list, which the test moves; nobody looks but the test."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 3600)
    return now


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="lumbarflow.progress")
    return caplog


def work(clock, seconds, *arguments, **options):
    """Go through a loop whose items take so many seconds each."""
    for _, each in zip(track(seconds, *arguments, **options), seconds, strict=True):
        clock[0] += each


def test_a_terminal_without_tqdm_gets_lines(monkeypatch, open_terminal, clock, lines):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    screen = open_terminal()
    work(clock, [40, 40, 40], "epoch 1", "batches")
    assert "epoch 1: 1 of 3 batches, 40 s each" in lines.text
    assert screen.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("items", [["a", "b", "c"], {"a": 1, "b": 2}.items(), range(4), []], ids=str)
def test_every_item_comes_once_in_order(monkeypatch, terminal, items):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(track(items, "ingest")) == list(items)
    assert not progress._loops


def test_a_terminal_shows_a_bar(open_terminal):
    screen = open_terminal()
    list(track(range(3), "ingest", unit="slices"))
    assert "ingest:   0%" in screen.getvalue() and "0/3" in screen.getvalue() and "slices" in screen.getvalue()


def test_a_bar_counts_what_was_done_before(open_terminal):
    screen = open_terminal()
    list(track(range(3), "ingest", done=7))
    assert "ingest:  70%" in screen.getvalue()


def test_elsewhere_lines_tell_rate_and_time_left_but_not_too_often(clock, lines):
    # One item takes 10 s: after 15 s have passed, that is at the 2nd and 4th of 6, a line follows; none at the last.
    work(clock, [10] * 6, "ingest")
    assert lines.messages == [
        "ingest: 2 of 6 series, 10 s each, about 40 s left",
        "ingest: 4 of 6 series, 10 s each, about 20 s left",
    ]


def test_a_slow_start_is_not_held_against_the_rest(clock, lines):
    # 30 s with the net's compilation, then 8 s each: 3 * 8 = 24 are left after the third.
    work(clock, [30, 8, 8, 8, 8, 8], "epoch 1 of 4", "batches")
    assert lines.messages == [
        "epoch 1 of 4: 1 of 6 batches, 30 s each, about 2 min 30 s left",
        "epoch 1 of 4: 3 of 6 batches, 8 s each, about 24 s left",
        "epoch 1 of 4: 5 of 6 batches, 8 s each, about 8 s left",
    ]


def test_what_an_earlier_run_has_done_is_counted_and_does_not_make_this_one_faster(clock, lines):
    work(clock, [20, 20], "ingest", done=10)
    assert lines.messages == ["ingest: 11 of 12 series, 20 s each, about 20 s left"]


def test_an_item_that_takes_long_is_told_of_by_the_innermost_loop(clock, lines):
    outer = track("ab", "train", "nets")
    next(outer)
    inner = track("abc", "epoch 1 of 2", "batches")
    next(inner)
    clock[0] = 59
    for loop in progress._loops:
        loop.look()
    assert lines.messages == []
    clock[0] = 61
    for loop in progress._loops:
        loop.look()
        loop.look()  # said once: the next line is due in a minute
    assert lines.messages == ["epoch 1 of 2: 0 of 3 batches, the next one has taken 1 min 1 s so far"]
    inner.close()
    outer.close()
    assert not progress._loops


def test_somebody_looks_at_a_loop_whose_item_takes_long(monkeypatch, lines):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.05)
    for _ in track("a", "predict", "scans"):
        end = time.monotonic() + 10
        while not lines.messages and time.monotonic() < end:
            time.sleep(0.01)
    assert lines.messages[0].startswith("predict: 0 of 1 scans, the next one has taken 0.0")


def test_lines_of_the_log_do_not_tear_a_bar(open_terminal, monkeypatch):
    screen = open_terminal()
    handler, root = logging.StreamHandler(screen), logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler])
    for _ in track(range(2), "ingest"):
        root.warning("in the middle")
        assert handler.stream is not screen
    assert handler.stream is screen, "it has its own back"
    # Before each line the cursor returns to the first column of a bar that was wiped.
    before = screen.getvalue().split("in the middle\n")[:-1]
    assert len(before) == 2
    for text in before:
        assert text.endswith("\r") and text.rstrip("\r").rpartition("\r")[2].strip(" ") == ""


def test_an_error_ends_all_progress(open_terminal):
    open_terminal()
    with pytest.raises(ValueError, match="a") as caught:
        for item in track("ab", "train"):
            for _ in track("abc", "epoch"):
                raise ValueError(item)
    # (The error still holds the frame of the loops.)
    assert caught and not progress._loops and not progress._handlers


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.254, "0.25 s"), (2.06, "2.1 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"),
     (250, "4 min 10 s"), (3599.6, "1 h 0 min"), (3900, "1 h 5 min"), (90000, "25 h 0 min")],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("number", "things", "words"),
    [(2, "test patients", "2 test patients"), (1, "test patients", "1 test patient"), (0, "slices", "0 slices"),
     (1, "rows of the screen", "1 row of the screen"), (1, "series", "1 series")],
)  # fmt: skip
def test_one_of_a_thing_is_no_plural(number, things, words):
    assert counted(number, things) == words
