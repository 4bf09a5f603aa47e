"""The GPTQ solver: its definition, batches, grids, edges.

Shapes: E experts, R rows, C columns, N tokens.
"""

import pytest
import torch

from camera.quantization.quantizers.gptq import GPTQ
from camera.quantization.quantizers.grids import CLIPS, Grid
from camera.quantization.quantizers.hessian import Hessian, output_error
from camera.runtime.errors import CameraError
from tests.helpers.quantization.gptq_problem import KINDS, C, E, R, as_good, inputs, same


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
    want = torch.stack([naive(W_ERC[e], H_ECC[e], bits, group_size) for e in range(E)])
    as_good(got, want.float(), W_ERC, H_ECC)


# --- batches ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_batched_is_one_by_one(W_ERC, H_ECC, kind, bits):
    solver = GPTQ(**KINDS[kind])
    batch = solver.solve(W_ERC, solver.factor(H_ECC), bits=bits)
    for e in range(E):
        one = slice(e, e + 1)
        alone = solver.solve(W_ERC[one], solver.factor(H_ECC[one]), bits=bits)
        as_good(batch.weight[one], alone.weight, W_ERC[one], H_ECC[one])
        assert torch.equal(batch.group_EC[one], alone.group_EC)


def test_shared_hessian(W_ERC, H_ECC):
    """Gate and up may be solved apart, concatenated, or as a batch of two on one factor."""
    solver = GPTQ(group_size=32, act_order=True)
    factor = solver.factor(H_ECC)
    gate, up = W_ERC[:, : R // 2], W_ERC[:, R // 2 :]
    whole = solver.solve(W_ERC, factor, bits=2)
    apart = torch.cat([solver.solve(W, factor, bits=2).weight for W in (gate, up)], 1)
    pair = solver.solve(torch.stack([gate[0], up[0]]), solver.factor(H_ECC[:1]), bits=2)
    as_good(apart, whole.weight, W_ERC, H_ECC)
    as_good(pair.weight.reshape(1, R, C), whole.weight[:1], W_ERC[:1], H_ECC[:1])
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
        as_good(other.weight, results[0].weight, W_ERC, H_ECC)
        assert torch.equal(other.group_EC, results[0].group_EC)


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
    # the mean that damps is summed in the given order
    as_good(moved.weight[:, :, torch.argsort(perm)], plain.weight, W_ERC, H_ECC)
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
        dict(damping=-1.0),
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
