"""The low-rank product nearest to a matrix, by the outputs it gives on calibration inputs.

Shapes: M x N the matrix, R rank.
"""

import torch

ATTEMPTS = 12  # of a damping that grows tenfold


def whitener(gram_NN: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower triangular S_NN with S S^T = G + damping * mean(diag G) * I, in the Gram's precision.

    G = sum x x^T over the inputs; a G of zeros (no input seen) gives the identity. Where rounding
    has left G indefinite the damping grows tenfold until it is not.
    """
    mean = gram_NN.diagonal().mean()
    eye_NN = torch.eye(len(gram_NN), dtype=gram_NN.dtype, device=gram_NN.device)
    if not mean > 0:
        return eye_NN
    smallest = torch.finfo(gram_NN.dtype).eps
    for attempt in range(ATTEMPTS):
        damped_NN = gram_NN + mean * damping * eye_NN
        scale_NN, failed = torch.linalg.cholesky_ex(damped_NN)
        if not failed:
            return scale_NN
        damping = max(10 * damping, smallest * 10**attempt)
    return eye_NN * mean.sqrt()


def low_rank(
    delta_MN: torch.Tensor, scale_NN: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_MR, B_RN of least ||(delta - A B) S||_F: the outputs' error on the inputs that S is of.

    With U, Sigma, V^T the SVD of delta S (S of `whitener`; the identity gives the plain SVD),
    A B = U_R Sigma_R V_R^T S^-1, and the error squared is the sum of the squared singular values
    left out. That product equals U_R U_R^T delta, so where M <= N nothing is solved for S; where
    M > N it is delta S V_R V_R^T S^-1, one triangular solve. Either way the work is one symmetric
    eigenproblem of size min(M, N). Columns of A and rows of B share their norms evenly.

    Source: D2-MoE (ICML 2025), whitened SVD of the deltas.
    """
    rows, columns = delta_MN.shape
    delta_MN = delta_MN.to(scale_NN.dtype)
    white_MN = delta_MN @ scale_NN
    if rows <= columns:
        left_MR = _top_eigenvectors(white_MN @ white_MN.T, rank)
        return _balanced(left_MR, left_MR.T @ delta_MN)
    right_NR = _top_eigenvectors(white_MN.T @ white_MN, rank)
    right_RN = torch.linalg.solve_triangular(scale_NN, right_NR.T, upper=False, left=False)
    return _balanced(white_MN @ right_NR, right_RN)


def output_energy(weight_MN: torch.Tensor, gram_NN: torch.Tensor) -> torch.Tensor:
    """||W X||_F^2 = tr(W G W^T), the energy of a projection's outputs on the inputs of G."""
    weight_MN = weight_MN.to(gram_NN.dtype)
    return ((weight_MN @ gram_NN) * weight_MN).sum().clamp_min(0)


def _top_eigenvectors(symmetric: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.eigh(symmetric).eigenvectors[:, -rank:].flip(1)


def _balanced(left_MR: torch.Tensor, right_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    norms_R = left_MR.norm(dim=0), right_RN.norm(dim=1)
    share_R = (norms_R[1] / norms_R[0]).sqrt()
    share_R = torch.where(share_R.isfinite() & (share_R > 0), share_R, 1.0)
    return left_MR * share_R, right_RN / share_R[:, None]
