"""D2-MoE: the released numbers and whole models."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import camera
from baselines.factorization.d2_moe import D2Moe
from baselines.factorization.low_rank import low_rank, output_energy, whitener
from baselines.factorization.merged_base import merged_base
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.formats.delta import DeltaExperts
from camera.method import METHODS
from camera.moe.budget import Budget, Count
from camera.moe.pool import LayerPool
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.golden import golden_cases
from tests.helpers.models import MOE_FAMILIES
from tests.helpers.oracles import capture, ffn_of
from tests.helpers.runs.documents import reference_settings

REFERENCE = D2Moe(0.5, **reference_settings("d2_moe"))
MERGES = {"fisher_freq": (1, 1), "fisher": (1, 0), "freq": (0, 1), "mean": (0, 0)}


@pytest.mark.golden("d2_moe", r"base_(\w+)_(gate_up|down)")
def test_bases_equal_the_released_implementation(expected):
    (merge, part), found = expected.parts, expected.tensors
    by_fisher, by_counts = MERGES[merge]
    base = merged_base(
        found[f"{part}_proj"],
        found[f"fisher_{part}"] if by_fisher else None,
        found["freq"] if by_counts else None,
    )
    expected.compare(base)


@pytest.mark.golden("d2_moe", r"scale_(in|mid)")
def test_whiteners_equal_the_released_implementation(expected):
    grams = expected.tensors[f"gram_{expected.parts[0]}"].double()
    expected.compare(torch.stack([whitener(gram, REFERENCE.damping) for gram in grams]))


def factored(found, part, rank, kind):
    """Low-rank products of all experts [E, M, N], and the output errors of each of the part's
    projections."""
    chunks, end = (2, "in") if part == "gate_up" else (1, "mid")
    base = found[f"base_fisher_freq_{part}"].double()
    products, errors = [], []
    for weight, gram in zip(found[f"{part}_proj"].double(), found[f"gram_{end}"], strict=True):
        gram = gram.double()
        scales = {
            "white": whitener(gram, REFERENCE.damping),
            "plain": torch.eye(len(gram)).double(),
        }
        deltas = (weight - base).chunk(chunks)
        pairs = [low_rank(delta, scales[kind], rank) for delta in deltas]
        products.append(torch.cat([a @ b for a, b in pairs]))
        rest = [delta - a @ b for delta, (a, b) in zip(deltas, pairs, strict=True)]
        errors.append(torch.stack([output_energy(delta, gram) for delta in rest]))
    return torch.stack(products), torch.stack(errors)


@pytest.mark.golden("d2_moe", r"ab_(\w+)_fp32_r([\d.]+)_(gate_up|down)")
def test_low_rank_products_equal_the_released_implementation(expected):
    kind, ratio, part = expected.parts
    product, _ = factored(expected.tensors, part, expected.hyper["rank"][ratio], kind)
    expected.compare(product)


@pytest.mark.golden("d2_moe", r"(\w+)_err_r([\d.]+)")
def test_output_errors_equal_the_released_implementation(expected):
    (kind, ratio), found = expected.parts, expected.tensors
    rank = expected.hyper["rank"][ratio]
    errors = [factored(found, part, rank, kind)[1] for part in ("gate_up", "down")]
    expected.compare(torch.cat(errors, 1))


# --- ranks -------------------------------------------------------------------------------------


def budget_of(model):
    """The budget of a model given by its dimensions, as the released accounting counts it."""
    hidden, width, experts = model["H"], model["I"], model["E"]
    moe, dense = model["moe_layers"], model["layers"] - model["moe_layers"]
    routed, shared = 3 * hidden * width * experts, 3 * hidden * model["shared"]
    layer = model["attn"] + 2 * hidden
    total = 2 * model["vocab"] * hidden + hidden + model["layers"] * layer
    total += dense * 3 * hidden * model["dense_ff"]
    total += moe * (routed + shared + hidden * experts + hidden * model["shared_gate"])
    pool = LayerPool([model["shared"]] * bool(shared) + [width] * experts, [])
    pool.routed = [False] * bool(shared) + [True] * experts
    count = Count(total, moe * (routed + shared), moe * routed, 2 * total)
    return Budget(count, {dense + i: pool for i in range(moe)}, "released")


def released_ratios(golden):
    found = [case for case in golden_cases(golden, "d2_moe") if "rows" in case["expected"]]
    if not found:
        pytest.skip(f"{golden} has no released ratios of D2-MoE: pass --golden DIR")
    return json.loads((golden / found[0]["file"]).read_text())


def test_ranks_equal_the_released_bisection_and_never_remove_too_much(golden):
    released = released_ratios(golden)
    for row in released["rows"]:
        model = released["models"][row["model"]]
        budget, settings = budget_of(model), {"sparsity_of": "model", "pp_ratio": row["pp_ratio"]}
        assert budget.dense.model == pytest.approx(row["original_params_B"] * 1e9, rel=1e-9)
        rank = D2Moe(sparsity=row["target"], **settings).rank(budget)
        assert row["rank"] <= rank <= row["rank"] + 1
        # the released count, at its own rank; it doesn't round the channels of the base
        hidden, width, experts = model["H"], model["I"], model["E"]
        step = 3 * experts * (hidden + width) * model["moe_layers"]
        kept = row["compressed_params_B"] * 1e9 + (rank - row["rank"]) * step
        rounded = 3 * hidden * model["moe_layers"]
        asked = (1 - row["target"]) * budget.dense.model
        assert asked - rounded <= kept < asked + step + rounded


@pytest.mark.parametrize(
    ("pp_ratio", "ratios"),
    [
        (0.1, [0.6805, 0.4734, 0.2662, 0.1626, 0.0593]),
        (0.6, [0.743, 0.5358, 0.3286, 0.2254, 0.1218]),
    ],
)
def test_ranks_equal_the_published_table(golden, pp_ratio, ratios):
    """Delta ratios that the paper prints for Mixtral (Table 12), as ranks of 4096."""
    models = released_ratios(golden)["models"]
    if "mixtral" not in models:
        pytest.skip("the released ratios have no Mixtral, which the table is of")
    model = models["mixtral"]
    budget, per_rank = budget_of(model), model["H"] * model["I"] / (model["H"] + model["I"])
    for sparsity, ratio in zip((0.2, 0.4, 0.6, 0.7, 0.8), ratios, strict=True):
        rank = D2Moe(sparsity, "model", pp_ratio=pp_ratio).rank(budget)
        assert abs(rank - per_rank * ratio) <= 1.5


@pytest.mark.parametrize("sparsity_of", ["moe", "model", "routed"])
def test_the_named_largest_sparsity_is_reached_and_no_more(golden, sparsity_of):
    for model in released_ratios(golden)["models"].values():
        budget = budget_of(model)
        with pytest.raises(CameraError, match="largest possible") as refusal:
            D2Moe(0.9999, sparsity_of).check(budget)
        largest = float(str(refusal.value).rpartition(" ")[2].rstrip("."))
        assert D2Moe(largest, sparsity_of).rank(budget) <= 2
        with pytest.raises(CameraError, match="largest possible"):
            D2Moe(largest + 1e-3, sparsity_of).check(budget)


# --- whole models ------------------------------------------------------------------------------


@pytest.fixture
def run(data_folder, calibration, tmp_path):
    """run(family's folder, **settings): the result of compressing it into tmp_path/out."""

    def go(source, **settings):
        settings = {"sparsity": 0.2, **settings}
        where = dict(data=str(data_folder), device="cpu", progress=False, calibration=calibration)
        return camera.compress(source, "d2_moe", tmp_path / "out", **where, **settings)

    return go


@pytest.fixture
def ids(checkpoints, data_folder, calibration):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints("mixtral"))
    return calibration_tokens(
        tokenizer, calibration, data=str(data_folder), seed=1234, max_length=128
    ).ids_NL


