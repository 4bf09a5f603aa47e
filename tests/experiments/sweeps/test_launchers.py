"""Jobs on a cluster: what the queue is asked for, and a job that it takes off and puts back."""

import json
import os
import signal
import sys
from unittest import mock

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

import camera.pipeline.resume
import camera.streaming.streamer
from camera.runtime.errors import CameraError
from experiments.config.location import CONF
from experiments.records.files import LOST, RunFiles, SweepFiles
from hydra_plugins import camera_launchers
from tests.helpers.runs.composing import command, tiny

SLURM = "hydra_plugins.camera_launchers.SlurmLauncher"


class Queue(BasicLauncher):
    """Stands for submitit's launcher, which isn't installed here: a job that gets the signal leaves
    by sys.exit, as submitit's handler does, and is run again from the start."""

    asked: dict = {}
    lives = 0

    def __init__(self, **asked):
        super().__init__()
        Queue.asked = asked

    def launch(self, job_overrides, initial_job_idx):
        before = signal.signal(signal.SIGUSR2, lambda *_: sys.exit(-1))
        try:
            while True:
                Queue.lives += 1
                try:
                    return super().launch(job_overrides, initial_job_idx)
                except SystemExit as left:
                    assert left.code == -1 and Queue.lives <= Queue.asked["max_num_timeout"]
        finally:
            signal.signal(signal.SIGUSR2, before)


@pytest.fixture
def queue(monkeypatch):
    monkeypatch.setitem(Plugins.instance().class_name_to_class, SLURM, Queue)
    monkeypatch.setattr(Queue, "lives", 0)
    return Queue


@pytest.fixture
def overrides(checkpoints, data_folder, tmp_path):
    source = checkpoints("qwen2_moe", num_hidden_layers=5)
    return ["-m", *tiny(source, data_folder, tmp_path), "evaluation=none", "method=camera_p"]


def test_a_job_put_back_into_the_queue_goes_on_where_it_was(
    queue, overrides, tmp_path, monkeypatch
):
    original, written = camera.pipeline.resume.write_json, []
    load, loaded = camera.streaming.streamer.LayerStreamer.load_layer, []

    def time_is_up(*args):
        original(*args)
        written.append(1)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGUSR2)

    def counted(self, index):
        loaded.append((queue.lives, index))
        return load(self, index)

    monkeypatch.setattr("camera.pipeline.resume.write_json", time_is_up)
    monkeypatch.setattr("camera.streaming.streamer.LayerStreamer.load_layer", counted)
    assert command(*overrides, "hydra/launcher=slurm") == 0
    assert queue.lives == 2
    first = [index for life, index in loaded if life == 1]
    then = [index for life, index in loaded if life == 2]
    # the signal came when two layers were written
    assert first[:2] == [0, 1] and then == list(range(then[0], 5)) and 2 <= then[0] < 5
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "DONE").exists() and not (run / "error.txt").exists()
    (sweep,) = (tmp_path / "sweeps").iterdir()
    assert json.loads((sweep / "jobs" / "0000.json").read_text())["error"] is None


def test_the_queue_is_asked_for_what_the_command_says(queue, overrides, tmp_path):
    more = ("hydra.launcher.timeout_min=30", "hydra.launcher.partition=short")
    assert command(*overrides, "hydra/launcher=slurm", *more) == 0
    asked = queue.asked
    assert (asked["timeout_min"], asked["partition"]) == (30, "short")
    assert 0 < asked["signal_delay_s"] < 30 * 60 and asked["max_num_timeout"] > 0
    # submitit's files stand below the sweep's, and %j is left for SLURM to fill in
    assert str(asked["submitit_folder"]).startswith(str(tmp_path / "sweeps"))
    assert str(asked["submitit_folder"]).endswith("%j")


@pytest.mark.parametrize(("launcher", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_package_that_is_not_installed_is_named(
    launcher, package, overrides, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)  # import_module raises ModuleNotFoundError
    assert command(*overrides, f"hydra/launcher={launcher}") == 1
    said = "".join(capsys.readouterr())
    assert f"pip install 'camera-moe[{launcher}]'" in said and "Traceback" not in said
    assert "1 job was not started" in said and "0 of 1 jobs done" in said
    assert "table can't be made" not in said


class Two(camera_launchers.RemoteLauncher):
    """The first job is killed while it runs, the second comes back."""

    name, needs = "two", "json"

    def send(self, job, numbered):
        def killed():
            raise CameraError("its worker died")

        return [killed, lambda: {"folder": "second", "error": None}]


def test_a_killed_job_hides_no_other(tmp_path, monkeypatch):
    sweep = SweepFiles(tmp_path)
    sweep.record(0, tmp_path / "first", LOST)
    launcher = Two()
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    launcher.setup(hydra_context=mock.Mock(), task_function=len, config=config)
    first, second = launcher.launch([["seed=1"], ["seed=2"]], 0)
    assert first.return_value["folder"] == str(tmp_path / "first")
    assert first.return_value["error"] == "killed: its worker died"
    assert second.return_value == {"folder": "second", "error": None}


@pytest.fixture
def slurm_job(tmp_path, monkeypatch):
    """A job of submitit's that SLURM doesn't know any more, on a cluster without accounting."""
    for name, line in {"squeue": "exit 0", "scontrol": "echo JobId=7 JobState=FAILED"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(camera_launchers, "PAUSE_S", 0)
    files = {name: tmp_path / name for name in ("stdout", "stderr", "result_pickle")}
    paths = mock.Mock(folder=tmp_path, **files)
    return mock.Mock(job_id="7_0", paths=paths, **{"results.return_value": ["done"]})


def test_a_job_that_never_comes_back_is_not_waited_for(slurm_job):
    wait = camera_launchers._Waiting(slurm_job)
    with pytest.raises(CameraError, match=r"job 7_0 ended as FAILED$"):
        wait()
    log = "slurmstepd-node: error: Exceeded job memory limit\nsrun: error\n"
    slurm_job.paths.stdout.write_text(log)
    with pytest.raises(CameraError, match="ended as FAILED: Exceeded job memory limit"):
        wait()


def test_a_job_that_left_its_result_is_done(slurm_job):
    slurm_job.paths.result_pickle.touch()
    assert camera_launchers._Waiting(slurm_job)() == "done"


def test_a_job_that_was_put_back_too_often_is_to_go_on(tmp_path):
    run = RunFiles(tmp_path)
    run.fail("UncompletedJobError: Job not requeued because: timed-out too many times.", "")
    assert run.reason and run.failure is None


@pytest.mark.parametrize("launcher", sorted(p.stem for p in (CONF / "hydra/launcher").glob("*")))
def test_every_launcher_says_how_to_install_it(launcher):
    first = (CONF / "hydra" / "launcher" / f"{launcher}.yaml").read_text().partition("\n\n")[0]
    extra = {"parallel": "joblib"}.get(launcher, launcher)
    assert f"pip install 'camera-moe[{extra}]'" in first
    assert f"\n{extra} = [" in (CONF.parent / "pyproject.toml").read_text()


def test_ray_gives_a_job_a_gpu():
    said = OmegaConf.load(CONF / "hydra" / "launcher" / "ray.yaml")
    assert said.ray.remote.num_gpus >= 1  # from a job that asks for none Ray hides them
