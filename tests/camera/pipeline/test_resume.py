"""A run that was killed goes on at the right layer and ends in the same bytes."""

import pkgutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import camera
from camera.pipeline.cache import computed_by
from camera.pipeline.resume import PassProgress
from camera.runtime.errors import CameraError
from camera.streaming.streamer import LayerStreamer

LAYERS = 5
PER_LAYER = 5  # files: shard, statistics, plan, hidden states, state
CALLS = (
    "camera.checkpoint.shards.write_tensors",
    "camera.calibration.statistics.Statistics.save",
    "camera.method.Plan.save",
    "camera.pipeline.resume.write_tensors",
    "camera.pipeline.resume.write_json",
)


class Killed(BaseException):
    """As good as kill -9: nothing of the library handles it."""


@pytest.fixture
def compress(checkpoints, data_folder, calibration, tmp_path):
    source = checkpoints("qwen2_moe", num_hidden_layers=LAYERS)

    def go(name="out", **options):
        settings = dict(
            sparsity=0.3,
            calibration=calibration,
            data=str(data_folder),
            device="cpu",
            progress=False,
        )
        return camera.compress(source, "camera_p", tmp_path / name, **{**settings, **options})

    return go


def written(folder):
    """Bytes of a checkpoint's shards and of its plan, by file."""
    paths = [*sorted(folder.glob("model*")), folder / "plan.safetensors"]
    return {path.name: path.read_bytes() for path in paths}


def interrupt(monkeypatch, at, after):
    """Kill at the `at`-th file that is written, before or after the writing itself."""
    count = [0]

    def wrap(target):
        original = pkgutil.resolve_name(target)

        def wrapped(*args, **kwargs):
            count[0] += 1
            if count[0] == at and not after:
                raise Killed
            original(*args, **kwargs)
            if count[0] == at:
                raise Killed

        monkeypatch.setattr(target, wrapped)

    for target in CALLS:
        wrap(target)
    return count


@pytest.fixture
def uninterrupted(compress, tmp_path):
    compress("whole")
    return written(tmp_path / "whole")


