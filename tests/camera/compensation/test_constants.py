"""Constants of removed experts, against least squares written out.

Shapes: T tokens, E experts, R removed, H hidden, S parts of the tokens (fitted to, held out).
"""

import pytest
import torch

from camera.compensation.constants import ENOUGH, RIDGES, UNJUDGED, fitted_constants

T, E, H = 60, 6, 5


def problem(seed=0, tokens=T):
    """Outputs f_TEH and weights a_TE, of which a token chooses three."""
    draw = torch.Generator().manual_seed(seed)
    f_TEH = torch.randn(tokens, E, H, generator=draw, dtype=torch.float64) + 0.5
    a_TE = torch.rand(tokens, E, generator=draw, dtype=torch.float64)
    chosen = torch.rand(tokens, E, generator=draw).argsort(1) < 3
    return f_TEH, a_TE * chosen


def sums(f_TEH, a_TE, fitted=T):
    """Means, and the two sums over the tokens up to `fitted` and over the others."""
    own = (a_TE > 0).double()
    mean_EH = torch.einsum("te,teh->eh", own, f_TEH) / own.sum(0).clamp(min=1)[:, None]
    parts = [(f_TEH[:fitted], a_TE[:fitted]), (f_TEH[fitted:], a_TE[fitted:])]
    gram_SEE = torch.stack([a_TE.T @ a_TE for _, a_TE in parts])
    joint = [torch.einsum("td,te,teh->deh", a_TE, a_TE, f_TEH) for f_TEH, a_TE in parts]
    return mean_EH, gram_SEE, torch.stack(joint)


def missing(f_TEH, a_TE, removed, constants_RH):
    """What constants leave of the output of the removed experts, [T, H]."""
    a_TR = a_TE[:, removed]
    return torch.einsum("tr,trh->th", a_TR, f_TEH[:, removed]) - a_TR @ constants_RH


def least_squares(f_TEH, a_TE, removed, mean_RH, ridge):
    a_TR = a_TE[:, removed]
    root = (ridge * a_TR.square().sum(0).mean()).sqrt()
    left = torch.cat([a_TR, root * torch.eye(len(removed))])
    lost_TH = torch.einsum("tr,trh->th", a_TR, f_TEH[:, removed])
    return torch.linalg.lstsq(left, torch.cat([lost_TH, root * mean_RH])).solution


@pytest.mark.parametrize("removed", [[2], [0, 3], [1, 2, 4, 5], list(range(E))])
def test_they_are_the_joint_least_squares_with_a_ridge_to_the_means(removed):
    f_TEH, a_TE = problem()
    given = sums(f_TEH, a_TE)
    want_RH = least_squares(f_TEH, a_TE, removed, given[0][removed], UNJUDGED)
    found_RH, ridge = fitted_constants(removed, *given)
    torch.testing.assert_close(found_RH, want_RH)
    assert ridge == UNJUDGED  # nothing is held out


@pytest.mark.parametrize(("fitted", "seed"), [(12, 0), (24, 6), (45, 2), (50, 8)])
def test_the_largest_ridge_that_gains_enough_on_held_out_tokens_is_taken(fitted, seed):
    """Of all that is tried the half of the most is enough; then all tokens are fitted to."""
    f_TEH, a_TE = problem(seed)
    removed, given = [0, 1, 4], sums(f_TEH, a_TE, fitted)
    mean_RH = given[0][removed]
    first, out = (f_TEH[:fitted], a_TE[:fitted]), (f_TEH[fitted:], a_TE[fitted:])
    by_means = missing(*out, removed, mean_RH).square().sum()
    gains = {
        ridge: by_means
        - missing(*out, removed, least_squares(*first, removed, mean_RH, ridge)).square().sum()
        for ridge in RIDGES
    }
    most = max(gains.values())
    fitting = [ridge for ridge, gain in gains.items() if gain > 0 and gain >= ENOUGH * most]
    found_RH, ridge = fitted_constants(removed, *given)
    assert ridge == max(fitting, default=0)
    want_RH = least_squares(f_TEH, a_TE, removed, mean_RH, ridge) if ridge else mean_RH
    torch.testing.assert_close(found_RH, want_RH)


def test_they_leave_less_than_the_means_do_where_that_holds_for_held_out_tokens_too():
    f_TEH, a_TE = problem(tokens=400)
    f_TEH[:, 1] += 3 * a_TE[:, 4, None] - 2 * a_TE[:, 0, None]  # goes with its neighbours' weights
    removed, given = [0, 1, 4], sums(f_TEH, a_TE, 350)
    found_RH, ridge = fitted_constants(removed, *given)
    left, by_means = (
        missing(f_TEH, a_TE, removed, constants_RH).norm()
        for constants_RH in (found_RH, given[0][removed])
    )
    assert 0 < ridge < max(RIDGES) and left < by_means


def test_means_stay_where_a_fit_is_no_better_on_held_out_tokens():
    f_TEH, a_TE = problem()
    mean_EH, gram_SEE, joint_SEEH = sums(f_TEH, a_TE, 30)
    joint_SEEH[1] = gram_SEE[1][..., None] * mean_EH  # held out: every output is the mean
    found_RH, ridge = fitted_constants([0, 1, 4], mean_EH, gram_SEE, joint_SEEH)
    assert ridge == 0 and torch.equal(found_RH, mean_EH[[0, 1, 4]])


def test_an_expert_without_tokens_keeps_its_mean():
    f_TEH, a_TE = problem()
    a_TE[:, [1, 2]] = 0
    given = sums(f_TEH, a_TE, 40)
    given[0][1] = 7.0  # known from elsewhere
    found_RH, _ = fitted_constants([1, 3], *given)
    torch.testing.assert_close(found_RH[0], given[0][1])
    torch.testing.assert_close(fitted_constants([1, 2], *given)[0], given[0][[1, 2]])
    assert fitted_constants([], *given)[0].shape == (0, H)
