"""Quantised models as they are written and loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file

import camera
from baselines.quantization.gptq import Gptq
from baselines.quantization.rtn import Rtn
from camera.checkpoint.loading import load_model
from camera.moe.budget import Budget, Count
from camera.moe.capture import run_ffn
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.pool import LayerPool
from camera.quantization.camera_q import CameraQ
from camera.quantization.camera_q_dagger import CameraQDagger
from tests.helpers.models import FAMILIES
from tests.helpers.oracles import capture, ffn_of

IDS = torch.arange(3, 43).repeat(2, 1)
TINY = dict(num_hidden_layers=2)
METHODS = {
    "camera_q": CameraQ(bits=2.9, group_size=16),
    "optimal": CameraQ(bits=2.9, group_size=16, group_bits=[4, 3, 2, 1, 0]),
    "ratios": CameraQ(bits=3.5, ratios=[0.25, 0.5, 0.25]),
    "global": CameraQ(bits=2.9, group_size=16, low_share=0.4, rank_scope="global", clip="gptq"),
    "expert": CameraQ(bits=2.9, group_size=16, rank_scope="expert", true_sequential=True),
    "dagger": CameraQDagger(bits=3.9, group_size=16),
    "shuffle": CameraQDagger(bits=4.2, group_size=16, split="shuffle"),
    "gptq": Gptq(bits=3.25),
    "act_order": Gptq(bits=4.5, act_order=True),
    "sym": Gptq(bits=3.0, sym=True),
    "rtn": Rtn(bits=3.0),
}
PAIRS = list(zip(FAMILIES, METHODS, strict=True))


def compress(method, model, out, calibration, data):
    return camera.compress(
        model, method, out, calibration=calibration, data=str(data), device="cpu", progress=False
    )


def in_memory(method, family, folder, tokens_NL):
    """The plain path: the whole model in memory, each layer from what stands before it."""
    model = load_model(folder, "cpu")
    layers = model.model.layers
    has_experts = any(hasattr(ffn_of(layer), "experts") for layer in layers)
    todo = [
        i for i, layer in enumerate(layers) if not has_experts or hasattr(ffn_of(layer), "experts")
    ]
    views = {i: FeedForward(layers[i], family_of(family), f"model.layers.{i}") for i in todo}
    pools = {
        i: LayerPool(list(v.widths), [g.routed for g in v.groups for _ in g.widths])
        for i, v in views.items()
    }
    hidden = model.config.hidden_size
    weights = 3 * hidden * sum(sum(pool.widths) for pool in pools.values())
    budget = Budget(Count(weights, weights, 0, weights), pools, family, hidden)
    method.check(budget)

    def look(step, i):
        observer, (x_TH, _) = step.observer.build(i, views[i]), capture(model, i, tokens_NL)
        with torch.no_grad():
            run_ffn(views[i], x_TH[None], observer)
        return observer.result()

    *earlier, last = method.passes(budget, "compressed")
    seen = {step.kind: {i: look(step, i) for i in todo} for step in earlier}
    plan = method.plan(seen, budget)
    for i, layer in enumerate(layers):
        view = views.get(i) or FeedForward(layer, family_of(family), f"model.layers.{i}")
        with torch.no_grad():
            method.prepare_layer(i, view)
        if i not in views:
            continue
        found = None if last.observer is None else look(last, i)
        with torch.no_grad():
            if i not in plan.layers:
                plan = plan.with_layer(i, method.plan_layer(i, view, found, budget, plan))
            method.apply(i, view, plan.layers[i], found)
    return model


@pytest.mark.parametrize(("family", "name"), PAIRS, ids=[f"{f}-{m}" for f, m in PAIRS])
def test_checkpoint_computes_what_the_model_in_memory_does(
    family, name, checkpoints, data_folder, calibration, tmp_path
):
    method, source = METHODS[name], checkpoints(family, **TINY)
    result = compress(method, source, tmp_path / "q", calibration, data_folder)
    tokens = camera.calibration.tokens.calibration_tokens(
        camera.checkpoint.loading.load_tokenizer(source),
        calibration,
        data=str(data_folder),
        seed=1234,
    )
    loaded = load_model(tmp_path / "q", "cpu")
    memory = in_memory(method, family, source, tokens.ids_NL)
    with torch.no_grad():
        got, want = loaded(IDS).logits, memory(IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    generated = loaded.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 7)
    report = json.loads((tmp_path / "q" / "camera.json").read_text())
    target = method.bits
    layers = [layer["bits"]["stored"] for layer in report["layers"].values()]
    if name == "global":
        layers = [sum(layers) / len(layers)]
    assert all(0.9 * target < stored <= target * (1 + 1e-9) for stored in layers)
    for layer in report["layers"].values():
        assert layer["bits"]["raw"] < layer["bits"]["stored"]
    if 0 not in (getattr(method, "group_bits", None) or ()):
        on_disk = result.bits["stored"]
        assert on_disk == pytest.approx(sum(layers) / len(layers), rel=0.01)


@pytest.mark.parametrize("family", ["qwen3_moe", "phimoe", "deepseek_v3", "granitemoe"])
def test_attention_and_router_are_rounded(family, checkpoints, tmp_path):
    source, method = checkpoints(family, **TINY), Rtn(bits=3.25, attn_bits=8, router_bits=4)
    camera.compress(source, method, tmp_path / "q", device="cpu", progress=False)
    spec = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    forms = [module["form"] for module in spec["modules"].values()]
    assert sum(form in ("packed_linear", "packed_router") for form in forms) >= 5
    loaded, memory = load_model(tmp_path / "q", "cpu"), in_memory(method, family, source, None)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, memory(IDS).logits, rtol=1e-4, atol=1e-4)
    attention, native = (
        loaded.model.layers[1].self_attn,
        load_model(source, "cpu").model.layers[1].self_attn,
    )
    projection = next(n for n, m in native.named_modules() if isinstance(m, torch.nn.Linear))
    got = attention.get_submodule(projection).dense()
    want = native.get_submodule(projection).weight
    assert 0 < (got - want).abs().max() < 0.01 * want.abs().max()


def test_camera_q_on_a_pruned_checkpoint(checkpoints, data_folder, calibration, tmp_path):
    method = camera.CameraP(sparsity=0.3)
    compress(method, checkpoints("qwen2_moe", **TINY), tmp_path / "p", calibration, data_folder)
    quantised = CameraQ(bits=3.3, group_size=16)
    compress(quantised, tmp_path / "p", tmp_path / "q", calibration, data_folder)
    modules = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["modules"]
        for name in "pq"
    ]
    for path, spec in modules[1].items():
        before = modules[0][path]
        assert spec["widths"] == before.get("widths", [before.get("width")])
    tensors = load_file(tmp_path / "q" / "model-00001-of-00003.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in tensors.values())
    assert load_model(tmp_path / "q", "cpu")(IDS).logits.isfinite().all()
