"""The shared cache of statistics: what shares a pass, what doesn't, what isn't believed."""

import json
from pathlib import Path
from time import sleep

import pytest
import torch
from safetensors.torch import load_file

import camera
from camera.calibration.statistics import Statistics
from camera.calibration.trials import TrialStatistics
from camera.pipeline.cache import tokens_key
from camera.pipeline.passes.dense import DensePass
from camera.runtime.files import CheckpointFiles
from camera.streaming.settings import MemoryChoices
from tests.helpers.models import build_model, build_tokenizer


@pytest.fixture
def passes(monkeypatch):
    """The dense passes that were made."""
    made, gather = [], DensePass._gather
    monkeypatch.setattr(DensePass, "_gather", lambda *a: made.append(a) or gather(*a))
    return made


@pytest.fixture
def compress(checkpoints, data_folder, calibration, tmp_path):
    """compress(method, ...): the tensors of a new checkpoint over the folder `shared`."""
    count = iter(range(100))

    def go(method="camera_p", model=None, statistics=tmp_path / "shared", **options):
        out = tmp_path / f"out-{next(count)}"
        settings = dict(sparsity=0.3) if isinstance(method, str) else {}
        settings |= dict(data=str(data_folder), device="cpu", progress=False)
        settings |= dict(calibration=calibration, statistics=statistics, propagate="dense")
        camera.compress(model or checkpoints("qwen2_moe"), method, out, **{**settings, **options})
        files = sorted(out.glob("model*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    return go


def equal(one, other):
    same = one.keys() == other.keys()
    return same and all(torch.equal(one[name], other[name]) for name in one)


def test_one_pass_serves_what_computes_alike_and_no_other(compress, passes, monkeypatch):
    compress()
    compress(sparsity=0.4)
    assert len(passes) == 1
    with monkeypatch.context() as patch:
        patch.setattr("camera.pipeline.cache.versions", lambda: {"torch": "99"})
        compress()
    assert len(passes) == 2
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
        compress()
    assert len(passes) == 3
    compress(memory=MemoryChoices(experts="disk"))
    assert len(passes) == 4
    compress(sparsity=0.5)
    assert len(passes) == 4


def test_a_report_tells_what_statistics_cost_the_run_that_gathered_them(
    compress, tmp_path, monkeypatch
):
    gather = DensePass._gather
    monkeypatch.setattr(DensePass, "_gather", lambda *a: sleep(1) or gather(*a))
    compress()
    compress(sparsity=0.4)
    (path,) = (tmp_path / "shared").glob("*.json")
    path.unlink()  # of a version that noted nothing
    compress(sparsity=0.5)
    own, other, unknown = (
        json.loads((tmp_path / f"out-{n}" / CheckpointFiles.REPORT).read_text()) for n in range(3)
    )
    assert own["cached_statistics"] == {} and own["seconds"]["calibrate"] >= 1
    used = other["cached_statistics"]
    assert 1 <= used["seconds"] <= own["seconds"]["calibrate"] + 0.01
    assert other["seconds"]["calibrate"] < used["seconds"]  # reading them takes milliseconds
    assert 0 < used["peak_memory_bytes"] <= own["peak_memory_bytes"]
    assert unknown["cached_statistics"] == {"seconds": 0.0, "peak_memory_bytes": 0}


def test_tokens_of_another_shape_are_others():
    class Drawn:
        hash = "the ids in order"

        def __init__(self, *shape):
            self.ids_NL = torch.arange(8).view(shape)

    assert tokens_key(Drawn(2, 4)) != tokens_key(Drawn(4, 2))


def test_statistics_say_what_they_are_of(compress, tmp_path):
    compress()
    (path,) = (tmp_path / "shared").glob("*.safetensors")
    about = Statistics.load(path).about
    assert about["propagate"] == "dense" and about["processes"] == 1
    assert (about["dtype"], about["device"]) == ("torch.float32", "cpu")
    assert about["calibration"]["samples"] == 6
    assert about["versions"]["mathematics"] == str(camera.MATHEMATICS)


@pytest.mark.parametrize("damage", ["cut", "empty", "of another kind"])
def test_damaged_statistics_are_gathered_anew(damage, compress, passes, tmp_path, caplog):
    first = compress()
    (path,) = (tmp_path / "shared").glob("*.safetensors")
    content = path.read_bytes()
    if damage == "of another kind":
        trials = TrialStatistics({}, torch.zeros(1, dtype=torch.int64), torch.zeros(1))
        Statistics({0: trials}, {}).save(path)
    else:
        path.write_bytes(content[:-7] if damage == "cut" else b"")
    assert equal(compress(), first)
    assert len(passes) == 2
    assert damage == "of another kind" or "gathering anew" in caplog.text
    assert path.read_bytes() == content


def test_a_method_object_used_before_shares_what_was_seen_of_this_model_alone(compress, tmp_path):
    """That no method keeps anything in its object is in test_contract.py."""

    def new():
        return camera.CameraQ(bits=4.5, group_size=8, score="hidden_share")

    other = tmp_path / "other"
    build_model("qwen2_moe", seed=7).save_pretrained(other)
    build_tokenizer().save_pretrained(other)
    used = new()
    compress(used)
    again = compress(used, Path(other))
    later = compress(new(), other)
    clean = compress(new(), other, tmp_path / "clean")
    assert equal(again, clean) and equal(later, clean)
