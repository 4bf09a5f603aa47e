"""A run that is interrupted: what is recorded of it, whenever the signal comes."""

import os
import signal
import time

import pytest

from experiments.records import files
from experiments.records.folders import Folders
from experiments.runs import measurements
from experiments.runs.run import run
from tests.helpers.runs.composing import settings_of, tiny


@pytest.fixture
def settings(checkpoints, data_folder, tmp_path):
    return settings_of(
        *tiny(checkpoints("qwen2_moe"), data_folder, tmp_path),
        "method=dense",
        "evaluation=perplexity",
    )


def error_of(settings):
    return (Folders.of(settings).run / "error.txt").read_text()


def test_an_interrupt_is_recorded_and_goes_through(settings, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measurements, "perplexity", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    assert error_of(settings).startswith("KeyboardInterrupt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_a_failure_is_recorded(number, settings, monkeypatch):
    """They may come together: torchrun ends all ranks when one is lost."""

    def failing(*_, **__):
        raise RuntimeError("connection closed")

    def interrupted(path, text):
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # a signal is handled between two steps of Python
        write_text(path, text)

    def leave(*_):
        raise KeyboardInterrupt

    write_text, before = files.write_text, signal.signal(number, leave)
    monkeypatch.setattr(measurements, "perplexity", failing)
    monkeypatch.setattr(files, "write_text", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(settings)
        assert signal.getsignal(number) is leave
    finally:
        signal.signal(number, before)
    assert error_of(settings).startswith("RuntimeError: connection closed")
