"""How many micro-experts each layer gives, from what trials of each cost."""

import itertools

import torch

from camera.pruning.allocation import allocate


def test_allocation_is_the_cheapest_of_all():
    removed = [[4, 8, 12], [4, 8, 12], [4, 8, 12]]
    cost = [[1.0, 2.5, 9.0], [0.2, 3.0, 8.0], [2.0, 4.0, 6.5]]  # convex: the hull is the curve
    for total in range(0, 37, 4):
        best = min(
            sum(0.0 if n == 0 else cost[layer][n // 4 - 1] for layer, n in enumerate(counts))
            for counts in itertools.product((0, 4, 8, 12), repeat=3)
            if sum(counts) == total
        )
        gone = allocate(removed, cost, total, unit=4)
        assert sum(gone) == total
        assert sum(0.0 if n == 0 else cost[i][n // 4 - 1] for i, n in enumerate(gone)) == best


def test_allocation_gives_what_is_asked_and_never_more_than_was_tried():
    torch.manual_seed(0)
    removed = [sorted(torch.randperm(500)[:4].add(1).tolist()) for _ in range(6)]
    cost = [torch.rand(4).cumsum(0).tolist() for _ in range(6)]
    limit = sum(counts[-1] for counts in removed)
    for total in (0, 1, limit // 3, limit - 1, limit):
        gone = allocate(removed, cost, total)
        assert sum(gone) == total
        assert all(0 <= n <= counts[-1] for n, counts in zip(gone, removed, strict=True))


def test_a_trial_that_costs_less_than_a_smaller_one_is_no_reason_to_cut_more():
    assert allocate([[5, 10, 15]] * 2, [[1.0, 3.0, 2.0], [0.75, 1.5, 4.0]], 10, 5) == [0, 10]


def test_what_any_cut_of_a_layer_costs_is_no_reason_to_spare_it():
    removed, cost = [[10, 20, 30]] * 2, [[1.0, 2.0, 4.0], [2.0, 4.0, 6.0]]
    rerouted = [[3.0 + c for c in cost[0]], cost[1]]
    for total in (10, 25, 40):
        assert allocate(removed, rerouted, total) == allocate(removed, cost, total)


def test_a_layer_that_may_lose_nothing_gives_nothing():
    assert allocate([[0, 0], [5, 10]], [[0.0, 0.0], [1.0, 2.0]], 7) == [0, 7]
