"""Packed experts: what the solver said is what is stored, loaded, multiplied and counted.

Shapes: T tokens, K experts per token, N tokens of one expert, H hidden, R rows, C columns.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from camera.blocks import FeedForward
from camera.checkpoint import CameraConfig, CameraQuantizer, load_model
from camera.errors import CameraError
from camera.experts.cut import Cut, Solved
from camera.experts.packed import PackedExperts
from camera.experts.packed_linear import PackedLinear, PackedRouter
from camera.experts.packed_mlp import PackedMlp
from camera.experts.packed_spec import (
    average_bits,
    experts_spec,
    linear_spec,
    mlp_spec,
    router_spec,
    spec_bytes,
    spec_code_bits,
    spec_weights,
)
from camera.families import family_of
from camera.gptq import GPTQ, Hessian
from camera.skeleton import Skeleton
from conftest import build_model

H = 20
BITS_OF = [[3, 2, 2, 2, 2, 1], [], [2], [4, 3, 3, 2, 2, 2, 1, 1, 1], [3] * 5, [1, 1]]
WIDTHS = [len(bits) for bits in BITS_OF]
IDS = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(5))


def solver(group_size=8, sym=False, **options) -> GPTQ:
    return GPTQ(group_size=group_size, sym=sym, scale_dtype=torch.float16, **options)


def factor_of(gptq: GPTQ, columns: int, order=None):
    """Of correlated inputs, their channels reordered."""
    mix_CC = torch.randn(columns, columns) / max(columns, 1) ** 0.5 + torch.eye(columns)
    hessian = Hessian(1, columns)
    x_NC = torch.randn(4 * columns + 4, columns) @ mix_CC * (0.2 + torch.rand(columns))
    hessian.add(0, x_NC if order is None else x_NC[:, order])
    return gptq.factor(hessian.H_ECC)


def shuffled(bits: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """These bits in descending order, and an order of the matrix that they belong to."""
    return torch.tensor(bits, dtype=torch.int64), torch.randperm(len(bits))


def restored(weight_RC: torch.Tensor, rows=None, columns=None) -> torch.Tensor:
    """A solved weight with its rows and columns put back where they came from."""
    back = torch.empty_like(weight_RC)
    rows = torch.arange(len(weight_RC)) if rows is None else rows
    columns = torch.arange(weight_RC.shape[1]) if columns is None else columns
    back[rows[:, None], columns] = weight_RC
    return back


class Plan:
    """A method's way to cut the experts: solves them, and remembers the weights it meant."""

    def __init__(self, name: str, group_size=8, sym=False, seed=0):
        torch.manual_seed(seed)
        self.name = name
        hidden_bits = [3] * 3 + [2] * 12 + [1] * 5
        order = {"static_groups": True} if name == "static" else {}
        if name in ("act_order", "static"):
            order["act_order"] = True
        if name == "mc":
            order["float_zero"] = True
        gptq = solver(group_size, sym, **order)
        self.want, solved = [], []
        for bits in BITS_OF:
            bits = [2] * len(bits) if name in ("act_order", "static") else bits
            bits = [len(bits) % 3 + 1] * len(bits) if name == "mc" else bits
            gate, up, down = (
                self._matrix(gptq, hidden_bits, bits, kind) for kind in ("gate", "up", "down")
            )
            self.want.append((torch.cat([gate[1], up[1]]), down[1]))
            solved.append(([gate[0], up[0]], down[0], bits))
        permuted = {"dagger": ("columns",), "act_order": ("columns",)}.get(name, ())
        gate_up = Cut.of("rows", [s[2] for s in solved], permuted)
        down = Cut.of("columns", [s[2] for s in solved], permuted)
        if name == "dagger":
            gate_up = Cut.of("columns", [hidden_bits] * len(BITS_OF), permuted)
        if name == "shuffle":
            gate_up = Cut.of("rows", BITS_OF, ("rows",))
            down = Cut.of("columns", BITS_OF, ("columns",))
        self.spec = experts_spec(H, WIDTHS, gate_up, down, group_size, sym)
        self.experts = PackedExperts(self.spec, torch.nn.SiLU())
        for expert, (both, below, _) in enumerate(solved):
            self.experts.put(expert, both, below)

    def _matrix(self, gptq, hidden_bits, bits, kind):
        """(what the solver left, the weight that it means)."""
        rows, columns = (H, len(bits)) if kind == "down" else (len(bits), H)
        W_RC = torch.randn(rows, columns) * 0.1
        by_columns = kind == "down" or self.name == "dagger"
        permuted = self.name == "dagger" or self.name == "shuffle"
        sorted_bits, order = shuffled(hidden_bits if by_columns and kind != "down" else bits)
        if not permuted:
            order = torch.arange(len(order))
        where = {"columns": order} if by_columns else {"rows": order}
        W_RC = W_RC[:, order] if by_columns else W_RC[order]
        given = {"column_bits" if by_columns else "row_bits": sorted_bits}
        if self.name == "act_order":  # a moving order leaves no segments
            given = {"bits": 2}
        factor = factor_of(gptq, columns, where.get("columns"))
        quantized = gptq.solve(W_RC[None], factor, **given)
        where = where if permuted else {}
        return Solved.of(quantized, 0, **where), restored(quantized.weight[0], **where)


