"""A sweep from the command line: one job fails, the others finish, the table shows them all."""

import csv
import json
import os
import re
import subprocess
import sys

import pytest

from experiments.config.location import CONF
from tests.helpers.runs.composing import command, tiny


def main_py(*arguments):
    """`python main.py ARGUMENTS` in a process of its own, one thread for each of its jobs."""
    return subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=CONF.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def sweep(checkpoints, data_folder, tmp_path_factory):
    """The finished command and its output folder."""
    output = tmp_path_factory.mktemp("outputs")
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, output)
    done = main_py("-m", *overrides, "method=dense,camera_p", "sparsity=0.2,1.5,0.4")
    return done, output, overrides


def test_a_failing_job_does_not_end_the_sweep(sweep):
    done, output, _ = sweep
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "3 of 4 jobs done" in done.stdout  # the dense model once
    with (output / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["dense", "camera_p", "camera_p"]
    assert [row["sparsity"] for row in rows] == ["", "20.0", "40.0"]
    assert {row["status"] for row in rows} == {"done"}
    assert len(list((output / "runs").iterdir())) == 3  # of what is refused nothing stays


def test_what_will_be_refused_is_said_before_the_first_job_starts(sweep):
    done, _, _ = sweep
    said = done.stdout.splitlines()
    (refused,) = [number for number, line in enumerate(said) if "1 of 4 jobs is refused" in line]
    assert "sparsity=1.5 must lie between 0 and 1" in said[refused + 1]
    (launched,) = [number for number, line in enumerate(said) if "Launching 4 jobs" in line]
    assert refused < launched
    assert any(
        "2 of 6 jobs are the same as others: dense uses no sparsity" in line for line in said
    )


def test_a_sweep_ends_with_its_models_and_the_line_that_loads_one(sweep):
    done, output, _ = sweep
    made = sorted(path for path in (output / "checkpoints").iterdir() if path.is_dir())
    assert len(made) == 2 and all(f"{path}  (" in done.stdout for path in made)
    assert f'camera.load("{made[0]}")' in done.stdout
    assert done.stdout.splitlines()[-1] == f"More    camera report {output}"


def test_the_table_is_printed_and_written(sweep):
    done, output, _ = sweep
    (folder,) = (output / "sweeps").iterdir()
    assert (folder / "table.csv").read_text() == (output / "table.csv").read_text()
    for kind in ("md", "tex"):  # and what failed without leaving a run
        assert (output / f"table.{kind}").read_text().strip() in (
            folder / f"table.{kind}"
        ).read_text()
    assert "sparsity=1.5 must lie" in (folder / "table.md").read_text()
    assert "Camera-P" in done.stdout and "sparsity=1.5 must lie between" in done.stdout
    jobs = [json.loads(file.read_text()) for file in sorted((folder / "jobs").iterdir())]
    assert [bool(job["error"]) for job in jobs] == [False, False, True, False]


def test_a_sweep_is_named_after_what_it_asks_and_its_runs_after_no_preset(sweep):
    _, output, _ = sweep
    (folder,) = (output / "sweeps").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-\d{6}-method-sparsity", folder.name)
    assert not list(output.glob("runs/*/studies.json"))


def test_everything_is_below_output(sweep):
    _, output, _ = sweep
    places = {"checkpoints", "locks", "runs", "sweeps", "table.csv", "table.md", "table.tex"}
    assert {path.name for path in output.iterdir()} == places


def test_a_second_sweep_skips_what_is_done(sweep, capsys):
    _, output, overrides = sweep
    before = {path: path.stat().st_mtime_ns for path in (output / "runs").glob("*/DONE")}
    assert command("-m", *overrides, "method=camera_p", "sparsity=0.2,0.4") == 0
    assert capsys.readouterr().out.count("is done already") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    newest = max((output / "sweeps").iterdir())
    with (newest / "table.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["dense", "camera_p", "camera_p"]


def test_what_failed_is_left_alone_until_a_retry_is_asked_for(sweep, capsys, monkeypatch):
    _, _, overrides = sweep
    again = ("-m", *overrides, "method=dense", "evaluation.blocks=1")
    with monkeypatch.context() as patch:
        patch.setattr("experiments.runs.run.assemble", lambda *_: 1 / 0)
        assert command(*again) == 1
    capsys.readouterr()
    assert command(*again) == 1
    said = "".join(capsys.readouterr())
    assert "failed before: ZeroDivisionError" in said and "retry=failed" in said
    assert "Traceback" not in said
    assert command(*again, "retry=failed") == 0
    assert command(*again) == 0


def test_a_run_that_fails_again_is_tried_once_in_a_sweep(sweep, capsys, monkeypatch):
    _, _, overrides = sweep
    tried = []
    monkeypatch.setattr("experiments.runs.run.assemble", lambda *_: tried.append(1) or 1 / 0)
    again = ("-m", *overrides, "method=dense", "evaluation.blocks=4", "retry=failed")
    for times in (1, 2):
        assert command(*again, "evaluation.batch_size=1,2") == 1
        assert len(tried) == times


def test_a_single_run_says_one_sentence_and_fails(sweep, capsys):
    _, _, overrides = sweep
    assert command(*overrides, "sparsity=1.5") == 1
    printed = "".join(capsys.readouterr())
    assert "sparsity=1.5 must lie between 0 and 1" in printed
    assert "Traceback" not in printed


def test_what_nobody_expects_keeps_its_traceback(sweep, capsys, monkeypatch):
    _, _, overrides = sweep
    monkeypatch.setattr("experiments.runs.run.assemble", lambda *_: 1 / 0)
    assert command(*overrides, "method=dense", "evaluation=none") == 1
    assert "Traceback" in capsys.readouterr().out


def test_a_dry_run_lists_the_jobs_and_writes_nothing(sweep, capsys):
    _, output, overrides = sweep
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    asked = ("-m", *overrides, "dry_run=true", "method=camera_p", "sparsity=0.2,0.7,1.5")
    assert command(*asked) == 0
    said = "".join(capsys.readouterr())
    assert [state for state in said.split() if state in ("done", "refused")][-2:] == [
        "done",
        "refused",
    ]
    assert "1 of 3 jobs to do; time: about " in said and "kB" in said.split("checkpoints: about")[1]
    assert command(*asked[1:-1], "sparsity=0.2") == 0
    assert "0 of 1 jobs to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
