"""A bit plan applied to a layer: orders, widths, fallbacks.

Shapes: M micro-experts of an expert that stay, W width of one expert.
"""

import pytest
import torch

from camera.quantization.layer import quantize_layer
from camera.quantization.plans.layer_bits import ExpertBits
from camera.quantization.quantizers.gptq import GPTQ
from tests.helpers.quantization.gptq_problem import as_good
from tests.helpers.quantization.quantizing import dense_output, layer_of, seen_by


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "llama", "gpt_oss"])
def test_permutation_alone_changes_no_output(family):
    """Eight bits with fine scales are all but exact, whatever the order of micro-experts."""
    ffn, x_TH = layer_of(family)
    before, pool = dense_output(ffn, x_TH), ffn.widths
    plan = [ExpertBits.matched(torch.full((w,), 8), torch.rand(w)) for w in pool]
    assert any(e.order().tolist() != list(range(len(e.down))) for e in plan)
    quantize_layer(ffn, plan, GPTQ(group_size=4))
    torch.testing.assert_close(dense_output(ffn, x_TH), before, rtol=0.05, atol=0.02 * before.std())


@pytest.mark.parametrize("settings", [{}, dict(act_order=True, static_groups=True)])
def test_equal_bits_are_uniform_gptq(settings):
    """One group of micro-experts, kept in order, solves to what GPTQ gives each matrix alone."""
    ffn, x_TH = layer_of("qwen2_moe")
    seen, experts = seen_by(ffn, x_TH), ffn.module.experts
    solver = GPTQ(group_size=16, scale_dtype=torch.float16, **settings)
    inputs, hidden = seen.input_EHH[1:], torch.stack([seen.hidden(e) for e in range(1, 9)])
    tokens_E = seen.tokens_E[1:]
    want_gate_up = solver.solve(experts.gate_up_proj, solver.factor(inputs, tokens_E), bits=2)
    want_down = solver.solve(experts.down_proj, solver.factor(hidden, tokens_E), bits=2)
    quantize_layer(ffn, [ExpertBits.matched(torch.full((w,), 2)) for w in ffn.widths], solver, seen)
    # solved in batches of other shapes, whose sums run in another order
    weights, packed = (experts.gate_up_proj, experts.down_proj), ffn.module.experts
    for e in range(8):
        one = slice(e, e + 1)
        as_good(packed.gate_up(e)[None], want_gate_up.weight[one], weights[0][one], inputs[one])
        as_good(packed.down(e)[None], want_down.weight[one], weights[1][one], hidden[one])


def test_widths_of_nothing_one_and_all_are_solved_together():
    """Padding of a batch of unequal experts changes nothing: each alone gives the same."""
    ffn, x_TH = layer_of("qwen3_moe")
    seen, widths = seen_by(ffn, x_TH), [0, 1, 2, 7, 24, 24, 5, 1]
    torch.manual_seed(0)
    plan = []
    for width in widths:
        bits_W = torch.zeros(24, dtype=torch.int64)
        bits_W[torch.randperm(24)[:width]] = torch.randint(1, 4, (width,))
        plan.append(ExpertBits.matched(bits_W))
    native, solver = ffn.module.experts, GPTQ(group_size=5, scale_dtype=torch.float16)
    downs = []
    for e, bits in enumerate(plan):
        order = bits.order()
        H_MM = seen.hidden(e)[order][:, order]
        factor = solver.factor(H_MM[None], seen.tokens_E[e : e + 1])
        weight = native.down_proj[e][:, order][None]
        downs.append(solver.solve(weight, factor, column_bits=bits.down[order]).weight[0])
    quantize_layer(ffn, plan, solver, seen)
    assert ffn.module.experts.widths == widths
    for e, down in enumerate(downs):
        torch.testing.assert_close(ffn.module.experts.down(e), down, rtol=0, atol=1e-6)
    assert dense_output(ffn, x_TH).isfinite().all()


def test_experts_without_tokens_fall_back_and_are_counted():
    ffn, x_TH = layer_of("qwen3_moe")
    native = ffn.module.experts.down_proj.clone()
    seen = seen_by(ffn, x_TH[:2])
    empty = int((seen.tokens_E == 0).sum())
    assert empty
    for fallback in ("rtn", "mean_hessian"):
        ffn, _ = layer_of("qwen3_moe")
        plan = [ExpertBits.matched(torch.full((24,), 2))] * 8
        solver = GPTQ(group_size=16, fallback=fallback)
        _, report = quantize_layer(ffn, plan, solver, seen)
        (report,) = report.values()
        assert report["gate_up"]["fallback"] == {fallback: empty}
        assert report["down"]["fallback"] == {"rtn": empty}
        lost = int((seen.tokens_E == 0).nonzero()[0])
        want = GPTQ(group_size=16).solve(native[lost][None], bits=2).weight[0]
        got = ffn.module.experts.down(lost)
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-4)


def test_gptq_loses_less_than_rounding_and_true_sequential_less_downstream():
    ffn, x_TH = layer_of("llama")
    plan = [ExpertBits.matched(torch.full((64,), 2))]
    before, errors = dense_output(ffn, x_TH), []
    for true_sequential in (False, True):
        ffn, _ = layer_of("llama")
        seen = seen_by(ffn, x_TH, keep=1000)
        _, report = quantize_layer(
            ffn, plan, GPTQ(group_size=16), seen, true_sequential=true_sequential
        )
        (report,) = report.values()
        for part in report.values():
            assert part["error_all"] < part["error_rtn_all"] < 1
        errors.append((dense_output(ffn, x_TH) - before).square().sum())
    assert errors[0] != errors[1]
