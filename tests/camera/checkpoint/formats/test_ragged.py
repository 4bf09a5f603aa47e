"""Ragged experts: every way to run them gives the same, and the layout they are stored in."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from camera.checkpoint.formats import ragged
from camera.checkpoint.formats.ragged import RaggedExperts
from camera.moe.experts.layout import ExpertLayout

HIDDEN, TOP_K = 16, 3
# with empty experts, widths no multiple of 16 bytes, runs of one width, and all of one width
WIDTHS = {
    "ragged": [8, 0, 16, 8, 8, 24, 16, 5],
    "uniform": [12] * 8,
    "sparse": [0, 0, 1, 0, 0, 9, 2, 7],
}
WAYS = ["forward", "by_expert", "by_width", "together", "gathered", "all_at_once", "one_token"]


def make(
    widths: list[int], dtype: torch.dtype = torch.float32, *, biased: bool = False
) -> RaggedExperts:
    torch.manual_seed(0)
    layout = ExpertLayout(biased=biased)
    experts = RaggedExperts(HIDDEN, widths, nn.SiLU(), dtype=dtype, layout=layout)
    for table in experts.parameters():
        nn.init.normal_(table, std=0.4)
    return experts


def routed(tokens: int, experts: int = 8, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(tokens)
    scores_TE = torch.rand(tokens, experts, generator=draw)
    weight_TK, index_TK = scores_TE.topk(TOP_K)
    return torch.randn(tokens, HIDDEN, generator=draw).to(dtype), index_TK, weight_TK.to(dtype)


def one_by_one(experts: RaggedExperts, x_TH, index_TK, weight_TK) -> torch.Tensor:
    """The definition: each token visits its experts, in fp64."""
    y_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for t, (x_H, index_K, weight_K) in enumerate(zip(x_TH, index_TK, weight_TK, strict=True)):
        for e, weight in zip(index_K.tolist(), weight_K.double(), strict=True):
            gate_W, up_W = (experts.gate_up(e).double() @ x_H.double()).chunk(2)
            y_TH[t] += weight * (experts.down(e).double() @ (F.silu(gate_W) * up_W))
    return y_TH


@pytest.mark.parametrize("tokens", [1, 2, 6, 50])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run_is_the_plain_loop(way, widths, tokens):
    if way == "one_token" and tokens > 1:
        pytest.skip("one token only")
    experts, inputs = make(WIDTHS[widths]), routed(tokens)
    with torch.no_grad():
        expected = one_by_one(experts, *inputs)
        y_TH = getattr(experts, way)(*inputs)
    torch.testing.assert_close(y_TH.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["forward", "by_expert", "by_width", "gathered"])
@pytest.mark.parametrize("slow_half", [True, False])
def test_half_precision_stays_within_its_rounding(way, slow_half, monkeypatch):
    monkeypatch.setattr(ragged, "SLOW_HALF", slow_half)
    experts = make(WIDTHS["ragged"], torch.bfloat16)
    inputs = routed(6, dtype=torch.bfloat16)
    with torch.no_grad():
        y_TH = getattr(experts, way)(*inputs)
        expected = one_by_one(experts, *inputs)
    assert y_TH.dtype == torch.bfloat16
    assert (y_TH.double() - expected).norm() <= 0.02 * expected.norm()


def test_routing_weights_in_more_precision_than_the_tokens_are_kept():
    experts = make(WIDTHS["ragged"], torch.bfloat16)
    x_TH, index_TK, weight_TK = routed(6)
    with torch.no_grad():
        y_TH = experts(x_TH.bfloat16(), index_TK, weight_TK)
        expected = one_by_one(experts, x_TH.bfloat16(), index_TK, weight_TK)
    assert y_TH.dtype == torch.bfloat16
    assert (y_TH.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("way", ["forward", "by_expert", "by_width", "gathered", "all_at_once"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_gradients_are_those_of_the_plain_loop(way, tokens):
    def gradients(run) -> list[torch.Tensor]:
        experts, (x_TH, index_TK, weight_TK) = make(WIDTHS["ragged"]), routed(tokens)
        leaves = [x_TH.requires_grad_(), weight_TK.requires_grad_(), *experts.parameters()]
        run(experts)(x_TH, index_TK, weight_TK).double().square().sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(lambda experts: partial(one_by_one, experts))
    found = gradients(lambda experts: getattr(experts, way))
    for grad, other in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4)


def test_one_token_reads_only_the_experts_it_is_routed_to():
    experts, (x_1H, index_1K, weight_1K) = make(WIDTHS["ragged"]), routed(1)
    with torch.no_grad():
        expected = experts(x_1H, index_1K, weight_1K)
        for e in set(range(8)) - set(index_1K[0].tolist()):
            experts.gate_up(e).fill_(torch.nan), experts.down(e).fill_(torch.nan)
        assert torch.equal(experts(x_1H, index_1K, weight_1K), expected)


def test_padding_of_a_gathered_expert_adds_nothing_whatever_stands_there():
    experts, (x_1H, index_1K, weight_1K) = make(WIDTHS["ragged"]), routed(1)
    with torch.no_grad():
        expected = experts.gathered(x_1H, index_1K, weight_1K)
        for e in set(range(8)) - set(index_1K[0].tolist()):
            experts.gate_up(e).fill_(1e30)
        assert torch.equal(experts.gathered(x_1H, index_1K, weight_1K), expected)


def test_no_tokens_give_no_output():
    experts, (x_TH, index_TK, weight_TK) = make(WIDTHS["ragged"]), routed(2)
    assert experts(x_TH[:0], index_TK[:0], weight_TK[:0]).shape == (0, HIDDEN)


def test_an_emptied_layer_adds_nothing():
    inputs = routed(4)
    assert make([0] * 8)(*inputs).eq(0).all()


@pytest.mark.parametrize(
    ("tokens", "widths", "way"),
    [
        (1, [8] * 8, "one_token"),
        (4, [8] * 8, "all_at_once"),
        (512, [200] * 4 + [100] * 4, "by_width"),
        (512, list(range(200, 208)), "by_expert"),
    ],
)
def test_a_cpu_runs_few_tokens_small_layers_and_the_rest_each_in_its_way(
    tokens, widths, way, monkeypatch
):
    experts, ran = make(widths), []
    for name in WAYS[1:]:
        monkeypatch.setattr(experts, name, lambda x, *_, name=name: ran.append(name))
    with torch.no_grad():
        experts(*routed(tokens))
    assert ran == [way]


@pytest.mark.parametrize(
    ("widths", "tokens", "grouped", "compiler", "way"),
    [
        ("ragged", 2, True, True, "gathered"),
        ("ragged", 40, True, True, "together"),
        ("ragged", 40, True, False, "by_width"),
        ("ragged", 40, False, False, "by_expert"),
        ("uniform", 40, False, True, "by_width"),
    ],
)
def test_an_accelerator_gathers_few_tokens_and_groups_many(
    widths, tokens, grouped, compiler, way, monkeypatch
):
    experts, ran = make(WIDTHS[widths]).to("meta"), []
    for name in WAYS[1:]:
        monkeypatch.setattr(experts, name, lambda x, *_, name=name: ran.append(name))
    monkeypatch.setattr(ragged, "has_grouped_products", lambda device, dtype: grouped)
    monkeypatch.setattr(ragged.ragged_products, "compiles", lambda tensor: compiler)
    with torch.no_grad():
        experts(*(part.to("meta") for part in routed(tokens)))
    assert ran == [way]


@pytest.mark.parametrize("way", ["by_width", "together", "gathered"])
def test_biases_of_gate_and_up_are_those_of_each_expert(way):
    experts, inputs = make(WIDTHS["ragged"], biased=True), routed(50)
    with torch.no_grad():
        expected = experts.by_expert(*inputs)
        torch.testing.assert_close(getattr(experts, way)(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widths", ["ragged", "sparse"])
def test_many_experts_of_unequal_widths_are_three_launches(widths, interpreted):
    experts, inputs = make(WIDTHS[widths]), routed(50)
    with torch.no_grad():
        y_TH = experts.together(*inputs)
        expected = one_by_one(experts, *inputs)
    assert interpreted.launched == 3
    torch.testing.assert_close(y_TH.double(), expected, rtol=1e-5, atol=1e-5)


def test_an_expert_is_one_block_of_both_tables_and_all_of_them_fill_these():
    experts = make(WIDTHS["ragged"])
    with torch.no_grad():
        for e, width in enumerate(experts.widths):
            gate_up, down = experts.gate_up(e), experts.down(e)
            assert gate_up.shape == (2 * width, HIDDEN) and down.shape == (HIDDEN, width)
            assert gate_up.is_contiguous() and down.t().is_contiguous()
            gate_up.fill_(e), down.fill_(e)
    for table, rows in ((experts.gate_up_proj, 2), (experts.down_proj, 1)):
        counted = table[:, 0].long().bincount(minlength=8).tolist()
        assert counted == [rows * width for width in WIDTHS["ragged"]]


def test_experts_of_one_width_are_neighbours():
    experts = make(WIDTHS["ragged"])
    assert [experts.widths[e] for e in experts.order] == sorted(experts.widths)
    assert experts.order == [1, 7, 0, 3, 4, 2, 6, 5]


def test_new_weights_are_used_at_once():
    """Nothing derived from the weights is kept between calls: loading and casting just work."""
    experts, inputs = make(WIDTHS["ragged"]), routed(1)
    with torch.no_grad():
        experts(*inputs)
        moved = copy.deepcopy(experts).double()
        for table in experts.parameters():
            table.data = table.data.clone().mul_(0.5)
        y_TH = experts(*inputs)
        torch.testing.assert_close(y_TH.double(), one_by_one(experts, *inputs), rtol=1e-5, atol=0)
        inputs = [part.double() if part.is_floating_point() else part for part in inputs]
        torch.testing.assert_close(moved(*inputs), one_by_one(moved, *inputs))
