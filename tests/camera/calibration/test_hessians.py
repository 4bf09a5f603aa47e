"""Energies and Hessians of a layer, gathered in one pass.

Shapes: T tokens, E experts of the pool.
"""

import pytest
import torch

from camera.calibration.scores.energy import EnergyObserver
from camera.moe.capture import run_ffn
from tests.helpers.oracles import shared_of
from tests.helpers.quantization.quantizing import layer_of, seen_by


@pytest.mark.parametrize("weighted", [False, True])
def test_hessians_are_sums_over_routed_tokens(weighted):
    """Against all tokens through all experts, times a zero gate."""
    ffn, x_TH = layer_of("qwen2_moe")
    seen = seen_by(ffn, x_TH, weighted=weighted)
    _, (index_TK, weight_TK) = routing_of(ffn, x_TH)
    experts, shared = ffn.module.experts, shared_of(ffn.module)
    gate = torch.sigmoid(ffn.module.shared_expert_gate(x_TH)).squeeze(1)
    tokens_TE = torch.zeros(len(x_TH), 8).scatter_(1, index_TK, weight_TK.float())
    for e in range(9):
        if e == 0:
            a_T, reached = gate, torch.ones(len(x_TH))
            h_TW = torch.nn.functional.silu(shared.gate_proj(x_TH)) * shared.up_proj(x_TH)
        else:
            a_T, reached = tokens_TE[:, e - 1], (tokens_TE[:, e - 1] > 0).float()
            gate_up = x_TH @ experts.gate_up_proj[e - 1].T
            h_TW = torch.nn.functional.silu(gate_up[:, :24]) * gate_up[:, 24:]
        scale_T1 = (a_T if weighted else reached)[:, None]
        x, h = x_TH * scale_T1, h_TW * scale_T1
        torch.testing.assert_close(seen.input_EHH[e], x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen.hidden(e), h.T @ h, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            seen.input_max2_EH[e], (x_TH * reached[:, None]).square().amax(0)
        )


def routing_of(ffn, x_TH):
    seen = {}
    hook = ffn.module.experts.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=(args + tuple(kwargs.values()))), with_kwargs=True
    )
    with torch.no_grad():
        ffn.module(x_TH[None])
    hook.remove()
    return seen["x"][0], seen["x"][1:3]


def test_energies_are_camera_p_s_and_hessians_are_not_stored():
    ffn, x_TH = layer_of("qwen3_moe")
    plain = EnergyObserver(ffn)
    with torch.no_grad():
        run_ffn(ffn, x_TH[None], plain)
    seen, energy = seen_by(ffn, x_TH, keep=5), plain.result()
    stored = seen.stored()
    assert type(stored) is type(energy)
    for name, tensor in energy.tensors().items():
        assert torch.equal(getattr(stored, name), tensor)
    assert (seen.kept_E <= 5).all() and len(seen.kept_PH) == int(seen.kept_E.sum())
    first = seen.kept(2)
    assert any(torch.equal(first[0], x) for x in x_TH)
