"""Micro-expert energy against a dense all-experts oracle, and the laws it must obey."""

import pytest
import torch

from camera.calibration.scores.energy import EnergyObserver
from camera.calibration.statistics import Statistics
from camera.moe.capture import run_ffn
from camera.moe.families import FAMILIES as DECLARED
from camera.moe.feed_forward import FeedForward
from camera.moe.grouped.sinks import OutputSum
from camera.runtime.errors import CameraError
from tests.helpers import oracles
from tests.helpers.models import FAMILIES, MOE_FAMILIES, build_model


def measure(family, ffn, x_TH, mask_T=None, chunks=1, output=False):
    view = FeedForward(ffn, DECLARED[family], "layer")
    observer, outputs = EnergyObserver(view), []
    masks = [None] * chunks if mask_T is None else mask_T.chunk(chunks)
    with torch.no_grad():
        for x, mask in zip(x_TH.chunk(chunks), masks, strict=True):
            sink = OutputSum(x) if output else None
            run_ffn(view, x[None], observer, mask_T=mask, sink=sink)
            outputs.append(sink and sink.y_TH)
    return observer.result(), outputs


def layer_and_input(family, index=1, tokens=40, **overrides):
    model = build_model(family, **overrides)
    ids = torch.randint(3, 250, (1, tokens), generator=torch.Generator().manual_seed(1))
    x_TH, routing = oracles.capture(model, index, ids)
    return model.model.layers[index], x_TH, routing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_energy_equals_the_dense_all_experts_oracle(family, alpha):
    layer, x_TH, routing = layer_and_input(family)
    energy, _ = measure(family, layer, x_TH)
    expected = oracles.energies(oracles.ffn_of(layer), x_TH, routing, alpha)
    torch.testing.assert_close(energy.energy(alpha), expected, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_the_oracle_itself_adds_up_to_the_ffn_output(family):
    layer, x_TH, routing = layer_and_input(family)
    ffn = oracles.ffn_of(layer)
    with torch.no_grad():
        own = ffn(x_TH[None])[0].double()
    torch.testing.assert_close(
        oracles.dense_phi(ffn, x_TH, routing) @ oracles.basis(ffn), own, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_can_return_the_ffn_output_itself(family):
    layer, x_TH, _ = layer_and_input(family)
    with torch.no_grad():
        own = oracles.ffn_of(layer)(x_TH[None])[0]
    _, (seen,) = measure(family, layer, x_TH, output=True)
    torch.testing.assert_close(seen, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "llama"])
@pytest.mark.parametrize("chunks", [2, 5, 40])
def test_any_chunking_of_the_tokens_gives_the_same_energies(family, chunks):
    layer, x_TH, _ = layer_and_input(family)
    whole, _ = measure(family, layer, x_TH)
    parts, _ = measure(family, layer, x_TH, chunks=chunks)
    # fp32 products of other shapes: the terms of a small phi cancel to some 1e-5 of it
    torch.testing.assert_close(parts.sum2_N, whole.sum2_N, rtol=1e-4, atol=1e-14)
    torch.testing.assert_close(parts.max2_N, whole.max2_N, rtol=1e-4, atol=1e-14)
    assert torch.equal(parts.tokens_E, whole.tokens_E)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "llama"])
@pytest.mark.parametrize("output", [False, True])
def test_padding_is_not_counted(family, output):
    layer, x_TH, _ = layer_and_input(family)
    mask_T = torch.arange(40) >= 13
    masked, _ = measure(family, layer, x_TH, mask_T, output=output)
    alone, _ = measure(family, layer, x_TH[mask_T])
    torch.testing.assert_close(masked.energy(0.9), alone.energy(0.9), rtol=1e-4, atol=1e-14)
    assert torch.equal(masked.tokens_E, alone.tokens_E)


def test_permuting_micro_experts_permutes_their_energies():
    layer, x_TH, _ = layer_and_input("mixtral")
    before, _ = measure("mixtral", layer, x_TH)
    experts, width = layer.mlp.experts, before.widths[0]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate, up = experts.gate_up_proj[2].chunk(2)
        experts.gate_up_proj[2] = torch.cat((gate[order], up[order]))
        experts.down_proj[2] = experts.down_proj[2][:, order]
    after, _ = measure("mixtral", layer, x_TH)
    rows = slice(2 * width, 3 * width)
    # each from fp32 sums, which another place in the matrix may order otherwise
    moved = before.energy(0.5)[rows][order]
    torch.testing.assert_close(after.energy(0.5)[rows], moved, rtol=1e-4, atol=0)


@pytest.mark.parametrize("part", ["up", "down"])
def test_scaling_up_or_down_by_c_scales_the_energy_by_c_squared(part):
    layer, x_TH, _ = layer_and_input("mixtral")
    before, _ = measure("mixtral", layer, x_TH)
    experts, width = layer.mlp.experts, before.widths[0]
    with torch.no_grad():
        if part == "up":
            experts.gate_up_proj[0, width + 5] *= 3
        else:
            experts.down_proj[0, :, 5] *= 3
    after, _ = measure("mixtral", layer, x_TH)
    ratio = after.energy(0.9) / before.energy(0.9)
    torch.testing.assert_close(ratio[5], torch.tensor(9.0, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(ratio[6:], torch.ones_like(ratio[6:]), rtol=1e-5, atol=0)


def test_alpha_zero_energy_of_a_removed_micro_expert_bounds_the_output_error():
    layer, x_TH, routing = layer_and_input("qwen3_moe")
    energy, _ = measure("qwen3_moe", layer, x_TH)
    lowest = torch.argsort(energy.energy(0.0))[:30]
    ffn = oracles.ffn_of(layer)
    error = oracles.dense_phi(ffn, x_TH, routing)[:, lowest] @ oracles.basis(ffn)[lowest]
    assert error.norm() <= energy.energy(0.0)[lowest].sqrt().sum()


def test_an_expert_without_tokens_has_no_energy_and_is_reported():
    layer, x_TH, _ = layer_and_input("qwen3_moe")
    layer.mlp.gate.weight.data[4] = -100 * x_TH.mean(0)
    x_TH = x_TH.mean(0) + 0.01 * x_TH
    energy, _ = measure("qwen3_moe", layer, x_TH)
    assert ("layer.mlp.experts", 4) in energy.unreached()
    assert energy.energy(0.9)[4 * 24 : 5 * 24].eq(0).all()


def test_energies_survive_saving(tmp_path):
    layer, x_TH, _ = layer_and_input("qwen2_moe")
    energy, _ = measure("qwen2_moe", layer, x_TH)
    Statistics({7: energy}, {"model": "m"}).save(tmp_path / "e.safetensors")
    again = Statistics.load(tmp_path / "e.safetensors")
    assert again.about == {"model": "m"}
    assert again.layers[7].groups == energy.groups
    assert torch.equal(again.layers[7].energy(0.9), energy.energy(0.9))


def test_a_broken_energies_file_is_refused_by_name(tmp_path):
    path = tmp_path / "e.safetensors"
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(CameraError, match=str(path)):
        Statistics.load(path)


def test_bf16_weights_are_measured_in_fp32():
    layer, x_TH, _ = layer_and_input("qwen2_moe", dtype=torch.bfloat16)
    energy, _ = measure("qwen2_moe", layer, x_TH)
    assert energy.max2_N.dtype == torch.float32 and energy.sum2_N.dtype == torch.float64
    routed = energy.energy(0.9)[40:]
    assert len(routed.unique()) > 0.99 * (routed > 0).sum()
