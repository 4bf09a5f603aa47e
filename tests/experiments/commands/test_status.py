"""`camera status`: what is done, running, failed, to go, and how long it takes."""

import json
import os
import time

import pytest

from experiments.commands.status import main, state, sweeps_of
from experiments.records.files import lock_of
from experiments.sweeps.durations import Durations, format_duration
from experiments.sweeps.jobs import SweepJob, write_plan

LIKE = ("m", "camera_p", "quick")


class Output:
    """An output folder made by hand."""

    def __init__(self, folder):
        self.folder = folder

    def job(self, name, grid="pruning", like=LIKE, **more):
        return SweepJob(
            [f"method={name}", "seed=1"], [grid], self.folder / "runs" / name, like, **more
        )

    def sweep(self, name, *jobs):
        (self.folder / "sweeps" / name).mkdir(parents=True)
        write_plan(jobs, self.folder / "sweeps" / name, self.folder)

    def started(self, name, **files):
        run = self.folder / "runs" / name
        run.mkdir(parents=True)
        stored = {"settings": {"model": {"name": "m"}}, "method": "camera_p"}
        stored["identity"] = {"evaluation": {}}
        (run / "settings.json").write_text(json.dumps(stored))
        for file, text in files.items():
            (run / f"{file}.txt").write_text(text)
        return run

    def finished(self, name, seconds=60.0):
        run = self.started(name)
        part = seconds / 3
        parts = {"calibrate": part, "compress": part, "evaluate": part}
        (run / "metrics.json").write_text(json.dumps({"seconds": parts}))
        (run / "DONE").touch()
        return run

    def lock(self, name):
        return lock_of(self.folder / "runs" / name)


@pytest.fixture
def output(tmp_path):
    return Output(tmp_path)


def printed(capsys, folder, code=0):
    assert main([str(folder)]) == code
    out = capsys.readouterr()
    return out.out if code == 0 else out.err


def row(text, name):
    (line,) = (line for line in text.splitlines() if line.strip().startswith(name))
    return line.split()


def test_every_state_is_told_apart(output):
    output.finished("done")
    output.started("failed", error="OSError: no such file\n\nTraceback")
    output.started("interrupted", error="KeyboardInterrupt\n\nTraceback")
    output.started("running")
    names = ("done", "failed", "interrupted", "running", "new")
    with output.lock("running"):
        states = {name: state(output.job(name)) for name in names}
    assert states == {
        "done": "done",
        "failed": "failed",
        "interrupted": "to go",
        "running": "running",
        "new": "to go",
    }
    assert state(output.job("running")) == "to go", "its process is gone"
    assert state(SweepJob(["sparsty=1"], [], refused="no such key")) == "failed"


def test_a_retried_run_is_running_and_a_finished_one_done_whoever_looks_at_it(output):
    output.started("retried", error="it failed")
    output.finished("looked_at")
    with output.lock("retried"), output.lock("looked_at"):
        assert state(output.job("retried")) == "running"
        assert state(output.job("looked_at")) == "done"


def test_the_page_counts_and_names_what_runs_and_why_others_failed(output, capsys):
    output.finished("a", seconds=100)
    output.started("b", error="bits=3 can't be met.\n\nTraceback")
    output.started("c", log="compress\ncompress: 1 of 6 layers")
    jobs = [output.job(name, like=LIKE) for name in "abcd"]
    other = output.job("e", grid="alpha")
    refused = SweepJob(["method=f", "seed=1"], ["alpha"], refused="f is no method.")
    output.sweep("20260101", *jobs, other, refused)
    with output.lock("c"):
        text = printed(capsys, output.folder)
    # c has run for no time, d and e take as long as a did
    assert row(text, "20260101") == ["20260101", "1", "1", "2", "2", "5", "min"]
    assert row(text, "pruning") == ["pruning", "1", "1", "1", "1", "3", "min"]
    assert row(text, "alpha") == ["alpha", "0", "0", "1", "1", "100", "s"]
    assert "c (method=c), for 0 s\n    compress: 1 of 6 layers\n" in text
    assert "b (method=b): bits=3 can't be met." in text
    assert "a job (method=f): f is no method." in text
    assert "seed=1" not in text, "it is what they have in common"


