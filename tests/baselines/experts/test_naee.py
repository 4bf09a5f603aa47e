"""NAEE: the reference's numbers; cached outputs against running experts; searches; whole runs.

Shapes: T tokens, C candidates, E experts, H hidden.
"""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import camera
from baselines.experts.base import ExpertPruning
from baselines.experts.frequency import Frequency
from baselines.experts.naee import NAEE, OutputObserver
from baselines.experts.reap import Reap
from baselines.experts.rerouting import Rerouter
from baselines.experts.subset_search import OutputError, search
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.loading import load_tokenizer
from camera.method import Plan
from camera.moe.capture import run_ffn
from camera.moe.families import Family
from camera.moe.feed_forward import FeedForward
from camera.moe.routing import router_constraints
from camera.pruning.whole_experts import remove_experts
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.dropping import (
    ALL,
    CASES,
    build,
    candidates,
    family_and_overrides,
    some,
    tokens,
    views,
)
from tests.helpers.models import MOE_FAMILIES
from tests.helpers.oracles import capture
from tests.helpers.runs.documents import reference_settings


def ffn_of(block):
    layer = torch.nn.Module()
    layer.mlp = block
    return FeedForward(layer, Family(), "layer")


@torch.no_grad()
def seen_by(ffn, batches, sample=0, seed=0):
    """What calibration gathers of a layer that is shown these batches [B, L, H]."""
    observer = OutputObserver(ffn, sample, seed)
    for i, x_BLH in enumerate(batches):
        observer.ffn_input(i, x_BLH.flatten(0, 1), None, None)
        run_ffn(ffn, x_BLH, observer, batch=i)
    return observer.result()


# --- against the reference ---


def block_of(expected):
    tensors, hyper = expected.tensors, expected.hyper
    config = MixtralConfig(
        hidden_size=tensors["X"].shape[-1],
        intermediate_size=tensors["down_proj"].shape[-1],
        num_local_experts=hyper["num_experts"],
        num_experts_per_tok=hyper["top_k"],
    )
    block = MixtralSparseMoeBlock(config).eval().requires_grad_(False)
    block.gate.weight.copy_(tensors["router_weight"])
    block.experts.gate_up_proj.copy_(tensors["gate_up_proj"])
    block.experts.down_proj.copy_(tensors["down_proj"])
    return block


@pytest.mark.golden("naee", r"J_r(\d+)")
def test_every_subset_has_the_error_of_the_reference(expected):
    keep, experts = int(expected.parts[0]), expected.hyper["num_experts"]
    tensors, ffn = expected.tensors, ffn_of(block_of(expected))
    seen = seen_by(ffn, tensors["X"])
    batch = tensors["X"].shape[1] * tensors["X"].shape[2]
    method = NAEE(1 - keep / experts, **reference_settings("naee") | {"norm_tokens": batch})
    error = OutputError(seen.gram_TEE, Rerouter(ffn, seen.x_TH), method.norm_tokens)
    sets = tensors[f"subsets_r{keep}"].tolist()
    expected.compare(error(~candidates(sets, experts)))
    found = search(error, experts, experts - keep, how=method.search)
    assert found.drop == tensors[f"best_r{keep}"].tolist()
    assert found.evaluations == len(sets)


@pytest.mark.golden("naee", r"Z_pruned_r(\d+)_batch(\d+)")
def test_the_pruned_block_puts_out_what_the_reference_does(expected):
    (keep, batch), tensors, block = expected.parts, expected.tensors, block_of(expected)
    pruned = MixtralSparseMoeBlock(block.experts.config).eval().requires_grad_(False)
    pruned.load_state_dict(block.state_dict())
    drop = tensors[f"best_r{keep}"].tolist()
    stay = [e for e in range(expected.hyper["num_experts"]) if e not in drop]
    remove_experts(ffn_of(pruned), stay)
    expected.compare(pruned(tensors["X"][int(batch)]).flatten(0, 1))


# --- cached outputs ---


@pytest.mark.parametrize("case", ALL)
def test_cached_outputs_give_the_error_of_the_layer_really_cut(case):
    """Whatever the family's routing: J of a set is the distance to the smaller layer's output."""
    model = build(case)
    i, ffn = next(iter(views(model).items()))
    x_TH, _ = capture(model, i, tokens())
    seen, routing = seen_by(ffn, [x_TH[None]]), router_constraints(ffn)
    keeps = [some(routing, seed) for seed in range(3)]
    with torch.no_grad():
        error = OutputError(seen.gram_TEE, Rerouter(ffn, seen.x_TH))
        got_C = error(candidates(keeps, routing.experts))
        full_TH = ffn.module(x_TH[None])[0]
        for keep, got in zip(keeps, got_C, strict=True):
            smaller = views(build(case))[i]
            remove_experts(smaller, keep)
            want = (full_TH - smaller.module(x_TH[None])[0]).norm()
            torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-6)
        assert error(candidates([range(routing.experts)], routing.experts)).item() == 0
        shared = ffn.module.shared_experts(x_TH) if hasattr(ffn.module, "shared_experts") else 0
        if not hasattr(ffn.module, "shared_expert"):
            want = (full_TH - shared).norm().item()
            assert error.of_nothing() == pytest.approx(want, rel=1e-4)


