"""A listener hears of every layer, with numbers that the checkpoint confirms."""

import json

import pytest
import torch

import camera
from camera.calibration.settings import Calibration
from camera.calibration.statistics import Statistics
from camera.method import Plan
from camera.pipeline.passes.measured import of_layer
from camera.runtime.errors import CameraError


class Heard:
    """Keeps what it is told; dies at the layer `dies`."""

    def __init__(self, dies=None):
        self.began, self.layers, self.dies = 0, {}, dies

    def begin(self):
        self.began += 1

    def layer(self, index, measured):
        if index == self.dies:
            raise KeyboardInterrupt
        assert self.began == 1 and index not in self.layers
        self.layers[index] = dict(measured)


@pytest.fixture
def compress(checkpoints, data_folder, tmp_path):
    def compress(heard, method="camera_p", **settings):
        return camera.compress(
            checkpoints("qwen2_moe"),
            method,
            tmp_path / "out",
            calibration=Calibration(samples=4, length=48),
            data=str(data_folder),
            listener=heard,
            **settings,
        )

    return compress


def test_shares_are_those_of_plan_and_statistics(compress, tmp_path):
    heard = Heard()
    result = compress(heard, sparsity=0.4, alpha=0.3, rank_scope="global")
    plan = Plan.load(tmp_path / "out").layers
    found = Statistics.load(tmp_path / "out" / "statistics.safetensors").layers
    assert list(heard.layers) == [0, 1, 2] and set(plan) <= {0, 1, 2}
    for index, layer in plan.items():
        energy_N, keep_N = found[index].energy(0.3), layer.keep_N
        measured = heard.layers[index]
        assert measured["kept_share"] == pytest.approx(keep_N.double().mean().item())
        removed = (energy_N[~keep_N].sum() / energy_N.sum()).item()
        assert measured["energy_removed"] == pytest.approx(removed)
        assert measured["seconds"] >= 0 and measured["memory_bytes"] > 0
    stored = json.loads((tmp_path / "out" / "camera.json").read_text())["measured"]
    assert stored == result.measured == {str(i): m for i, m in heard.layers.items()}


def test_bits_are_those_of_the_files(compress):
    heard = Heard()
    result = compress(heard, "rtn", bits=4.2)
    bits = [measured["bits"] for measured in heard.layers.values()]
    assert len(bits) == 3  # layers of one size
    assert sum(bits) / 3 == pytest.approx(result.bits["stored"])  # counted from what was written
    assert all(0 < measured["output_error"] < 0.1 for measured in heard.layers.values())


def test_a_run_that_goes_on_tells_all_layers(compress):
    first, second = Heard(dies=1), Heard()
    with pytest.raises(KeyboardInterrupt):
        compress(first, sparsity=0.4)
    compress(second, sparsity=0.4)
    assert list(first.layers) == [0] and list(second.layers) == [0, 1, 2]
    assert second.layers[0] == first.layers[0]


def test_a_refusal_begins_nothing(compress):
    heard = Heard()
    with pytest.raises(CameraError):
        compress(heard, "rtn", bits=400)
    assert heard.began == 0


def test_a_method_without_such_numbers_has_none():
    class Other:
        pass

    assert of_layer(Other(), None, None, (8, 8), {"bits": 3, "experts": [1]}) == {}
    assert of_layer(Other(), None, None, (8, 6), {}) == {"kept_share": 0.75}
    kept = {"a": [torch.tensor([0])]}
    assert of_layer(Other(), None, kept, (2, 1), {"missing": 0.5})["refit_missing"] == 0.5
