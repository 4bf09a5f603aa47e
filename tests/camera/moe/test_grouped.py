"""Experts computed together, as an accelerator does it, are the experts one by one."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from camera.calibration.experts.super_experts import WithOutliers
from camera.calibration.observers import LayerObserver
from camera.calibration.scores.energy import EnergyObserver, EnergySpec
from camera.calibration.scores.hidden_share import HiddenShareObserver
from camera.moe.capture import run_ffn
from camera.moe.families import FAMILIES as DECLARED
from camera.moe.feed_forward import FeedForward
from camera.moe.grouped import products
from camera.moe.grouped.phi import phi_of
from camera.moe.grouped.products import filled_products, grouped_products
from camera.moe.grouped.rows import BLOCK, routed_rows
from camera.moe.grouped.sinks import OutputSum, PhiProjection, PhiRecord
from camera.pruning.slicing import slice_layer
from tests.helpers.models import build_model

TOKENS = 40  # no whole blocks
SHAPES = ["qwen2_moe", "deepseek_v3", "mixtral", "llama"]  # shared: gated, plain, none; no experts


@pytest.fixture
def layer():
    """layer(family): the FFN of a tiny model's second layer, and inputs."""

    def go(family: str) -> tuple[FeedForward, torch.Tensor]:
        model = build_model(family)
        ffn = FeedForward(model.model.layers[1].requires_grad_(False), DECLARED[family], "layer")
        draw = torch.Generator().manual_seed(0)
        return ffn, torch.randn(2, TOKENS // 2, model.config.hidden_size, generator=draw)

    return go


@pytest.fixture
def both(monkeypatch):
    """both(run): what it gives one by one, and together."""

    def go(run):
        found = [run()]
        monkeypatch.setattr("camera.moe.capture.computes_together", lambda device: True)
        return *found, run()

    return go


@pytest.mark.parametrize("family", SHAPES)
def test_energies_and_outputs_are_those_of_experts_one_by_one(family, layer, both):
    ffn, x_BLH = layer(family)

    def run():
        observer, output = EnergyObserver(ffn), OutputSum(x_BLH)
        for batch in range(2):
            run_ffn(ffn, x_BLH, observer, sink=output, batch=batch)
        return observer.result(), output.y_TH

    (one, one_TH), (other, other_TH) = both(run)
    torch.testing.assert_close(other.sum2_N, one.sum2_N, rtol=1e-5, atol=1e-14)
    torch.testing.assert_close(other.max2_N, one.max2_N, rtol=1e-5, atol=1e-14)
    assert torch.equal(other.tokens_E, one.tokens_E)
    torch.testing.assert_close(other_TH, one_TH, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "routed", "kernel"),
    [
        *product(SHAPES, (False, True), (None, "torch's")),
        ("qwen2_moe", False, "ours"),
    ],
)
def test_a_pruned_layer_is_finished_from_any_phi_that_was_kept(
    family, routed, kernel, layer, both, monkeypatch, request
):
    draw = torch.Generator().manual_seed(1)

    def run():
        ffn, x_BLH = layer(family)
        record = PhiRecord(routed=routed)
        run_ffn(ffn, x_BLH, sink=record)
        draw.manual_seed(1)
        kept = {
            group.path: [torch.rand(w, generator=draw).lt(0.6).nonzero()[:, 0] for w in widths]
            for group, widths in ((group, group.widths) for group in ffn.groups)
        }
        slice_layer(ffn, kept)
        ffn = FeedForward(ffn.layer, ffn.family, "layer")
        projection, output = PhiProjection(ffn, kept), OutputSum(x_BLH)
        for call in record.calls:
            projection.add(call, output)
        if routed:
            projection.add_rest(x_BLH, output)
        return output.y_TH, ffn.module(x_BLH)

    if kernel == "torch's":
        monkeypatch.setattr(products, "has_grouped_products", lambda *_: True)
    if kernel == "ours":
        request.getfixturevalue("interpreted")
    (one, module), (other, _) = both(run)
    module = (module[0] if isinstance(module, tuple) else module).flatten(0, 1)
    torch.testing.assert_close(one, module, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_phi_kept_apart_is_each_experts_own(layer, both):
    ffn, x_BLH = layer("qwen2_moe")

    def run():
        record = PhiRecord(apart=True)
        run_ffn(ffn, x_BLH, sink=record)
        return {(call.path, call.expert): call for call in record.calls}

    one, other = both(run)
    assert one.keys() == other.keys()
    for place, call in other.items():
        assert call.phi_NW.untyped_storage().nbytes() == call.phi_NW.nbytes
        assert (call.tokens_N is None) == (one[place].tokens_N is None)
        torch.testing.assert_close(call.phi_NW, one[place].phi_NW, rtol=1e-5, atol=1e-7)
        if call.tokens_N is not None:
            assert torch.equal(call.tokens_N, one[place].tokens_N)


@pytest.mark.parametrize("massive", [0.0, 2.3, 1e9])
def test_super_experts_are_looked_for_with_the_same_result(massive, layer, both, monkeypatch):
    monkeypatch.setattr("camera.calibration.experts.super_experts.MASSIVE", massive)
    ffn, x_BLH = layer("qwen2_moe")

    def run():
        found = {"1": {"median": 0.0, "largest": {}}}
        observer = WithOutliers(EnergySpec(), found).build(1, ffn)
        for batch in range(2):
            run_ffn(ffn, x_BLH * (1 + batch), observer, batch=batch)
        observer.result()
        return found["1"]["largest"]

    one, other = both(run)
    assert other == pytest.approx(one, rel=1e-5)
    every = len(ffn.widths)
    assert len(one) == {0.0: every, 1e9: 0}.get(massive, len(one))
    assert massive != 2.3 or 0 < len(one) < every


def test_what_a_subclass_sees_of_each_expert_is_not_passed_by(layer, both):
    """An observer that changes `__call__` alone inherits nobody's way of seeing all at once."""
    ffn, x_BLH = layer("qwen2_moe")

    class Doubled(EnergyObserver):
        def __call__(self, call):
            super().__call__(call), super().__call__(call)

    def run(make):
        observer: LayerObserver = make(ffn)
        observer.ffn_input(0, x_BLH.flatten(0, 1), x_BLH.flatten(0, 1), None)
        run_ffn(ffn, x_BLH, observer)
        return observer.result()

    for make in (Doubled, HiddenShareObserver):
        one, other = both(lambda make=make: run(make))
        torch.testing.assert_close(other.sum2_N, one.sum2_N, rtol=1e-5, atol=1e-14)
        assert torch.equal(other.tokens_E, one.tokens_E)


@pytest.mark.parametrize("counts", [[3, 0, 40, 1], [0, 0, 0, 7], [5, 5, 5, 5]])
def test_every_way_of_multiplying_is_a_product_for_each_expert(counts, monkeypatch):
    index = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    x_TC, weight_ECD = torch.randn(len(index), 16), torch.randn(4, 16, 12)
    rows = routed_rows(index[:, None], 4)
    x_RC = rows.inputs(x_TC)
    expected = torch.stack([x @ weight_ECD[e] for x, e in zip(x_TC, index, strict=True)])
    ways = {"loop": grouped_products(x_RC, weight_ECD, rows.bounds)}
    ways["filled"] = filled_products(x_RC, weight_ECD, rows.bounds)
    monkeypatch.setattr(products, "has_grouped_products", lambda *_: True)
    ways["grouped"] = grouped_products(x_RC, weight_ECD, rows.bounds)
    for y_RD in ways.values():
        torch.testing.assert_close(rows.add_up(y_RD), expected, rtol=1e-5, atol=1e-5)


def test_rows_are_every_slot_once_in_blocks_of_one_expert():
    draw = torch.Generator().manual_seed(0)
    index_TK = torch.rand(50, 8, generator=draw).topk(3).indices
    rows = routed_rows(index_TK, 8)
    owner_R = rows.of_experts(torch.arange(8))
    assert all(len(block.unique()) == 1 for block in owner_R.split(BLOCK))
    assert torch.equal(owner_R[rows.row_TK], index_TK)
    assert torch.equal(rows.token_R[rows.row_TK], torch.arange(50)[:, None].expand(50, 3))
    assert int((rows.token_R < 50).sum()) == rows.row_TK.unique().numel() == 150
    assert rows.weights(index_TK.float() + 1).sum() == (index_TK + 1).sum()


def test_a_token_that_is_nobodys_makes_no_square():
    """Whatever fills an expert's rows up counts neither in sums nor in maxima."""
    rows = routed_rows(torch.tensor([[0], [2]]), 3)
    gate, up = torch.full((2, 4), -3.0), torch.full((2, 4), 2.0)
    found = phi_of(rows.inputs(gate), rows.inputs(up), None, F.silu, True)
    expected = (F.silu(gate) * up).square()
    summed = rows.by_expert(found.sum2_BW).sum(1)
    torch.testing.assert_close(summed, torch.stack([expected[0], torch.zeros(4), expected[1]]))
    assert phi_of(rows.inputs(gate), rows.inputs(up), None, nn.SiLU(), False).phi_RW is None