def test_padding_is_not_sampled_and_the_sample_is_seeded():
    ffn = views(build("olmoe"))[0]
    x_TH = torch.randn(40, 32)
    mask_T = torch.arange(40) % 4 > 0

    def sample(number, seed, batch):
        observer = OutputObserver(ffn, number, seed)
        parts = zip(x_TH.split(batch), mask_T.split(batch), strict=True)
        for i, (part, mask) in enumerate(parts):
            observer.ffn_input(i, part, None, mask)
        with torch.no_grad():
            return observer.result().x_TH

    assert torch.equal(sample(0, 1, 10), x_TH[mask_T])
    assert torch.equal(sample(99, 1, 10), x_TH[mask_T])
    few = sample(9, 1, 10)
    place = [(x_TH == row).all(1).nonzero().item() for row in few]
    assert len(set(place)) == 9 and place == sorted(place) and mask_T[place].all()
    assert torch.equal(few, sample(9, 1, 10)) and torch.equal(few, sample(9, 1, 40))
    assert not torch.equal(few, sample(9, 2, 10))


# --- budgets ---


def budget_of(folder):
    return MetaModel(folder).budget


@pytest.mark.parametrize("of", ["moe", "model", "routed"])
@pytest.mark.parametrize("asked", [0.28, 0.3])
@pytest.mark.parametrize("case", ["qwen2_moe", "deepseek", "deepseek_v3", "granitemoe"])
def test_the_asked_fraction_is_hit_within_one_expert_a_layer_and_never_exceeded(
    case, asked, of, checkpoints
):
    family, overrides = family_and_overrides(case)
    folder = checkpoints(family, **overrides)
    budget, method = budget_of(folder), Frequency(sparsity=asked, sparsity_of=of)
    drop, routing = method.removed(budget), method.routing(budget)
    plan = Plan(method.name, method.settings())
    written = method.native_config(MetaModel(folder).config, budget, plan)
    assert list(written.values()) == [routing.experts - drop]

    def parameters(gone):
        config = MetaModel(folder).config
        setattr(config, next(iter(written)), routing.experts - gone)
        return count(AutoModelForCausalLM.from_config(config))[of]

    full, after, next_one = (parameters(n) for n in (0, drop, drop + routing.groups))
    assert drop % routing.groups == 0
    assert 1 - after / full < asked + 1e-9 < 1 - next_one / full


