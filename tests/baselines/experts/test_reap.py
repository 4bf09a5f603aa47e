"""REAP and frequency: the reference's numbers, and what must hold of any score of experts."""

from typing import get_args

import pytest
import torch
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from baselines.experts.frequency import Frequency
from baselines.experts.reap import Reap, ReapScore
from baselines.experts.subset_search import keep_best
from baselines.experts.use import UseObserver
from camera.moe.capture import run_ffn
from camera.moe.families import Family
from camera.moe.feed_forward import FeedForward
from camera.runtime.errors import CameraError
from tests.helpers.dropping import build, tokens, views
from tests.helpers.oracles import capture
from tests.helpers.runs.documents import reference_settings


@torch.no_grad()
def use(block, batches, softmax=False, family=Family()):  # noqa: B008 (it is frozen)
    layer = torch.nn.Module()
    layer.mlp = block
    ffn = FeedForward(layer, family, "layer")
    observer = UseObserver(ffn, softmax)
    with torch.no_grad():
        for x_BLH, mask_T in batches:
            run_ffn(ffn, x_BLH, observer, mask_T=mask_T)
    return observer.result()


def block_of(tensors, hyper, layer, kind):
    sizes = dict(
        hidden_size=hyper["hidden"],
        intermediate_size=hyper["intermediate"],
        num_experts_per_tok=hyper["top_k"],
    )
    if kind == "always":
        block = MixtralSparseMoeBlock(
            MixtralConfig(**sizes, num_local_experts=hyper["num_experts"])
        )
    else:
        sizes["moe_intermediate_size"] = sizes.pop("intermediate_size")
        config = Qwen3MoeConfig(**sizes, num_experts=hyper["num_experts"])
        config.norm_topk_prob = kind == "renorm"
        block = Qwen3MoeSparseMoeBlock(config)
    block.eval().requires_grad_(False)
    block.gate.weight.copy_(tensors[f"l{layer}_router_weight"])
    block.experts.gate_up_proj.copy_(tensors[f"l{layer}_gate_up_proj"])
    block.experts.down_proj.copy_(tensors[f"l{layer}_down_proj"])
    return block


# what the reference's block does, and the ways here to score it: a model that renormalises,
# one that doesn't, one that does and is scored without (the reference on Mixtral)
WAYS = {
    "renorm": [("renorm", "model")],
    "norenorm": [("norenorm", "model"), ("always", reference_settings("reap")["routing_weights"])],
}


@pytest.mark.golden("reap", r"l(\d+)_reap_(\w+)")
def test_scores_and_pruned_experts_are_those_of_the_reference(expected):
    (layer, name), tensors, hyper = expected.parts, expected.tensors, expected.hyper
    batches = [
        (tensors[f"l{layer}_x_b{i}"], tensors[f"mask_b{i}"].bool().flatten())
        for i in range(len(hyper["batches"]))
    ]
    keys = {
        "reap": f"reap_{name}",
        "weighted_ean_sum": f"weighted_ean_sum_{name}",
        "weighted_frequency": f"weighted_expert_frequency_sum_{name}",
        "ean_sum": "ean_sum",
        "ean_mean": "ean_mean",
    }
    for kind, weights in WAYS[name]:
        block = block_of(tensors, hyper, layer, kind)
        seen = use(block, batches, weights == "softmax")
        counts_E = Frequency(0.5).expert_scores(seen)
        expected.compare(counts_E, f"l{layer}_expert_frequency")
        for score, key in keys.items():
            method = Reap(0.5, score=score, routing_weights=weights)
            expected.compare(method.expert_scores(seen), f"l{layer}_{key}")
        score_E = Reap(0.5, routing_weights=weights).expert_scores(seen)
        for ratio, number in hyper["n_prune"].items():
            gone = (~keep_best(score_E, number)).nonzero().flatten()
            expected.compare(gone, f"l{layer}_pruned_r{ratio}_{name}")


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "phimoe", "granitemoe"])
def test_scores_use_the_weights_that_the_model_applies(family):
    """Against every expert run on every token, times what the router handed out."""
    model = build(family)
    i, ffn = next(iter(views(model).items()))
    x_TH, (index_TK, weight_TK) = capture(model, i, tokens())
    observer = UseObserver(ffn)
    with torch.no_grad():
        run_ffn(ffn, x_TH[None], observer)
    seen, want = observer.result(), []
    experts = ffn.module.experts
    for e in range(experts.num_experts):
        gate, up = (x_TH.double() @ experts.gate_up_proj[e].double().T).chunk(2, -1)
        out_TH = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].double().T
        hit_TK = index_TK == e
        norm_T = out_TH.norm(dim=-1)
        each = (weight_TK.double() * norm_T[:, None])[hit_TK]
        want.append(each.mean() if len(each) else torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(
        Reap(0.5).expert_scores(seen), torch.stack(want).detach(), rtol=1e-4, atol=0
    )
    assert seen.routed_tokens().sum() == index_TK.numel()
    assert len(seen.tokens_E) == sum(len(group.widths) for group in ffn.groups)


@pytest.mark.parametrize("score", get_args(ReapScore))
def test_chunking_changes_nothing(score):
    model = build("olmoe")
    x_BLH = capture(model, 0, tokens())[0].detach().view(2, 24, 32)
    block, method = model.model.layers[0].mlp, Reap(0.5, score=score)
    whole = method.expert_scores(use(block, [(x_BLH, None)]))
    parts = method.expert_scores(
        use(block, [(x.contiguous(), None) for x in x_BLH.split(5, dim=1)])
    )
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-9)


def test_an_experts_score_scales_with_its_output():
    model = build("olmoe")
    x_BLH = capture(model, 0, tokens())[0][None]
    block = model.model.layers[0].mlp
    before = Reap(0.5).expert_scores(use(block, [(x_BLH, None)]))
    block.experts.down_proj.data[3] *= 2.5
    after = Reap(0.5).expert_scores(use(block, [(x_BLH, None)]))
    before[3] *= 2.5
    assert before[3] > 0
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


def test_the_same_pass_serves_reap_and_frequency_unless_routing_weights_differ():
    used = Frequency(0.6).observer().key()
    assert Reap(0.2).observer().key() == used
    assert Reap(0.2, score="ean_sum").observer().key() == used
    assert Reap(0.2, routing_weights="softmax").observer().key() != used


@pytest.mark.parametrize(("key", "value"), [("score", "best"), ("routing_weights", "sigmoid")])
def test_unknown_options_are_refused(key, value):
    with pytest.raises(CameraError, match=f"{key}={value} is none of"):
        Reap(0.5, **{key: value}).check(None)
