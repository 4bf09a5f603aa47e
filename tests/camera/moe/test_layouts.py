"""Experts that are stored or called otherwise: transposed, interleaved, biased, scaled.

Shapes: B samples, L tokens of a sample, T = B * L tokens, H hidden, K experts per token.
"""

import pytest
import torch
from torch import nn

from baselines.factorization.layer_factors import Factoring, factored_layer
from camera.calibration.experts.super_experts import MASSIVE, WithOutliers
from camera.calibration.scores.energy import EnergyObserver, EnergySpec
from camera.checkpoint.formats.delta import DeltaExperts
from camera.checkpoint.formats.ragged import ragged_of
from camera.compensation.experts import compensate, output_weights
from camera.compensation.settings import CompensationSettings
from camera.moe.capture import run_ffn, unwrap
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.gradients import backpropagate
from camera.moe.grouped.sinks import OutputSum, PhiProjection, PhiRecord
from camera.pruning.slicing import slice_layer
from tests.helpers import oracles
from tests.helpers.models import build_model

ODD = ("gpt_oss", "laguna", "llama4")


class FfnAlone(nn.Module):
    """A decoder layer of a residual and its FFN."""

    def __init__(self, name, module):
        super().__init__()
        self.name = name
        setattr(self, name, module)

    def forward(self, x_BLH):
        return x_BLH + unwrap(getattr(self, self.name)(x_BLH)).view_as(x_BLH)


@pytest.fixture(params=ODD)
def ffn(request):
    """The last layer's FFN, as the pipeline sees it, and its own native block."""
    return view(request.param)


def view(name):
    from importlib import import_module

    family, model = family_of(name), build_model(name).requires_grad_(False)
    if family.adapt:
        import_module(family.adapt).adapt(model)
    block = oracles.ffn_of(oracles.layers_of(model)[-1])
    return FeedForward(FfnAlone(family.ffn, block), family, "layers.1")


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def output(ffn, x_BLH):
    sink = OutputSum(x_BLH)
    run_ffn(ffn, x_BLH, sink=sink)
    return sink.y_TH


def native_output(name, x_BLH):
    """What transformers' own block puts out."""
    block = oracles.ffn_of(oracles.layers_of(build_model(name))[-1])
    with torch.no_grad():
        return unwrap(block(x_BLH)).reshape(-1, x_BLH.shape[-1])