def count(model):
    """Parameters under the three denominators, from the names of tensors."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    sizes = {n: t.numel() for n, t in model.state_dict().items() if n not in tied}
    routed = sum(size for n, size in sizes.items() if ".experts." in n)
    shared = sum(size for n, size in sizes.items() if ".shared_expert." in n)
    shared += sum(size for n, size in sizes.items() if ".shared_experts." in n)
    return {"routed": routed, "moe": routed + shared, "model": sum(sizes.values())}


def refused(match, folder, method=None, **settings):
    with pytest.raises(CameraError, match=match):
        (method or NAEE)(**{"sparsity": 0.3, **settings}).check(budget_of(folder))


@pytest.mark.parametrize("method", [NAEE, Reap, Frequency])
def test_dense_models_are_refused(method, checkpoints):
    for family in ("llama", "qwen3"):
        refused(
            f"method {method.name} removes whole routed.*{family} model has none",
            checkpoints(family),
            method,
        )


def test_what_cannot_be_is_refused_with_the_nearest_that_can(checkpoints):
    olmoe = checkpoints("olmoe")
    refused(
        r"smallest possible.*is 0\.125 \(1 of 8 experts",
        olmoe,
        sparsity=0.1,
        sparsity_of="routed",
    )
    refused(
        r"largest possible.*is 0\.625 \(5 of 8 experts.*chooses 3\)",
        olmoe,
        sparsity=0.76,
        sparsity_of="routed",
    )
    budget = budget_of(olmoe)
    assert NAEE(0.125, "routed").removed(budget) == 1
    assert NAEE(0.625, "routed").removed(budget) == 5
    refused("none of which its top-3 router can spare", checkpoints("deepseek_v3"))
    refused(
        r"smallest possible.*is 0\.25 \(4 of 16 experts .* from 4 groups of equal size",
        checkpoints("deepseek_v3", **CASES["deepseek_v3"]),
        sparsity=0.2,
        sparsity_of="routed",
    )
    refused("between 0 and 1", olmoe, sparsity=1.0)
    refused("sparsity_of=all is none of moe", olmoe, sparsity_of="all")
    refused("max_subsets=0.*at least 1", olmoe, max_subsets=0)
    refused("search=enumerate would try", olmoe, search="enumerate", max_subsets=3)
    refused("search=best is none of", olmoe, search="best")


def test_the_nearest_possible_named_is_accepted(checkpoints):
    """A message that names a sparsity names one that works."""
    for family in ("qwen2_moe", "mixtral", "granitemoe", "deepseek_v2"):
        budget = budget_of(checkpoints(family))
        for of in ("moe", "model", "routed"):
            for asked in (0.001, 0.999):
                with pytest.raises(CameraError) as refusal:
                    Frequency(asked, of).check(budget)
                named = float(str(refusal.value).split(" is ")[1].split()[0])
                Frequency(named, of).check(budget)


# --- whole runs ---


METHODS = {"naee": partial(NAEE, sample_tokens=100), "reap": Reap, "frequency": Frequency}


@pytest.mark.parametrize(
    ("method", "family"),
    [("naee", family) for family in MOE_FAMILIES]
    + [("reap", "qwen2_moe"), ("reap", "deepseek_v3"), ("frequency", "phimoe")],
)
def test_runs_write_plain_smaller_models(
    family, method, checkpoints, data_folder, calibration, tmp_path
):
    source = checkpoints(family, num_hidden_layers=2, **CASES[family])
    out = tmp_path / "out"
    propagate = "dense" if method == "reap" else "compressed"
    chosen: ExpertPruning = METHODS[method](sparsity=0.55, sparsity_of="routed")
    result = camera.compress(
        source,
        chosen,
        out,
        calibration=calibration,
        propagate=propagate,
        data=str(data_folder),
        device="cpu",
        progress=False,
    )
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert getattr(model.config, "quantization_config", None) is None
    budget = budget_of(source)
    drop, experts = chosen.removed(budget), chosen.routing(budget).experts
    layers = views(model)
    original = AutoModelForCausalLM.from_pretrained(source)
    for i, ffn in views(original).items():
        report = result.layers[str(i)]
        assert len(report["dropped"]) == drop
        keep = [e for e in range(experts) if e not in report["dropped"]]
        remove_experts(ffn, keep)
        assert router_constraints(layers[i]).experts == experts - drop
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, original(tokens()).logits)
    assert result.sparsity["routed"] == pytest.approx(drop / experts)
    parameters = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert result.sparsity["moe"] == pytest.approx(
        (budget.dense.routed - parameters) / budget.dense.moe
    )
    assert result.coverage["experts"] > 0
    if method == "naee":
        assert {"search", "evaluations", "error", "relative_error"} <= report.keys()
        assert 0 < report["relative_error"] < 1.5 and report["tokens"] == 100


def test_no_other_expert_of_a_layer_would_be_missed_less(
    checkpoints, data_folder, calibration, tmp_path
):
    source = checkpoints("mixtral", num_hidden_layers=1)
    result = camera.compress(
        source,
        NAEE(0.25, "routed", sample_tokens=0),
        tmp_path / "out",
        calibration=calibration,
        data=str(data_folder),
        device="cpu",
        progress=False,
    )
    ids_NL = calibration_tokens(
        load_tokenizer(source), calibration, data=str(data_folder), seed=1234, max_length=128
    ).ids_NL
    report = result.layers["0"]
    assert report["search"] == "enumerate" and report["evaluations"] == 4
    model = AutoModelForCausalLM.from_pretrained(source)
    x_TH, _ = capture(model, 0, ids_NL)
    with torch.no_grad():
        full_TH, lost = model.model.layers[0].mlp(x_TH[None]), []
        for gone in range(4):
            ffn = views(AutoModelForCausalLM.from_pretrained(source))[0]
            remove_experts(ffn, [e for e in range(4) if e != gone])
            lost.append((full_TH - ffn.module(x_TH[None])).norm().item())
    assert report["dropped"] == [lost.index(min(lost))]
    assert report["error"] == pytest.approx(min(lost), rel=1e-4)
    assert report["relative_error"] == pytest.approx(min(lost) / full_TH.norm().item(), rel=1e-4)
