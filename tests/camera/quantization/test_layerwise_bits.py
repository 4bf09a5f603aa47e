"""Bits by layer: the best plan within the target, from errors that are measured."""

from itertools import product
from math import gcd

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import camera
from camera.method import Plan
from camera.moe.budget import Budget, Count
from camera.moe.pool import LayerPool
from camera.quantization.layerwise.allocation import least_error, next_cost
from camera.quantization.layerwise.bits import LayerwiseBits
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.checkpoints import shards_of
from tests.helpers.models import build_model, build_tokenizer

CALIBRATION = camera.Calibration(source="wikitext2", samples=4, length=32)
SIZES = dict(hidden_size=32, moe_intermediate_size=32, num_hidden_layers=4)


# --- the allocation ---


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_within_the_budget_has_less_error(seed):
    draw = torch.Generator().manual_seed(seed)
    cost_LB = torch.randint(1, 9, (4, 3), generator=draw).cumsum(1).tolist()
    error_LB = torch.rand(4, 3, generator=draw, dtype=torch.float64).tolist()  # not monotone
    least, most = sum(map(min, cost_LB)), sum(map(max, cost_LB))
    for budget in range(least, most + 1):
        plans = [
            (sum(e[b] for e, b in zip(error_LB, plan, strict=True)), plan)
            for plan in product(range(3), repeat=4)
            if sum(c[b] for c, b in zip(cost_LB, plan, strict=True)) <= budget
        ]
        found = least_error(cost_LB, error_LB, budget)
        assert sum(c[b] for c, b in zip(cost_LB, found, strict=True)) <= budget
        assert sum(e[b] for e, b in zip(error_LB, found, strict=True)) == pytest.approx(
            min(plans)[0]
        )
    with pytest.raises(CameraError, match="the fewest bits of every layer"):
        least_error(cost_LB, error_LB, least - 1)


def test_of_plans_of_equal_error_the_cheapest_is_taken():
    assert least_error([[1, 2], [1, 2]], [[0.5, 0.5], [0.5, 0.1]], 4) == [0, 1]
    assert next_cost([[1, 2], [1, 4]], [0, 0], 3) == 5


def test_a_hundred_layers_are_planned_at_once():
    error_LB = [[layer * 4.0**-b for b in (2, 3, 4, 8)] for layer in range(1, 101)]
    choice = least_error([[2, 3, 4, 8]] * 100, error_LB, 300)
    assert choice == sorted(choice) and sum((2, 3, 4, 8)[b] for b in choice) == 300


# --- the group size ---


def budget_of(hidden, *widths):
    pools = {i: LayerPool([width] * 2, [True] * 2) for i, width in enumerate(widths)}
    weights = 6 * hidden * sum(widths)
    return Budget(Count(weights, weights, weights, 2 * weights), pools, "test", hidden)


@pytest.mark.parametrize(
    ("hidden", "width", "size"),
    [(2048, 1408, 128), (2048, 704, 64), (576, 64, 64), (2880, 2880, 64), (32, 24, None)],
)
def test_the_group_size_divides_every_row(hidden, width, size):
    found = LayerwiseBits(bits=5.0).divisor(budget_of(hidden, width))
    assert found == size and gcd(hidden, width) % (size or 1) == 0


