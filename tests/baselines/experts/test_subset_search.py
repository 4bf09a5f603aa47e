"""Searches for the experts that go, on errors of which everything is known.

Shapes: T tokens, C candidates, E experts, H hidden.
"""

import itertools

import pytest
import torch

from baselines.experts.subset_search import OutputError, keep_best, resolve, search
from camera.runtime.errors import CameraError
from tests.helpers.dropping import candidates

# J of one set is summed in fp32, in an order that hangs on how many sets are asked for at once.
SAME = 1e-5


def random_error(experts, top_k=2, count=60, seed=0):
    """J of plain softmax top-k routing, experts and tokens random."""
    draw = torch.Generator().manual_seed(seed)
    out_TEH = torch.randn(count, experts, 5, generator=draw)
    logits_TE = torch.randn(count, experts, generator=draw)

    def route(keep_CE):
        logits_TCE = logits_TE[:, None].masked_fill(~keep_CE, float("-inf"))
        weight, index = logits_TCE.softmax(-1).topk(top_k)
        return torch.zeros_like(logits_TCE).scatter_(-1, index, weight)

    return OutputError(out_TEH @ out_TEH.transpose(1, 2), route), out_TEH, route


def test_blocks_of_tokens_have_a_norm_each():
    error, out_TEH, route = random_error(6)
    keep_CE = candidates([(0, 1, 4), (2, 3, 5)], 6)
    z_TCH = (route(keep_CE) - route(torch.ones(1, 6, dtype=torch.bool))) @ out_TEH
    for block in (60, 25, 7):
        want_C = sum(part.norm(dim=(0, 2)) for part in z_TCH.split(block))
        got_C = OutputError(error.gram_TEE, route, block)(keep_CE)
        torch.testing.assert_close(got_C.float(), want_C, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drop", [1, 2, 3])
def test_enumeration_is_the_best_and_greedy_never_better(drop):
    error, *_ = random_error(8)
    every = candidates(list(itertools.combinations(range(8), 8 - drop)), 8)
    best = search(error, 8, drop, how="enumerate")
    assert best.error == pytest.approx(error(every).min().item(), rel=SAME)
    assert best.error == pytest.approx(error(~candidates([best.drop], 8)).item(), rel=SAME)
    greedy = search(error, 8, drop, how="greedy")
    assert greedy.evaluations == sum(8 - i for i in range(drop))
    assert greedy.error == pytest.approx(error(~candidates([greedy.drop], 8)).item(), rel=SAME)
    for how in ("greedy", "independent"):
        found = search(error, 8, drop, how=how)
        assert len(found.drop) == drop and found.error >= best.error * (1 - SAME)
        if drop == 1:
            assert found.drop == best.drop


def test_greedy_drops_what_enumeration_would_where_the_losses_add_up():
    cost_E = torch.tensor([5.0, 1, 4, 2, 3, 9, 8, 7], dtype=torch.float64)
    for how in ("enumerate", "greedy", "independent"):
        found = search(lambda keep_CE: (~keep_CE).double() @ cost_E, 8, 3, how=how)
        assert found.drop == [1, 3, 4] and found.error == 6 and found.search == how


def test_of_equals_the_first_goes():
    for how in ("enumerate", "greedy", "independent"):
        assert search(lambda keep_CE: torch.zeros(len(keep_CE)), 6, 2, how=how).drop == [0, 1]


def test_random_search_is_seeded_and_counts_what_it_tried():
    error, *_ = random_error(12)
    a, b, c = (
        search(error, 12, 5, how="random", limit=50, seed=s, groups=g)
        for s, g in ((1, 1), (1, 1), (2, 1))
    )
    assert a == b and a.drop != c.drop and a.evaluations == 50 and a.search == "random"
    assert search(error, 12, 5, how="enumerate").error <= a.error * (1 + SAME)
    assert search(error, 12, 5, how="random", limit=800).search == "enumerate"


@pytest.mark.parametrize("how", ["enumerate", "greedy", "independent", "random"])
def test_groups_lose_equally_many(how):
    error, *_ = random_error(12)
    found = search(error, 12, 6, groups=3, how=how, limit=5000 if how == "enumerate" else 100)
    assert [sum(e // 4 == g for e in found.drop) for g in range(3)] == [2, 2, 2]
    if how == "enumerate":
        pairs = [list(itertools.combinations(range(s, s + 4), 2)) for s in (0, 4, 8)]
        sets = [sum(parts, ()) for parts in itertools.product(*pairs)]
        assert found.evaluations == len(sets) == 216
        least = error(~candidates(sets, 12)).min().item()
        assert found.error == pytest.approx(least, rel=SAME)


def test_auto_enumerates_up_to_the_limit_and_more_is_refused():
    assert resolve("auto", 8, 2) == "enumerate" and resolve("auto", 16, 8) == "greedy"
    assert resolve("auto", 64, 13) == "greedy"
    assert resolve("enumerate", 16, 8, limit=13000) == "enumerate"
    with pytest.raises(
        CameraError, match=r"1\.31e\+13 sets of 13 out of 64.*max_subsets=5000.*greedy"
    ):
        resolve("enumerate", 64, 13)
    with pytest.raises(CameraError, match="search=genetic is none of auto"):
        resolve("genetic", 8, 2)


def test_the_lowest_scores_go_from_each_group():
    score_E = torch.tensor([3.0, 1, 2, 0, 9, 9, 9, 8])
    assert keep_best(score_E, 2).tolist() == [True, False, True, False] + [True] * 4
    assert keep_best(score_E, 2, 2).tolist() == [True] * 3 + [False] + [True] * 3 + [False]