def test_one_sweep_may_be_asked_for(output, capsys):
    output.sweep("1", output.job("a"))
    output.sweep("2", output.job("b"))
    text = printed(capsys, output.folder / "sweeps" / "1")
    assert row(text, "1")[1:5] == ["0", "0", "0", "1"]
    assert not any(line.startswith(" 2") for line in text.splitlines())


def test_a_sweep_that_newer_ones_go_on_with_is_left_out(output):
    output.finished("a")
    output.sweep("1", output.job("a"))
    output.sweep("2", output.job("a"), output.job("b"))
    output.sweep("3", output.job("d"))
    output.sweep("4", output.job("b"), output.job("c"))
    assert [sweep.name for sweep in sweeps_of(output.folder)] == ["3", "4"]


def test_nothing_is_written(output, capsys):
    output.finished("a")
    output.sweep("1", output.job("a"), output.job("b"))
    before = sorted(output.folder.rglob("*"))
    printed(capsys, output.folder)
    assert sorted(output.folder.rglob("*")) == before


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert "has no runs" in printed(capsys, tmp_path, code=1)
    assert "no such folder" in printed(capsys, tmp_path / "nowhere", code=1)


def test_time_left_is_by_the_nearest_finished_runs(output):
    runs = [output.finished(f"r{n}", seconds) for n, seconds in enumerate((10, 20, 90))]
    durations = Durations([*runs, output.started("unfinished")])
    same = output.job("x", like=next(like for like in durations.seconds if len(like) == 3))
    assert durations.expected_seconds(same) == 20
    assert durations.expected_seconds(output.job("x", like=("other", "other", "other"))) == 20
    assert Durations([]).expected_seconds(same) is None
    assert Durations([]).left([same], []) is None
    assert durations.left([same, same], []) == 40


def test_what_runs_is_partly_done_and_shares_the_rest(output):
    durations = Durations([output.finished("done", 100)])
    running = [output.job("a"), output.job("b")]
    for job in running:
        ago = time.time() - 40
        os.utime(output.started(job.run.name) / "settings.json", (ago, ago))
    left = durations.left([output.job("c")], running)
    assert left == pytest.approx((60 + 60 + 100) / 2, abs=20)  # 150 were nothing of it done


def test_waiting_for_the_disk_counts(output):
    run = output.finished("done", 10)
    ago = time.time() - 500
    os.utime(run / "settings.json", (ago, ago))
    assert Durations([run]).expected_seconds(output.job("x")) == pytest.approx(500, abs=100)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0 s"), (119, "119 s"), (720, "12 min"), (9000, "2.5 h"), (2e5, "2.3 days")],
)
def test_durations_are_given_in_their_unit(seconds, told):
    assert format_duration(seconds) == told


def test_a_damaged_plan_is_named_and_hides_no_other_sweep(output, capsys):
    output.sweep("1", output.job("a"))
    output.sweep("2", output.job("b"))
    plan = output.folder / "sweeps" / "2" / "plan.json"
    plan.write_text('{"jobs": [')
    assert main([str(output.folder)]) == 0
    said = capsys.readouterr()
    assert row(said.out, "1") and f"{plan} is damaged" in said.err


def test_a_run_with_damaged_settings_is_no_measure_of_time(output):
    run = output.finished("a")
    (run / "settings.json").write_text("")
    assert Durations([run]).expected_seconds(output.job("b")) is None


def test_runs_that_no_sweep_asked_for_are_told_too(output, capsys):
    output.finished("alone")
    said = printed(capsys, output.folder)
    assert row(said, "single runs")[2:] == ["1", "0", "0", "0"]
    output.started("broken", error="OSError: no such file\n\nTraceback")
    output.started("stopped", error="KeyboardInterrupt\n\nTraceback")
    output.finished("planned")
    output.sweep("now", output.job("planned"))
    said = printed(capsys, output.folder)
    assert row(said, "single runs")[2:6] == ["1", "0", "1", "1"] and row(said, "now")[1] == "1"
    assert "broken: OSError: no such file" in said
    assert "stopped: the same command goes on" in said
    with output.lock("stopped"):
        assert row(printed(capsys, output.folder), "single runs")[2:6] == ["1", "1", "1", "0"]


def test_what_is_refused_without_a_run_has_failed(output):
    refused = output.job("x", refused="sparsity=40 must lie between 0 and 1.")
    assert state(refused) == "failed"
    output.started("x")
    assert state(refused) == "to go"
