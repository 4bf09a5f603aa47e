"""Constants of removed experts, against least squares written out.

Shapes: T tokens, E experts, R removed, H hidden.
"""

import pytest
import torch

from camera.compensation.constants import RIDGE, fitted_constants

T, E, H = 60, 6, 5


def problem(seed=0):
    """Outputs f_TEH and weights a_TE, of which a token chooses three."""
    draw = torch.Generator().manual_seed(seed)
    f_TEH = torch.randn(T, E, H, generator=draw, dtype=torch.float64) + 0.5
    a_TE = torch.rand(T, E, generator=draw, dtype=torch.float64)
    chosen = torch.rand(T, E, generator=draw).argsort(1) < 3
    return f_TEH, a_TE * chosen


def sums(f_TEH, a_TE):
    own = (a_TE > 0).double()
    mean_EH = torch.einsum("te,teh->eh", own, f_TEH) / own.sum(0).clamp(min=1)[:, None]
    return mean_EH, a_TE.T @ a_TE, torch.einsum("td,te,teh->deh", a_TE, a_TE, f_TEH)


@pytest.mark.parametrize("removed", [[2], [0, 3], [1, 2, 4, 5], list(range(E))])
def test_they_are_the_joint_least_squares_with_a_ridge_to_the_means(removed):
    f_TEH, a_TE = problem()
    mean_EH, gram_EE, joint_EEH = sums(f_TEH, a_TE)
    a_TR = a_TE[:, removed]
    lost_TH = torch.einsum("tr,trh->th", a_TR, f_TEH[:, removed])
    root = (RIDGE * a_TR.square().sum(0).mean()).sqrt()
    left = torch.cat([a_TR, root * torch.eye(len(removed))])
    right = torch.cat([lost_TH, root * mean_EH[removed]])
    want_RH = torch.linalg.lstsq(left, right).solution
    found_RH = fitted_constants(removed, mean_EH, gram_EE, joint_EEH)
    torch.testing.assert_close(found_RH, want_RH)


def test_they_leave_less_than_the_means_do():
    f_TEH, a_TE = problem(seed=1)
    removed, given = [0, 1, 4], sums(f_TEH, a_TE)
    lost_TH = torch.einsum("tr,trh->th", a_TE[:, removed], f_TEH[:, removed])
    left = [
        (lost_TH - a_TE[:, removed] @ constants_RH).norm()
        for constants_RH in (fitted_constants(removed, *given), given[0][removed])
    ]
    assert left[0] < left[1]


def test_an_expert_without_tokens_keeps_its_mean():
    f_TEH, a_TE = problem()
    a_TE[:, [1, 2]] = 0
    given = sums(f_TEH, a_TE)
    given[0][1] = 7.0  # known from elsewhere
    found_RH = fitted_constants([1, 3], *given)
    torch.testing.assert_close(found_RH[0], given[0][1])
    torch.testing.assert_close(fitted_constants([1, 2], *given), given[0][[1, 2]])
    assert fitted_constants([], *given).shape == (0, H)