PLANS = [
    ("camera_q", 8, False),
    ("camera_q", 8, True),
    ("camera_q", 7, False),  # divides no width
    ("camera_q", None, False),
    ("camera_q", 1, False),
    ("dagger", 8, False),
    ("shuffle", 8, False),
    ("act_order", 8, False),
    ("static", 8, True),
    ("mc", 8, False),
]


@pytest.fixture(scope="module", params=PLANS, ids=lambda p: f"{p[0]}-g{p[1]}-{'a'[p[2] :]}sym")
def plan(request) -> Plan:
    return Plan(*request.param)


def routing(tokens: int, top_k: int = 3):
    x_TH = torch.randn(tokens, H, generator=torch.Generator().manual_seed(1))
    scores = torch.rand(tokens, len(WIDTHS), generator=torch.Generator().manual_seed(2))
    weight_TK, index_TK = scores.topk(top_k)
    return x_TH, index_TK, weight_TK


def stored_bytes(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


# --- routed experts ---


def test_stored_weights_are_the_solved_ones_exactly(plan):
    for expert, (gate_up, down) in enumerate(plan.want):
        assert torch.equal(plan.experts.gate_up(expert), gate_up)
        assert torch.equal(plan.experts.down(expert), down)


def test_forward_equals_plain_experts_of_these_weights(plan):
    for tokens in (1, 40):
        x_TH, index_TK, weight_TK = routing(tokens)
        got = plan.experts(x_TH, index_TK, weight_TK)
        torch.testing.assert_close(plan.experts.dequantize()(x_TH, index_TK, weight_TK), got)
        want = torch.zeros_like(x_TH)
        for t, k in torch.cartesian_prod(torch.arange(tokens), torch.arange(3)).tolist():
            gate_up, down = plan.want[index_TK[t, k]]
            gate, up = (gate_up @ x_TH[t]).chunk(2)
            want[t] += weight_TK[t, k] * (down @ (F.silu(gate) * up))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert got.isfinite().all()


def test_bytes_of_the_spec_are_those_in_the_file(plan):
    spec = json.loads(json.dumps(plan.spec))
    file = save(plan.experts.state_dict())
    header = 8 + int.from_bytes(file[:8], "little")
    assert spec_bytes(spec) == stored_bytes(plan.experts) == len(file) - header
    assert spec_weights(spec) == 3 * H * sum(WIDTHS)
    assert spec_code_bits(spec) <= 8 * spec_bytes(spec)


def test_loads_into_a_skeleton_made_from_the_spec_alone(plan):
    class Native(torch.nn.Module):
        act_fn = torch.nn.SiLU()
        down_proj = torch.empty(1, device="meta")

    file = save(plan.experts.state_dict())
    skeleton = PackedExperts.build(Native(), json.loads(json.dumps(plan.experts.spec())))
    assert skeleton.spec() == plan.spec
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    skeleton.load_state_dict(load(file), strict=True, assign=True)
    skeleton.to("cpu")
    for expert in range(len(WIDTHS)):
        assert torch.equal(skeleton.gate_up(expert), plan.experts.gate_up(expert))
        assert torch.equal(skeleton.down(expert), plan.experts.down(expert))


def test_no_change_of_dtype_touches_what_is_stored(plan):
    other = copy.deepcopy(plan.experts).to(torch.bfloat16)
    assert other.gate_up(0).dtype == torch.bfloat16
    assert torch.equal(other.gate_up(0), plan.experts.gate_up(0).bfloat16())
    back = other.to(torch.float32)
    assert torch.equal(back.gate_up(3), plan.experts.gate_up(3))


def test_gate_and_up_solved_as_one_are_stored_as_two():
    plan, gptq = Plan("camera_q"), solver()
    bits = torch.tensor(BITS_OF[3])
    W_RC = torch.randn(1, 2 * len(bits), H)
    both = gptq.solve(W_RC, factor_of(gptq, H), row_bits=bits.repeat(2))
    down = gptq.solve(torch.randn(1, H, len(bits)), column_bits=bits)
    plan.experts.put(3, [Solved.of(both, 0)], Solved.of(down, 0))
    assert torch.equal(plan.experts.gate_up(3), both.weight[0])


def test_every_expert_may_be_empty():
    nothing = Cut.of("rows", [[], []]), Cut.of("columns", [[], []])
    experts = PackedExperts(experts_spec(H, [0, 0], *nothing, 8, False), torch.nn.SiLU())
    x_TH = torch.randn(3, H)
    y_TH = experts(x_TH, torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
    assert torch.equal(y_TH, torch.zeros(3, H)) and experts.dequantize().widths == [0, 0]


def test_an_index_beyond_int16_is_kept():
    columns = 2**15 + 8
    order = torch.arange(columns).flip(0)
    codes = torch.randint(0, 4, (1, columns), dtype=torch.uint8)
    cut = Cut.of("columns", [[2] * columns], ("columns",))
    linear = PackedLinear(linear_spec(1, columns, cut, None, True))
    one, group = torch.ones(1, 1), torch.zeros(columns, dtype=torch.int64)
    linear.put(Solved(codes, one, 2 * one, group, columns=order))
    assert torch.equal(linear.dense(), codes.flip(1) - 2.0)
    assert linear.weight_columns.dtype == torch.int32


# --- bytes ---


@pytest.mark.parametrize(
    "bits, sym, want", [(2, False, 2.5), (2, True, 2.25), (3, False, 3.5), (1, False, 1.25)]
)
def test_average_bits_are_codes_and_metadata_of_the_groups(bits, sym, want):
    gate_up, down = Cut.of("rows", [[bits] * 16] * 3), Cut.of("columns", [[bits] * 16] * 3)
    linear = linear_spec(16, 128, Cut.of("rows", [[bits] * 16]), 64, sym)
    assert average_bits(linear) == want
    # A row of down is a quarter of a group: its scale counts four times.
    spec = experts_spec(128, [16] * 3, gate_up, down, 64, sym)
    assert average_bits(spec) == pytest.approx((2 * want + bits + 4 * (want - bits)) / 3)
    assert average_bits(spec, linear) < average_bits(spec)


def test_segments_cost_their_own_bits_and_groups():
    bits = [3] * 2 + [2] * 12 + [1] * 2
    spec = experts_spec(64, [16], Cut.of("rows", [bits]), Cut.of("columns", [bits]), 8, False)
    codes = 64 * sum(bits) * 3
    gate_up = 2 * 8 * (14 * 32 + 2 * 16)  # rows, groups of a row, bits per group
    down = 64 * (1 * 32 + 2 * 32 + 1 * 16)
    assert spec_code_bits(spec) == codes and 8 * spec_bytes(spec) == codes + gate_up + down


# --- what can't be stored is refused ---


def test_what_the_layout_cannot_hold_is_refused():
    plan = Plan("camera_q")
    gptq = solver()
    bits = torch.tensor(BITS_OF[0])
    gate_up = Solved.of(gptq.solve(torch.randn(1, 12, H), row_bits=bits.repeat(2)), 0)
    down = gptq.solve(torch.randn(1, H, 6), column_bits=bits)
    put = plan.experts.put
    with pytest.raises(ValueError, match="needs 2 matrices"):
        put(3, [gate_up], Solved.of(down, 0))
    with pytest.raises(ValueError, match="grouped otherwise"):
        put(0, [gate_up], Solved.of(gptq.solve(torch.randn(1, H, 6), bits=2), 0))
    with pytest.raises(ValueError, match="keeps no index"):
        put(0, [gate_up], Solved.of(down, 0, columns=torch.arange(6).flip(0)))
    with pytest.raises(ValueError, match="zeros"):
        Plan("camera_q", sym=True).experts.put(0, [gate_up], Solved.of(down, 0))
    short = Cut.of("rows", [[2] * 6]), Cut.of("columns", [[2] * 5])
    with pytest.raises(ValueError, match="cover"):
        spec_bytes(experts_spec(H, [6], *short, 8, False))
    with pytest.raises(ValueError, match="descend"):
        Cut("rows", (2, 3), ((1,), (1,)))


# --- MLPs, linear layers, routers ---


def quantize_mlp(mlp, bits_of, group_size=8, biases=None):
    """A packed MLP by round-to-nearest, and a native one that holds what it means."""
    gptq, bits = solver(group_size), torch.tensor(bits_of)
    width, hidden = mlp.up_proj.weight.shape
    cut = Cut.of("rows", [bits_of]), Cut.of("columns", [bits_of])
    packed = PackedMlp(mlp_spec(hidden, width, *cut, group_size, False), mlp.act_fn, biases)
    gate, up = (
        gptq.solve(m.weight[None].detach(), row_bits=bits) for m in (mlp.gate_proj, mlp.up_proj)
    )
    down = gptq.solve(mlp.down_proj.weight[None].detach(), column_bits=bits)
    packed.put([Solved.of(gate, 0), Solved.of(up, 0)], Solved.of(down, 0))
    means = copy.deepcopy(mlp)
    for linear, q in ((means.gate_proj, gate), (means.up_proj, up), (means.down_proj, down)):
        linear.weight.data = q.weight[0]
    return packed, means


def quantize_linear(linear, bits=4, group_size=8):
    rows, columns = linear.weight.shape
    spec = linear_spec(rows, columns, Cut.of("rows", [[bits] * rows]), group_size, False)
    q = solver(group_size).solve(linear.weight[None].detach(), bits=bits)
    packed = PackedLinear(spec, linear.bias)
    packed.put(Solved.of(q, 0))
    return packed, q.weight[0]


def quantize_router(router, bits=8, group_size=16):
    rows, columns = router.weight.shape
    spec = router_spec(rows, columns, Cut.of("rows", [[bits] * rows]), group_size, False)
    q = solver(group_size).solve(router.weight[None].detach(), bits=bits)
    packed = PackedRouter.of(router, spec)
    packed.put(Solved.of(q, 0))
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
    skeleton = PackedMlp.build(mlp.to("meta"), json.loads(json.dumps(packed.spec())))
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
    skeleton = PackedRouter.build(copy.deepcopy(native).to("meta"), packed.spec())
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
            cut = Cut.of("rows", bits_of), Cut.of("columns", bits_of)
            spec = experts_spec(native.hidden_dim, [width] * experts, *cut, 8, False)
            packed = PackedExperts(spec, native.act_fn, dtype=model.dtype)
            bits = torch.tensor(bits_of)
            both = gptq.solve(native.gate_up_proj.detach(), row_bits=bits.repeat(1, 2))
            down = gptq.solve(native.down_proj.detach(), column_bits=bits)
            for e in range(experts):
                packed.put(e, [Solved.of(both, e)], Solved.of(down, e))
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
    skeleton = Skeleton(tmp_path)
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
