"""HEAPr: the reference's scores and sets, its invariances, and what is left after it."""

import gc
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import camera
from baselines.micro_experts.heapr import HEAPr
from camera.calibration.scores.gradient import GradientStatistics, SensitivityObserver
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.gradients import ExpertGradients
from camera.moe.pool import rows_of_mask
from camera.pipeline.passes import backward
from camera.pipeline.resume import Progress
from camera.runtime.errors import CameraError
from camera.streaming.streamer import Streamer
from tests.helpers.golden import golden_folder
from tests.helpers.models import build_model
from tests.helpers.oracles import ffn_of, zero_lowest


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Layers are freed with a collection each: let it look at what the tests make only."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def golden_case(config, name):
    """What the index says of a case, and its tensors; skips where the folder lacks it."""
    folder = golden_folder(config)
    path = folder / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is absent: the golden vectors of HEAPr are not in this folder")
    index = json.loads((folder / "index.json").read_text())
    return next(case for case in index["cases"] if case["case"] == name), load_file(path)


def measured(folder, ids, work):
    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    return backward.measure(
        Streamer(folder),
        SimpleNamespace(ids_NL=ids),
        lambda index, ffn: SensitivityObserver(ffn),
        lambda title, start: range(start, layers),
        Progress(work / "progress", {}),
        work / "inputs",
    )


def test_scores_equal_the_reference_s_gram_matrices(request):
    """Batch by batch, from h and g alone: no matrix of H x H is formed."""
    about, tensors = golden_case(request.config, "heapr_hook")
    down_EHI, counts = tensors["down_proj"], tensors["counts"]
    experts, _, width = down_EHI.shape
    group = SimpleNamespace(
        path="experts", routed=True, widths=[width] * experts, down=lambda e: down_EHI[e]
    )
    observer = SensitivityObserver(
        SimpleNamespace(groups=[group], module=torch.nn.Linear(1, 1), widths=group.widths)
    )
    parts = counts.flatten().tolist()
    pieces = zip(tensors["h"].split(parts), tensors["grad"].split(parts), strict=True)
    for i, (h_NW, g_NH) in enumerate(pieces):
        e, tokens = i // counts.shape[1], torch.arange(len(h_NW))
        if len(h_NW):
            a_N = torch.ones(len(h_NW))
            dh_NW = g_NH @ down_EHI[e]
            observer(ExpertGradients(group, e, tokens, g_NH, h_NW, a_N, dh_NW, g_NH, 1))
    tolerance = about["expected"]["score"]["compare"]
    torch.testing.assert_close(
        observer.result().product(),
        tensors["score"].flatten().double(),
        rtol=tolerance["rtol"],
        atol=tolerance["atol"],
    )


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory, request):
    """(about, tensors, folder of the model, its sensitivities) of the end-to-end golden case."""
    about, tensors = golden_case(request.config, "heapr_qwen3")
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
    want, reached = tensors["score"].double(), tensors["score"] >= 0
    # the reference's loss is the mean over the samples of a batch, each of which counts whole here
    found[reached] /= about["hyper"]["cali_batch_size"] ** 2
    assert torch.equal(found < 0, ~reached)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=0)
    for i, layer in seen.items():
        assert torch.equal(layer.tokens_E, tensors[f"tokens_layer{i}"])


@pytest.mark.parametrize("ratio", ["0.2", "0.4"])
def test_global_plans_and_pruned_logits_equal_the_reference_s(ratio, qwen3):
    about, tensors, folder, seen = qwen3
    keep, total = about["hyper"]["n_keep"][ratio], tensors["score"].numel()
    # the reference keeps int(N (1 - ratio)); a sparsity of exactly as many is the same budget
    method = HEAPr(sparsity=(total - keep) / total, sparsity_of="routed")
    budget = Streamer(folder).budget
    method.check(budget)
    method.prepare(seen, budget)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    for i, layer in enumerate(model.model.layers):
        ffn = FeedForward(layer, family_of("qwen3_moe"), f"model.layers.{i}")
        want = rows_of_mask(ffn, tensors[f"keep_mask_r{ratio}"][i].flatten())
        outcome = method.compress(i, ffn, seen[i], budget)
        for path, experts in want.items():
            assert all(map(torch.equal, outcome.kept[path], experts))
    with torch.no_grad():
        logits = model(tensors["input_ids"][:2]).logits
    want = tensors[f"logits_r{ratio}"]
    tolerance = about["expected"][f"logits_r{ratio}"]["compare"]["tol"]
    assert (logits - want).abs().max() <= tolerance * want.abs().max()


def text():
    return torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(3))


def scores_of(model, work):
    model.save_pretrained(work / "model")
    return [
        getattr(layer, term)(normalize)
        for layer in measured(work / "model", text(), work).values()
        for term in ("product", "joint")
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
    ("family", "sparsity_of", "rank_scope", "term"),
    [
        ("qwen2_moe", "moe", "global", "product"),
        ("qwen2_moe", "routed", "global", "fisher"),
        ("deepseek", "model", "global", "product"),
        ("granitemoe", "moe", "layer", "product"),
        ("llama", "moe", "global", "fisher"),
    ],
)
def test_the_pruned_model_is_the_masked_one_and_the_count_is_met(
    family, sparsity_of, rank_scope, term, checkpoints, compress
):
    folder = checkpoints(family)
    out, _ = compress(
        folder,
        sparsity=0.3,
        sparsity_of=sparsity_of,
        rank_scope=rank_scope,
        score=term,
        normalize="all",
    )
    dense, pruned = Streamer(folder).budget, Streamer(out).budget
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
    statistics = camera.calibration.statistics.Statistics.load(out / "statistics.safetensors")
    masked = AutoModelForCausalLM.from_pretrained(folder)
    for i, (before, after) in sizes.items():
        score_N = getattr(statistics.layers[i], term)("all")
        if sparsity_of == "routed":
            score_N[:40] = torch.inf
        zero_lowest(ffn_of(masked.model.layers[i]), score_N, before - after)
    with torch.no_grad():
        want = masked(text()).logits
        got = AutoModelForCausalLM.from_pretrained(out)(text()).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [dict(score="sum"), dict(normalize="none")])
def test_unknown_choices_are_refused(settings, checkpoints, compress):
    with pytest.raises(CameraError, match=r"method\.(term|normalize)="):
        compress(checkpoints("qwen3_moe"), sparsity=0.3, **settings)
