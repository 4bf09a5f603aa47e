"""Experts as a shared base and low-rank deltas: the same function as the dense product."""

import pytest
import torch
from torch import nn

from camera.checkpoint.formats.delta import DeltaExperts
from camera.checkpoint.formats.format import FORMATS
from tests.helpers.models import MOE_FAMILIES, build_model
from tests.helpers.oracles import ffn_of

HIDDEN, WIDTH, EXPERTS, TOP_K, TOKENS = 16, 12, 6, 3, 50


def delta_experts(base_width=WIDTH, rank=4, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = HIDDEN, WIDTH, EXPERTS, base_width, rank
    experts = DeltaExperts(*sizes, nn.SiLU(), dtype=dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def routed(dtype=torch.float32, tokens=TOKENS):
    """Random tokens whose routing leaves the last expert without any."""
    torch.manual_seed(1)
    x_TH = torch.randn(tokens, HIDDEN, dtype=dtype)
    weight_TK, index_TK = torch.rand(tokens, EXPERTS - 1).topk(TOP_K)
    return x_TH, index_TK, weight_TK.to(dtype)


def dense_sum(experts, x_TH, index_TK, weight_TK):
    """Every expert's whole weights, spelt out: W_base where it reaches, plus A B."""
    base, y_TH = experts.base_width, torch.zeros_like(x_TH)
    for t, x_H in enumerate(x_TH):
        for e, a in zip(index_TK[t].tolist(), weight_TK[t], strict=True):
            gate_up = experts.gate_up_left[e].reshape(2, WIDTH, -1)
            gate_up = gate_up @ experts.gate_up_right[e].reshape(2, -1, HIDDEN)
            down = experts.down_left[e] @ experts.down_right[e]
            for row in range(base):
                gate_up[0, row] = gate_up[0, row] + experts.gate_up_proj[row]
                gate_up[1, row] = gate_up[1, row] + experts.gate_up_proj[base + row]
                down[:, row] = down[:, row] + experts.down_proj[:, row]
            y_TH[t] += a * (down @ (nn.functional.silu(gate_up[0] @ x_H) * (gate_up[1] @ x_H)))
    return y_TH


@pytest.mark.parametrize("base_width", [WIDTH, 7, 0])
def test_factored_forward_equals_the_dense_product(base_width):
    experts = delta_experts(base_width)
    inputs = routed()
    with torch.no_grad():
        torch.testing.assert_close(
            experts(*inputs), dense_sum(experts, *inputs), rtol=1e-4, atol=1e-5
        )


def test_views_of_one_expert_are_base_plus_product():
    experts = delta_experts(base_width=7)
    x_TH, _, _ = routed()
    index_TK = torch.full((TOKENS, 1), 2)
    with torch.no_grad():
        gate, up = nn.functional.linear(x_TH, experts.gate_up(2)).chunk(2, -1)
        want_TH = nn.functional.linear(nn.functional.silu(gate) * up, experts.down(2))
        got_TH = experts(x_TH, index_TK, torch.ones(TOKENS, 1))
    torch.testing.assert_close(got_TH, want_TH, rtol=1e-4, atol=1e-5)


def test_no_tokens_and_one_token_give_their_own_rows():
    experts = delta_experts()
    x_TH, index_TK, weight_TK = routed()
    with torch.no_grad():
        whole = experts(x_TH, index_TK, weight_TK)
        one = experts(x_TH[:1], index_TK[:1], weight_TK[:1])
        none = experts(x_TH[:0], index_TK[:0], weight_TK[:0])
    torch.testing.assert_close(one, whole[:1], rtol=1e-4, atol=1e-5)
    assert none.shape == (0, HIDDEN)


def test_bfloat16_stays_bfloat16_and_near():
    experts, inputs = delta_experts(), routed()
    with torch.no_grad():
        want = experts(*inputs)
        low = experts.bfloat16()(inputs[0].bfloat16(), inputs[1], inputs[2])  # fp32 weights
    assert low.dtype == torch.bfloat16
    assert (low.float() - want).norm() < 0.03 * want.norm()


def test_gradients_reach_every_tensor():
    experts = delta_experts()
    experts(*routed()).square().sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_spec_rebuilds_the_module_in_the_place_of_native_experts(family):
    with torch.device("meta"):
        native = ffn_of(build_model(family).model.layers[-1]).experts
    count, hidden, width = native.down_proj.shape
    experts = DeltaExperts(hidden, width, count, width - 3, 2, native.act_fn)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    spec = experts.spec()
    built = FORMATS[spec["form"]].from_spec(native, spec)
    assert all(parameter.is_meta for parameter in built.parameters())
    built.load_state_dict(experts.state_dict(), assign=True)
    x_TH, index_TK = torch.randn(9, hidden), torch.arange(18).reshape(9, 2) % count
    weight_TK = torch.rand(9, 2)
    with torch.no_grad():
        assert torch.equal(built(x_TH, index_TK, weight_TK), experts(x_TH, index_TK, weight_TK))


def test_native_readers_meet_other_shapes():
    native = ffn_of(build_model("mixtral").model.layers[0]).experts
    count, hidden, width = native.down_proj.shape
    stored = DeltaExperts(hidden, width, count, width, 2, native.act_fn).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        native.load_state_dict(stored, strict=False)
