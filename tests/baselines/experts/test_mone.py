"""MoNE: which experts are stable and little used, and the means that stand in their place."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from baselines.experts.mone import MoNE
from camera.method import Plan
from camera.moe.capture import run_ffn
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.constants import outputs_of, replace_by_constants, weights_of
from tests.helpers.dropping import build, tokens, views
from tests.helpers.oracles import capture

IDS = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(5))
HALF = dict(sparsity=0.5, sparsity_of="routed")


@torch.no_grad()
def seen(family, joint=False):
    """What a layer's observer saw of the test's tokens, and what every expert does with them."""
    model = build(family)
    index, ffn = next(iter(views(model).items()))
    x_TH, routing = capture(model, index, tokens())
    method = MoNE(0.5, replaced_by="fitted" if joint else "mean")
    observer = method.outputs().build(index, ffn)
    for batch, part_TH in enumerate(x_TH.split(20)):
        observer.ffn_input(batch, part_TH, None, None)
        run_ffn(ffn, part_TH[None], observer, batch=batch)
    f_TEH = outputs_of(ffn.module.experts, x_TH)
    return observer.result(), f_TEH, weights_of(routing, f_TEH.shape[1])


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "granitemoe"])
def test_the_score_is_the_spread_of_an_experts_output_times_its_use(family):
    found, f_TEH, a_TE = seen(family)
    want = {"all": [], "routed": []}
    for e in range(f_TEH.shape[1]):
        own = a_TE[:, e] > 0
        spread = f_TEH[own, e].std(0).norm() if own.sum() > 1 else torch.zeros(())
        want["all"].append(spread * a_TE[:, e].sum())
        want["routed"].append(spread * a_TE[own, e].mean() if own.any() else torch.zeros(()))
    for use_over, expected in want.items():
        score_E = MoNE(0.5, use_over=use_over).expert_scores(found)
        torch.testing.assert_close(score_E, torch.stack(expected).double(), rtol=1e-4, atol=1e-9)


PAIRS = ["qwen2_moe", "deepseek_v3", "phimoe", "granitemoe", "gpt_oss"]  # the last one has biases


@pytest.mark.parametrize("family", PAIRS)
def test_sums_over_pairs_use_the_weights_that_the_model_applies(family, monkeypatch):
    monkeypatch.setattr("camera.calibration.experts.outputs.RUN", 3)
    found, f_TEH, a_TE = seen(family, joint=True)
    held_T = torch.arange(len(a_TE)) // 3 % 8 == 7  # of eight runs of neighbours the last
    for part, part_T in enumerate((~held_T, held_T)):
        part_TE = a_TE * part_T[:, None]
        torch.testing.assert_close(found.gram_SEE[part], part_TE.T @ a_TE, rtol=1e-4, atol=1e-7)
        joint_EEH = torch.einsum("td,te,teh->deh", part_TE, a_TE, f_TEH).float()
        torch.testing.assert_close(found.joint_SEEH[part], joint_EEH, rtol=1e-3, atol=1e-6)


@pytest.fixture
def compressed(checkpoints, data_folder, tmp_path):
    """compressed(method, settings): a model of two layers, what was done to it, and where."""

    def go(method, settings, source=None, out="out", family="qwen2_moe"):
        source = source or checkpoints(family, num_hidden_layers=2)
        text = camera.Calibration(source="wikitext2", samples=4, length=32)
        options = dict(calibration=text, data=str(data_folder), device="cpu", progress=False)
        return source, camera.compress(source, method, tmp_path / out, **settings, **options)

    return go


FITTED = dict(rank_scope="global", replaced_by="fitted")


@pytest.mark.parametrize(
    ("family", "settings"), [("qwen2_moe", {}), ("qwen2_moe", FITTED), ("gpt_oss", FITTED)]
)
@torch.no_grad()
def test_a_checkpoint_computes_what_the_plan_says(family, settings, compressed, tmp_path):
    (source, done), out = compressed("mone", HALF | settings, family=family), tmp_path / "out"
    layers = Plan.load(out).layers
    constants = {i: (layer.removed, layer.constants_RH) for i, layer in layers.items()}
    whole = replace_by_constants(AutoModelForCausalLM.from_pretrained(source), constants)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(loaded(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    budget, counts = MetaModel(source).budget, [len(gone) for gone, _ in constants.values()]
    stays = budget.hidden * (2 if family == "gpt_oss" else 1)  # the constant, and a bias of 0
    freed = sum(counts) * (budget.dense.routed // 16 - stays)  # of 2 layers of 8 experts
    assert done.sparsity["routed"] == pytest.approx(freed / budget.dense.routed)
    assert sum(counts) == 8 and (settings or counts == [4, 4])
    card = (out / "README.md").read_text()  # gpt-oss' checkpoints have no tensor for each expert
    assert not done.native and ("approximate-experts" in card) == (family == "qwen2_moe")
    assert camera.describe(out).bytes["compressed"] == done.bytes["compressed"]


def test_global_ranking_takes_the_lowest_of_all_layers_and_leaves_each_one(compressed, tmp_path):
    settings = dict(rank_scope="global", replaced_by="mean", sparsity=0.8, sparsity_of="routed")
    compressed("aimer", settings)
    layers = Plan.load(tmp_path / "out").layers.values()
    score_LE = torch.tensor([layer.report["score"] for layer in layers])
    keep_LE = torch.stack([layer.keep_E for layer in layers])
    best_LE = torch.zeros_like(keep_LE).scatter(1, score_LE.argmax(1, keepdim=True), True)
    assert (keep_LE | ~best_LE).all() and (~keep_LE).sum() == 12
    assert score_LE[~keep_LE].max() <= score_LE[keep_LE & ~best_LE].min()


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        ("mone", dict(replaced_by="zero"), "replaced_by=zero is none of none, mean, fitted"),
        ("mone", dict(use_over="some"), "use_over=some is none of all, routed"),
        ("naee", dict(replaced_by="novice"), "replaced_by=novice is none of"),
        ("reap", dict(rank_scope="global"), "set method.replaced_by=mean or fitted"),
        ("reap", dict(rank_scope="measured"), "rank_scope=measured is none of layer, global"),
        ("aimer", dict(rank_scope="global", replaced_by="mean", sparsity=0.99), "isn't 1 to 21"),
    ],
)
def test_what_can_not_be_is_refused_before_a_weight_is_read(method, settings, told, checkpoints):
    budget = MetaModel(checkpoints("qwen2_moe")).budget
    with pytest.raises(CameraError, match=told):
        camera.api.as_method(method, HALF | settings).check(budget)


def test_what_holds_constants_is_not_compressed_further(compressed, tmp_path):
    compressed("naee", HALF | dict(replaced_by="mean"))
    for method, settings in (("random", dict(sparsity=0.3)), ("rtn", dict(bits=5.15))):
        with pytest.raises(CameraError, match=r"replaced by constants, .* start from the original"):
            compressed(method, settings, tmp_path / "out", "further")
    assert not (tmp_path / "further").exists()


@pytest.mark.parametrize("rank_scope", ["layer", "global"])
def test_constants_are_refused_where_a_routing_weight_scales_what_experts_read(
    checkpoints, rank_scope
):
    budget = replace(MetaModel(checkpoints("qwen2_moe"), "cpu").budget, model_type="llama4")
    with pytest.raises(CameraError, match=r"of type llama4 scales what .* method.replaced_by=none"):
        MoNE(**HALF, rank_scope=rank_scope).check(budget)
