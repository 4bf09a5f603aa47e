"""Quantising methods from end to end, and what must hold between them.

Shapes: T tokens, N micro-experts of a layer's pool, W width of one expert.
"""

from dataclasses import replace

import pytest
import torch

import camera
from baselines.quantization.gptq import Gptq
from camera.calibration.hessians import HessianObserver
from camera.calibration.scores.energy import EnergyObserver
from camera.moe.budget import Budget, Count
from camera.moe.capture import observe
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.pool import LayerPool
from camera.quantization.bit_errors import bit_errors
from camera.quantization.bit_plan import ExpertBits
from camera.quantization.camera_q import CameraQ
from camera.quantization.camera_q_dagger import CameraQDagger
from camera.quantization.gptq import GPTQ
from camera.quantization.layer import quantize_layer
from tests.helpers.gptq_problem import as_good
from tests.helpers.models import build_model
from tests.helpers.oracles import capture, shared_of


def layer_of(family: str, index: int = 1, **overrides):
    """A layer's FFN, and inputs of it with the norm's scale."""
    model = build_model(family, **overrides).requires_grad_(False)
    ids = torch.randint(3, 250, (4, 64), generator=torch.Generator().manual_seed(0))
    x_TH, _ = capture(model, index, ids)
    ffn = FeedForward(model.model.layers[index], family_of(family), f"model.layers.{index}")
    return ffn, x_TH


def seen_by(ffn, x_TH, **settings):
    observer = HessianObserver(ffn, **settings)
    with torch.no_grad():
        observe(ffn, x_TH[None], observer)
    return observer.result()


def budget_of(ffn, index: int = 1) -> Budget:
    """The budget of a model of this one layer."""
    routed = [group.routed for group in ffn.groups for _ in group.widths]
    weights = 3 * 32 * sum(ffn.widths)
    pools = {index: LayerPool(list(ffn.widths), routed)}
    hidden = ffn.groups[0].down(0).shape[0]
    return Budget(Count(weights, weights, 0, 2 * weights), pools, "test", hidden)


# --- statistics ---


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
        observe(ffn, x_TH[None], plain)
    seen, energy = seen_by(ffn, x_TH, keep=5), plain.result()
    stored = seen.stored()
    assert type(stored) is type(energy)
    for name, tensor in energy.tensors().items():
        assert torch.equal(getattr(stored, name), tensor)
    assert (seen.kept_E <= 5).all() and len(seen.kept_PH) == int(seen.kept_E.sum())
    first = seen.kept(2)
    assert any(torch.equal(first[0], x) for x in x_TH)


# --- equalities between plans ---


def dense_output(ffn, x_TH):
    with torch.no_grad():
        return ffn.module(x_TH[None])


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "llama"])
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


def test_a_micro_expert_has_one_width_in_three_matrices():
    """Rows and columns of a mixed layer are those of the uniform runs at their bits."""
    ffn, x_TH = layer_of("qwen3_moe")
    seen, experts = seen_by(ffn, x_TH), ffn.module.experts
    method = CameraQ(bits=4.0, group_size=16, low_share=0.3)
    plan, size = method.plan(1, ffn, seen, budget_of(ffn))
    solver = method.solver(size)
    factor = solver.factor(seen.input_EHH, seen.tokens_E)
    uniform = {b: solver.solve(experts.gate_up_proj, factor, bits=b).weight for b in (1, 2, 3)}
    quantize_layer(ffn, plan, solver, seen)
    used = set()
    for e, bits in enumerate(plan):
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
    method.check(Budget(Count(weights, weights, 0, 2 * weights), {0: pool}, "test", 576))
    assert method.levels == levels


