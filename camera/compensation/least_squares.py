"""Compensation: the output weights of what stays of a layer, refitted to what it put out.

    min over w  sum_t c_t |y_t - sum_i phi_ti w_i|^2
                + ridge * E * sum_i |w_i - w_i^old|^2 / |w_i^old|^2

y_t is the layer's output before it was cut, i runs over the micro-experts that stay, E is the
mean of sum_t c_t phi_ti^2 |w_i|^2 over them. c_t is 1 / |h_t|^2, h_t the hidden state after the
layer: what comes next normalises it, and a few tokens whose states are many times as large as all
others would else be the only ones that count. A relative change of weights costs the same whatever
the scale of a micro-expert, and however little the calibration text uses it: what other texts need
of it stays. One expert, or a layer of at most `AT_ONCE` micro-experts, is solved at once
(`camera.compensation.normal_equations`). A wider layer is solved by block coordinate descent over
experts on the residual, so that no matrix is wider than one expert: each step is the exact minimum
over one expert's w_i, the others held.

Shapes: T calibration tokens (of them the first `fitted` fit, the others are held out), H hidden,
N tokens of one expert, W its kept width, K micro-experts of all experts together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch

from camera.compensation.expert_regression import ExpertRegression
from camera.compensation.normal_equations import NormalEquations
from camera.compensation.settings import CompensationSettings
from camera.runtime import distributed
from camera.runtime.errors import CameraError

ENOUGH = 1e-3  # a sweep, or a smaller ridge, that improves by less than this share is the last
AT_ONCE = 4096  # micro-experts: four matrices of so many rows and columns are 256 MiB


@dataclass(frozen=True)
class FitReport:
    """What a fit did: squared norms of what was removed and of what of it is missing afterwards, on
    all tokens and (`_out`) on those held out, before these were fitted to; the ridge chosen (0: the
    old weights are best) and the sweeps it took."""

    removed: float
    residual: float
    removed_out: float
    residual_out: float
    ridge: float
    sweeps: int


def at_once(widths: Sequence[int]) -> bool:
    """Whether experts of these widths are solved by one matrix over all."""
    return len(widths) == 1 or sum(widths) <= AT_ONCE


def refit(
    blocks: list[ExpertRegression],
    residual_TH: torch.Tensor,
    fitted: int,
    how: CompensationSettings,
    where: str = "a layer",
) -> FitReport:
    """Fit the blocks' weights so that little of `residual_TH` is left (fp32, changed in place).

    The ridge is that after which the held-out tokens, those from `fitted` on, are closest; with it
    all tokens are then fitted. Where no ridge helps, weights and residual are left as they were.
    CameraError, with the name `where`, if squares of activations or weights overflow.
    """
    blocks = [block for block in blocks if block.weight_WH.numel()]
    removed, removed_out = _errors(residual_TH, fitted)
    left = FitReport(removed + removed_out, removed + removed_out, removed_out, removed_out, 0.0, 0)
    if not blocks or not removed:
        return left
    if at_once([len(block.old_WH) for block in blocks]):
        return _solve(blocks, residual_TH, fitted, how, where, left)
    return _descend_all(blocks, residual_TH, fitted, how, where, left)


def _solve(
    blocks: list[ExpertRegression],
    residual_TH: torch.Tensor,
    fitted: int,
    how: CompensationSettings,
    where: str,
    left: FitReport,
) -> FitReport:
    """`refit` of all blocks at once, by their normal equations."""
    blocks = [block for block in blocks if block.can_move]
    if not blocks:
        return left
    sums = NormalEquations.of(blocks, residual_TH, range(fitted))
    out = NormalEquations.of(blocks, residual_TH, range(fitted, len(residual_TH)))
    norm2_K = torch.cat([block.norm2_W for block in blocks])
    energy = (sums.gram_KK.diagonal().double() * norm2_K.double()).mean().item()
    _refuse_overflow(left.removed + energy, where)
    judge = out if left.removed_out else sums  # without held-out tokens the fitted ones decide
    best, chosen = judge.missing, 0.0
    for ridge in how.ridges if energy else ():
        reached = judge.left(sums.solve(ridge, norm2_K))
        if reached >= best * (1 - ENOUGH):
            break
        best, chosen = reached, ridge
    if not chosen:
        return left
    sums.add(out)
    change_KH = sums.solve(chosen, norm2_K)
    widths = [len(block.old_WH) for block in blocks]
    for block, change_WH in zip(blocks, change_KH.split(widths), strict=True):
        block.move(residual_TH, change_WH)
    missing, out_now = _errors(residual_TH, fitted)
    best = best if left.removed_out else 0.0
    return replace(left, residual=missing + out_now, residual_out=best, ridge=chosen, sweeps=1)


def _refuse_overflow(squares: float, where: str) -> None:
    if not isfinite(squares):
        raise CameraError(
            f"the refit of {where} overflows: its activations or output weights are too large to "
            "be squared; check the weights, or set compensate=none."
        )


def _descend_all(
    blocks: list[ExpertRegression],
    residual_TH: torch.Tensor,
    fitted: int,
    how: CompensationSettings,
    where: str,
    left: FitReport,
) -> FitReport:
    """`refit` by coordinate descent over the blocks."""
    judge = 1 if left.removed_out else 0  # without held-out tokens the fitted ones decide
    best, chosen = (left.removed, left.removed_out)[judge], 0.0
    for block in blocks:
        block.fit_to(fitted)
    _refuse_overflow(left.removed + _mean_energy(blocks), where)
    for ridge in how.ridges:
        reached, _ = _descend(blocks, residual_TH, fitted, ridge, how.sweeps, judge)
        if reached >= best * (1 - ENOUGH):
            break
        best, chosen = reached, ridge
    if not chosen:
        for block in blocks:
            block.reset(residual_TH)
        return left
    if judge:
        for block in blocks:
            block.fit_to(len(residual_TH))
    missing, sweeps = _descend(blocks, residual_TH, len(residual_TH), chosen, how.sweeps, 0)
    return replace(left, residual=missing, residual_out=best * judge, ridge=chosen, sweeps=sweeps)


def refit_alone(
    block: ExpertRegression,
    residual_NH: torch.Tensor,
    fitted: int,
    how: CompensationSettings,
    where: str,
) -> FitReport:
    """Fit one expert by itself, to a residual of its own tokens."""
    if block.tokens_N is not None:
        fitted = int(torch.searchsorted(block.tokens_N, fitted))
    own = ExpertRegression(None, block.phi_NW, block.old_WH, block.scale_N1)
    found = refit([own], residual_NH, fitted, how, where)
    block.weight_WH = own.weight_WH
    return found


def fit_report(fits: list[FitReport]) -> dict[str, Any]:
    """Share of the removed squared output that is still missing, on all tokens and held-out ones
    (before these were fitted to), and the ridges that were chosen."""
    removed, missing = sum(f.removed for f in fits), sum(f.residual for f in fits)
    removed_out, missing_out = sum(f.removed_out for f in fits), sum(f.residual_out for f in fits)
    return {
        "missing": missing / removed if removed else 0.0,
        "missing_held_out": missing_out / removed_out if removed_out else None,
        "ridges": [f.ridge for f in fits],
        "sweeps": [f.sweeps for f in fits],
    }


def _descend(
    blocks: list[ExpertRegression],
    residual_TH: torch.Tensor,
    fitted: int,
    ridge: float,
    most: int,
    judge: int,
) -> tuple[float, int]:
    """Sweep over the blocks as long as the tokens judged by get closer or, if these are the ones
    fitted to, what is minimised gets smaller; their error, and the sweeps."""
    energy = _mean_energy(blocks)
    for block in blocks:
        block.factorise(ridge * energy)

    def measured() -> tuple[float, float]:
        error = _errors(residual_TH, fitted)[judge]
        return error, error if judge else error + sum(block.penalty for block in blocks)

    (error, reached), sweeps, enough = measured(), 0, False
    while sweeps < most and not enough:
        for block in blocks:
            block.step(residual_TH)
        before, (error, reached) = reached, measured()
        sweeps, enough = sweeps + 1, reached >= before * (1 - ENOUGH)
    return error, sweeps


def _mean_energy(blocks: list[ExpertRegression]) -> float:
    energy_N = torch.cat([block.energy_W for block in blocks])
    return energy_N.double().mean().item()


def _errors(residual_TH: torch.Tensor, fitted: int) -> tuple[float, float]:
    """Squared norm of what is left on the tokens fitted to, and on those held out."""
    parts = (residual_TH[:fitted], residual_TH[fitted:])
    norms = torch.stack([torch.linalg.vector_norm(part) for part in parts])
    first, second = distributed.all_sum(norms.double().square()).tolist()
    return first, second
