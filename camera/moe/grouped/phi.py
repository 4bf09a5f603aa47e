"""phi of all experts of a group, and its squares, in as few passes over memory as can be.

Shapes: R rows of all experts, B = R / BLOCK blocks of rows, W width of one expert.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from camera.moe.grouped.rows import BLOCK
from camera.runtime.device.compiled import Compiled


class Phi(NamedTuple):
    """phi in the model's precision (None where nobody keeps it), sums and maxima of its squares in
    each block, and |h|^2 of every row; fp32."""

    phi_RW: torch.Tensor | None
    sum2_BW: torch.Tensor
    max2_BW: torch.Tensor
    h2_R: torch.Tensor


def phi_of(
    gate_RW: torch.Tensor,
    up_RW: torch.Tensor,
    a_R: torch.Tensor | None,
    act: Callable[[torch.Tensor], torch.Tensor],
    keeps: bool,
) -> Phi:
    """phi = a * act(gate) * up in fp32, `a` None for 1; if it `keeps` it, in the gates' dtype."""
    if isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation":
        act = F.silu  # one function for the modules of all layers
    return Phi(*(_compiled if act is F.silu else _phi)(gate_RW, up_RW, a_R, act, keeps))


def _phi(
    gate_RW: torch.Tensor,
    up_RW: torch.Tensor,
    a_R: torch.Tensor | None,
    act: Callable[[torch.Tensor], torch.Tensor],
    keeps: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    h_RW = act(gate_RW.float()) * up_RW.float()
    h2_R = h_RW.square().sum(1)
    phi_RW = h_RW if a_R is None else h_RW * a_R[:, None]
    del h_RW
    phi2_BRW = phi_RW.square().view(-1, BLOCK, phi_RW.shape[1])
    kept_RW = phi_RW.to(gate_RW.dtype) if keeps else None
    return kept_RW, phi2_BRW.sum(1), phi2_BRW.amax(1), h2_R


_compiled = Compiled(_phi)