def plain_d2_moe(model, ids, rank, merge="fisher_freq", pp_ratio=0.0, damping=1e-6):
    """The method written out: autograd, Grams of captured inputs, SVD; weights put back whole."""
    layers = {i: ffn_of(layer) for i, layer in enumerate(model.model.layers)}
    layers = {i: ffn for i, ffn in layers.items() if hasattr(ffn, "experts")}
    fisher = {i: [0, 0] for i in layers}
    for sample in ids:
        model.zero_grad()
        model(sample[None], labels=sample[None]).loss.backward()
        for i, ffn in layers.items():
            for p, weight in enumerate((ffn.experts.gate_up_proj, ffn.experts.down_proj)):
                fisher[i][p] = fisher[i][p] + weight.grad.double().square()
    seen = {i: capture(model, i, ids) for i in layers}  # all of them before anything changes
    for i, ffn in layers.items():
        (x_TH, (index_TK, _)), experts = seen[i], ffn.experts
        x_TH = x_TH.double()
        gates, ups = experts.gate_up_proj.detach().double().chunk(2, 1)
        downs, count = experts.down_proj.detach().double(), len(gates)
        inputs = [x_TH[(index_TK == e).any(1)] for e in range(count)]
        hidden = [F.silu(x @ gates[e].T) * (x @ ups[e].T) for e, x in enumerate(inputs)]
        counts = torch.tensor([len(x) for x in inputs]).double()
        bases = []
        fishers = *fisher[i][0].chunk(2, 1), fisher[i][1]
        for weights, squares in zip((gates, ups, downs), fishers, strict=True):
            by_fisher, by_counts = MERGES[merge]
            share = squares + 1e-12 * squares.mean() if by_fisher else torch.ones_like(squares)
            share = share * (counts if by_counts else torch.ones(count))[:, None, None]
            bases.append((share * weights).sum(0) / share.sum(0))
        score = bases[2].norm(dim=0) * torch.cat(hidden).norm(dim=0)
        gone = score.argsort()[: int(len(score) * pp_ratio)]
        bases[0][gone], bases[1][gone], bases[2][:, gone] = 0, 0, 0
        for p, (weights, base) in enumerate(zip((gates, ups, downs), bases, strict=True)):
            for e in range(count):
                x = (inputs if p < 2 else hidden)[e]
                gram = x.T @ x
                eye = torch.eye(len(gram)).double()
                if len(x):
                    scale = torch.linalg.cholesky(gram + damping * gram.diagonal().mean() * eye)
                else:
                    scale = eye
                u, s, vh = torch.linalg.svd((weights[e] - base) @ scale, full_matrices=False)
                low = (u[:, :rank] * s[:rank] @ vh[:rank]) @ scale.inverse()
                weights[e] = base + low
        experts.gate_up_proj.data = torch.cat((gates, ups), 1).float()
        experts.down_proj.data = downs.float()
    return model.eval()


