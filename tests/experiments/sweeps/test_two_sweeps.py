"""Two sweeps at once on one output folder: each run is done once, and nobody waits idle."""

import json
import multiprocessing
import os
import time

import pytest

from experiments.records.files import lock_of
from experiments.runs import run
from experiments.sweeps import launches
from tests.helpers.runs.composing import command, tiny
from tests.helpers.runs.planning import jobs_of


@pytest.fixture
def sweep(checkpoints, data_folder, tmp_path):
    """The arguments of a sweep of four runs that take no time."""
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path)
    return ["-m", *overrides, "evaluation=none", "method=dense", "seed=1,2,3,4"]


def finished_in_order(output):
    return sorted((output / "runs").glob("*/DONE"), key=lambda done: done.stat().st_mtime_ns)


def processes(seen):
    return {line.split()[0] for line in seen.read_text().splitlines()}


def test_two_processes_share_the_runs(sweep, tmp_path, monkeypatch):
    assemble, seen = run.assemble, tmp_path / "seen.txt"

    def slow(settings, *parts):
        with seen.open("a") as file:
            file.write(f"{os.getpid()} {settings.seed}\n")
        deadline = time.monotonic() + 120
        while len(processes(seen)) < 2 and time.monotonic() < deadline:  # until they meet
            time.sleep(0.02)
        return assemble(settings, *parts)

    monkeypatch.setattr(run, "assemble", slow)
    fork = multiprocessing.get_context("fork")  # what is imported here needn't be there
    both = [fork.Process(target=lambda: os._exit(command(*sweep))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0]
    done = [line.split() for line in seen.read_text().splitlines()]
    assert sorted(seed for _, seed in done) == ["1", "2", "3", "4"]
    assert processes(seen) == {str(process.pid) for process in both}
    assert len(finished_in_order(tmp_path)) == 4
    for folder in (tmp_path / "sweeps").iterdir():
        records = [json.loads(file.read_text()) for file in (folder / "jobs").iterdir()]
        assert len({record["folder"] for record in records}) == len(records) == 4
        assert not any(record["error"] for record in records)


def test_a_run_that_is_held_comes_last(sweep, tmp_path, monkeypatch):
    jobs = jobs_of(*sweep[1:])
    first, *others = [job.run / "DONE" for job in jobs]
    held, sleep = lock_of(jobs[0].run), time.sleep
    held.acquire()

    def others_are_done(seconds):
        if seconds == launches.PAUSE_S and held.is_locked:
            assert finished_in_order(tmp_path) == others
            held.release()
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", others_are_done)
    assert command(*sweep) == 0
    assert finished_in_order(tmp_path) == [*others, first]
