"""Inputs and settings that the tests of GPTQ's solver share; conftest.py has weights and Hessians.

Shapes: E experts, R rows, C columns, N tokens.
"""

import torch

from camera.quantization.quantizers.grids import CLIPS
from camera.quantization.quantizers.hessian import output_error

E, R, C = 5, 12, 80


def inputs(experts: int = E, columns: int = C, tokens: int = 300) -> torch.Tensor:
    """Correlated inputs x_ENC, of another covariance for each expert."""
    torch.manual_seed(1)
    mix_ECC = torch.randn(experts, columns, columns) / columns**0.5
    x_ENC = torch.randn(experts, tokens, columns) @ (mix_ECC + 0.3 * torch.eye(columns))
    return x_ENC * (0.2 + torch.rand(columns))


def same(a, b) -> None:
    """Two quantised weights are bit for bit the same."""
    for name in ("codes_ERC", "scale_ERG", "zero_ERG", "group_EC", "loss_ER"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)


def as_good(got_ERC, want_ERC, W_ERC, H_ECC) -> None:
    """Two quantised weights lose equally much of every expert's output, and most rows are the same.

    For sums that run in another order. One code that rounds otherwise moves all later ones of its
    row, so codes may differ in number, but what they cost hardly does: rounding to nearest loses
    14 % more on these inputs at the least, another expert's Hessian twice as much. Rows are solved
    apart, and a tie comes in one of hundreds.
    """
    got_E, want_E = (output_error(W_ERC, q_ERC, H_ECC).sum(1) for q_ERC in (got_ERC, want_ERC))
    torch.testing.assert_close(got_E, want_E, rtol=0.05, atol=0)
    step_ER1 = 1e-3 * want_ERC.abs().amax(2, keepdim=True)
    assert ((got_ERC - want_ERC).abs() <= step_ER1).all(2).float().mean() >= 0.75


KINDS = {
    "plain": dict(group_size=32),
    "whole_row": dict(group_size=None, sym=True),
    "uneven_groups": dict(group_size=33, block_size=20),
    "act_order": dict(group_size=16, act_order=True),
    "act_order_static": dict(group_size=16, act_order=True, static_groups=True),
    "clip": dict(group_size=32, clip=CLIPS["mc"], float_zero=True),
    "half_scales": dict(group_size=32, scale_dtype=torch.float16),
}
