"""Camera-Q: bits by energy, the same in all three matrices; what quantising methods refuse.

Shapes: N micro-experts of a layer's pool, W width of one expert.
"""

from dataclasses import replace

import pytest
import torch

import camera
from baselines.quantization.gptq import Gptq
from camera.moe.budget import Budget, Count
from camera.moe.feed_forward import FeedForward
from camera.moe.pool import LayerPool
from camera.quantization.camera_q import CameraQ
from camera.quantization.camera_q_dagger import CameraQDagger
from camera.quantization.layer import quantize_layer
from tests.helpers.quantization.quantizing import (
    budget_of,
    dense_output,
    layer_of,
    plan_of,
    seen_by,
)


def test_a_micro_expert_has_one_width_in_three_matrices():
    """Rows and columns of a mixed layer are those of the uniform runs at their bits."""
    ffn, x_TH = layer_of("qwen3_moe")
    seen, experts = seen_by(ffn, x_TH), ffn.module.experts
    method = CameraQ(bits=4.0, group_size=16, low_share=0.3)
    plan = plan_of(method, ffn, seen)
    solver = method.quantizer_of(plan.group_size)
    factor = solver.factor(seen.input_EHH, seen.tokens_E)
    uniform = {b: solver.solve(experts.gate_up_proj, factor, bits=b).weight for b in (1, 2, 3)}
    quantize_layer(ffn, plan.experts, solver, seen)
    used = set()
    for e, bits in enumerate(plan.experts):
        order = bits.order()
        assert torch.equal(bits.gate, bits.up) and torch.equal(bits.gate, bits.down)
        assert bits.down[order].tolist() == sorted(bits.down.tolist(), reverse=True)
        packed = ffn.module.experts.gate_up(e)
        for place, row in enumerate(order.tolist()):
            b = int(bits.down[row])
            used.add(b)
            torch.testing.assert_close(packed[place], uniform[b][e, row], atol=1e-5, rtol=0)
            other = packed[len(order) + place], uniform[b][e, len(order) + row]
            torch.testing.assert_close(*other, atol=1e-5, rtol=0)
    assert used == {1, 2, 3}


@pytest.mark.parametrize(
    ("bits", "options", "levels"),
    [
        (2.25, {}, [3, 2, 1]),
        (2.5, {}, [3, 2, 1]),
        (1.5, {}, [3, 2, 1]),  # nothing is removed unasked
        (3.25, {}, [4, 3, 2]),
        (3.25, {"ratios": [0.2, 0.6, 0.2]}, [3, 2, 1]),
        (3.25, {"group_bits": [3, 1]}, [3, 1]),
        (4.25, {"group_size": 16}, [3, 2, 1]),  # 2 bits a weight are scales and zeros
        (6.25, {}, [7, 6, 5]),
    ],
)
def test_groups_lie_around_what_the_target_allows_all(bits, options, levels):
    method, pool = CameraQ(bits=bits, **options), LayerPool([1536, 768], [False, True])
    weights = 3 * 576 * sum(pool.widths)
    budget = Budget(Count(weights, weights, 0, 2 * weights), {0: pool}, "test", 576)
    method.check(budget)
    assert method.levels(budget) == levels
    assert method.plan({}, budget).shared == {"levels": levels}
    assert method.settings()["group_bits"] == options.get("group_bits")  # as it was asked


def test_zero_bits_equal_pruning_then_camera_q():
    """Lowest group removed: the same packed tensors as of a layer that was sliced first."""
    ffn, x_TH = layer_of("qwen2_moe")
    method = CameraQ(bits=None, ratios=[0.3, 0.4, 0.3], group_bits=[3, 2, 0], group_size=16)
    seen = seen_by(ffn, x_TH)
    plan = plan_of(method, ffn, seen)
    quantize_layer(ffn, plan.experts, method.quantizer_of(plan.group_size), seen)
    whole = dense_output(ffn, x_TH)

    sliced, _ = layer_of("qwen2_moe")
    pruned = camera.CameraP(sparsity=0.3)
    kept = plan_of(pruned, sliced, seen.stored())
    pruned.apply(1, sliced, kept, None)
    sliced = FeedForward(sliced.layer, sliced.family, sliced.path)
    again = seen_by(sliced, x_TH)
    then = replace(method, ratios=[0.3 / 0.7, 0.4 / 0.7], group_bits=[3, 2])
    plan = plan_of(then, sliced, again)
    quantize_layer(sliced, plan.experts, then.quantizer_of(plan.group_size), again)
    assert ffn.module.experts.widths == sliced.module.experts.widths
    assert min(ffn.module.experts.widths) < max(ffn.module.experts.widths)
    torch.testing.assert_close(dense_output(sliced, x_TH), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (CameraQ(bits=0.5), "between"),
        (CameraQ(bits=7.0, group_bits=[3, 2, 1]), "between"),
        (CameraQ(group_bits=[1, 2, 3]), "group_bits"),
        (CameraQ(group_bits=[4, 3, 2, 1], low_share=0.5), "ratios"),
        (CameraQ(ratios=[0.5, 0.5]), "share for each"),
        (CameraQ(ratios=[0.5, 0.5, 0.5]), "add up"),
        (CameraQ(bits=None), "ratios"),
        (CameraQ(rank_scope="global"), "low_share"),
        (CameraQ(alpha=1.5), "alpha"),
        (CameraQ(low_share=2.0), "low_share"),
        (CameraQ(rank_scope="world"), "rank_scope"),
        (CameraQ(align=0), "align"),
        (CameraQ(act_order=True), "static_groups"),
        (CameraQ(clip="some"), "clip"),
        (CameraQ(group_size=0), "group_size"),
        (CameraQ(attn_bits=9), "attn_bits"),
        (CameraQ(damping=2.0), "damping"),
        (CameraQ(true_sequential=True, weighted_hessian=True), "weighted_hessian"),
        (CameraQ(bits=2.5, ratios=[0.1, 0.8, 0.1], group_size=8), "group_size=8"),
        (CameraQDagger(group_bits=[3, 2, 0], bits=3.5), "group_bits"),
        (CameraQDagger(rank_scope="global", bits=3.5), "rank_scope"),
        (CameraQDagger(split="halves"), "split"),
        (Gptq(bits=2.25), "nearest"),
        (Gptq(bits=None), "target"),
        (Gptq(bits=2.0, group_size=8), "nearest"),
    ],
)
def test_what_cannot_be_done_is_refused_before_weights_are_read(method, why):
    ffn, _ = layer_of("qwen2_moe")
    with pytest.raises(camera.CameraError, match=why):
        method.check(budget_of(ffn))
