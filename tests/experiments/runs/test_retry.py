"""What is tried again: in a sweep a failed run on request, an interrupted one always."""

import threading
import time

import pytest
from filelock import Timeout

from experiments.records.failures import FailedBeforeError
from experiments.records.files import lock_of
from experiments.records.folders import Folders
from experiments.runs.run import run
from tests.helpers.runs.composing import settings_of, tiny


@pytest.fixture
def make(checkpoints, data_folder, tmp_path):
    """make(*overrides): settings of a run that takes no time."""
    overrides = [*tiny(checkpoints("qwen2_moe"), data_folder, tmp_path), "evaluation=none"]
    return lambda *more: settings_of(*overrides, "method=dense", *more)


@pytest.fixture
def error(make):
    """The error.txt of that run, to be written."""
    file = Folders.of(make()).run / "error.txt"
    file.parent.mkdir(parents=True)
    return file


def test_in_a_sweep_a_failed_run_is_left_alone(make, error):
    error.write_text("OSError: full\n\nTraceback")
    with pytest.raises(FailedBeforeError, match=r"failed before: OSError: full .retry=failed"):
        run(make(), sweep="now")
    assert error.exists() and not Folders.of(make()).files.is_done
    run(make("force=true"), sweep="now")
    assert not error.exists() and Folders.of(make()).files.is_done


@pytest.mark.parametrize("interruption", ["KeyboardInterrupt", "SystemExit: -1"])
def test_in_a_sweep_an_interrupted_run_goes_on(interruption, make, error):
    error.write_text(f"{interruption}\n\nTraceback")
    run(make(), sweep="now")
    assert not error.exists() and Folders.of(make()).files.is_done


def test_a_retry_is_of_what_failed_before_the_sweep(make, error):
    error.write_text("OSError: full")
    failed_at = error.stat().st_mtime
    with pytest.raises(FailedBeforeError):
        run(make("retry=failed"), sweep="now", since=failed_at)
    run(make("retry=failed"), sweep="now", since=failed_at + 1)
    assert not error.exists() and Folders.of(make()).files.is_done


def test_a_run_by_itself_is_always_tried(make, error):
    error.write_text("OSError: full")
    run(make())
    assert not error.exists() and Folders.of(make()).files.is_done


def test_a_run_that_another_process_is_doing_is_waited_for_or_not(make, caplog):
    folders = Folders.of(make())
    lock = lock_of(folders.run)
    lock.acquire()
    with pytest.raises(Timeout):
        run(make(), wait=False)
    waiting = threading.Thread(target=run, args=(make(),))
    with caplog.at_level("INFO"):
        waiting.start()
        while "waiting for it" not in caplog.text and waiting.is_alive():
            time.sleep(0.01)
    assert not folders.run.exists()
    lock.release()
    waiting.join()
    assert folders.files.is_done
