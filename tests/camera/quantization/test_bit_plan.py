"""Bit plans: what they cost on disk, that they meet a target, and that optimal means optimal.

Shapes: N micro-experts of a pool.
"""

import itertools

import pytest
import torch

from camera.checkpoint.formats.packed.footprint import StoredBits
from camera.checkpoint.formats.packed.layout import metadata_bits
from camera.checkpoint.formats.packed.segments import BitSegments
from camera.checkpoint.formats.packed.spec import experts_spec, mlp_spec, spec_bytes
from camera.quantization.plans.bit_plan import (
    bits_of_ranking,
    ranking,
    solve_boundaries,
    solve_group_size,
    solve_optimal,
    solve_shares,
)
from camera.quantization.plans.shares import boundaries_of, share_corners
from camera.runtime.errors import CameraError

HIDDEN, WIDTHS = 64, (96, *[64] * 16)
ERRORS = {4: 0.01, 3: 0.05, 2: 0.25, 1: 0.7, 0: 1.0}


@pytest.fixture
def score_N() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(sum(WIDTHS), dtype=torch.float64) ** 4


def counts(bits_N, widths=WIDTHS):
    return [torch.bincount(part, minlength=5).tolist() for part in bits_N.split(list(widths))]


# --- what a plan costs ---


@pytest.mark.parametrize("group_size", [16, 24, 128, None])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("widths", [WIDTHS, (7, 0, 1, 33), (5,)])
def test_footprint_is_what_the_packed_modules_take(group_size, sym, widths):
    torch.manual_seed(1)
    bits_N = torch.randint(0, 5, (sum(widths),))
    kept = [part[part > 0] for part in bits_N.split(list(widths))]
    gate_up, down = BitSegments.of("rows", kept), BitSegments.of("columns", kept)
    spec = experts_spec(HIDDEN, [len(k) for k in kept], gate_up, down, group_size, sym)
    assert StoredBits(HIDDEN, widths, group_size, sym).total(bits_N) == 8 * spec_bytes(spec)


def test_footprint_of_column_cuts_and_of_an_mlp():
    bits = torch.tensor([3] * 20 + [2] * 30 + [1] * 14)
    down = torch.tensor([3] * 10 + [2] * 30 + [1] * 8)
    pool = StoredBits(HIDDEN, (48,), 16)
    spec = mlp_spec(
        HIDDEN,
        48,
        BitSegments.of("columns", [bits], ("columns",)),
        BitSegments.of("columns", [down]),
        16,
        False,
    )
    channels = torch.bincount(bits, minlength=9)[None]
    assert pool.total_by_columns(channels, pool.counts(down)) == 8 * spec_bytes(spec)


def test_uniform_bits_cost_what_the_papers_say():
    pool = StoredBits(2048, (1408,) * 4, 128)
    assert pool.uniform_average(2) == pytest.approx(2.25)
    assert pool.uniform_average(1) == pytest.approx(1.125)
    assert StoredBits(2048, (1408,), 128, sym=True).uniform_average(3) == pytest.approx(3.125)
    assert pool.uniform_average(0) == 0
    assert [metadata_bits(b) for b in (0, 1, 2, 8)] == [0, 16, 32, 32]


# --- ranking and cutting ---


def test_ranking_puts_the_highest_first_and_of_equals_the_first():
    score_N = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert ranking(score_N, [2, 2], "layer").tolist() == [1, 2, 3, 0]
    assert ranking(score_N, [2, 2], "expert").tolist() == [1, 2, 0, 3]


def test_expert_scope_takes_the_same_share_of_every_expert(score_N):
    order_N = ranking(score_N, WIDTHS, "expert")
    for share in (0.125, 0.5):
        bits_N = bits_of_ranking(
            order_N, WIDTHS, [3, 1], boundaries_of([share, 1 - share], len(order_N))
        )
        for width, row in zip(WIDTHS, counts(bits_N), strict=True):
            assert abs(row[3] - share * width) <= 1


def test_cuts_follow_the_ranking(score_N):
    order_N = ranking(score_N, WIDTHS, "layer")
    bits_N = bits_of_ranking(
        order_N, WIDTHS, [3, 2, 1], boundaries_of([0.125, 0.75, 0.125], len(order_N))
    )
    assert bits_N[order_N].tolist() == sorted(bits_N.tolist(), reverse=True)
    assert torch.bincount(bits_N).tolist() == [0, 140, 840, 140]


@pytest.mark.parametrize("align", [8, 32])
def test_aligned_boundaries_are_multiples(score_N, align):
    order_N = ranking(score_N, WIDTHS, "layer")
    bits_N = bits_of_ranking(order_N, WIDTHS, [3, 2, 1], [300, 800], align)
    for part, score in zip(bits_N.split(WIDTHS), score_N.split(WIDTHS), strict=True):
        high, mid = int((part == 3).sum()), int((part == 2).sum())
        assert high % align == 0 and ((high + mid) % align == 0 or high + mid == len(part))
        best_first = part[torch.argsort(score, descending=True)]
        assert best_first.tolist() == sorted(best_first.tolist(), reverse=True)


# --- meeting a target ---


