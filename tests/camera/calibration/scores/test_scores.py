"""Scores by name: what each ranks by, and that pruning and quantising methods can be told any.

Shapes: T tokens, N micro-experts of a layer's pool, W width of one expert.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from camera.calibration.scores.base import SCORES
from camera.calibration.scores.gradient import ProductScore
from camera.calibration.scores.residual import RIDGE, unexplained
from camera.calibration.statistics import Statistics
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.loading import load_model, load_tokenizer
from camera.moe.pool import PoolIndex
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.oracles import basis, capture, dense_phi, ffn_of


@pytest.fixture
def compress(data_folder, calibration, tmp_path):
    def run(source, method, name="out", **options):
        settings = dict(
            data=str(data_folder),
            calibration=calibration,
            device="cpu",
            progress=False,
            statistics=tmp_path / "statistics",
        )
        return camera.compress(source, method, tmp_path / name, **{**settings, **options})

    return run


def statistics_of(folder):
    (file,) = (path for path in folder.glob("*.safetensors") if "-cuts-" not in path.name)
    return Statistics.load(file)


def test_residual_is_what_the_others_of_an_expert_can_t_explain(
    checkpoints, compress, calibration, data_folder, tmp_path
):
    source = checkpoints("qwen2_moe")
    compress(source, "camera_plus", score="residual", compensate="none", sparsity=0.3)
    found = dict(statistics_of(tmp_path / "statistics"))[0]
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = calibration_tokens(
        load_tokenizer(source, False), calibration, data=str(data_folder), seed=1234, max_length=128
    ).ids_NL
    ffn = ffn_of(model.model.layers[0])
    norm_N = basis(ffn).norm(dim=1)
    parts = (dense_phi(ffn, *capture(model, 0, ids)) * norm_N).split(found.widths, 1)
    want_N = torch.cat([left_alone(part_TW) for part_TW in parts])
    torch.testing.assert_close(found.residual_N, want_N, rtol=1e-3, atol=1e-9)


def left_alone(phi_TW):
    """Squared norm of what a ridge regression on all others leaves of each column."""
    ridge, left = RIDGE * phi_TW.square().sum(0).mean(), []
    for i in range(phi_TW.shape[1]):
        rest, own = phi_TW[:, [j for j in range(phi_TW.shape[1]) if j != i]], phi_TW[:, i]
        gram = rest.T @ rest + ridge * torch.eye(rest.shape[1])
        best = torch.linalg.solve(gram, rest.T @ own)
        left.append((own - rest @ best).square().sum() + ridge * best.square().sum())
    return torch.stack(left)


def test_projections_add_up_to_the_mean_length_of_an_experts_output(
    checkpoints, compress, calibration, data_folder, tmp_path
):
    source = checkpoints("qwen2_moe")
    compress(source, "camera_plus", score="projection", compensate="none", sparsity=0.3)
    found = dict(statistics_of(tmp_path / "statistics"))[1]
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = calibration_tokens(
        load_tokenizer(source, False), calibration, data=str(data_folder), seed=1234, max_length=128
    ).ids_NL
    ffn = ffn_of(model.model.layers[1])
    x_TH, (index_TK, weight_TK) = capture(model, 1, ids)
    # every gate 1: outputs before the routing weight, on the tokens that came
    phi_TN = dense_phi(ffn, x_TH, (index_TK, torch.ones_like(weight_TK)))
    gate_T = torch.sigmoid(x_TH.double() @ ffn.shared_expert_gate.weight.double().T).detach()
    start = 0
    score_N = SCORES["projection"]().values(found)
    for expert, (width, tokens) in enumerate(
        zip(found.widths, found.tokens_E.tolist(), strict=True)
    ):
        part = slice(start, start + width)
        start += width
        h_TW = phi_TN[:, part] / gate_T if expert == 0 else phi_TN[:, part]
        y_TH = h_TW @ basis(ffn)[part]
        reached = (index_TK == expert - 1).any(1) if expert else torch.ones(len(x_TH)).bool()
        assert reached.sum() == tokens > 0
        want = y_TH[reached].norm(dim=1).mean()
        torch.testing.assert_close(score_N[part].sum(), want, rtol=1e-4, atol=0)
        along = (h_TW[:, 3] * (y_TH @ basis(ffn)[part][3]) / y_TH.norm(dim=1))[reached].mean()
        torch.testing.assert_close(score_N[part][3], along, rtol=1e-3, atol=1e-9)


def test_what_repeats_another_micro_expert_is_worth_little():
    phi_TW, norm2_W = torch.randn(200, 6), torch.rand(6) + 0.5
    phi_TW[:, 3] = 2 * phi_TW[:, 1]
    share_W = unexplained(phi_TW.T @ phi_TW, norm2_W)
    parts_TW = phi_TW.double() * norm2_W.double().sqrt()
    torch.testing.assert_close(
        share_W, left_alone(parts_TW) / parts_TW.square().sum(0), rtol=1e-4, atol=1e-6
    )
    assert max(share_W[1], share_W[3]) < 0.5 * share_W[[0, 2, 4, 5]].min()


def test_energies_relative_to_hidden_states_are_shares_of_the_hidden_states(
    checkpoints, compress, calibration, data_folder, tmp_path
):
    source = checkpoints("deepseek")
    compress(source, "camera_plus", score="hidden_share", compensate="none", sparsity=0.3)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = calibration_tokens(
        load_tokenizer(source, False), calibration, data=str(data_folder), seed=1234, max_length=128
    ).ids_NL
    for index, layer in statistics_of(tmp_path / "statistics"):
        before = []
        norm = model.model.layers[index].post_attention_layernorm
        hook = norm.register_forward_pre_hook(lambda _, args, seen=before: seen.append(args[0]))
        with hook:
            ffn, (x_TH, routing) = ffn_of(model.model.layers[index]), capture(model, index, ids)
        share_TN = dense_phi(ffn, x_TH, routing) / before[0].flatten(0, 1).norm(dim=1)[:, None]
        norm2_N = basis(ffn).square().sum(1)
        for alpha, phi2_N in ((0, share_TN.square().sum(0)), (1, share_TN.square().amax(0))):
            torch.testing.assert_close(layer.energy(alpha), phi2_N * norm2_N, rtol=1e-4, atol=1e-12)


def scored(name, source, statistics):
    """Groups and scores of every layer, from the run's statistics or, without any, the weights."""
    score = SCORES[name](normalize="all") if name in ("fisher", "product") else SCORES[name]()
    spec = score.observer()
    if spec is not None and spec.reads != "weights":
        return [(layer.groups, score.values(layer)) for _, layer in statistics_of(statistics)]
    model, found = MetaModel(source), []
    for index, pool in model.budget.layers.items():
        model.load_layer(index)
        ffn = model.feed_forward(index)
        seen = None if spec is None else spec.build(index, ffn).result()
        score_N = score.of_layer(index, seen, pool.micro_experts)
        found.append((PoolIndex(ffn).groups, score_N))
    return found


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("score", SCORES)
def test_the_lowest_scores_go(score, scope, checkpoints, compress, tmp_path):
    source = checkpoints("deepseek")
    result = compress(
        source,
        "camera_plus",
        score=score,
        rank_scope=scope,
        propagate="dense",
        compensate="none",
        sparsity=0.4,
    )
    parts = scored(score, source, tmp_path / "statistics")
    pools = [parts] if scope == "global" else [[part] for part in parts]
    for pool in pools:
        scores_N = torch.cat([score_N for _, score_N in pool])
        limit = scores_N.sort().values[int(len(scores_N) * 0.4 + 1e-9)]
        kept = [w for groups, _ in pool for path in groups for w in result.widths[path]]
        widths = [width for groups, _ in pool for parts in groups.values() for width in parts]
        assert kept == [int((part >= limit).sum()) for part in scores_N.split(widths)]


