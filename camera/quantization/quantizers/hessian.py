"""Hessians of a layer's matrices, and the triangular factors that GPTQ's solver reads.

Shapes: E experts, R rows (outputs), C columns (inputs), N tokens.
"""

from dataclasses import dataclass

import torch


class Hessian:
    """Sum of x x^T over the tokens of each expert, in fp32: the Hessian of |Wx - Qx|^2, halved."""

    def __init__(self, experts: int, columns: int, device: torch.device | str = "cpu"):
        self.H_ECC = torch.zeros(experts, columns, columns, device=device)
        self.tokens_E = torch.zeros(experts, dtype=torch.int64)

    def add(self, expert: int, x_NC: torch.Tensor) -> None:
        """Count the N inputs that reached an expert; chunks may come in any order."""
        x_NC = x_NC.detach().float()
        self.H_ECC[expert].addmm_(x_NC.T, x_NC)
        self.tokens_E[expert] += len(x_NC)


@dataclass(frozen=True)
class Factor:
    """What the solver needs of a Hessian; one serves every weight that reads the same inputs.

    U_ECC is upper triangular with U^T U = (H + damping * mean(diag H) * I)^-1, over columns in the
    order perm_EC (None: as they stand); dead_EC are the columns that no token ever touched.
    fallback says per expert what stood in for its own Hessian: "" (nothing), "rtn" or
    "mean_hessian" (too few tokens), "rtn_damping" (no rung of the damping ladder helped).
    """

    U_ECC: torch.Tensor
    dead_EC: torch.Tensor
    perm_EC: torch.Tensor | None
    damping_E: list[float]
    fallback: list[str]

    def expand(self, experts: int) -> "Factor":
        """The same factor for every one of several weights, if it is only one."""
        if len(self.fallback) == experts:
            return self
        tensors = (self.U_ECC, self.dead_EC, self.perm_EC)
        wide = (t if t is None else t.expand(experts, *t.shape[1:]) for t in tensors)
        return Factor(*wide, self.damping_E * experts, self.fallback * experts)


def output_error(W_ERC: torch.Tensor, Q_ERC: torch.Tensor, H_ECC: torch.Tensor) -> torch.Tensor:
    """|Wx - Qx|^2 summed over the tokens of H, per row: (w - q) H (w - q)^T, fp32 [E, R]."""
    D_ERC = W_ERC.float() - Q_ERC.float()
    return ((D_ERC @ H_ECC.float()) * D_ERC).sum(2)


def inverse_factor(H_ECC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper triangular U with U^T U = H^-1, and which H were positive definite.

    H = R R^T with R upper triangular is the Cholesky factor of H read backwards, and U = R^-1: one
    factorisation, and H itself is never inverted.
    """
    L_ECC, info_E = torch.linalg.cholesky_ex(H_ECC.flip(1, 2))
    eye = torch.eye(H_ECC.shape[1], device=H_ECC.device)
    U_ECC = torch.linalg.solve_triangular(L_ECC, eye, upper=False).flip(1, 2)
    return U_ECC, (info_E == 0) & U_ECC.isfinite().flatten(1).all(1)
