"""Packed MLPs, linear layers and routers, and whole models of them."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from camera.checkpoint.config import CameraConfig, CameraQuantizer
from camera.checkpoint.formats.packed.experts import PackedExperts
from camera.checkpoint.formats.packed.linear import PackedLinear, PackedRouter
from camera.checkpoint.formats.packed.mlp import PackedMlp
from camera.checkpoint.formats.packed.segments import BitSegments
from camera.checkpoint.formats.packed.spec import (
    experts_spec,
    linear_spec,
    mlp_spec,
    router_spec,
    spec_bytes,
)
from camera.checkpoint.loading import load_model
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.models import build_model
from tests.helpers.quantization.packing import solver, stored_bytes

IDS = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(5))

# --- MLPs, linear layers, routers ---


def quantize_mlp(mlp, bits_of, group_size=8, biases=None):
    """A packed MLP by round-to-nearest, and a native one that holds what it means."""
    gptq, bits = solver(group_size), torch.tensor(bits_of)
    width, hidden = mlp.up_proj.weight.shape
    cut = BitSegments.of("rows", [bits_of]), BitSegments.of("columns", [bits_of])
    packed = PackedMlp(mlp_spec(hidden, width, *cut, group_size, False), mlp.act_fn, biases)
    gate, up = (
        gptq.solve(m.weight[None].detach(), row_bits=bits) for m in (mlp.gate_proj, mlp.up_proj)
    )
    down = gptq.solve(mlp.down_proj.weight[None].detach(), column_bits=bits)
    packed.store([gate.matrix(0), up.matrix(0)], down.matrix(0))
    means = copy.deepcopy(mlp)
    for linear, q in ((means.gate_proj, gate), (means.up_proj, up), (means.down_proj, down)):
        linear.weight.data = q.weight[0]
    return packed, means


def quantize_linear(linear, bits=4, group_size=8):
    rows, columns = linear.weight.shape
    spec = linear_spec(rows, columns, BitSegments.of("rows", [[bits] * rows]), group_size, False)
    q = solver(group_size).solve(linear.weight[None].detach(), bits=bits)
    packed = PackedLinear(spec, linear.bias)
    packed.store(q.matrix(0))
    return packed, q.weight[0]


def quantize_router(router, bits=8, group_size=16):
    rows, columns = router.weight.shape
    spec = router_spec(rows, columns, BitSegments.of("rows", [[bits] * rows]), group_size, False)
    q = solver(group_size).solve(router.weight[None].detach(), bits=bits)
    packed = PackedRouter.of(router, spec)
    packed.store(q.matrix(0))
    return packed, q.weight[0]


def test_an_mlp_and_its_biases_are_what_was_solved():
    torch.manual_seed(0)
    mlp = build_model("llama", mlp_bias=True).model.layers[0].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        torch.nn.init.normal_(getattr(mlp, name).bias)
    biases = {name: child.bias for name, child in mlp.named_children() if "proj" in name}
    packed, means = quantize_mlp(mlp, [3] * 10 + [2] * 40 + [1] * 14, biases=biases)
    x_NH = torch.randn(5, 32)
    assert torch.equal(packed(x_NH), means(x_NH))
    plain = packed.dequantize(copy.deepcopy(mlp))
    assert type(plain) is type(mlp) and torch.equal(plain(x_NH), means(x_NH))
    biases = sum(4 * tensor.numel() for tensor in biases.values())
    assert spec_bytes(packed.spec()) == stored_bytes(packed) - biases
    skeleton = PackedMlp.from_spec(mlp.to("meta"), json.loads(json.dumps(packed.spec())))
    skeleton.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(skeleton(x_NH), means(x_NH))


def test_a_linear_layer_comes_back_plain():
    linear = torch.nn.Linear(20, 7)
    packed, weight = quantize_linear(linear)
    plain = packed.dequantize()
    assert torch.equal(plain.weight, weight) and torch.equal(plain.bias, linear.bias)
    x = torch.randn(2, 3, 20)
    assert torch.equal(packed(x), plain(x))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "phimoe", "mixtral"])
def test_a_router_keeps_its_own_way_of_choosing(family):
    ffn = build_model(family).model.layers[1].mlp
    router = getattr(ffn, "router", None) or ffn.gate
    native, x_TH = copy.deepcopy(router), torch.randn(11, 32)
    packed, weight = quantize_router(router)
    native.weight.data = weight
    assert isinstance(packed, type(native)) and "weight" not in packed.state_dict()
    for got, want in zip(packed(x_TH), native(x_TH), strict=True):
        assert torch.equal(got, want)
    skeleton = PackedRouter.from_spec(copy.deepcopy(native).to("meta"), packed.spec())
    skeleton.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(skeleton(x_TH)[0], native(x_TH)[0])
    plain = packed.dequantize()
    assert type(plain) is type(native) and plain.state_dict().keys() == native.state_dict().keys()
    assert torch.equal(plain(x_TH)[0], native(x_TH)[0])


# --- whole models ---


def pack_model(model, layers=(1, 2)):
    """Quantise experts, shared experts, routers and attention of some layers."""
    forms, base = {}, model.model
    for i in layers:
        layer, root = base.layers[i], f"model.layers.{i}"
        ffn, moe = layer.mlp, hasattr(layer.mlp, "experts")
        if moe:
            native, gptq = ffn.experts, solver()
            experts, _, width = native.down_proj.shape
            bits_of = [[3] * e + [2] * (width - 2 * e) + [1] * e for e in range(experts)]
            cut = BitSegments.of("rows", bits_of), BitSegments.of("columns", bits_of)
            spec = experts_spec(native.hidden_dim, [width] * experts, *cut, 8, False)
            packed = PackedExperts(spec, native.act_fn, dtype=model.dtype)
            bits = torch.tensor(bits_of)
            both = gptq.solve(native.gate_up_proj.detach(), row_bits=bits.repeat(1, 2))
            down = gptq.solve(native.down_proj.detach(), column_bits=bits)
            for e in range(experts):
                packed.store(e, [both.matrix(e)], down.matrix(e))
            ffn.experts = packed
            forms[f"{root}.mlp.experts"] = packed.spec()
            name = "router" if hasattr(ffn, "router") else "gate"
            forms[f"{root}.mlp.{name}"] = quantize_router(getattr(ffn, name))[0].spec()
        shared = next((n for n in ("shared_expert", "shared_experts") if hasattr(ffn, n)), None)
        if shared or not moe:
            mlp = getattr(ffn, shared) if shared else ffn
            width = mlp.up_proj.out_features
            packed = quantize_mlp(mlp, [3] * 8 + [2] * (width - 8))[0].to(model.dtype)
            setattr(ffn, shared, packed) if shared else setattr(layer, "mlp", packed)
            forms[f"{root}.mlp.{shared}" if shared else f"{root}.mlp"] = packed.spec()
        for name in ("q_proj", "o_proj"):  # Qwen2's q_proj has a bias
            if getattr(layer.self_attn, name, None) is not None:
                linear = quantize_linear(getattr(layer.self_attn, name))[0].to(model.dtype)
                setattr(layer.self_attn, name, linear)
                forms[f"{root}.self_attn.{name}"] = linear.spec()
    model.config.quantization_config = CameraConfig(modules=forms)
    model.hf_quantizer = CameraQuantizer(model.config.quantization_config, pre_quantized=True)
    rules = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = model.hf_quantizer.update_weight_conversions(rules, model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "phimoe", "deepseek_v3", "llama"])
def test_a_packed_model_loads_generates_and_saves_again(family, dtype, tmp_path):
    model = pack_model(build_model(family, dtype=dtype))
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "one", dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():  # equal tensors, but not in equally aligned memory
        got, want = loaded(IDS).logits, model(IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
    out = loaded.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 20)
    loaded.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=dtype).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_a_layer_is_read_alone(tmp_path):
    model = pack_model(build_model("qwen2_moe"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    skeleton = MetaModel(tmp_path)
    layer, want = skeleton.load_layer(1), model.model.layers[1]
    x_TH = torch.randn(9, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer.mlp(x_TH[None]), want.mlp(x_TH[None]))
        torch.testing.assert_close(layer.self_attn.o_proj(x_TH), want.self_attn.o_proj(x_TH))
    skeleton.free(layer)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


@pytest.mark.parametrize("family", ["qwen2_moe", "llama"])
def test_methods_see_packed_experts_as_they_see_plain_ones(family):
    model = pack_model(build_model(family))
    layer, x_NH = model.model.layers[1], torch.randn(6, 32)
    ffn = FeedForward(layer, family_of(family), "model.layers.1")
    for group in ffn.groups:
        for expert, width in enumerate(group.widths):
            (gate, up), down = group.gate_up(expert), group.down(expert)
            assert gate.shape == up.shape == (width, 32) and down.shape == (32, width)
            h_NW = group.activations(expert, x_NH)
            torch.testing.assert_close(h_NW, F.silu(x_NH @ gate.T) * (x_NH @ up.T))
            torch.testing.assert_close(group.project(expert, h_NW), h_NW @ down.T)


def test_another_precision_reads_the_same_stored_bytes(tmp_path):
    model = pack_model(build_model("qwen2_moe"))
    model.save_pretrained(tmp_path)
    half = load_model(tmp_path, "cpu", "bfloat16")
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            assert torch.equal(half.state_dict()[name], tensor), name
    with torch.no_grad():
        logits = half(IDS).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize("family", ["qwen2_moe", "llama"])
def test_a_reader_that_does_not_know_the_format_stops(family, tmp_path):
    pack_model(build_model(family)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError, CameraError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)
