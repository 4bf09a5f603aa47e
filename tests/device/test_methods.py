"""Every method, memory mode and family makes on an accelerator what it makes on the CPU."""

import pytest
import torch

import camera
from camera.method import METHODS
from camera.quantization.base import Quantization
from tests.helpers.checkpoints import tensors_of
from tests.helpers.methods import CASES
from tests.helpers.models import MOE_FAMILIES

pytestmark = pytest.mark.gpu  # on a real card too
# A code that rounds the other way by the last bit of its scale moves the tokens of later layers:
# quantised models are compared in the layer whose inputs are the same.
SAME_CODES = 0.98


def product_of(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Low-rank factors have signs of their own: what counts is their product."""
    left = tensors[name.replace("_right", "_left")].double()
    right = tensors[name.replace("_left", "_right")].double()
    if "gate_up" not in name:
        return left @ right
    halves = zip(left.chunk(2, 1), right.chunk(2, 1), strict=True)
    return torch.cat([left @ right for left, right in halves], 1)


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "_left" in name or "_right" in name:
            pair = product_of(mine, name), product_of(theirs, name)
        else:
            pair = mine[name], tensor
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: name + m)


def assert_first_layer_quantised_alike(mine: dict, theirs: dict) -> None:
    assert mine.keys() == theirs.keys()
    first = {name: tensor for name, tensor in theirs.items() if ".layers.0." in name}
    assert any(tensor.dtype == torch.uint8 for tensor in first.values())
    for name, tensor in first.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-5)
        elif name.endswith("_scales"):
            assert (mine[name].int() - tensor.int()).abs().max() <= 1, name
        else:
            assert (mine[name] == tensor).float().mean() >= SAME_CODES, name


@pytest.mark.parametrize("case", CASES)
def test_every_method_makes_what_it_makes_on_the_cpu(case, compressed, device):
    mine, theirs = (tensors_of(compressed(case, where)) for where in (device, "cpu"))
    if issubclass(METHODS[CASES[case][0]], Quantization):
        assert_first_layer_quantised_alike(mine, theirs)
    else:
        assert_same(mine, theirs)


def test_experts_of_one_width_are_those_of_the_cpu(compressed, device):
    settings = dict(expert_widths="uniform", sparsity=0.4138)
    mine, theirs = (
        tensors_of(compressed("camera_p", where, settings=settings)) for where in (device, "cpu")
    )
    assert_same(mine, theirs)


@pytest.mark.parametrize(
    ("case", "memory"),
    [
        ("camera_p", dict(phi="recompute")),
        ("camera_p", dict(phi="routed")),
        ("camera_p", dict(hidden="disk")),
        ("camera_p", dict(experts="disk")),
        ("heapr", dict(hidden="disk")),
    ],
)
def test_memory_that_is_saved_changes_nothing(case, memory, compressed, device):
    saving = compressed(case, device, memory=camera.MemoryChoices(**memory))
    assert_same(tensors_of(saving), tensors_of(compressed(case, "cpu")))


@pytest.mark.parametrize("family", [name for name in MOE_FAMILIES if name != "qwen2_moe"])
def test_every_family_is_pruned_as_on_the_cpu(family, compressed, device):
    mine, theirs = (tensors_of(compressed("camera_p", where, family)) for where in (device, "cpu"))
    assert_same(mine, theirs)


@pytest.mark.parametrize("case", ["camera_p", "heapr"])
def test_the_same_run_gives_the_same_bytes(case, compressed, device, tmp_path):
    again = compressed(case, device, memory=camera.MemoryChoices())
    mine, theirs = tensors_of(compressed(case, device)), tensors_of(again)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
