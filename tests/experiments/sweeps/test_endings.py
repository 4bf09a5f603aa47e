"""A sweep always ends with its table, and what failed is named in it."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.config.location import CONF
from experiments.records import files
from experiments.runs import run as runs
from experiments.sweeps import ending
from experiments.sweeps.launches import Launches
from tests.helpers.runs.composing import command, tiny


@pytest.fixture
def sweep(checkpoints, data_folder, tmp_path):
    """The arguments of a sweep whose runs take no time."""
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path)
    return ["-m", *overrides, "evaluation=none", "method=dense"]


def the_sweep(output):
    (folder,) = (output / "sweeps").iterdir()
    return folder


def table_of(folder):
    with (folder / "table.csv").open() as file:
        return {row["folder"]: row["status"] for row in csv.DictReader(file)}


def full(monkeypatch, name):
    """Let nothing of that name be written: the disk is full."""

    def write(path, content):
        if name in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, content)

    original = files.write_json
    for module in (files, runs):
        monkeypatch.setattr(module, "write_json", write)


def test_a_job_that_can_not_be_recorded_is_in_the_table(sweep, tmp_path, monkeypatch, capsys):
    full(monkeypatch, "jobs")
    assert command(*sweep, "seed=1,-2") == 1
    said = "".join(capsys.readouterr())
    assert "No space left" in said and "Traceback" not in said and "1 of 2 jobs done" in said
    assert list(table_of(the_sweep(tmp_path)).values()) == ["done"]
    assert "seed=-2 must not be negative" in (the_sweep(tmp_path) / "table.md").read_text()


def test_a_run_is_of_every_preset_that_asks_for_it(sweep, tmp_path):
    for preset in ("alpha", "main"):
        assert command(*sweep, f"experiment={preset}") == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert files.RunFiles(run).studies == ["alpha", "main"]
    names = sorted(folder.name.rpartition("-")[2] for folder in (tmp_path / "sweeps").iterdir())
    assert names == ["alpha", "main"]


def test_a_full_disk_hides_no_reason(sweep, tmp_path, monkeypatch, capsys):
    full(monkeypatch, "compress.json")

    def refused(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_text", refused)
    monkeypatch.setattr("experiments.tables.writing.write_text", refused)
    assert command(*sweep, "seed=1,2") == 1
    said = "".join(capsys.readouterr())
    assert "free space on that disk" in said and "Traceback" not in said
    assert "error.txt can't be written" in said and "tables can't be written" in said
    assert said.count("failed: ") >= 2 and "0 of 2 jobs done" in said
    assert not list(tmp_path.rglob("error.txt"))


def test_an_empty_error_file_is_a_failure(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "assemble", lambda *_: 1 / 0)
    assert command(*sweep, "seed=1") == 1
    (error,) = (tmp_path / "runs").glob("*/error.txt")
    error.write_text("")
    capsys.readouterr()
    assert command(*sweep, "seed=1") == 1
    assert "failed before" in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["settings.json", "metrics.json"])
def test_a_damaged_run_is_named_and_keeps_no_table_away(name, sweep, tmp_path, capsys):
    assert command(*sweep, "seed=1") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / name).write_text("")
    capsys.readouterr()
    assert command(*sweep, "seed=2,-3") == 1
    assert "1 of 2 jobs done" in capsys.readouterr().out
    assert table_of(tmp_path)[folder.name] == f"damaged: {name}"


def test_a_run_of_another_layout_is_named(sweep, tmp_path):
    old = tmp_path / "runs" / "old"
    old.mkdir(parents=True)
    (old / "settings.json").write_text('{"method": "dense", "settings": {}}')
    assert command(*sweep, "seed=2") == 0
    assert table_of(tmp_path)["old"] == "damaged: settings.json (lacks 'identity')"


def test_a_table_that_can_not_be_made_hides_no_failure(sweep, monkeypatch, capsys):
    monkeypatch.setattr(ending, "_tables", lambda *_: 1 / 0)
    assert command(*sweep, "seed=1,-2") == 1
    said = "".join(capsys.readouterr())
    assert "can't be made: ZeroDivisionError" in said
    assert "seed=-2 must not be negative" in said and "1 of 2 jobs done" in said


def test_a_refused_job_without_a_folder_is_in_the_table(sweep, tmp_path, capsys):
    assert command(*sweep, "model.path=/nowhere,/nothing") == 1
    assert "/nowhere" in (the_sweep(tmp_path) / "table.md").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_ends_in_its_table(number, code, sweep, tmp_path, monkeypatch, capsys):
    assemble, seen = runs.assemble, []

    def interrupted(*args):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), number)
            time.sleep(5)
        return assemble(*args)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it
    monkeypatch.setattr(runs, "assemble", interrupted)
    assert command(*sweep, "seed=1,2,3") == code
    said = "".join(capsys.readouterr())
    assert "1 of 3 jobs done" in said and "1 job was not started" in said
    assert "Interrupted" in said and "the same command goes on." in said
    assert "Traceback" not in said and "failed" not in said and "interrupted: " in said
    statuses = sorted(status.split(":")[0] for status in table_of(the_sweep(tmp_path)).values())
    assert statuses == ["done", "interrupted"]
    monkeypatch.setattr(runs, "assemble", assemble)
    assert command(*sweep, "seed=1,2,3") == 0


def test_output_that_can_not_be_written_is_one_sentence(sweep, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    absent = Path("/proc/nowhere")  # of which no folder can be made
    embedded = ["data=embedded", "evaluation=perplexity"]  # whose texts are written there
    for arguments, output in (
        (sweep, file),
        (sweep[1:], file),
        ([*sweep[1:], *embedded], absent),
        ([*sweep[1:], *embedded, "dry_run=true"], absent),
    ):
        assert command(*arguments, f"output={output}") == 1
        said = "".join(capsys.readouterr())
        assert f"output={output}: " in said and "can't be written" in said
        assert "Traceback" not in said


class Dying:
    """A launcher that starts jobs until one kills it, as a pool does whose worker is killed."""

    def __init__(self, sweep, deadly):
        self.sweep, self.deadly, self.started = sweep, deadly, []

    def launch(self, job_overrides, initial_job_idx):
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            self.started.append(overrides)
            self.sweep.record(number, None, files.LOST)
            if overrides in self.deadly:
                raise RuntimeError("a worker was killed")
            self.sweep.record(number, None, None)
        return [Returned({"folder": None, "error": None})] * len(job_overrides)


class Returned:
    def __init__(self, value):
        self.return_value = value


def test_a_killed_worker_takes_no_other_job_with_it(tmp_path):
    from experiments.sweeps.jobs import SweepJob

    jobs = [SweepJob([str(number)], []) for number in range(4)]
    launcher = Dying(files.SweepFiles(tmp_path), deadly=[["1"]])
    launches = Launches(launcher, launcher.sweep)
    launches.launch_all(jobs)
    assert launcher.started == [["0"], ["1"], ["2"], ["3"], ["1"]]  # once more, by itself
    errors = [record["error"] for _, record in launches.ends(jobs)]
    assert errors == [None, files.LOST, None, None]


def test_a_launcher_that_starts_nothing_fails(tmp_path):
    from experiments.sweeps.jobs import SweepJob

    class Broken:
        def launch(self, job_overrides, initial_job_idx):
            raise RuntimeError("no such queue")

    jobs = [SweepJob(["0"], [])]
    launches = Launches(Broken(), files.SweepFiles(tmp_path))
    with pytest.raises(RuntimeError, match="no such queue"):
        launches.launch_all(jobs)
    assert [record for _, record in launches.ends(jobs)] == [None]


def test_a_preset_runs_side_by_side_and_a_worker_killed_for_good_is_named(
    checkpoints, data_folder, tmp_path
):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path / "out")
    deadly = (
        "import os, camera.api\n"
        "compress = camera.api.compress\n"
        "def killed(model, method, *a, **k):\n"
        "    if method.name == 'random': os.kill(os.getpid(), 9)\n"
        "    return compress(model, method, *a, **k)\n"
        "import camera; camera.compress = killed\n"
    )
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('DEADLY'):\n"
        + "".join(f"    {line}\n" for line in deadly.splitlines())
    )
    arguments = ["-m", *overrides, "evaluation=none", "hydra/launcher=parallel"]
    grid = "[{method:dense},{method:[camera_p,random],sparsity:0.4}]"
    arguments += ["experiment=main", f"hydra.sweeper.grids.main={grid}"]
    done = subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=CONF.parent,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DEADLY": "1",
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(CONF.parent)]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "2 of 3 jobs done" in done.stdout
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = {(row["method"], row["sparsity"], row["status"]) for row in csv.DictReader(file)}
    assert rows >= {("dense", "", "done"), ("camera_p", "40.0", "done")}
    assert "killed: it left no record" in (the_sweep(tmp_path / "out") / "table.md").read_text()
    records = (the_sweep(tmp_path / "out") / "jobs").glob("*.json")
    assert any(json.loads(file.read_text())["error"] == files.LOST for file in records)


def test_a_second_sigterm_does_not_keep_the_table_away(sweep, tmp_path, monkeypatch):
    tables = ending._tables

    def disturbed(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        tables(*args)

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(ending, "_tables", disturbed)
    monkeypatch.setattr(runs, "assemble", interrupted)
    assert command(*sweep, "seed=1,2") == 143
    assert (the_sweep(tmp_path) / "table.md").exists()


def test_the_reason_in_the_run_is_the_sentence_about_the_disk(sweep, tmp_path, monkeypatch):
    full(monkeypatch, "compress.json")
    assert command(*sweep, "seed=1") == 1
    (error,) = (tmp_path / "runs").glob("*/error.txt")
    assert "free space on that disk" in error.read_text().splitlines()[0]
