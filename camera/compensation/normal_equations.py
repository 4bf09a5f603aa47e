"""The normal equations of a refit: sums over tokens, from which every ridge is solved and judged.

    A = Phi^T Phi + diag(ridge * E / |w_i^old|^2),   A (w - w^old) = Phi^T R

Phi is of all experts side by side, R what is missing of the output, each token as much as it
counts. What a change of weights leaves of R is a quadratic form of the same sums, so held-out
tokens, with sums of their own, judge any number of ridges without being read again.

Shapes: T tokens, P of them at a time, H hidden, K micro-experts of all experts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from camera.compensation.expert_regression import PIECE, ExpertRegression
from camera.runtime import distributed


@dataclass
class NormalEquations:
    """gram_KK = Phi^T Phi, pull_KH = Phi^T R and missing = |R|^2, over all processes."""

    gram_KK: torch.Tensor
    pull_KH: torch.Tensor
    missing: float

    @classmethod
    def of(
        cls, blocks: Sequence[ExpertRegression], residual_TH: torch.Tensor, tokens: range
    ) -> NormalEquations:
        """The sums over these tokens of the layer."""
        widths = [len(block.old_WH) for block in blocks]
        gram_KK = residual_TH.new_zeros(sum(widths), sum(widths))
        pull_KH = residual_TH.new_zeros(sum(widths), residual_TH.shape[1])
        missing = torch.zeros((), dtype=torch.float64, device=residual_TH.device)
        for start in range(0, len(tokens), PIECE):
            piece = tokens[start : start + PIECE]
            phi_PK = residual_TH.new_zeros(len(piece), sum(widths))
            for block, phi_PW in zip(blocks, phi_PK.split(widths, dim=1), strict=True):
                block.spread(phi_PW, piece)
            part_PH = residual_TH[piece.start : piece.stop]
            gram_KK.addmm_(phi_PK.T, phi_PK)
            pull_KH.addmm_(phi_PK.T, part_PH)
            missing += part_PH.double().square().sum()
        return cls(
            distributed.all_sum(gram_KK),
            distributed.all_sum(pull_KH),
            distributed.all_sum(missing).item(),
        )

    def add(self, other: NormalEquations) -> None:
        """Take the tokens of `other` in."""
        self.gram_KK += other.gram_KK
        self.pull_KH += other.pull_KH
        self.missing += other.missing

    def solve(self, ridge: float, norm2_K: torch.Tensor) -> torch.Tensor:
        """The change of weights [K, H]; a micro-expert's costs `ridge` * E / its old |w_i|^2.

        E is the mean energy, |phi_i|^2 |w_i|^2. One of which nothing is known stays as it is.
        """
        energy = (self.gram_KK.diagonal().double() * norm2_K.double()).mean().item()
        left_KK = self.gram_KK.clone()
        left_KK.diagonal().add_(ridge * energy / norm2_K)
        # scaled to a diagonal of ones: norms differ by many powers of ten
        scale_K1 = left_KK.diagonal().sqrt()[:, None].clone()
        left_KK.div_(scale_K1).div_(scale_K1.T)
        factor_KK = torch.linalg.cholesky(left_KK)
        return torch.cholesky_solve(self.pull_KH / scale_K1, factor_KK).div_(scale_K1)

    def left(self, change_KH: torch.Tensor) -> float:
        """|R - Phi change|^2: what is still missing after a change of the weights."""
        taken = 2 * self.pull_KH - self.gram_KK @ change_KH
        return max(0.0, self.missing - (taken.double() * change_KH.double()).sum().item())
