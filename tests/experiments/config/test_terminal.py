"""A log on a terminal: lines as wide as it is, broken between words; in a file as they are."""

import logging

import pytest

from experiments.config.terminal import FoldedFormatter

WORDS = [f"setting_{n}=value-{n}" for n in range(12)]
LONG = "x" * 90


def shown(message):
    return FoldedFormatter().format(logging.makeLogRecord({"msg": message}))


@pytest.mark.parametrize("columns", [30, 80])
def test_a_long_line_is_broken_between_words(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown("\t#1 : " + " ".join(WORDS)).splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= columns
    assert " ".join(lines).split() == ["#1", ":", *WORDS]


def test_what_fits_and_what_has_no_space_is_left(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert shown("two\nlines") == "two\nlines"
    assert LONG in shown(f"a file {LONG}").splitlines()[-1]


def test_a_file_gets_whole_lines(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert shown(" ".join(WORDS)) == " ".join(WORDS)
