"""Compensation: the output weights of what stays of a layer, refitted to what the layer put out.

    min over w  sum_t c_t |y_t - sum_i phi_ti w_i|^2
                + ridge * E * sum_i |w_i - w_i^old|^2 / |w_i^old|^2

y_t is the layer's output before it was cut, i runs over the micro-experts that stay, E is the
mean of sum_t c_t phi_ti^2 |w_i|^2 over them. c_t is 1 / |h_t|^2, h_t the hidden state after the
layer: what comes next normalises it, and a few tokens whose states are many times as large as all
others would else be the only ones that count. A relative change of weights costs the same whatever
the scale of a micro-expert, and however little the calibration text uses it: what other texts need
of it stays. Solved by block coordinate descent over experts on the residual, so that no matrix is
wider than one expert: each step is the exact minimum over one expert's w_i, the others held.

Shapes: T calibration tokens (of them the first `fitted` fit, the others are held out), H hidden,
N tokens of one expert, P a few of them, W its kept width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch

from camera.compensation.settings import CompensationSettings
from camera.runtime import distributed
from camera.runtime.errors import CameraError

ENOUGH = 1e-3  # a sweep, or a smaller ridge, that improves by less than this share is the last
TINY = 1e-6
PIECE = 4096  # tokens whose phi stands in fp32 at a time


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


class ExpertRegression:
    """One expert of the descent: `phi_NW` on its tokens (None for all), `weight_WH` to fit.

    `scale_N1` is the root of what each token counts, as it is in the residual.
    """

    def __init__(
        self,
        tokens_N: torch.Tensor | None,
        phi_NW: torch.Tensor,
        weight_WH: torch.Tensor,
        scale_N1: torch.Tensor | None = None,
    ):
        self.tokens_N, self.phi_NW, self.scale_N1 = tokens_N, phi_NW, scale_N1
        self.old_WH = weight_WH.float()
        self.weight_WH = self.old_WH.clone()

    def output(self) -> torch.Tensor:
        """What it put out with its old weights, each token as much as it counts, fp32 [N, H]."""
        y_NH = self.old_WH.new_zeros(len(self.phi_NW), self.old_WH.shape[1])
        for rows, phi_PW in self._pieces():
            y_NH[rows].addmm_(phi_PW, self.old_WH)
        return y_NH

    def fit_to(self, fitted: int) -> None:
        """Count only tokens before `fitted` of the layer in what follows."""
        self._fitted = fitted
        if self.tokens_N is not None:
            self._fitted = int(torch.searchsorted(self.tokens_N, fitted))
        width = len(self.old_WH)
        gram_WW = self.old_WH.new_zeros(width, width)
        for _, phi_PW in self._pieces(self._fitted):
            gram_WW.addmm_(phi_PW.T, phi_PW)
        self._gram_WW = distributed.all_sum(gram_WW)

    @property
    def energy_W(self) -> torch.Tensor:
        """|phi_i|^2 |w_i|^2 of every micro-expert, over the tokens fitted to."""
        return self._gram_WW.diagonal() * self.old_WH.square().sum(1)

    @property
    def penalty(self) -> float:
        """What the change of the weights counts."""
        if self._held:
            return 0.0
        return (self._ridge_W1 * (self.weight_WH - self.old_WH).square()).sum().item()

    def factorise(self, ridge: float) -> None:
        """Prepare steps; w_i is held back by ridge * |w_i - w_i^old|^2 / |w_i^old|^2."""
        norm2_W = self.old_WH.square().sum(1)
        floor = TINY * norm2_W.mean()  # a micro-expert that did nothing is held by a finite force
        self._ridge_W1 = (ridge / norm2_W.clamp(min=floor))[:, None]
        # an expert that puts nothing out is held by an infinite one: it stays as it is
        self._held = not self._ridge_W1.isfinite().all()
        if self._held:
            return
        left_WW = self._gram_WW + torch.diag(self._ridge_W1[:, 0])
        # scaled to a diagonal of ones: norms differ by many powers of ten
        self._scale_W1 = left_WW.diagonal().sqrt()[:, None]
        self._factor_WW = torch.linalg.cholesky(left_WW / self._scale_W1 / self._scale_W1.T)

    def reset(self, residual_TH: torch.Tensor) -> None:
        """Go back to the old weights."""
        self._change(residual_TH, self._residual(residual_TH), self.old_WH - self.weight_WH)
        self.weight_WH = self.old_WH.clone()  # to the bit

    def step(self, residual_TH: torch.Tensor) -> None:
        """Move to the minimum over this expert's weights, the others held."""
        if self._held:
            return
        residual_NH = self._residual(residual_TH)
        pull_WH = torch.zeros_like(self.old_WH)
        for rows, phi_PW in self._pieces(self._fitted):
            pull_WH.addmm_(phi_PW.T, residual_NH[rows])
        pull_WH = distributed.all_sum(pull_WH)
        pull_WH -= self._ridge_W1 * (self.weight_WH - self.old_WH)
        change_WH = torch.cholesky_solve(pull_WH / self._scale_W1, self._factor_WW)
        change_WH /= self._scale_W1
        self._change(residual_TH, residual_NH, change_WH)

    def alone(
        self, residual_NH: torch.Tensor, fitted: int, how: CompensationSettings, where: str
    ) -> FitReport:
        """Fit this expert by itself, to a residual of its own tokens."""
        if self.tokens_N is not None:
            fitted = int(torch.searchsorted(self.tokens_N, fitted))
        own = ExpertRegression(None, self.phi_NW, self.old_WH, self.scale_N1)
        found = coordinate_descent([own], residual_NH, fitted, how, where)
        self.weight_WH = own.weight_WH
        return found

    def _pieces(self, first: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """phi of the first tokens, each as much as it counts, fp32, a few at a time."""
        phi_NW = self.phi_NW[:first]
        for start in range(0, len(phi_NW), PIECE):
            rows = slice(start, min(start + PIECE, len(phi_NW)))
            phi_PW = phi_NW[rows].float()
            yield rows, phi_PW if self.scale_N1 is None else phi_PW * self.scale_N1[rows]

    def _residual(self, residual_TH: torch.Tensor) -> torch.Tensor:
        if self.tokens_N is None:
            return residual_TH
        return residual_TH.index_select(0, self.tokens_N)

    def _change(
        self, residual_TH: torch.Tensor, residual_NH: torch.Tensor, change_WH: torch.Tensor
    ) -> None:
        self.weight_WH += change_WH
        for rows, phi_PW in self._pieces():
            residual_NH[rows].addmm_(phi_PW, change_WH, alpha=-1)
        if self.tokens_N is not None:  # a token is an expert's once, and index_add_ is slow
            residual_TH.index_copy_(0, self.tokens_N, residual_NH)


def coordinate_descent(
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
    judge = 1 if removed_out else 0  # without held-out tokens the fitted ones decide
    best, chosen = (removed, removed_out)[judge], 0.0
    for block in blocks:
        block.fit_to(fitted)
    if not isfinite(removed + removed_out + _mean_energy(blocks)):
        raise CameraError(
            f"the refit of {where} overflows: its activations or output weights are too large to "
            "be squared; check the weights, or set compensate=none."
        )
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

    (error, reached), sweeps = measured(), 0
    enough = len(blocks) == 1  # one step is exact
    while sweeps == 0 or (sweeps < most and not enough):
        for block in blocks:
            block.step(residual_TH)
        before, (error, reached) = reached, measured()
        sweeps, enough = sweeps + 1, enough or reached >= before * (1 - ENOUGH)
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