def test_group_sizes_that_leave_a_rest_are_refused_with_their_neighbours():
    with pytest.raises(CameraError, match="the nearest that do are 64 and 128"):
        LayerwiseBits(bits=4.5, group_size=96).check(budget_of(2048, 1408))
    with pytest.raises(CameraError, match="the nearest that do are 2; or set -1"):
        LayerwiseBits(bits=4.5, group_size=16).check(budget_of(32, 22))
    LayerwiseBits(bits=4.5, group_size=-1).check(budget_of(320, 220))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(bits=None), "needs a target"),
        (dict(bit_widths=[1, 2]), "different bits from 2 to 8"),
        (dict(bit_widths=[4, 2]), "the fewest first"),
        (dict(bits=2.1), "can store between 2.25 and 8.25"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(CameraError, match=said):
        LayerwiseBits(**settings).check(budget_of(2048, 1408))


# --- a model of uneven layers ---


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose layers put out more and more."""
    folder = tmp_path_factory.mktemp("uneven")
    model = build_model("qwen3_moe", **SIZES)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.experts.down_proj.data *= 2.0 ** (index - 2)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compressed(source, data_folder, tmp_path_factory):
    """compressed(**settings): (checkpoint, result)."""

    def go(**settings):
        out = tmp_path_factory.mktemp("layerwise") / "out"
        options = dict(calibration=CALIBRATION, data=str(data_folder), progress=False)
        settings = {"bits": 4.0, "sym": True, "group_size": 16, **settings}
        return out, camera.compress(
            source, "layerwise_bits", out, device="cpu", **options, **settings
        )

    return go


@pytest.fixture(scope="module")
def planned(compressed):
    """A checkpoint, its report and what was planned."""
    out, result = compressed()
    return out, result, Plan.load(out)


def test_layers_differ_and_the_target_is_met_from_below(planned):
    _, result, plan = planned
    bits = [plan.shared["bits"][str(index)] for index in range(4)]
    assert bits == sorted(bits) and bits[0] < bits[-1]
    assert 4.0 * 0.99 <= result.bits["stored"] <= 4.0  # sums of whole bits reach it: 3 + 1 a weight
    for index, layer in plan.layers.items():
        for expert in layer.experts:
            parts = torch.cat([expert.gate, expert.up, expert.down])
            assert parts.unique().tolist() == [plan.shared["bits"][str(index)]]


def test_the_plan_has_less_error_than_equal_bits_of_the_same_size(planned):
    _, _, plan = planned
    errors = plan.shared["errors"]
    ours = sum(errors[index][str(bits)] for index, bits in plan.shared["bits"].items())
    assert ours < 0.9 * sum(of_layer["3"] for of_layer in errors.values())


@torch.no_grad()
def test_the_errors_are_those_of_rounded_experts(source, planned, data_folder):
    """By plain loops over the model, whose experts are rounded in fp64."""
    from camera.calibration.tokens import calibration_tokens

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = calibration_tokens(build_tokenizer(), CALIBRATION, data=str(data_folder), seed=1234)
    seen = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda module, inputs: seen.append([inputs[0].flatten(0, 1).double()])
        )
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: seen[-1].extend(inputs))
    model.model(input_ids=tokens.ids_NL)

    def rounded(w_RC, bits):
        groups = w_RC.double().unflatten(1, (-1, 16))
        top = groups.abs().amax(-1, keepdim=True)
        scale = (top * 2 / (2**bits - 1)).half().double()
        codes = ((groups / scale).round() + 2 ** (bits - 1)).clamp(0, 2**bits - 1)
        return ((codes - 2 ** (bits - 1)) * scale).flatten(1)

    def output(x, gate_up, down):
        gate, up = F.linear(x.double(), gate_up.double()).chunk(2, 1)
        return F.linear(F.silu(gate) * up, down.double())

    for index, (layer, (hidden_TH, x_TH, index_TK, weight_TK)) in enumerate(
        zip(model.model.layers, seen, strict=True)
    ):
        experts = layer.mlp.experts
        for bits in (2, 4):
            size_T = hidden_TH.square().sum(1)
            error_T = torch.zeros_like(size_T)
            for e in range(8):
                token, slot = (index_TK == e).nonzero(as_tuple=True)
                gate_up, down = experts.gate_up_proj[e], experts.down_proj[e]
                whole = output(x_TH[token], gate_up, down)
                lost = whole - output(x_TH[token], rounded(gate_up, bits), rounded(down, bits))
                weight = weight_TK[token, slot, None].double()
                size_T[token] += (weight * whole).square().sum(1)
                error_T[token] += (weight * lost).square().sum(1)
            error = float((error_T / size_T).sum())
            found = planned[2].shared["errors"][str(index)][str(bits)]
            assert found == pytest.approx(error / len(x_TH), rel=2e-3), (index, bits)


@torch.no_grad()
def test_the_hidden_states_lose_less_than_at_equal_bits(source, planned, compressed):
    ids = torch.randint(3, 250, (8, 64), generator=torch.Generator().manual_seed(3))
    equal, _ = compressed(bit_widths=[3])
    expected, ours, theirs = (
        camera.load(folder, device="cpu", dtype="float32").model(ids).last_hidden_state
        for folder in (source, planned[0], equal)
    )
    assert (ours - expected).square().sum() < (theirs - expected).square().sum()


class Interrupting:
    """Stops a run in the middle of its last pass."""

    def begin(self) -> None:
        pass

    def layer(self, index, measured) -> None:
        if index == 1:
            raise KeyboardInterrupt


def test_a_plan_is_applied_again_and_resumed(source, planned, data_folder, tmp_path):
    out, _, plan = planned
    options = dict(calibration=CALIBRATION, data=str(data_folder), progress=False, device="cpu")
    camera.apply(source, plan, tmp_path / "again", **options)
    assert shards_of(tmp_path / "again") == shards_of(out)
    settings = dict(bits=4.0, sym=True, group_size=16)

    resumed = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        camera.compress(
            source, "layerwise_bits", resumed, listener=Interrupting(), **options, **settings
        )
    camera.compress(source, "layerwise_bits", resumed, **options, **settings)
    assert shards_of(resumed) == shards_of(out)


def test_rounding_to_nearest_reads_no_text_in_the_last_pass(source):
    budget = MetaModel(source).budget
    method = LayerwiseBits(bits=5.0, quantizer="rtn")
    assert [step.reads_text for step in method.passes(budget, "compressed")] == [True, False]
    method = LayerwiseBits(bits=5.0)
    assert [step.reads_text for step in method.passes(budget, "compressed")] == [True, True]
