"""Which micro-experts stay: pure functions of scores and a budget."""

import pytest
import torch

from camera.moe.budget import to_remove
from camera.pruning.ranking import keep_highest


def scores(n=96, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept_widths(keep_N, widths):
    return [int(part.sum()) for part in keep_N.split(widths)]


@pytest.mark.parametrize("remove", [0, 1, 40, 96])
def test_the_lowest_go_and_exactly_as_many_as_asked(remove):
    score_N = scores()
    keep_N = keep_highest(score_N, [24] * 4, remove)
    assert (~keep_N).sum() == remove
    if 0 < remove < 96:
        assert score_N[~keep_N].max() < score_N[keep_N].min()


def test_of_equal_scores_the_first_goes():
    keep_N = keep_highest(torch.ones(6), [3, 3], 2)
    assert keep_N.tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize("multiple", [2, 8, 16, 64])
@pytest.mark.parametrize("seed", range(5))
def test_width_multiple_rounds_every_width_and_stays_on_budget(multiple, seed):
    widths, remove = [40, 24, 24, 24, 24], 50
    keep_N = keep_highest(scores(136, seed), widths, remove, width_multiple=multiple)
    for kept, full in zip(kept_widths(keep_N, widths), widths, strict=True):
        assert kept % multiple == 0 or kept == full
    removed = int((~keep_N).sum())
    assert removed <= remove
    assert remove - removed < multiple


def test_width_multiple_keeps_each_experts_highest():
    score_N, widths = scores(), [24] * 4
    keep_N = keep_highest(score_N, widths, 40, width_multiple=8)
    for score, keep in zip(score_N.split(widths), keep_N.split(widths), strict=True):
        if keep.any() and not keep.all():
            assert score[~keep].max() < score[keep].min()


def test_width_multiple_keeps_the_most_score_of_all_block_choices():
    from itertools import product

    score_N, widths = scores(48), [16, 16, 16]
    keep_N = keep_highest(score_N, widths, 24, width_multiple=8)
    best = 0.0
    for kept in product((0, 8, 16), repeat=3):
        if sum(kept) == 24:
            parts = score_N.split(widths)
            best = max(
                best, sum(float(p.topk(k).values.sum()) for p, k in zip(parts, kept, strict=True))
            )
    assert float(score_N[keep_N].sum()) == pytest.approx(best)


def test_min_width_guards_every_expert():
    score_N, widths = scores(), [24] * 4
    score_N[:24] = 0
    free = kept_widths(keep_highest(score_N, widths, 30), widths)
    guarded = kept_widths(keep_highest(score_N, widths, 30, min_width=5), widths)
    assert free[0] == 0
    assert guarded[0] == 5 and sum(guarded) == 66


def test_only_candidates_go():
    candidates_N = torch.arange(96) >= 24
    keep_N = keep_highest(scores(), [24] * 4, 60, candidates_N=candidates_N)
    assert keep_N[:24].all() and (~keep_N).sum() == 60
    blocks = keep_highest(scores(), [24] * 4, 60, candidates_N=candidates_N, width_multiple=8)
    assert blocks[:24].all() and (~blocks).sum() == 56


@pytest.mark.parametrize(
    ("micro_experts", "ratio", "removed"),
    [(192, 0.2, 38), (192, 0.6, 115), (100, 0.29, 29), (10, 0.0, 0), (7, 0.999, 6)],
)
def test_count_is_the_floor_of_n_times_ratio(micro_experts, ratio, removed):
    assert to_remove(micro_experts, ratio) == removed
