"""The GPTQ solver: the reference's numbers, and what must hold of any solver.

Shapes: E experts, R rows, C columns, N tokens.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from camera.errors import CameraError
from camera.gptq import GPTQ, QUIRKS, Hessian, output_error
from camera.quantizer import CLIPS, Grid

E, R, C = 5, 12, 80


def inputs(experts: int = E, columns: int = C, tokens: int = 300) -> torch.Tensor:
    """Correlated inputs x_ENC, of another covariance for each expert."""
    torch.manual_seed(1)
    mix_ECC = torch.randn(experts, columns, columns) / columns**0.5
    x_ENC = torch.randn(experts, tokens, columns) @ (mix_ECC + 0.3 * torch.eye(columns))
    return x_ENC * (0.2 + torch.rand(columns))


@pytest.fixture
def W_ERC() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(E, R, C) * 0.05


@pytest.fixture
def H_ECC() -> torch.Tensor:
    x_ENC = inputs()
    return x_ENC.transpose(1, 2) @ x_ENC


def same(a, b) -> None:
    """Two quantised weights are bit for bit the same."""
    for name in ("codes_ERC", "scale_ERG", "zero_ERG", "group_EC", "loss_ER"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)


def close(got: torch.Tensor, want: torch.Tensor, compare: dict) -> None:
    """By the tolerance that the golden index states."""
    got, want = got.double(), want.double()
    if compare["kind"] == "rel_fro":
        assert (got - want).norm() <= compare["tol"] * want.norm()
    else:
        torch.testing.assert_close(got, want, rtol=compare["rtol"], atol=compare["atol"])


def golden_case(folder, name: str):
    index = folder / "index.json"
    cases = json.loads(index.read_text())["cases"] if index.exists() else []
    found = next((case for case in cases if case["case"] == name), None)
    if found is None:
        pytest.skip(f"{folder} has no golden case {name}: pass --golden DIR")
    return found, load_file(folder / found["file"])


# --- against the reference ---


@pytest.mark.parametrize("name", ["gptq", "gptq_dead", "gptq_variants"])
def test_golden(golden, name):
    case, tensors = golden_case(golden, name)
    x_SNC = tensors["X"]
    hessian = Hessian(1, x_SNC.shape[2])
    for x_NC in x_SNC:
        hessian.add(0, x_NC)
    H_ECC = hessian.H_ECC * (2 / len(x_SNC))  # the reference's scale, which the loss has too
    torch.testing.assert_close(H_ECC[0], tensors["H"], rtol=1e-4, atol=1e-4)
    assert hessian.tokens_E.tolist() == [x_SNC.shape[0] * x_SNC.shape[1]]
    for combo, own in case["hyper"]["combos"].items():
        hyper = {**case["hyper"], **own}
        solver = GPTQ(
            group_size=None if hyper["groupsize"] == -1 else hyper["groupsize"],
            sym=hyper["sym"],
            act_order=hyper["actorder"],
            static_groups=hyper["static_groups"],
            block_size=hyper["blocksize"],
            percdamp=hyper["percdamp"],
            quirks=tuple(QUIRKS),
        )
        factor = solver.factor(tensors["H"][None])
        result = solver.solve(tensors["weight"][None], factor, bits=hyper["bits"])
        expected = case["expected"]
        close(result.weight[0], tensors[f"q_{combo}"], expected[f"q_{combo}"]["compare"])
        close(result.loss_ER.sum(), tensors[f"loss_{combo}"], expected[f"loss_{combo}"]["compare"])


def test_golden_clip_search(golden):
    case, tensors = golden_case(golden, "gptq_mse")
    for combo, hyper in case["hyper"]["combos"].items():
        options = dict(sym=hyper["sym"], clip=CLIPS["gptq"], quirks=("one_sided_sym",))
        solver = GPTQ(group_size=None, **options)
        result = solver.solve(tensors["weight"][None], bits=hyper["bits"])
        found = {"scale": result.scale_ERG[0], "zero": result.zero_ERG[0], "q": result.weight[0]}
        for kind, got in found.items():
            name = f"{kind}_{combo}"
            close(got, tensors[name], case["expected"][name]["compare"])


def test_golden_round_to_nearest_of_mc(golden):
    case, tensors = golden_case(golden, "mc_quant_loss")
    solver = GPTQ(group_size=case["hyper"]["groupsize"])
    for bits in case["hyper"]["bits"]:
        for matrix in ("gate_up", "down"):
            result = solver.solve(tensors[f"{matrix}_proj"], bits=bits)
            for expert in range(2):
                name = f"q{bits}_{matrix}_e{expert}"
                close(result.weight[expert], tensors[name], case["expected"][name]["compare"])
        special = solver.solve(tensors["w_special"][None], bits=bits).weight[0]
        name = f"q{bits}_w_special"
        close(special, tensors[name], case["expected"][name]["compare"])


def naive(w_RC, H_CC, bits, group_size, damping=0.01):
    """GPTQ in fp64 without blocks: after each column, all later columns are re-optimised."""
    W_RC, H_CC = w_RC.double().clone(), H_CC.double().clone()
    columns = W_RC.shape[1]
    H_CC += damping * H_CC.diagonal().mean() * torch.eye(columns)
    Q_RC = torch.zeros_like(W_RC)
    for c in range(columns):
        if c % group_size == 0:
            group_RN = W_RC[:, c : c + group_size]
            lo, hi = group_RN.amin(1).clamp(max=0), group_RN.amax(1).clamp(min=0)
            scale = (hi - lo) / (2**bits - 1)
            zero = (-lo / scale).round()
        Q_RC[:, c] = scale * (((W_RC[:, c] / scale).round() + zero).clamp(0, 2**bits - 1) - zero)
        # The best change of the columns after c, given the error of column c.
        error_R = W_RC[:, c] - Q_RC[:, c]
        if c + 1 < columns:
            rest = torch.linalg.solve(H_CC[c + 1 :, c + 1 :], H_CC[c + 1 :, c])
            W_RC[:, c + 1 :] += error_R[:, None] * rest
    return Q_RC


@pytest.mark.parametrize("bits, group_size", [(2, 16), (3, 33), (4, 80)])
def test_equals_the_definition(W_ERC, H_ECC, bits, group_size):
    solver = GPTQ(group_size=group_size, block_size=24)
    got = solver.solve(W_ERC, solver.factor(H_ECC), bits=bits).weight
    for e in range(E):
        want = naive(W_ERC[e], H_ECC[e], bits, group_size)
        torch.testing.assert_close(got[e].double(), want, rtol=1e-3, atol=1e-5)


# --- batches ---

KINDS = {
    "plain": dict(group_size=32),
    "whole_row": dict(group_size=None, sym=True),
    "uneven_groups": dict(group_size=33, block_size=20),
    "act_order": dict(group_size=16, act_order=True),
    "act_order_static": dict(group_size=16, act_order=True, static_groups=True),
    "clip": dict(group_size=32, clip=CLIPS["mc"], float_zero=True),
    "half_scales": dict(group_size=32, scale_dtype=torch.float16),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_batched_is_one_by_one(W_ERC, H_ECC, kind, bits):
    solver = GPTQ(**KINDS[kind])
    batch = solver.solve(W_ERC, solver.factor(H_ECC), bits=bits)
    for e in range(E):
        one = slice(e, e + 1)
        alone = solver.solve(W_ERC[one], solver.factor(H_ECC[one]), bits=bits)
        assert torch.equal(batch.codes_ERC[one], alone.codes_ERC)
        torch.testing.assert_close(batch.weight[one], alone.weight)


def test_shared_hessian(W_ERC, H_ECC):
    """Gate and up may be solved apart, concatenated, or as a batch of two on one factor."""
    solver = GPTQ(group_size=32, act_order=True)
    factor = solver.factor(H_ECC)
    gate, up = W_ERC[:, : R // 2], W_ERC[:, R // 2 :]
    whole = solver.solve(W_ERC, factor, bits=2)
    parts = [solver.solve(W, factor, bits=2).codes_ERC for W in (gate, up)]
    assert torch.equal(torch.cat(parts, 1), whole.codes_ERC)
    pair = solver.solve(torch.stack([gate[0], up[0]]), solver.factor(H_ECC[:1]), bits=2)
    assert torch.equal(pair.codes_ERC.reshape(R, C), whole.codes_ERC[0])
    assert pair.fallback == ["", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_identity_is_round_to_nearest(W_ERC, kind):
    solver = GPTQ(**{**KINDS[kind], "act_order": False})
    H_ECC = torch.eye(C).repeat(E, 1, 1)
    for bits in (1, 2, 4, 8):
        nearest = solver.solve(W_ERC, bits=bits)
        solved = solver.solve(W_ERC, solver.factor(H_ECC), bits=bits)
        assert torch.equal(nearest.codes_ERC, solved.codes_ERC)
        assert torch.equal(nearest.weight, solved.weight)
    assert nearest.fallback == ["rtn"] * E


def test_round_to_nearest_by_hand():
    W_ERC = torch.tensor([[[-0.22, 0.01, 0.19, 0.38]]])
    result = GPTQ(group_size=None).solve(W_ERC, bits=2)
    assert result.codes_ERC.tolist() == [[[0, 1, 2, 3]]]
    torch.testing.assert_close(result.weight, torch.tensor([[[-0.2, 0.0, 0.2, 0.4]]]))
    symmetric = GPTQ(group_size=None, sym=True).solve(W_ERC, bits=2)
    step = 2 * 0.38 / 3
    torch.testing.assert_close(symmetric.weight, torch.tensor([[[-step, 0.0, step, step]]]))


@pytest.mark.parametrize("kind", ["plain", "whole_row", "act_order_static", "clip"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_beats_round_to_nearest(W_ERC, H_ECC, kind, bits):
    solver = GPTQ(**KINDS[kind])
    solved = solver.solve(W_ERC, solver.factor(H_ECC), bits=bits)
    nearest = solver.solve(W_ERC, bits=bits)
    error_E, rtn_E = (output_error(W_ERC, q.weight, H_ECC).sum(1) for q in (solved, nearest))
    assert (error_E <= rtn_E).all()


def test_loss_is_half_the_damped_output_error(W_ERC, H_ECC):
    solver = GPTQ(group_size=16)
    result = solver.solve(W_ERC, solver.factor(H_ECC), bits=2)
    mean_E = H_ECC.diagonal(0, 1, 2).mean(1)
    damped = H_ECC + 0.01 * mean_E[:, None, None] * torch.eye(C)
    want = output_error(W_ERC, result.weight, damped) / 2
    torch.testing.assert_close(result.loss_ER, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "whole_row", "uneven_groups", "act_order"])
def test_block_size_changes_nothing(W_ERC, H_ECC, kind):
    results = []
    for block_size in (1, 7, 16, 128):
        solver = GPTQ(**{**KINDS[kind], "block_size": block_size})
        results.append(solver.solve(W_ERC, solver.factor(H_ECC), bits=2))
    for other in results[1:]:
        assert torch.equal(results[0].codes_ERC, other.codes_ERC)
        torch.testing.assert_close(results[0].weight, other.weight, rtol=1e-4, atol=1e-6)


def test_scale_of_the_hessian_cancels(W_ERC, H_ECC):
    H_ECC[:, :, 3] = H_ECC[:, 3, :] = 0  # with a dead column too
    solver = GPTQ(group_size=16)
    results = [solver.solve(W_ERC, solver.factor(H_ECC * s), bits=3) for s in (1.0, 1024.0)]
    assert torch.equal(results[0].codes_ERC, results[1].codes_ERC)


def test_chunks_of_tokens_add_up():
    x_NC = inputs(1)[0]
    whole, parts = Hessian(2, C), Hessian(2, C)
    whole.add(1, x_NC)
    for part in x_NC.split(37):
        parts.add(1, part)
    parts.add(0, x_NC[:0])
    torch.testing.assert_close(whole.H_ECC, parts.H_ECC, rtol=1e-5, atol=1e-4)
    assert parts.tokens_E.tolist() == [0, 300]
    assert parts.H_ECC[0].abs().max() == 0


# --- bits per row and per column ---


@pytest.mark.parametrize("kind", KINDS)
def test_row_bits_are_the_uniform_runs_rows(W_ERC, H_ECC, kind):
    solver = GPTQ(**KINDS[kind])
    factor = solver.factor(H_ECC)
    uniform = {bits: solver.solve(W_ERC, factor, bits=bits) for bits in (1, 2, 3)}
    row_bits = torch.randint(1, 4, (E, R))
    mixed = solver.solve(W_ERC, factor, row_bits=row_bits)
    assert torch.equal(mixed.bits_ERG[:, :, 0], row_bits)
    for bits, run in uniform.items():
        rows = row_bits == bits
        assert torch.equal(mixed.codes_ERC[rows], run.codes_ERC[rows])
        assert torch.equal(mixed.weight[rows], run.weight[rows])
    vector = solver.solve(W_ERC, factor, row_bits=row_bits[0])
    assert torch.equal(vector.codes_ERC[0], mixed.codes_ERC[0])


def segments(*cuts: tuple[int, int]) -> torch.Tensor:
    """Bits per column of contiguous (width, bits)."""
    return torch.tensor([bits for width, bits in cuts for _ in range(width)])


RAGGED = torch.stack(
    [
        segments((10, 3), (60, 2), (10, 1)),
        segments((13, 3), (50, 2), (17, 1)),
        segments((0, 3), (80, 2)),
        segments((79, 3), (1, 1)),
        segments((10, 3), (60, 2), (10, 1)),
    ]
)


@pytest.mark.parametrize("kind", ["plain", "uneven_groups", "act_order_static", "clip"])
def test_column_segments(W_ERC, H_ECC, kind):
    solver = GPTQ(**KINDS[kind])
    result = solver.solve(W_ERC, solver.factor(H_ECC), column_bits=RAGGED)
    size = KINDS[kind]["group_size"]
    bits_EC = result.bits_ERG[:, 0].gather(1, result.group_EC)
    assert torch.equal(bits_EC, RAGGED)
    assert (result.codes_ERC < 2 ** RAGGED[:, None]).all()
    for e in range(E):
        widths = [int((RAGGED[e] == b).sum()) for b in (3, 2, 1)]
        assert result.groups_E[e] == sum(-(-width // size) for width in widths)
        assert result.group_EC[e].bincount().max() <= size
        one = slice(e, e + 1)
        alone = solver.solve(W_ERC[one], solver.factor(H_ECC[one]), column_bits=RAGGED[e])
        assert torch.equal(alone.codes_ERC, result.codes_ERC[one])
        torch.testing.assert_close(alone.weight, result.weight[one])
    assert result.weight.isfinite().all()


def test_equal_segments_are_uniform(W_ERC, H_ECC):
    solver = GPTQ(group_size=32)
    factor = solver.factor(H_ECC)
    uniform = solver.solve(W_ERC, factor, bits=2)
    same(solver.solve(W_ERC, factor, column_bits=torch.full((E, C), 2)), uniform)
    same(solver.solve(W_ERC, factor, row_bits=torch.full((R,), 2)), uniform)


def test_last_group_is_shorter(W_ERC, H_ECC):
    solver = GPTQ(group_size=33)
    result = solver.solve(W_ERC, solver.factor(H_ECC), bits=3)
    assert result.groups_E == [3] * E
    assert result.group_EC[0].bincount().tolist() == [33, 33, 14]
    oversized = GPTQ(group_size=1000).solve(W_ERC, bits=3)
    same(oversized, GPTQ(group_size=None).solve(W_ERC, bits=3))


def test_act_order_is_undone(W_ERC, H_ECC):
    """Columns given in another order come back in that order."""
    torch.manual_seed(2)
    perm = torch.randperm(C)
    solver = GPTQ(group_size=16, act_order=True)
    plain = solver.solve(W_ERC, solver.factor(H_ECC), bits=3)
    moved = solver.solve(W_ERC[:, :, perm], solver.factor(H_ECC[:, perm][:, :, perm]), bits=3)
    assert torch.equal(plain.codes_ERC[:, :, perm], moved.codes_ERC)
    assert torch.equal(plain.group_EC[:, perm], moved.group_EC)
    largest = H_ECC.diagonal(0, 1, 2).argmax(1)
    assert plain.group_EC.gather(1, largest[:, None]).tolist() == [[0]] * E


# --- grids ---


def test_one_bit_is_plus_minus_the_mean(W_ERC):
    W_ERC[0, 0, 5] = 0.0
    W_ERC[0, 1, 6] = -0.0
    W_ERC[1, 0] = 0.0
    result = GPTQ(group_size=32).solve(W_ERC, bits=1)
    sign = torch.where(W_ERC >= 0, 1.0, -1.0)
    for w, q, s in zip(*(t.split(32, 2) for t in (W_ERC, result.weight, sign)), strict=True):
        torch.testing.assert_close(q, s * w.abs().mean(2, keepdim=True))
    assert result.weight[0, 0, 5] > 0
    assert result.codes_ERC.max() == 1


def test_zero_is_kept(W_ERC, H_ECC):
    """A weight of 0 stays 0 from two bits on, and rows of nothing but 0 at any."""
    W_ERC[:, 3] = 0.0
    for kind in ("plain", "whole_row", "clip"):
        solver = GPTQ(**KINDS[kind])
        for bits in (1, 2, 5):
            result = solver.solve(W_ERC, solver.factor(H_ECC), bits=bits)
            assert result.weight.isfinite().all()
            assert (result.weight[:, 3] == 0).all()


def test_eight_bits_fit(W_ERC):
    result = GPTQ(group_size=32).solve(W_ERC, bits=8)
    assert result.codes_ERC.dtype == torch.uint8
    assert (result.weight - W_ERC).abs().max() <= result.scale_ERG.max() * 0.51


def test_clip_search_lowers_the_error(W_ERC):
    def miss(clip):
        result = GPTQ(group_size=32, clip=CLIPS[clip]).solve(W_ERC, bits=2)
        return (result.weight - W_ERC).abs().pow(2.4).sum()

    assert miss("gptq") < miss("none")
    assert miss("mc") < miss("none")
    assert len(CLIPS["mc"]) == 101 and len(CLIPS["gptq"]) == 80


def test_stored_scales_lose_nothing(W_ERC, H_ECC):
    for dtype in (torch.float16, torch.bfloat16):
        solver = GPTQ(group_size=32, scale_dtype=dtype)
        for tiny in (1.0, 1e-9):
            result = solver.solve(W_ERC * tiny, solver.factor(H_ECC), bits=2)
            stored = result.scale_ERG.to(dtype).float()
            assert torch.equal(stored, result.scale_ERG)
            assert result.weight.isfinite().all()


def test_one_sided_quirk():
    W_ENR = torch.rand(1, 8, 2) + 0.1
    maxq = torch.full((1, 2), 3.0)
    fair, _ = Grid(sym=True).fit(W_ENR, maxq)
    quirk, _ = Grid(sym=True, one_sided_sym=True).fit(W_ENR, maxq)
    torch.testing.assert_close(fair, 2 * quirk)


def test_feedback_only_between_blocks(W_ERC, H_ECC):
    """MC's variant: nothing happens inside a block, and the next block pays for it."""
    whole = GPTQ(group_size=C, block_size=C, inblock_feedback=False)
    assert torch.equal(
        whole.solve(W_ERC, whole.factor(H_ECC), bits=2).codes_ERC,
        whole.solve(W_ERC, bits=2).codes_ERC,
    )
    half = GPTQ(group_size=C // 2, block_size=C // 2, inblock_feedback=False)
    full = GPTQ(group_size=C // 2, block_size=C // 2)
    errors = [
        output_error(W_ERC, s.solve(W_ERC, s.factor(H_ECC), bits=2).weight, H_ECC).sum()
        for s in (full, half)
    ]
    assert errors[0] < errors[1]


# --- Hessians that don't serve ---


def test_dead_columns(W_ERC, H_ECC):
    dead = [0, 17, C - 1]
    H_ECC[0, dead, :] = 0
    H_ECC[0, :, dead] = 0
    for solver in (GPTQ(group_size=16), GPTQ(group_size=16, act_order=True, static_groups=True)):
        factor = solver.factor(H_ECC)
        result = solver.solve(W_ERC, factor, bits=2)
        assert torch.nonzero(factor.dead_EC[0]).flatten().tolist() == dead
        assert (result.weight[0][:, dead] == 0).all()
        assert (result.weight[1][:, dead] != 0).any()
        assert not factor.dead_EC[1:].any() and result.weight.isfinite().all()


@pytest.mark.parametrize("act_order", [False, True])
def test_fallback_round_to_nearest(W_ERC, H_ECC, act_order):
    H_ECC[2] = 0
    H_ECC[3] *= 0.01
    tokens_E = torch.tensor([300, 300, 0, 3, 300])
    solver = GPTQ(group_size=16, min_tokens=8, act_order=act_order)
    result = solver.solve(W_ERC, solver.factor(H_ECC, tokens_E), bits=2)
    nearest = solver.solve(W_ERC, bits=2)
    assert result.fallback == ["", "", "rtn", "rtn", ""]
    assert result.report() == {"experts": E, "damping": {0.01: 3}, "fallback": {"rtn": 2}}
    assert torch.equal(result.weight[2:4], nearest.weight[2:4])
    assert not torch.equal(result.weight[0], nearest.weight[0])
    unseen = solver.factor(H_ECC)  # without counts, an empty Hessian tells
    assert unseen.fallback == ["", "", "rtn", "", ""]


def test_fallback_mean_hessian(W_ERC, H_ECC):
    H_ECC[2] = 0
    tokens_E = torch.tensor([300, 300, 0, 3, 300])
    solver = GPTQ(group_size=16, min_tokens=8, fallback="mean_hessian")
    result = solver.solve(W_ERC, solver.factor(H_ECC, tokens_E), bits=2)
    mean_CC = H_ECC[[0, 1, 4]].mean(0, keepdim=True)
    want = solver.solve(W_ERC[2:4], solver.factor(mean_CC), bits=2)
    assert torch.equal(result.codes_ERC[2:4], want.codes_ERC)
    assert result.report()["fallback"] == {"mean_hessian": 2}
    assert H_ECC[2].abs().max() == 0  # the caller's tensor stays as it was
    nobody = solver.factor(torch.zeros(2, C, C))
    assert nobody.fallback == ["rtn", "rtn"]


def test_damping_ladder(W_ERC, H_ECC):
    """Singular, indefinite, hopeless and broken Hessians: each gets the rung it needs."""
    x_NC = inputs()[0, :4]
    H_ECC[1] = x_NC.T @ x_NC  # rank 4 of 80
    mean = H_ECC[2].diagonal().mean()
    lowest = torch.linalg.eigvalsh(H_ECC[2]).min()
    H_ECC[2] -= (lowest + 0.05 * mean) * torch.eye(C)  # the lowest eigenvalue is -0.05 mean
    H_ECC[3] = -H_ECC[3]
    H_ECC[4, 1, 1] = torch.nan
    solver = GPTQ(group_size=16, percdamp=1e-9)
    factor = solver.factor(H_ECC)
    assert factor.damping_E[0] == 1e-9
    assert 1e-9 < factor.damping_E[1] < 1e-3
    assert factor.damping_E[2] == pytest.approx(0.1)
    assert factor.fallback == ["", "", "", "rtn_damping", "rtn_damping"]
    result = solver.solve(W_ERC, factor, bits=2)
    assert result.weight.isfinite().all()
    assert torch.equal(result.weight[3:], solver.solve(W_ERC, bits=2).weight[3:])
    assert result.report()["fallback"] == {"rtn_damping": 2}
    assert len(result.report()["damping"]) == 3
    assert GPTQ(percdamp=0).factor(-H_ECC[:1]).fallback == ["rtn_damping"]


# --- edges ---


@pytest.mark.parametrize(
    "shape", [(3, 4, 0), (3, 0, 8), (0, 4, 8), (3, 4, 1), (3, 1, 8), (1, 1, 1)]
)
@pytest.mark.parametrize("act_order", [False, True])
def test_edges(shape, act_order):
    experts, _, columns = shape
    W_ERC = torch.randn(shape)
    x_ENC = torch.randn(experts, 20, columns)
    solver = GPTQ(group_size=4, act_order=act_order, static_groups=act_order)
    factor = solver.factor(x_ENC.transpose(1, 2) @ x_ENC, torch.full((experts,), 20))
    column_bits = torch.full((experts, columns), 3)
    column_bits[:, columns // 2 :] = 1
    for kwargs in (dict(bits=2), dict(bits=1), dict(column_bits=column_bits)):
        for used in (factor, None):
            result = solver.solve(W_ERC, used, **kwargs)
            assert result.codes_ERC.shape == result.weight.shape == shape
            assert result.weight.isfinite().all() and result.loss_ER.isfinite().all()
            assert result.loss_ER.shape == shape[:2]


def test_half_precision_weights(W_ERC, H_ECC):
    solver = GPTQ(group_size=32)
    factor = solver.factor(H_ECC)
    W_ERC = W_ERC.bfloat16()
    before = W_ERC.clone()
    same(solver.solve(W_ERC, factor, bits=2), solver.solve(W_ERC.float(), factor, bits=2))
    assert torch.equal(W_ERC, before)


def test_refusals(W_ERC):
    wrong = (
        dict(group_size=0),
        dict(block_size=0),
        dict(percdamp=-1.0),
        dict(fallback="none"),
        dict(clip=()),
        dict(quirks=("unknown",)),
    )
    for options in wrong:
        with pytest.raises(CameraError):
            GPTQ(**options)
    solver = GPTQ()
    for bits in (0, 9, 2.25):
        with pytest.raises(CameraError, match="bits"):
            solver.solve(W_ERC, bits=bits)
    with pytest.raises(CameraError, match="static_groups"):
        GPTQ(act_order=True).solve(W_ERC, column_bits=torch.full((C,), 2))
    with pytest.raises(CameraError, match="NaN"):
        solver.solve(W_ERC * torch.nan, bits=2)
    with pytest.raises(ValueError):
        solver.solve(W_ERC)
