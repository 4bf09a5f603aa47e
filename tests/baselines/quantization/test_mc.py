"""Mixture Compressor: the reference's losses and allocations, brute force, and the whole method.

Shapes: E experts, B bit widths.
"""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import camera
from baselines.quantization.mc import MixtureCompressor
from baselines.quantization.mc_allocation import Allocations, expert_costs, reachable
from baselines.quantization.rounding_loss import LEVELS, RoundingLossObserver
from camera.calibration.hessians import HessianObserver
from camera.checkpoint.loading import load_model
from camera.moe.capture import run_ffn
from camera.moe.families import Family
from camera.moe.feed_forward import FeedForward
from camera.quantization.quantizers.gptq import GPTQ
from camera.streaming.skeleton import MetaModel
from tests.helpers.golden import compare, golden_case
from tests.helpers.runs.documents import reference_settings

REFERENCE = MixtureCompressor(**reference_settings("mc"))

# --- the integer program ---


def test_allocations_equal_the_reference(golden):
    case, tensors = golden_case(golden, "mc_allocation")
    levels = case["hyper"]["bits"]
    for problem in case["hyper"]["problems"]:
        factors = [tensors[f"{problem['prefix']}_{name}"] for name in ("count", "weight", "eps")]
        want, prices = (tensors[f"{problem['prefix']}_{name}"] for name in ("bits", "cost"))
        for layer in range(problem["layers"]):
            cost_EB = expert_costs(
                *(factor[layer] for factor in factors),
                alpha=REFERENCE.expert_alpha,
                beta=REFERENCE.expert_beta,
                loss_exponent=REFERENCE.loss_exponent,
            )
            table = Allocations(cost_EB, levels, max(levels) * problem["E"])
            for row, budget in enumerate(problem["budgets"]):
                bits_E = table.within(budget)
                assert torch.equal(bits_E, want[row, layer])
                places = [levels.index(bits) for bits in bits_E.tolist()]
                price = cost_EB[torch.arange(len(bits_E)), places].sum()
                torch.testing.assert_close(price, prices[row, layer], rtol=1e-5, atol=0)


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_allocations_equal_brute_force(experts):
    torch.manual_seed(experts)
    for _ in range(5):
        cost_EB = torch.rand(experts, 3, dtype=torch.float64)  # not even falling in the bits
        needed = [3, 2][:experts]
        least, most = reachable(experts, LEVELS, needed)
        table = Allocations(cost_EB, LEVELS, most)
        for budget in range(least, most + 1):
            bits_E = table.within(budget).tolist()
            plans = [
                plan
                for plan in itertools.product(LEVELS, repeat=experts)
                if sum(plan) <= budget and set(needed) <= set(plan)
            ]

            def price(plan, cost_EB=cost_EB):
                return sum(float(cost_EB[e, b - 1]) for e, b in enumerate(plan))

            assert tuple(bits_E) in plans
            assert price(bits_E) == pytest.approx(min(map(price, plans)), abs=1e-12)
        with pytest.raises(camera.CameraError, match="too few"):
            table.within(least - 1)


def test_exponents():
    count, weight = torch.tensor([1, 3]), torch.tensor([1.0, 1.0])
    loss = torch.tensor([[4.0], [9.0]])
    cost = expert_costs(count, weight, loss, alpha=2, beta=1, loss_exponent=0.5)
    want = 1000 * torch.tensor([[0.25**2 * 0.5 * 2], [0.75**2 * 0.5 * 3]])
    torch.testing.assert_close(cost, want.double())


# --- what rounding one expert costs ---


class Experts(nn.Module):
    has_gate = is_concatenated = True

    def __init__(self, gate_up, down):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up


class Block(nn.Module):
    """Softmax over all experts, the best two, renormalised: the golden case's routing."""

    def __init__(self, tensors):
        super().__init__()
        self.router = tensors["router_weight"]
        self.gate = nn.Identity()  # blocks have a router by this name; here the case has routed
        self.experts = Experts(tensors["gate_up_proj"], tensors["down_proj"])

    def forward(self, x):
        weights, index = (x @ self.router.T).softmax(-1).topk(2)
        return self.experts(x, index, weights / weights.sum(-1, keepdim=True))


