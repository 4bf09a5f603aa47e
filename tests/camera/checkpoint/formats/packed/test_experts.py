"""Packed experts: what the solver said is what is stored, loaded, multiplied and counted.

Shapes: T tokens, K experts per token, N tokens of one expert, H hidden, R rows, C columns.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional as F

from camera.checkpoint.formats.packed.experts import PackedExperts
from camera.checkpoint.formats.packed.linear import PackedLinear
from camera.checkpoint.formats.packed.segments import BitSegments, QuantizedMatrix
from camera.checkpoint.formats.packed.spec import (
    experts_spec,
    linear_spec,
    spec_bytes,
    spec_code_bits,
    spec_weights,
)
from camera.quantization.quantizers.gptq import GPTQ
from camera.quantization.quantizers.hessian import Hessian
from tests.helpers.quantization.packing import solver, stored_bytes

H = 20
BITS_OF = [[3, 2, 2, 2, 2, 1], [], [2], [4, 3, 3, 2, 2, 2, 1, 1, 1], [3] * 5, [1, 1]]
WIDTHS = [len(bits) for bits in BITS_OF]


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
        gate_up = BitSegments.of("rows", [s[2] for s in solved], permuted)
        down = BitSegments.of("columns", [s[2] for s in solved], permuted)
        if name == "dagger":
            gate_up = BitSegments.of("columns", [hidden_bits] * len(BITS_OF), permuted)
        if name == "shuffle":
            gate_up = BitSegments.of("rows", BITS_OF, ("rows",))
            down = BitSegments.of("columns", BITS_OF, ("columns",))
        self.spec = experts_spec(H, WIDTHS, gate_up, down, group_size, sym)
        self.experts = PackedExperts(self.spec, torch.nn.SiLU())
        for expert, (both, below, _) in enumerate(solved):
            self.experts.store(expert, both, below)

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
        return quantized.matrix(0, **where), restored(quantized.weight[0], **where)


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
    skeleton = PackedExperts.from_spec(Native(), json.loads(json.dumps(plan.experts.spec())))
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
    plan.experts.store(3, [both.matrix(0)], down.matrix(0))
    assert torch.equal(plan.experts.gate_up(3), both.weight[0])


def test_every_expert_may_be_empty():
    nothing = BitSegments.of("rows", [[], []]), BitSegments.of("columns", [[], []])
    experts = PackedExperts(experts_spec(H, [0, 0], *nothing, 8, False), torch.nn.SiLU())
    x_TH = torch.randn(3, H)
    y_TH = experts(x_TH, torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
    assert torch.equal(y_TH, torch.zeros(3, H)) and experts.dequantize().widths == [0, 0]


def test_an_index_beyond_int16_is_kept():
    columns = 2**15 + 8
    order = torch.arange(columns).flip(0)
    codes = torch.randint(0, 4, (1, columns), dtype=torch.uint8)
    cut = BitSegments.of("columns", [[2] * columns], ("columns",))
    linear = PackedLinear(linear_spec(1, columns, cut, None, True))
    one, group = torch.ones(1, 1), torch.zeros(columns, dtype=torch.int64)
    linear.store(QuantizedMatrix(codes, one, 2 * one, group, columns=order))
    assert torch.equal(linear.dense(), codes.flip(1) - 2.0)
    assert linear.weight_columns.dtype == torch.int32


# --- bytes ---


def average_bits(spec):
    """Stored bits per weight, metadata included."""
    return 8 * spec_bytes(spec) / spec_weights(spec)


@pytest.mark.parametrize(
    "bits, sym, want", [(2, False, 2.5), (2, True, 2.25), (3, False, 3.5), (1, False, 1.25)]
)
def test_average_bits_are_codes_and_metadata_of_the_groups(bits, sym, want):
    gate_up, down = (
        BitSegments.of("rows", [[bits] * 16] * 3),
        BitSegments.of("columns", [[bits] * 16] * 3),
    )
    linear = linear_spec(16, 128, BitSegments.of("rows", [[bits] * 16]), 64, sym)
    assert average_bits(linear) == want
    # A row of down is a quarter of a group: its scale counts four times.
    spec = experts_spec(128, [16] * 3, gate_up, down, 64, sym)
    assert average_bits(spec) == pytest.approx((2 * want + bits + 4 * (want - bits)) / 3)


def test_segments_cost_their_own_bits_and_groups():
    bits = [3] * 2 + [2] * 12 + [1] * 2
    spec = experts_spec(
        64, [16], BitSegments.of("rows", [bits]), BitSegments.of("columns", [bits]), 8, False
    )
    codes = 64 * sum(bits) * 3
    gate_up = 2 * 8 * (14 * 32 + 2 * 16)  # rows, groups of a row, bits per group
    down = 64 * (1 * 32 + 2 * 32 + 1 * 16)
    assert spec_code_bits(spec) == codes and 8 * spec_bytes(spec) == codes + gate_up + down


# --- what can't be stored is refused ---


def test_what_the_layout_cannot_hold_is_refused():
    plan = Plan("camera_q")
    gptq = solver()
    bits = torch.tensor(BITS_OF[0])
    gate_up = gptq.solve(torch.randn(1, 12, H), row_bits=bits.repeat(2)).matrix(0)
    down = gptq.solve(torch.randn(1, H, 6), column_bits=bits)
    store = plan.experts.store
    with pytest.raises(ValueError, match="needs 2 matrices"):
        store(3, [gate_up], down.matrix(0))
    with pytest.raises(ValueError, match="grouped otherwise"):
        store(0, [gate_up], gptq.solve(torch.randn(1, H, 6), bits=2).matrix(0))
    with pytest.raises(ValueError, match="keeps no index"):
        store(0, [gate_up], down.matrix(0, columns=torch.arange(6).flip(0)))
    with pytest.raises(ValueError, match="zeros"):
        Plan("camera_q", sym=True).experts.store(0, [gate_up], down.matrix(0))
    short = BitSegments.of("rows", [[2] * 6]), BitSegments.of("columns", [[2] * 5])
    with pytest.raises(ValueError, match="cover"):
        spec_bytes(experts_spec(H, [6], *short, 8, False))
    with pytest.raises(ValueError, match="descend"):
        BitSegments("rows", (2, 3), ((1,), (1,)))