def equals_the_plain_path(source, out, result, ids, **settings):
    reloaded = AutoModelForCausalLM.from_pretrained(out).eval()
    forms = [m for m in reloaded.modules() if isinstance(m, DeltaExperts)]
    reports = json.loads((out / "camera.json").read_text())["layers"]
    assert len(forms) == len(reports) > 0
    native = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
    expected = plain_d2_moe(native, ids, forms[0].rank, **settings)
    with torch.no_grad():
        got, want = (model(ids[:2]).logits for model in (reloaded, expected))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_reloaded_checkpoint_equals_the_plain_path(family, run, checkpoints, ids, tmp_path):
    source = checkpoints(family)
    result = run(source)
    equals_the_plain_path(source, tmp_path / "out", result, ids)
    assert result.sparsity["moe"] <= 0.2 + 1e-9


@pytest.mark.parametrize("merge", [merge for merge in MERGES if merge != "fisher_freq"])
def test_other_merges_equal_the_plain_path(merge, run, checkpoints, ids, tmp_path):
    source = checkpoints("qwen2_moe")
    result = run(source, merge=merge)
    equals_the_plain_path(source, tmp_path / "out", result, ids, merge=merge)


def test_a_base_without_some_channels_equals_the_plain_path(run, checkpoints, ids, tmp_path):
    source = checkpoints("deepseek")
    result = run(source, merge="freq", pp_ratio=0.3)
    equals_the_plain_path(source, tmp_path / "out", result, ids, merge="freq", pp_ratio=0.3)
    reports = json.loads((tmp_path / "out" / "camera.json").read_text())["layers"].values()
    assert {report["base_width"] for report in reports} == {24 - 7}


@pytest.mark.parametrize("sparsity_of", ["moe", "model", "routed"])
def test_the_realised_sparsity_is_within_one_rank_and_never_over(
    sparsity_of, run, checkpoints, tmp_path
):
    source = checkpoints("deepseek")
    result = run(source, merge="mean", sparsity=0.3, sparsity_of=sparsity_of)
    layers, experts, sizes = 2, 8, 32 + 24
    whole = MetaModel(source).budget.dense
    one_rank = layers * experts * 3 * sizes / getattr(whole, sparsity_of)
    assert 0.3 - one_rank < result.sparsity[sparsity_of] <= 0.3


def test_the_report_says_how_near_each_projection_comes(run, checkpoints, tmp_path):
    run(checkpoints("qwen3_moe"), merge="mean", sparsity=0.3)
    reports = json.loads((tmp_path / "out" / "camera.json").read_text())["layers"]
    for report in reports.values():
        assert report["rank"] > 0 and report["experts_without_tokens"] == 0
        assert set(report["output_error"]) == {"gate", "up", "down"}
        assert all(0 < error < 1 for error in report["output_error"].values())


def test_dense_models_and_impossible_settings_are_refused(run, checkpoints):
    with pytest.raises(CameraError, match="has none"):
        run(checkpoints("llama"))
    for settings, named in (
        ({"merge": "median"}, "merge=median"),
        ({"pp_ratio": 1.0}, "pp_ratio=1.0"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"sparsity": 0.0}, "sparsity=0.0"),
        ({"sparsity_of": "experts"}, "sparsity_of=experts"),
    ):
        with pytest.raises(CameraError, match=named):
            run(checkpoints("mixtral"), **settings)


def test_a_model_of_single_experts_cannot_get_smaller(checkpoints):
    budget = MetaModel(checkpoints("qwen3_moe", num_experts=1, num_experts_per_tok=1)).budget
    with pytest.raises(CameraError, match="can't make this qwen3_moe model smaller"):
        METHODS["d2_moe"](sparsity=0.25).check(budget)