@pytest.mark.parametrize("scope", ["layer", "expert"])
@pytest.mark.parametrize("levels", [[3, 2, 1], [4, 2, 1], [3, 1], [3, 2, 0]])
@pytest.mark.parametrize("bits", [2.25, 2.5, 3.0])
def test_shares_meet_the_target(score_N, scope, levels, bits):
    pool = StoredBits(HIDDEN, WIDTHS, 64)
    order_N = ranking(score_N, WIDTHS, scope)
    bits_N, cuts = solve_shares(order_N, pool, levels, bits, low_share=0.25)
    assert 0.99 * bits <= pool.average(bits_N) <= bits
    assert torch.equal(bits_N, bits_of_ranking(order_N, WIDTHS, levels, cuts))


def test_low_share_is_kept_where_the_target_allows(score_N):
    pool = StoredBits(HIDDEN, WIDTHS, 64)
    order_N = ranking(score_N, WIDTHS, "expert")
    for share in (0.125, 0.25):
        bits_N, _ = solve_shares(order_N, pool, [3, 2, 1], 2.6, low_share=share)
        assert int((bits_N == 1).sum()) == round(share * len(bits_N))
    for bits, level in ((1.6, 3), (3.4, 2)):  # none of the highest, none in the middle
        bits_N, _ = solve_shares(order_N, pool, [3, 2, 1], bits, low_share=0.25)
        assert int((bits_N == level).sum()) == 0
        assert 0.99 * bits <= pool.average(bits_N) <= bits


def test_what_cannot_be_met_is_refused(score_N):
    pool = StoredBits(HIDDEN, WIDTHS, 64)
    order_N = ranking(score_N, WIDTHS, "layer")
    with pytest.raises(CameraError, match="bits"):
        solve_shares(order_N, pool, [3, 2, 1], 1.0, low_share=0.25)
    with pytest.raises(CameraError, match="ratios"):
        share_corners([4, 3, 2, 1], 10, 0.25)
    whole, _ = solve_shares(order_N, pool, [3, 2, 1], 9.0, low_share=0.25)
    assert (whole == 3).all()


def test_solve_cuts_goes_as_far_as_fits():
    corners = [(0, 0), (0, 6), (6, 6), (10, 10)]
    for budget in range(21):
        cuts = solve_boundaries(corners, sum, budget)
        assert sum(cuts) <= budget and list(cuts) == sorted(cuts)
        assert sum(cuts) in (budget, budget - 1)


def test_group_size_is_the_smallest_that_fits():
    pools = {g: StoredBits(2048, (1408,), g) for g in range(8, 2049, 8)}
    solved = solve_group_size(
        lambda g: pools[g].uniform_average(2) * pools[g].weights, pools[8].weights, 2.25, 2048
    )
    assert solved == 128
    assert solve_group_size(lambda g: 10.0, 1, 2.25, 64) is None


# --- the optimal plan ---


def test_optimal_plan_beats_every_other_of_its_size():
    """Brute force over all plans of six micro-experts, groups that share no scale."""
    torch.manual_seed(3)
    widths, levels = (3, 3), [3, 2, 1, 0]
    pool = StoredBits(64, widths, 1)  # cost is a sum over micro-experts
    price = {b: pool.total(torch.tensor([b, 0, 0, 0, 0, 0])) for b in levels}
    plans = [(p, sum(price[b] for b in p)) for p in itertools.product(levels, repeat=6)]
    assert all(pool.total(torch.tensor(p)) == cost for p, cost in plans[::97])
    for trial in range(10):
        score_N = torch.rand(6, dtype=torch.float64) ** 3
        order_N = ranking(score_N, widths, "layer")
        target = (
            pool.uniform_average(1)
            + (trial + 1) * (pool.uniform_average(3) - pool.uniform_average(1)) / 12
        )
        errors = {b: ERRORS[b] for b in levels}
        bits_N, _ = solve_optimal(score_N, order_N, pool, errors, target)

        def error(plan, score_N=score_N):
            return sum(s * ERRORS[b] for s, b in zip(score_N.tolist(), plan, strict=True))

        spent = pool.total(bits_N)
        assert spent <= target * pool.weights * (1 + 1e-9)
        best = min(error(p) for p, cost in plans if cost <= spent)
        assert error(bits_N.tolist()) <= best * (1 + 1e-9)


@pytest.mark.parametrize("bits", [1.5, 2.25, 3.0])
@pytest.mark.parametrize("align", [1, 16])
def test_optimal_plan_meets_the_target_and_beats_shares(score_N, bits, align):
    pool = StoredBits(HIDDEN, WIDTHS, 64)
    order_N = ranking(score_N, WIDTHS, "layer")
    optimal, _ = solve_optimal(score_N, order_N, pool, ERRORS, bits, align=align)
    shares, _ = solve_shares(order_N, pool, [3, 2, 1], bits, low_share=0.25, align=align)
    assert (0.99 if align == 1 else 0.9) * bits <= pool.average(optimal) <= bits

    def error(plan):
        return float((score_N * torch.tensor([ERRORS[b] for b in plan.tolist()])).sum())

    assert error(optimal) <= error(shares)
    assert optimal[order_N].tolist() == sorted(optimal.tolist(), reverse=True) or align > 1


def test_equal_scores_do_not_jump_over_the_target():
    pool = StoredBits(HIDDEN, WIDTHS, 64)
    for score_N in (torch.ones(sum(WIDTHS)), torch.zeros(sum(WIDTHS))):
        order_N = ranking(score_N, WIDTHS, "expert")
        bits_N, _ = solve_optimal(score_N, order_N, pool, ERRORS, 2.25)
        assert pool.average(bits_N) <= 2.25