@pytest.mark.parametrize("name", ODD)
def test_the_sum_of_the_experts_is_the_native_block(name):
    x_BLH = drawn(2, 20, 32)
    expected = native_output(name, x_BLH)
    ffn = view(name)
    torch.testing.assert_close(output(ffn, x_BLH), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        found = unwrap(ffn.module(x_BLH)).reshape(-1, 32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ODD)
def test_what_an_accelerator_computes_together_is_the_native_block(name):
    """Only plain experts go together; energies and the output are the same for all."""
    x_BLH, ffn = drawn(2, 20, 32), view(name)
    assert ffn.routed.goes_together == (name == "laguna")
    energies = []
    for together in (False, True):
        observer, sink = EnergyObserver(ffn), OutputSum(x_BLH)
        with torch.no_grad():
            run_ffn(ffn, x_BLH, observer, sink=sink, together=together)
        torch.testing.assert_close(sink.y_TH, native_output(name, x_BLH), rtol=1e-5, atol=1e-6)
        energies.append(observer.result().sum2_N)
    torch.testing.assert_close(*energies, rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("apart", [False, True])
def test_a_pruned_layer_is_finished_from_phi_with_its_biases(ffn, apart):
    x_BLH, record = drawn(2, 20, 32), PhiRecord(apart=apart)
    run_ffn(ffn, x_BLH, sink=record, together=True)
    kept = {group.path: [torch.arange(5)] * len(group.widths) for group in ffn.groups}
    slice_layer(ffn, kept)
    ffn = FeedForward(ffn.layer, ffn.family, ffn.path)
    projection, found = PhiProjection(ffn, kept), OutputSum(x_BLH)
    with torch.no_grad():
        for call in record.calls:
            projection.add(call, found)
        expected = unwrap(ffn.module(x_BLH)).reshape(-1, 32)
    torch.testing.assert_close(found.y_TH, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("together", [False, True])
def test_an_expert_is_a_super_expert_by_its_bias_too(together):
    ffn, found = view("gpt_oss"), {"1": {"median": 0.0, "largest": {}}}
    ffn.routed.module.down_proj_bias[3, 7] = 2 * MASSIVE
    observer = WithOutliers(EnergySpec(), found).build(1, ffn)
    run_ffn(ffn, drawn(2, 20, 32), observer, together=together)
    observer.result()
    assert found["1"]["largest"] == {"3": pytest.approx(2 * MASSIVE, rel=0.1)}


def test_gradients_are_autograds_of_the_native_block(ffn):
    """Of the input, and of every weight, summed over the tokens."""
    x_BLH, dout_BLH = drawn(2, 20, 32), drawn(2, 20, 32, seed=2)
    sums = {}

    def observer(call):
        for gradients in call.weights():
            for name, gradient in zip(("gate", "up", "down"), gradients, strict=True):
                key = call.group.path, call.expert, name
                sums[key] = sums.get(key, 0) + gradient

    found = backpropagate(ffn.layer, ffn, x_BLH, {}, dout_BLH, observer)
    for parameter in ffn.layer.parameters():
        parameter.requires_grad_()
    x_BLH.requires_grad_()
    ffn.layer(x_BLH).backward(dout_BLH)
    torch.testing.assert_close(found, x_BLH.grad, rtol=1e-4, atol=1e-5)
    experts = ffn.routed.module
    for (path, expert, name), gradient in sums.items():
        if path != ffn.routed.path:
            expected = getattr(ffn.groups[0].module, f"{name}_proj").weight.grad
        else:
            kind = "down_proj" if name == "down" else "gate_up_proj"
            expected = getattr(experts, kind).grad[expert]
            expected = expected.T if type(experts).__name__ != "LagunaExperts" else expected
            if name != "down":
                halves = oracles.split(experts, expected.T)
                expected = halves[name == "up"].T
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_ragged_experts_compute_the_same_in_every_way(ffn):
    x_TH, native = drawn(40, 32), ffn.routed.module
    top_k = ffn.module.router.top_k if ffn.family.adapt else 3
    index_TK = drawn(40, 8).topk(top_k).indices
    weight_TK = drawn(40, top_k).abs()
    with torch.no_grad():
        expected = native(x_TH, index_TK, weight_TK)
        ragged = ragged_of(ffn.routed, [torch.arange(24)] * 8)
        for run in (ragged.all_at_once, ragged.by_expert, ragged.by_width, ragged.gathered):
            found = ragged._with_biases(run(x_TH, index_TK, weight_TK), index_TK, weight_TK)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        one = ragged(x_TH[:1], index_TK[:1], weight_TK[:1])
        torch.testing.assert_close(one, expected[:1], rtol=1e-4, atol=1e-5)


def test_back_in_the_native_layout_the_experts_compute_what_was_kept(ffn):
    kept, x_TH = [torch.tensor([0, 5, 7, 23])] * 8, drawn(40, 32)
    routing = torch.arange(40)[:, None] % 8, drawn(40, 1)
    ragged, native = ragged_of(ffn.routed, kept), ffn.routed.module
    with torch.no_grad():
        expected = ragged(x_TH, *routing)
        for name, tensor in ragged.to_native(24).items():
            getattr(native, name).copy_(tensor)
        torch.testing.assert_close(native(x_TH, *routing), expected, rtol=1e-4, atol=1e-5)


def test_factors_of_full_rank_are_the_experts(ffn):
    """The biases go the way of the micro-experts, which are put in another order."""
    eye_EHH, eye_EWW = (torch.eye(n, dtype=torch.float64).expand(8, n, n) for n in (32, 24))
    how = Factoring(rank=24, pp_ratio=0.5, merge="mean", damping=1e-8)
    found = factored_layer(ffn.routed, eye_EHH, eye_EWW, None, torch.ones(8), how)
    del found["error_P"]
    base, group = found["down_proj"].shape[1], ffn.routed
    delta = DeltaExperts(32, 24, 8, base, 24, group.act_fn, layout=group.layout)
    delta.load_state_dict({name: t for name, t in found.items() if t.numel()})
    x_TH, routing = drawn(40, 32), (torch.arange(40)[:, None] % 8, drawn(40, 1))
    with torch.no_grad():
        expected = group.module(x_TH, *routing)
        torch.testing.assert_close(delta(x_TH, *routing), expected, rtol=1e-3, atol=1e-4)
        plain = delta.dequantize()
        torch.testing.assert_close(plain(x_TH, *routing), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["layer", "between", "dense"])
def test_a_refit_that_has_nothing_to_mend_changes_nothing(ffn, target):
    """Biases are no part of what output weights are fitted to."""
    x_BLH, record = drawn(2, 40, 32), PhiRecord()
    run_ffn(ffn, x_BLH, sink=record)
    expected, before = output(ffn, x_BLH), output_weights(ffn)
    kept = {group.path: [torch.arange(width) for width in group.widths] for group in ffn.groups}
    before = {place: down_HW.clone() for place, down_HW in before.items()}
    aim = None if target == "layer" else expected.float().clone()
    how = CompensationSettings(target=target, token_weights="uniform")
    found, _ = compensate(ffn, [(80, record.calls)], kept, before, 60, how, aim)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for (path, expert), down_HW in before.items():
        group = next(group for group in ffn.groups if group.path == path)
        torch.testing.assert_close(group.down(expert), down_HW, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", [*ODD, "qwen2_moe"])
def test_half_way_to_the_dense_model_the_weights_are_half_way_too(name):
    """Least squares with one ridge are linear in what is aimed at."""
    x_BLH, found = drawn(2, 40, 32), {}
    for target in ("layer", "dense", "between"):
        ffn, record = view(name), PhiRecord()
        run_ffn(ffn, x_BLH, sink=record)
        before = {place: down_HW.clone() for place, down_HW in output_weights(ffn).items()}
        kept = {g.path: [torch.arange(0, width, 2) for width in g.widths] for g in ffn.groups}
        slice_layer(ffn, kept)
        ffn = FeedForward(ffn.layer, ffn.family, ffn.path)
        how = CompensationSettings(target=target, token_weights="uniform", ridges=[1.0])
        aim = None if target == "layer" else drawn(80, 32, seed=2)
        compensate(ffn, [(80, record.calls)], kept, before, 80, how, aim)
        found[target] = [down_HW.clone() for down_HW in output_weights(ffn).values()]
    assert not all(torch.equal(*pair) for pair in zip(found["layer"], found["dense"], strict=True))
    for layer_HW, dense_HW, between_HW in zip(*found.values(), strict=True):
        torch.testing.assert_close(between_HW, (layer_HW + dense_HW) / 2, rtol=1e-3, atol=1e-4)
