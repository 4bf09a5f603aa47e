"""After a cut, what stays is refitted to what the layer put out; in every family, saved and loaded.

Shapes: T tokens, H hidden, N micro-experts of a layer's pool.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.loading import load_model, load_tokenizer
from camera.compensation import least_squares
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.runtime.errors import CameraError
from camera.streaming.settings import MemoryChoices
from camera.streaming.streamer import LayerStreamer
from tests.helpers.models import FAMILIES
from tests.helpers.oracles import basis, capture, dense_phi, ffn_of

SPARSITY = 0.5


@pytest.fixture
def calibration():
    return camera.Calibration(source="wikitext2", samples=24, length=64)


@pytest.fixture
def compress(data_folder, calibration, tmp_path):
    def run(source, name="out", method="camera_p", **options):
        settings = dict(
            sparsity=SPARSITY,
            data=str(data_folder),
            calibration=calibration,
            device="cpu",
            progress=False,
        )
        return camera.compress(source, method, tmp_path / name, **{**settings, **options})

    return run


@pytest.fixture
def tokens(calibration, data_folder):
    def of(source):
        tokenizer = load_tokenizer(source, False)
        return calibration_tokens(
            tokenizer, calibration, data=str(data_folder), seed=1234, max_length=128
        ).ids_NL

    return of


def layers_of(folder):
    return load_model(folder, "cpu", "float32").model.layers


def outputs(model, module, ids):
    """What a module of the model puts out, [T, H]."""
    seen = []
    hook = module.register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0].flatten(0, 1)


def squared_weights(model, index, ids, token_weights):
    """[T, 1]: what the errors of each token count."""
    norm2_T1 = outputs(model, model.model.layers[index], ids).square().sum(1, keepdim=True)
    return 1 / norm2_T1 if token_weights == "relative" else torch.ones_like(norm2_T1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_s_output_comes_closer_in_every_family(
    family, checkpoints, compress, tokens, tmp_path
):
    source = checkpoints(family)
    compress(source, "plain")
    result = compress(source, "fitted", compensate="layer")
    original, ids = AutoModelForCausalLM.from_pretrained(source).eval(), tokens(source)
    index = min(map(int, result.layers))  # the first in the pool: its input is the same in all
    counts_T1 = squared_weights(original, index, ids, "relative")
    errors = []
    for name in ("plain", "fitted"):
        model = load_model(tmp_path / name, "cpu", "float32")
        got_TH, want_TH = (
            outputs(m, ffn_of(m.model.layers[index]), ids) for m in (model, original)
        )
        errors.append((counts_T1 * (got_TH - want_TH).square()).sum().item())
    assert errors[1] < errors[0]
    report = result.layers[str(index)]
    assert errors[1] / errors[0] == pytest.approx(report["missing"], rel=1e-3)
    assert json.loads((tmp_path / "fitted" / "camera.json").read_text())["layers"]


@pytest.mark.parametrize("token_weights", ["relative", "uniform"])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "granitemoe", "llama"])
def test_with_one_ridge_the_weights_are_those_of_the_joint_solution(
    family, token_weights, checkpoints, compress, tokens, tmp_path, monkeypatch
):
    monkeypatch.setattr(least_squares, "ENOUGH", 1e-8)
    source, ridge = checkpoints(family), 1.0
    options = dict(token_weights=token_weights, ridges=[ridge], sweeps=400)
    result = compress(source, compensate="layer", **options)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    index = min(map(int, result.layers))
    assert result.layers[str(index)]["ridges"] == [ridge]
    ids = tokens(source)
    x_TH, routing = capture(model, index, ids)
    ffn = ffn_of(model.model.layers[index])
    scale = getattr(ffn, "routed_scaling_factor", None) if routing else None
    phi_TN, basis_NH = dense_phi(ffn, x_TH, routing), basis(ffn)
    assert scale is None or family == "deepseek_v3"
    keep_N = kept_mask(model, index, tmp_path / "out", source)
    stays_TN = phi_TN[:, keep_N]
    gone_TH = phi_TN[:, ~keep_N] @ basis_NH[~keep_N]
    counts_T1 = squared_weights(model, index, ids, token_weights)
    counted_TN = counts_T1 * stays_TN
    gram_NN = counted_TN.T @ stays_TN
    norm2_N = basis_NH[keep_N].square().sum(1)
    stiffness = ridge * (gram_NN.diagonal() * norm2_N).mean()
    change_NH = torch.linalg.solve(
        gram_NN + stiffness * torch.diag(1 / norm2_N), counted_TN.T @ gone_TH
    )
    got_NH = output_rows(layers_of(tmp_path / "out")[index], model.config.model_type)

    def objective(change_NH):
        error_TH = (counts_T1 * (gone_TH - stays_TN @ change_NH).square()).sum()
        return (error_TH + stiffness * (change_NH.square().sum(1) / norm2_N).sum()).item()

    least, untouched = objective(change_NH), objective(torch.zeros_like(change_NH))
    reached = objective(got_NH - basis_NH[keep_N])
    assert (reached - least) / (untouched - least) == pytest.approx(0, abs=1e-5)


def kept_mask(model, index, out, source):
    """bool [N] in pool order: gate rows of the compressed layer among those of the original."""
    compressed = layers_of(out)[index]
    family = family_of(model.config.model_type)
    before = FeedForward(model.model.layers[index], family, "before")
    after = FeedForward(compressed, family, "after")
    parts = []
    for whole, cut in zip(before.groups, after.groups, strict=True):
        for expert in range(len(whole.widths)):
            gate_WH, kept_WH = whole.gate_up(expert)[0], cut.gate_up(expert)[0]
            parts.append((gate_WH[:, None] == kept_WH[None]).all(-1).any(1))
    return torch.cat(parts)


def output_rows(layer, model_type):
    ffn = FeedForward(layer, family_of(model_type), "after")
    rows = [g.down(e).T for g in ffn.groups for e in range(len(g.widths))]
    return torch.cat(rows).double().detach()


@pytest.mark.parametrize("target", ["layer", "between", "dense"])
@pytest.mark.parametrize("method", ["random", "magnitude", "heapr", "camera_plus"])
def test_every_score_and_scope_can_be_compensated(method, target, checkpoints, compress, tmp_path):
    source = checkpoints("qwen2_moe")
    scope = {"rank_scope": "global"} if method == "random" else {}
    result = compress(source, "out", method, compensate="layer", target=target, **scope)
    plain = compress(source, "plain", method, compensate="none", **scope)
    assert result.widths == plain.widths
    assert result.bytes == plain.bytes
    assert all(report["missing"] < 1 for report in result.layers.values())
    model = load_model(tmp_path / "out", "cpu", "float32")
    assert torch.isfinite(model(torch.arange(3, 40)[None]).logits).all()


def test_what_flows_on_is_what_the_refitted_layer_puts_out(
    checkpoints, compress, tokens, tmp_path, monkeypatch
):
    """The last hidden states of calibration are those of the model that was written."""
    last, add = {}, LayerStreamer.add

    def added(self, index, outputs):
        found = add(self, index, outputs)
        last[index] = [batch.hidden_BLH for batch in found]
        return found

    monkeypatch.setattr(LayerStreamer, "add", added)
    source = checkpoints("deepseek")
    compress(source, compensate="layer")
    model, states = load_model(tmp_path / "out", "cpu", "float32"), []
    model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        model(tokens(source))
    torch.testing.assert_close(torch.cat(last[max(last)]), states[0], rtol=1e-4, atol=1e-4)


def test_aiming_at_the_dense_model_ends_closer_to_it(checkpoints, compress, tokens, tmp_path):
    source = checkpoints("qwen3_moe", num_hidden_layers=4)
    ids, distances = tokens(source), []
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(source).eval().model(ids).last_hidden_state
        for target in ("layer", "between", "dense"):
            compress(source, target, compensate="layer", target=target)
            model = load_model(tmp_path / target, "cpu", "float32")
            distances.append((model.model(ids).last_hidden_state - want).norm().item())
    assert distances[2] < distances[1] < distances[0]


@pytest.mark.parametrize("phi", ["recompute", "routed"])
def test_what_can_t_keep_phi_is_refused(phi, checkpoints, compress):
    with pytest.raises(CameraError, match=r"memory.phi=keep"):
        compress(checkpoints("qwen2_moe"), compensate="layer", memory=MemoryChoices(phi=phi))
