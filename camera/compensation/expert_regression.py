"""One expert of a refit: its part of the normal equations, and steps of its own.

Shapes: T tokens of the layer, N of one expert, P a few of them, W its kept width, H hidden.
"""

from collections.abc import Iterator

import torch

from camera.runtime import distributed

TINY = 1e-6
PIECE = 4096  # tokens whose phi stands in fp32 at a time


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
    def norm2_W(self) -> torch.Tensor:
        """|w_i^old|^2, at least a small part of its mean: none moves freely."""
        norm2_W = self.old_WH.square().sum(1)
        return norm2_W.clamp(min=TINY * norm2_W.mean())

    @property
    def can_move(self) -> bool:
        """False for an expert that puts nothing out, whose every change is infinite."""
        return bool((1 / self.norm2_W).isfinite().all())

    @property
    def penalty(self) -> float:
        """What the change of the weights counts."""
        if self._held:
            return 0.0
        return (self._ridge_W1 * (self.weight_WH - self.old_WH).square()).sum().item()

    def factorise(self, ridge: float) -> None:
        """Prepare steps; w_i is held back by ridge * |w_i - w_i^old|^2 / |w_i^old|^2."""
        self._ridge_W1 = (ridge / self.norm2_W)[:, None]
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

    def spread(self, phi_PW: torch.Tensor, piece: range) -> None:
        """Write phi of these tokens of the layer, each as much as it counts, where they stand."""
        if self.tokens_N is None:
            rows, where_N = slice(piece.start, piece.stop), slice(None)
        else:
            ends = torch.tensor([piece.start, piece.stop], device=self.tokens_N.device)
            rows = slice(*torch.searchsorted(self.tokens_N, ends).tolist())
            where_N = self.tokens_N[rows] - piece.start
        phi_NW = self.phi_NW[rows].float()
        phi_PW[where_N] = phi_NW if self.scale_N1 is None else phi_NW * self.scale_N1[rows]

    def move(self, residual_TH: torch.Tensor, change_WH: torch.Tensor) -> None:
        """Change the weights, and what is missing with them."""
        self._change(residual_TH, self._residual(residual_TH), change_WH)

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