def test_zero_bits_equal_pruning_then_camera_q():
    """Lowest group removed: the same packed tensors as of a layer that was sliced first."""
    ffn, x_TH = layer_of("qwen2_moe")
    method = CameraQ(bits=None, ratios=[0.3, 0.4, 0.3], group_bits=[3, 2, 0], group_size=16)
    seen = seen_by(ffn, x_TH)
    plan, size = method.plan(1, ffn, seen, budget_of(ffn))
    quantize_layer(ffn, plan, method.solver(size), seen)
    whole = dense_output(ffn, x_TH)

    sliced, _ = layer_of("qwen2_moe")
    pruned = camera.CameraP(sparsity=0.3)
    pruned.compress(1, sliced, seen.stored(), budget_of(sliced))
    sliced = FeedForward(sliced.layer, sliced.family, sliced.path)
    again = seen_by(sliced, x_TH)
    then = replace(method, ratios=[0.3 / 0.7, 0.4 / 0.7], group_bits=[3, 2])
    then.__post_init__()
    plan, size = then.plan(1, sliced, again, budget_of(sliced))
    quantize_layer(sliced, plan, then.solver(size), again)
    assert ffn.module.experts.widths == sliced.module.experts.widths
    assert min(ffn.module.experts.widths) < max(ffn.module.experts.widths)
    torch.testing.assert_close(dense_output(sliced, x_TH), whole, rtol=1e-4, atol=1e-5)


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


def test_bit_errors_predict_what_is_lost():
    """Measured shares fall with bits, and are what a layer of those bits really loses."""
    levels = (4, 3, 2, 1, 0)
    ffn, x_TH = layer_of("llama")
    seen, before = seen_by(ffn, x_TH), dense_output(ffn, x_TH)
    solver = GPTQ(group_size=16)
    errors = bit_errors(ffn, seen, solver, levels)
    assert errors[0] == 1 and all(errors[b] < errors[b - 1] for b in levels[:-1])
    for bits in (4, 3):
        ffn, _ = layer_of("llama")
        quantize_layer(ffn, [ExpertBits.matched(torch.full((64,), bits))], solver, seen)
        lost = (dense_output(ffn, x_TH) - before).square().sum() / before.square().sum()
        assert 0.5 * errors[bits] < lost < 2 * errors[bits]


# --- the ablation ---


def test_dagger_has_the_shares_of_camera_q_along_its_own_inputs():
    ffn, x_TH = layer_of("qwen2_moe")
    seen = seen_by(ffn, x_TH)
    method = CameraQDagger(bits=None, ratios=[0.25, 0.5, 0.25], group_size=16)
    plan, _ = method.plan(1, ffn, seen, budget_of(ffn))
    mixed = torch.cat([e.down for e in plan])
    assert torch.bincount(mixed).tolist()[1:] == [58, 116, 58]
    for e in plan:
        for bits in (e.gate, e.up):
            assert torch.bincount(bits).tolist() == [0, 8, 16, 8]
    e = plan[3]
    energy_H = seen.channel_energy(0.9)[3] * ffn.module.experts.gate_up_proj[2, :24].square().sum(0)
    assert e.gate[energy_H.argmax()] == 3 and e.gate[energy_H.argmin()] == 1
    assert any(not torch.equal(e.gate, e.up) for e in plan)


def test_shuffle_keeps_counts_and_breaks_the_match():
    ffn, x_TH = layer_of("qwen3_moe")
    seen = seen_by(ffn, x_TH)
    matched, _ = CameraQ(bits=3.3, group_size=16).plan(1, ffn, seen, budget_of(ffn))
    method = CameraQDagger(bits=3.3 + 32 / 96, group_size=16, split="shuffle")
    plan, _ = method.plan(1, ffn, seen, budget_of(ffn))
    again, _ = method.plan(1, ffn, seen, budget_of(ffn))
    for a, b, c in zip(matched, plan, again, strict=True):
        for bits in (b.gate, b.up, b.down):
            assert sorted(bits.tolist()) == sorted(a.down.tolist())
        assert torch.equal(b.gate, c.gate)
    assert any(not torch.equal(b.gate, b.down) for b in plan)


# --- end to end ---


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
