"""Energies and pruned sets of the released implementation; `--golden DIR` checks other vectors."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from camera.calibration.scores.energy import EnergyObserver
from camera.moe.budget import to_remove
from camera.moe.capture import run_ffn
from camera.moe.families import Family
from camera.moe.feed_forward import FeedForward
from camera.pruning.ranking import keep_highest
from tests.helpers.golden import golden_folder


class Experts(nn.Module):
    has_gate = is_concatenated = True

    def __init__(self, gate_up, down):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up


class Mlp(nn.Module):
    def __init__(self, gate_up, down):
        super().__init__()
        width, hidden = down.shape[1], down.shape[0]
        self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(width, hidden, bias=False), nn.SiLU()
        self.gate_proj.weight.data, self.up_proj.weight.data = gate_up.chunk(2)
        self.down_proj.weight.data = down


class Block(nn.Module):
    """A MoE block whose routing is the recorded one."""

    def __init__(self, tensors):
        super().__init__()
        self.routing = tensors["top_k_index"], tensors["top_k_weights"]
        self.gate = nn.Identity()  # blocks have a router by this name; here the case has routed
        self.experts = Experts(tensors["gate_up_proj"], tensors["down_proj"])
        if "shared_down_proj" in tensors:
            self.shared = Mlp(tensors["shared_gate_up_proj"], tensors["shared_down_proj"])
        if "shared_expert_gate" in tensors:
            gate = tensors["shared_expert_gate"]
            self.shared_gate = nn.Linear(gate.shape[1], 1, bias=False)
            self.shared_gate.weight.data = gate

    def forward(self, x):
        y = self.experts(x[0], *self.routing)
        return y + self.shared(x[0]) if hasattr(self, "shared") else y


def pytest_generate_tests(metafunc):
    """Every case of the folder that holds energies, whatever its name."""
    folder = golden_folder(metafunc.config)
    index = json.loads((folder / "index.json").read_text())
    cases = [c for c in index["cases"] if c["method"] == "camera_energy"]
    assert cases, f"{folder} has no case of method camera_energy"
    if "expected" in metafunc.fixturenames:
        kind = "energy_" if "energies" in metafunc.function.__name__ else "pruned_"
        pairs = [(c, name) for c in cases for name in c["expected"] if name.startswith(kind)]
        ids = [f"{c['case']}-{name}" for c, name in pairs]
        values = [((folder, c), name) for c, name in pairs]
        metafunc.parametrize(
            ("case", "expected"), values, ids=ids, scope="module", indirect=["case"]
        )


@pytest.fixture(scope="module")
def case(request):
    folder, about = request.param
    return about, load_file(folder / about["file"])


@pytest.fixture(scope="module")
def measured(case):
    _, tensors = case
    gated = "shared_expert_gate" in tensors
    family = Family(shared="shared", shared_gate="shared_gate" if gated else None)
    layer = nn.Module()
    layer.mlp = Block(tensors)
    ffn = FeedForward(layer, family, "layer")
    observer = EnergyObserver(ffn)
    with torch.no_grad():
        run_ffn(ffn, tensors["hidden_states"][None], observer)
    return observer.result()


def alpha_of(name):
    return float(name.split("_a")[1].split("_r")[0])


def test_energies_equal_the_released_implementation(case, expected, measured):
    about, tensors = case
    tolerance = about["expected"][expected]["compare"]
    torch.testing.assert_close(
        measured.energy(alpha_of(expected)),
        tensors[expected].double(),
        rtol=tolerance["rtol"],
        atol=tolerance["atol"],
    )


def test_pruned_sets_equal_the_released_implementation(case, expected, measured):
    pruned = case[1][expected]
    ratio = float(expected.split("_r")[1])
    remove = to_remove(sum(measured.widths), ratio)
    keep_N = keep_highest(measured.energy(alpha_of(expected)), measured.widths, remove)
    assert torch.equal((~keep_N).nonzero().squeeze(1), pruned)
