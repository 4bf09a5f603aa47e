"""HEAPr: the reference's scores and sets, its invariances, and what is left after it."""

import gc
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import camera
from baselines.micro_experts.heapr import HEAPr
from camera.calibration.scores.gradient import (
    GradientObserver,
    GradientSpec,
    GradientStatistics,
)
from camera.calibration.statistics import Statistics
from camera.method import PassKind
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.gradients import GradientCall
from camera.moe.pool import rows_of_mask
from camera.pipeline.passes.backward import BackwardWay
from camera.pipeline.resume import PassProgress
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer
from tests.helpers.golden import compare, golden_case
from tests.helpers.models import build_model
from tests.helpers.oracles import ffn_of, zero_lowest
from tests.helpers.runs.documents import reference_settings


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Layers are freed with a collection each: let it look at what the tests make only."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def measured(folder, ids, work):
    model = MetaModel(folder)
    way = BackwardWay(LayerStreamer(model), [{"input_ids": ids}], work / "inputs")
    progress = PassProgress(work / "progress", {})
    return way.run(GradientSpec(), lambda title, start: range(start, len(model.layers)), progress)


def test_scores_equal_the_reference_s_gram_matrices(golden):
    """Batch by batch, from h and g alone: no matrix of H x H is formed."""
    about, tensors = golden_case(golden, "heapr_hook")
    down_EHI, counts = tensors["down_proj"], tensors["counts"]
    experts, _, width = down_EHI.shape
    group = SimpleNamespace(
        path="experts", routed=True, widths=[width] * experts, down=lambda e: down_EHI[e]
    )
    observer = GradientObserver(
        SimpleNamespace(groups=[group], module=torch.nn.Linear(1, 1), widths=group.widths)
    )
    parts = counts.flatten().tolist()
    pieces = zip(tensors["h"].split(parts), tensors["grad"].split(parts), strict=True)
    for i, (h_NW, g_NH) in enumerate(pieces):
        e, batch = divmod(i, counts.shape[1])
        if len(h_NW):
            tokens_N, a_N = torch.arange(len(h_NW)), torch.ones(len(h_NW))
            dh_NW = g_NH @ down_EHI[e]
            place = group, e, batch, tokens_N
            observer(GradientCall(*place, g_NH, h_NW, a_N, dh_NW, g_NH, 1))
    score_EI = observer.result().product().view(experts, width)
    compare(score_EI, about, tensors, "score")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory, golden):
    """(about, tensors, folder of the model, its sensitivities) of the end-to-end golden case."""
    about, tensors = golden_case(golden, "heapr_qwen3")
    work = tmp_path_factory.mktemp("heapr")
    config = AutoConfig.for_model("qwen3_moe", **about["hyper"]["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {key[6:]: t for key, t in tensors.items() if key.startswith("model/")}
    model.load_state_dict(weights)
    model.save_pretrained(work / "model")
    return about, tensors, work / "model", measured(work / "model", tensors["input_ids"], work)


def test_streamed_scores_equal_the_reference_s(qwen3):
    about, tensors, _, seen = qwen3
    found = torch.stack([seen[i].product() for i in sorted(seen)]).view(tensors["score"].shape)
    reached = tensors["score"] >= 0
    # the reference's loss is the mean over the samples of a batch, each of which counts whole here
    found[reached] /= about["hyper"]["cali_batch_size"] ** 2
    assert torch.equal(found < 0, ~reached)
    compare(found, about, tensors, "score")
    for i, layer in seen.items():
        compare(layer.tokens_E, about, tensors, f"tokens_layer{i}")


@pytest.mark.golden("heapr", r"keep_mask_r([\d.]+)")
def test_global_plans_and_pruned_logits_equal_the_reference_s(expected, qwen3):
    (about, tensors, folder, seen), (ratio,) = qwen3, expected.parts
    keep, total = about["hyper"]["n_keep"][ratio], tensors["score"].numel()
    # the reference keeps int(N (1 - ratio)); a sparsity of exactly as many is the same budget
    method = HEAPr((total - keep) / total, **reference_settings("heapr"))
    budget = MetaModel(folder).budget
    method.check(budget)
    plan = method.plan({PassKind.BACKWARD: seen}, budget)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    for i, layer in enumerate(model.model.layers):
        ffn = FeedForward(layer, family_of("qwen3_moe"), f"model.layers.{i}")
        want = rows_of_mask(ffn, tensors[expected.name][i].flatten())
        applied = method.apply(i, ffn, plan.layers[i], seen[i])
        for path, experts in want.items():
            assert all(map(torch.equal, applied.kept[path], experts))
    with torch.no_grad():
        logits = model(tensors["input_ids"][:2]).logits
    compare(logits, about, tensors, f"logits_r{ratio}")


def text():
    return torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(3))


def scores_of(model, work):
    model.save_pretrained(work / "model")
    return [
        getattr(layer, score)(normalize)
        for layer in measured(work / "model", text(), work).values()
        for score in ("product", "joint")
        for normalize in ("routed", "all")
    ]


def test_scores_move_with_permuted_micro_experts(tmp_path):
    plain = scores_of(build_model("qwen3_moe"), tmp_path / "plain")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    model = build_model("qwen3_moe")
    for layer in model.model.layers:
        gate_up, down = layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data
        gate_up[2] = gate_up[2][torch.cat((order, 24 + order))]
        down[2] = down[2][:, order]
    moved = scores_of(model, tmp_path / "moved")
    for a, b in zip(plain, moved, strict=True):
        want = a.view(8, 24).clone()
        want[2] = want[2][order]
        torch.testing.assert_close(b.view(8, 24), want, rtol=1e-3, atol=0)


def test_scores_ignore_rescaling_that_keeps_the_function(tmp_path):
    plain = scores_of(build_model("qwen2_moe"), tmp_path / "plain")
    model = build_model("qwen2_moe")
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj.data[:, 24:] *= 8.0
        layer.mlp.experts.down_proj.data /= 8.0
        layer.mlp.shared_expert.up_proj.weight.data /= 4.0
        layer.mlp.shared_expert.down_proj.weight.data *= 4.0
    for a, b in zip(plain, scores_of(model, tmp_path / "scaled"), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=0)


def test_joint_and_product_are_one_where_only_one_token_came():
    """Of a single token the mean of the product is the product of the means."""
    h, dh = torch.rand(6).double(), torch.rand(6).double()
    seen = GradientStatistics(
        groups={"e": [2, 2, 2]},
        sum2_N=h.square(),
        max2_N=h.square().float(),
        basis_N=torch.ones(6),
        tokens_E=torch.tensor([1, 0, 4]),
        h2_N=h.square(),
        dh2_N=dh.square(),
        joint_N=(h * dh).square(),
    )
    torch.testing.assert_close(seen.product()[:2], seen.joint()[:2])
    assert (seen.product()[2:4] == -1).all() and (seen.joint("all")[2:4] == -1).all()
    torch.testing.assert_close(seen.product()[4:] * 4, seen.joint()[4:])  # 1/4 1/4 against 1/4
    torch.testing.assert_close(seen.product("all")[4:], seen.product()[4:] * 4)


@pytest.fixture
def compress(data_folder, calibration, tmp_path):
    def go(folder, name="out", **settings):
        out = tmp_path / name
        options = dict(calibration=calibration, data=str(data_folder), device="cpu", progress=False)
        return out, camera.compress(folder, "heapr", out, **options, **settings)

    return go


@pytest.mark.parametrize(
    ("family", "sparsity_of", "rank_scope", "score"),
    [
        ("qwen2_moe", "moe", "global", "product"),
        ("qwen2_moe", "routed", "global", "fisher"),
        ("deepseek", "model", "global", "product"),
        ("granitemoe", "moe", "layer", "product"),
        ("llama", "moe", "global", "fisher"),
    ],
)
def test_the_pruned_model_is_the_masked_one_and_the_count_is_met(
    family, sparsity_of, rank_scope, score, checkpoints, compress
):
    folder = checkpoints(family)
    out, _ = compress(
        folder,
        sparsity=0.3,
        sparsity_of=sparsity_of,
        rank_scope=rank_scope,
        score=score,
        normalize="all",
    )
    dense, pruned = MetaModel(folder).budget, MetaModel(out).budget
    sizes = {
        i: (sum(pool.widths), sum(pruned.layers[i].widths)) for i, pool in dense.layers.items()
    }
    ratio = dense.pool_ratio(0.3, sparsity_of)
    if rank_scope == "layer":
        assert all(before - after == int(before * ratio) for before, after in sizes.values())
    else:
        candidates = sum(
            width
            for pool in dense.layers.values()
            for width, routed in zip(pool.widths, pool.routed, strict=True)
            if routed or sparsity_of != "routed"
        )
        removed = [before - after for before, after in sizes.values()]
        assert sum(removed) == int(candidates * ratio)
        assert len(set(removed)) > 1, "every layer lost the same: nothing was ranked across them"
    if sparsity_of == "routed":
        assert all(pool.widths[0] == 40 for pool in pruned.layers.values())  # shared expert
    statistics = Statistics.load(out / "statistics.safetensors")
    values = {"product": GradientStatistics.product, "fisher": GradientStatistics.joint}[score]
    masked = AutoModelForCausalLM.from_pretrained(folder)
    for i, (before, after) in sizes.items():
        score_N = values(statistics.layers[i], "all")
        if sparsity_of == "routed":
            score_N[:40] = torch.inf
        zero_lowest(ffn_of(masked.model.layers[i]), score_N, before - after)
    with torch.no_grad():
        want = masked(text()).logits
        got = AutoModelForCausalLM.from_pretrained(out)(text()).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [dict(score="sum"), dict(normalize="none")])
def test_unknown_choices_are_refused(settings, checkpoints, compress):
    with pytest.raises(CameraError, match=r"method\.(score|normalize)="):
        compress(checkpoints("qwen3_moe"), sparsity=0.3, **settings)