@pytest.mark.parametrize("method", ["camera_q", "camera_q_dagger"])
@pytest.mark.parametrize("score", [name for name in SCORES if name != "energy"])
def test_bits_go_by_any_score(score, method, checkpoints, compress, tmp_path):
    source = checkpoints("qwen3_moe")
    options, target = dict(bits=4.0, group_size=16), 4.0
    by_energy = compress(source, method, "energy", **options)
    result = compress(source, method, "scored", score=score, **options)
    assert 0.9 * target < result.bits["stored"] <= target
    if score != "weight_sum":  # hardly varies: fewer widths of bits are best, with fewer scales
        assert result.bits["stored"] == pytest.approx(by_energy.bits["stored"], rel=0.05)
    maps = [{k: v["mean_bits"] for k, v in r.layers.items()} for r in (by_energy, result)]
    assert maps[0] != maps[1]
    model = load_model(tmp_path / "scored", "cpu", "float32")
    assert torch.isfinite(model(torch.arange(3, 40)[None]).logits).all()


def test_matched_bits_follow_the_score(checkpoints, compress, tmp_path):
    """Experts with more of the highest scores get more bits."""
    source = checkpoints("mixtral", num_hidden_layers=2)
    result = compress(
        source, "camera_q", score="product", group_bits=[3, 1], ratios=[0.25, 0.75], bits=None
    )
    for index, layer in statistics_of(tmp_path / "statistics"):
        score_N = ProductScore().values(layer)
        top_N = score_N >= score_N.sort().values[-(len(score_N) // 4)]
        want = [1 + 2 * part.double().mean().item() for part in top_N.split(layer.widths)]
        (bits,) = result.layers[str(index)]["mean_bits"].values()
        assert bits == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(score="size"), "score=size is none of"),
        (dict(score="fisher", normalize="none"), "normalize=none is none of"),
        (dict(score="energy", alpha=2.0), "alpha=2.0 must lie between"),
        (dict(score="energy", normalize="routed"), "normalize=routed is no setting of"),
        (dict(score="product", alpha=0.5), "alpha=0.5 is no setting of score=product"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(options, told):
    with pytest.raises(CameraError, match=told):
        camera.CameraPlus(sparsity=0.3, **options).ranked_by()
