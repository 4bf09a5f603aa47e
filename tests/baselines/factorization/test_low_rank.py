"""Low-rank deltas and merged bases: the identities of their mathematics."""

import pytest
import torch

from baselines.factorization.low_rank import low_rank, output_energy, whitener
from baselines.factorization.merged_base import kept_first, merged_base


def problem(rows, columns, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return delta, x, x.T @ x


SHAPES = [(12, 20), (20, 12), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape):
    delta, _, gram = problem(*shape)
    left, right = low_rank(delta, whitener(gram, 1e-6), min(shape))
    torch.testing.assert_close(left @ right, delta)


@pytest.mark.parametrize("rank", [1, 5, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_whitening_leaves_out_is_the_outputs_error(shape, rank):
    delta, x, gram = problem(*shape)
    left, right = low_rank(delta, whitener(gram, 0.0), rank)
    error = ((delta - left @ right) @ x.T).square().sum()
    tail = torch.linalg.svdvals(delta @ torch.linalg.cholesky(gram))[rank:].square().sum()
    torch.testing.assert_close(error, tail)
    torch.testing.assert_close(output_energy(delta - left @ right, gram), tail)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_inputs_it_is_the_plain_truncated_svd(shape):
    delta, _, gram = problem(*shape)
    left, right = low_rank(delta, whitener(torch.zeros_like(gram), 1e-6), 4)
    u, s, vh = torch.linalg.svd(delta)
    torch.testing.assert_close(left @ right, u[:, :4] * s[:4] @ vh[:4])
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_few_inputs_are_served_exactly_and_nothing_explodes(shape, tokens):
    delta, x, gram = problem(*shape, tokens=tokens)
    gram = gram.float().double()  # rounded: no longer positive definite
    left, right = low_rank(delta, whitener(gram, 1e-6), 4)
    error = (delta - left @ right) @ x.T
    assert error.norm() < 1e-2 * (delta @ x.T).norm()
    assert (left @ right).norm() <= 2 * delta.norm()


def test_a_delta_of_nothing_gives_zeros():
    left, right = low_rank(torch.zeros(6, 4), torch.eye(4), 2)
    assert left.isfinite().all() and right.isfinite().all() and not (left @ right).any()


def experts_and_fisher():
    torch.manual_seed(0)
    return torch.randn(5, 6, 7), torch.rand(5, 6, 7)


def test_equal_weights_give_the_mean_and_a_single_count_its_expert():
    weights, fisher = experts_and_fisher()
    ones = torch.ones(5, dtype=torch.int64)
    mean = weights.double().mean(0)
    torch.testing.assert_close(merged_base(weights, torch.ones(5, 6, 7), 7 * ones), mean)
    only = torch.tensor([0, 0, 9, 0, 0])
    torch.testing.assert_close(merged_base(weights, fisher, only), weights[2].double())


def test_weights_without_fisher_get_the_mean_by_counts():
    weights, fisher = experts_and_fisher()
    counts = torch.tensor([3, 1, 0, 4, 1])
    fisher[:, 2, 3] = 0
    base = merged_base(weights, fisher, counts)
    want = (weights[:, 2, 3].double() * counts).sum() / counts.sum()
    torch.testing.assert_close(base[2, 3], want)
    nothing = merged_base(weights, torch.zeros_like(fisher), torch.zeros_like(counts))
    torch.testing.assert_close(nothing, weights.double().mean(0))


def test_the_base_keeps_the_channels_of_largest_norm_times_input():
    base = torch.tensor([[1.0, 3.0, 2.0, 2.0]]).double()
    gram = torch.diag(torch.tensor([100.0, 1.0, 4.0, 4.0])).double()  # norms 10, 1, 2, 2
    assert kept_first(base, gram[None], 2).tolist() == [0, 2, 1, 3]