@pytest.mark.parametrize("after", [False, True], ids=["before writing", "after writing"])
@pytest.mark.parametrize("at", [1, 5, 10, 11, 12, 13, 20])
def test_killed_at_any_file_it_goes_on_to_the_same_bytes(
    at, after, compress, uninterrupted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt(patch, at, after)
        with pytest.raises(Killed):
            compress()
    assert not (tmp_path / "out").exists()
    loaded, load = [], LayerStreamer.load_layer
    monkeypatch.setattr(LayerStreamer, "load_layer", lambda s, i: loaded.append(i) or load(s, i))
    compress()
    assert written(tmp_path / "out") == uninterrupted
    finished = (at if after else at - 1) // PER_LAYER
    assert loaded == list(range(finished, LAYERS))


def test_a_dense_pass_goes_on_too(compress, tmp_path, monkeypatch):
    compress("whole", propagate="dense", statistics=tmp_path / "a")
    with monkeypatch.context() as patch:
        interrupt(patch, 8, after=True)
        with pytest.raises(Killed):
            compress(propagate="dense", statistics=tmp_path / "b")
    compress(propagate="dense", statistics=tmp_path / "b")
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    (one,), (other,) = ((tmp_path / n).glob("*.safetensors") for n in "ab")
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("target", ["layer", "between", "dense"])
def test_a_compensated_run_goes_on_too(target, compress, tmp_path, monkeypatch):
    options = dict(compensate="layer", target=target)
    compress("whole", **options)
    with monkeypatch.context() as patch:
        interrupt(patch, 2 * PER_LAYER + 1, after=True)
        with pytest.raises(Killed):
            compress(**options)
    compress(**options)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


KILLED_FOR_REAL = """
    import os, signal, sys, camera, camera.pipeline.resume
    source, out, data = sys.argv[1:]
    original, written = camera.pipeline.resume.write_json, []
    def write_json(*args):
        original(*args)
        written.append(1)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    camera.pipeline.resume.write_json = write_json
    camera.compress(source, "camera_p", out, sparsity=0.3, data=data, device="cpu",
                    calibration=camera.Calibration(samples=6, length=48), progress=False)
"""


def test_kill_minus_nine(compress, checkpoints, data_folder, uninterrupted, tmp_path):
    source = checkpoints("qwen2_moe", num_hidden_layers=LAYERS)
    command = [sys.executable, "-c", textwrap.dedent(KILLED_FOR_REAL)]
    done = subprocess.run([*command, source, tmp_path / "out", data_folder], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    compress()
    assert written(tmp_path / "out") == uninterrupted
    assert not list(tmp_path.glob(".out*"))


def test_a_truncated_shard_starts_the_work_anew(
    compress, uninterrupted, tmp_path, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        interrupt(patch, 3 * PER_LAYER, after=True)
        with pytest.raises(Killed):
            compress()
    last = sorted((tmp_path / ".out.partial").glob("model-*"))[-1]
    last.write_bytes(last.read_bytes()[:-10])
    compress()
    assert "starting anew" in caplog.text
    assert written(tmp_path / "out") == uninterrupted


def zero(path):
    """As a power cut leaves a file that wasn't waited for: its size is right."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE = {
    "hidden states zeroed": ("progress/hidden-*", zero),
    "hidden states cut": ("progress/hidden-*", lambda path: path.write_bytes(b"a" * 99)),
    "hidden states gone": ("progress/hidden-*", lambda path: path.unlink()),
    "a shard zeroed": ("model-00001-*", zero),
    "state empty": ("progress/state.json", lambda path: path.write_text("")),
    "state of another kind": ("progress/state.json", lambda path: path.write_text("[1]")),
    "statistics cut": ("progress/statistics-00001*", lambda path: path.write_bytes(b"")),
    "statistics gone": ("progress/statistics-00001*", lambda path: path.unlink()),
    "a plan gone": ("progress/plan-00000*", lambda path: path.unlink()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_work_is_done_anew_with_a_warning(
    damage, compress, uninterrupted, tmp_path, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        interrupt(patch, 2 * PER_LAYER, after=True)
        with pytest.raises(Killed):
            compress()
    pattern, harm = DAMAGE[damage]
    files = list((tmp_path / ".out.partial").glob(pattern))
    assert files
    for path in files:
        harm(path)
    compress()
    assert "starting anew" in caplog.text
    assert written(tmp_path / "out") == uninterrupted


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ("camera.runtime.distributed.world", "processes: 3 there, 1 here"),
        ("torch.get_float32_matmul_precision", "matmul_precision: 3 there, highest here"),
        ("camera.pipeline.cache.versions", "versions: 3 there"),
    ],
)
def test_work_computed_otherwise_is_dropped_with_a_warning(what, left, tmp_path, caplog):
    class model:
        device = torch.device("cpu")

    def progress():
        return PassProgress(tmp_path / "a" / "progress", computed_by(model, camera.CameraP))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(what, lambda: 3)
        other = progress()
    other.commit(1, {}, [])
    assert not progress().restore()
    assert f"starting anew ({left}" in caplog.text


def test_work_of_other_settings_is_refused_with_the_difference(compress, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2 * PER_LAYER + 1, after=True)
        with pytest.raises(Killed):
            compress(alpha=0.9)
    with pytest.raises(CameraError, match=r"alpha: 0\.9 there, 0\.5 here\): delete it"):
        compress(alpha=0.5)
    compress(alpha=0.9)
    assert (tmp_path / "out" / "camera.json").exists()


def test_work_of_another_version_or_device_is_dropped_with_a_warning(
    compress, uninterrupted, tmp_path, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        interrupt(patch, 2 * PER_LAYER + 1, after=True)
        patch.setattr("camera.pipeline.cache.code_version", lambda *_: "older")
        with pytest.raises(Killed):
            compress()
    compress()
    assert "starting anew (code: older there" in caplog.text
    assert written(tmp_path / "out") == uninterrupted


def test_a_full_disk_can_be_mended_and_gone_on_from(compress, uninterrupted, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        interrupt(patch, PER_LAYER + 2, after=True)
        with pytest.raises(Killed):
            compress()
    with monkeypatch.context() as patch:
        patch.setattr("camera.pipeline.resume.write_tensors", full)
        with pytest.raises(CameraError, match="run the same command again"):
            compress()
    compress()
    assert written(tmp_path / "out") == uninterrupted


def test_only_the_newest_hidden_states_are_kept(compress, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 3 * PER_LAYER + 1, after=True)
        with pytest.raises(Killed):
            compress()
    assert len(list((tmp_path / ".out.partial" / "progress").glob("hidden-*"))) == 1


def test_progress_of_nothing_restores_nothing(tmp_path):
    assert not PassProgress(tmp_path / "a" / "progress", {}).restore()
