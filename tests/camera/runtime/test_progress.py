"""How far a long loop is: a bar for a person, lines for a log."""

import io
import logging

import pytest
import torch
from rich.console import Console

from camera.runtime import progress
from camera.runtime.device.peak_memory import PeakMemory
from camera.runtime.progress import each_layer, format_bytes, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when a test says so."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def lines(monkeypatch, caplog):
    """What a log gets where the output is a file."""
    monkeypatch.setattr(progress.rich, "get_console", lambda: Console(file=io.StringIO()))
    caplog.set_level(logging.INFO, "camera")
    return lambda: [record.getMessage() for record in caplog.records]


def run(clock, seconds, **settings):
    settings = {"total": len(seconds), "unit": "layers"} | settings
    with progress_bar("compress", **settings) as advance:
        for spent in seconds:
            clock.now += spent
            advance(1)


def test_a_log_gets_a_line_a_minute_and_one_at_the_end(clock, lines):
    run(clock, [25] * 6, note=lambda: "0.50 GB")
    assert lines() == [
        "compress: 3 of 6 layers, 0:01:15, 0:01:15 left, 0.50 GB",
        "compress: 6 of 6 layers, 0:02:30, 0.50 GB",
    ]


def test_a_log_gets_nothing_of_what_takes_less_than_a_minute(clock, lines):
    run(clock, [9] * 6)
    assert lines() == []


def test_what_an_earlier_process_did_says_nothing_of_the_speed(clock, lines):
    run(clock, [60, 60], total=10, done=6)
    assert lines() == [
        "compress: 7 of 10 layers, 0:01:00, 0:03:00 left",
        "compress: 8 of 10 layers, 0:02:00, 0:02:00 left",
    ]


def test_who_asks_for_no_progress_gets_none(clock, lines):
    run(clock, [90, 90], show=False)
    assert lines() == []


def test_a_terminal_gets_a_bar_and_the_log_no_lines(clock, lines, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)
    monkeypatch.setattr(progress.rich, "get_console", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    run(clock, [90, 90], note=lambda: "0.50 GB")
    drawn = terminal.file.getvalue()
    assert "compress" in drawn and "2/2 layers" in drawn and "0.50 GB" in drawn
    assert lines() == []


def test_layers_go_on_where_they_stopped_and_tell_the_memory_held(clock, lines):
    seen = []
    for index in each_layer(2, 5, "measure", PeakMemory(torch.device("cpu")), True):
        seen.append(index)
        clock.now += 60
    assert seen == [2, 3, 4]
    first, *more = lines()
    assert first == "Going on at layer 3 of 5 (measure)."
    assert [line.split(",")[0] for line in more] == [f"measure: {n} of 5 layers" for n in (3, 4, 5)]
    assert all(line.endswith(" GB") for line in more)


def test_a_notebook_without_widgets_is_spared_the_bar(clock, lines, monkeypatch, recwarn):
    notebook = Console(file=io.StringIO(), force_jupyter=True)
    monkeypatch.setattr(progress.rich, "get_console", lambda: notebook)
    monkeypatch.setattr(progress, "find_spec", lambda _: None)
    run(clock, [90, 90])
    assert len(lines()) == 2
    assert not recwarn.list


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (0, "0 bytes"),
        (9, "9 bytes"),
        (10, "10 bytes"),
        (100, "0.10 kB"),
        (11_467_000, "11.47 MB"),
        (250_000, "0.25 MB"),
        (4_000_000, "4.00 MB"),
        (93_400_000_000, "93.40 GB"),
    ],
)
def test_a_size_is_told_with_two_digits_at_least(size, told):
    assert format_bytes(size) == told


def test_what_is_broken_off_says_where_and_what_ended_says_nothing(clock, lines):
    run(clock, [1, 1])
    assert progress.reached() is None
    with pytest.raises(KeyboardInterrupt):
        for layer in each_layer(0, 6, "compress", PeakMemory(torch.device("cpu")), show=False):
            if layer == 2:
                raise KeyboardInterrupt
    assert progress.reached() == "layer 3 of 6 (compress)"
    run(clock, [1, 1])
    assert progress.reached() is None
