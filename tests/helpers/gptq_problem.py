"""Inputs and settings that the tests of GPTQ's solver share; conftest.py has weights and Hessians.

Shapes: E experts, R rows, C columns, N tokens.
"""

import torch

from camera.quantization.grids import CLIPS

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


KINDS = {
    "plain": dict(group_size=32),
    "whole_row": dict(group_size=None, sym=True),
    "uneven_groups": dict(group_size=33, block_size=20),
    "act_order": dict(group_size=16, act_order=True),
    "act_order_static": dict(group_size=16, act_order=True, static_groups=True),
    "clip": dict(group_size=32, clip=CLIPS["mc"], float_zero=True),
    "half_scales": dict(group_size=32, scale_dtype=torch.float16),
}