def test_losses_equal_the_reference(golden):
    case, tensors = golden_case(golden, "mc_quant_loss")
    layer = nn.Module()
    layer.mlp = Block(tensors)
    ffn = FeedForward(layer, Family(), "layer")
    solver = GPTQ(group_size=case["hyper"]["groupsize"])
    observer = RoundingLossObserver(ffn, solver, HessianObserver(ffn))
    with torch.no_grad():
        for x_BLH in tensors["X"]:
            run_ffn(ffn, x_BLH.flatten(0, 1), observer)
    seen = observer.result()
    columns = [LEVELS.index(bits) for bits in case["hyper"]["bits"]]
    assert REFERENCE.loss_norm == "batches"  # that of loss_EB
    compare(seen.loss_EB[:, columns], case, tensors, "eps")
    compare(seen.count_E, case, tensors, "act_count")
    # one norm over all tokens: between the largest batch's and the sum of all
    assert (seen.loss2_EB.sqrt() < seen.loss_EB).all()


# --- the method ---


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_whole_method(family, checkpoints, data_folder, calibration, tmp_path):
    target = 3.2
    result = camera.compress(
        checkpoints(family),
        MixtureCompressor(bits=target, group_size=32),
        tmp_path / "mc",
        calibration=calibration,
        data=str(data_folder),
        device="cpu",
        progress=False,
    )
    config = json.loads((tmp_path / "mc" / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    for path, spec in modules.items():
        if spec["form"] == "packed_mlp":
            assert spec["gate_up"]["bits"] == [4]
            continue
        bits, counts = spec["gate_up"]["bits"], spec["gate_up"]["counts"]
        widths = spec["widths"]
        for e, width in enumerate(widths):  # a whole expert has one width of bits
            assert sorted(row[e] for row in counts) == [0] * (len(bits) - 1) + [width], path
        assert {3, 2} <= set(bits)
    report = json.loads((tmp_path / "mc" / "camera.json").read_text())["layers"]
    for layer in report.values():
        assert 0.9 * target < layer["bits"]["stored"] <= target
    assert result.bits["stored"] <= target
    logits = camera.checkpoint.loading.load_model(tmp_path / "mc", "cpu")(
        torch.arange(3, 40)[None]
    ).logits
    assert logits.isfinite().all()


def test_refusals(checkpoints, tmp_path):
    for family, settings, why in (
        ("llama", {}, "method=gptq"),
        ("qwen2_moe", dict(bits=1.0), "between"),
        ("qwen2_moe", dict(loss_norm="some"), "loss_norm"),
        ("qwen2_moe", dict(shared_bits=9), "shared_bits"),
        ("qwen2_moe", dict(at_least_one=[4]), "at_least_one"),
    ):
        with pytest.raises(camera.CameraError, match=why):
            camera.compress(checkpoints(family), MixtureCompressor(**settings), tmp_path / "out")


def test_what_whole_bits_miss_is_said_before_the_first_layer(checkpoints, caplog):
    budget = MetaModel(checkpoints("qwen3_moe")).budget
    MixtureCompressor(bits=4.5, group_size=8).check(budget)
    assert [record.message for record in caplog.records] == [
        "bits=4.5: layer 0 and those like it stores 4.375 bits per weight, and the next plan that "
        "these settings allow 4.75"
    ]
    caplog.clear()
    MixtureCompressor(bits=4.4, group_size=8).check(budget)
    assert not caplog.records


def test_an_expert_of_width_0_costs_nothing(checkpoints, data_folder, calibration, tmp_path):
    """Pruning over all layers may take an expert, or a layer's experts, whole."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("qwen3_moe"), source)
    small = [".layers.2.mlp.experts.", ".layers.1.mlp.experts.3."]
    for file in source.glob("*.safetensors"):
        tensors = {
            key: tensor * 1e-6 if "down" in key and any(s in key for s in small) else tensor
            for key, tensor in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
    options = dict(data=str(data_folder), device="cpu", progress=False, calibration=calibration)
    pruned = camera.compress(
        source, "magnitude", tmp_path / "cut", sparsity=0.4, rank_scope="global", **options
    )
    assert any(0 in widths for widths in pruned.widths.values())
    found = camera.compress(
        tmp_path / "cut", "mc", tmp_path / "mc", bits=4.5, group_size=8, **options
    )
    assert found.bits["stored"] <= 4.5
    load_model(tmp_path / "mc", device="cpu")(torch.tensor([[3, 4, 5]]))
