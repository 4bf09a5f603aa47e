"""Energies and pruned sets of the released implementation; `--golden DIR` checks other vectors."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from camera.blocks import FeedForward
from camera.capture import observe
from camera.energy import EnergyObserver
from camera.families import Family
from camera.plan import keep_highest

CASES = ("camera_qwen3", "camera_qwen2", "camera_mixtral", "camera_deepseek")


class Experts(nn.Module):
    has_gate = is_concatenated = True

    def __init__(self, gate_up, down):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up), nn.Parameter(down)

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return nn.functional.silu(gate) * up


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


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    index = json.loads((golden / "index.json").read_text())
    found = next((c for c in index["cases"] if c["case"] == request.param), None)
    if found is None:
        pytest.skip(f"{golden} has no case {request.param}")
    return found, load_file(golden / found["file"])


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
        observe(ffn, tensors["hidden_states"][None], observer)
    return observer.result()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_energies_equal_the_released_implementation(case, measured, alpha):
    about, tensors = case
    tolerance = about["expected"][f"energy_a{alpha}"]["compare"]
    expected = tensors[f"energy_a{alpha}"].double()
    torch.testing.assert_close(
        measured.energy(alpha), expected, rtol=tolerance["rtol"], atol=tolerance["atol"]
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_pruned_sets_equal_the_released_implementation(case, measured, alpha, ratio):
    _, tensors = case
    expected = tensors[f"pruned_a{alpha}_r{ratio}"]
    keep_N = keep_highest(measured.energy(alpha), measured.widths, len(expected))
    assert torch.equal((~keep_N).nonzero().squeeze(1), expected)
