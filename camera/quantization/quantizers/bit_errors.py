"""Energy lost at each bit width, measured before bits are assigned.

Shapes: E experts that are tried, R rows, C columns, B numbers of bits.
"""

from collections.abc import Sequence

import torch

from camera.calibration.hessians import HessianStatistics
from camera.moe.feed_forward import FeedForward
from camera.quantization.quantizers.quantizer import Quantizer
from camera.runtime.errors import CameraError

TRIED = 8  # experts of a layer, those of the most tokens


def bit_errors(
    ffn: FeedForward, seen: HessianStatistics, quantizer: Quantizer, levels: Sequence[int]
) -> dict[int, float]:
    """The share of a micro-expert's energy that is lost at each number of bits (0 bits: all).

    phi * w_down is a product of what gate, up and down give. With x a matrix's outputs over the
    calibration tokens, x' those of the solved matrix, c = <x, x'> / <x, x> and s = <x', x'> /
    <x, x>, and the errors of the three independent of each other, that share is 1 - 2 c_gate c_up
    c_down + s_gate s_up s_down. Never less at fewer bits, never more than 1. Solved for the experts
    of one module that saw the most tokens, all bits in one sweep.
    """
    group = max(ffn.groups, key=lambda group: len(group.widths))
    start = sum(len(g.widths) for g in ffn.groups[: ffn.groups.index(group)])
    widest = max(group.widths)
    full = [e for e, width in enumerate(group.widths) if width == widest and width]
    tried = sorted(full, key=lambda e: -int(seen.tokens_E[start + e]))[:TRIED]
    wanted = sorted({b for b in levels if b > 0}, reverse=True)
    keep = {0: 1.0}
    if not tried:
        return {b: keep.get(b, 0.5**b) for b in levels}
    gate_up = torch.stack([torch.cat(group.gate_up(e)) for e in tried])
    down = torch.stack([group.down(e) for e in tried])
    H_inputs = seen.input_EHH[[start + e for e in tried]]
    H_hidden = torch.stack([seen.hidden(start + e) for e in tried])
    tokens_E = seen.tokens_E[[start + e for e in tried]]
    gate_cB, gate_sB = _moments(quantizer, gate_up, H_inputs, tokens_E, wanted)
    down_cB, down_sB = _moments(quantizer, down, H_hidden, tokens_E, wanted)
    if not torch.stack([gate_cB, gate_sB, down_cB, down_sB]).isfinite().all():
        raise CameraError(
            f"the errors of quantising {group.path} overflow: its activations or weights are too "
            "large to be squared; check the weights."
        )
    least = 1.0
    for place in reversed(range(len(wanted))):  # from the fewest bits
        c = gate_cB[place] ** 2 * down_cB[place]
        s = gate_sB[place] ** 2 * down_sB[place]
        least = keep[wanted[place]] = min(least, max(float(1 - 2 * c + s), 0.0))
    return {b: keep[b] for b in levels}


def _moments(quantizer, W_ERC, H_ECC, tokens_E, levels) -> tuple[torch.Tensor, torch.Tensor]:
    """c and s of weights solved at each number of bits, fp64 [B]."""
    rows = W_ERC.shape[1]
    row_bits = torch.repeat_interleave(torch.tensor(levels), rows)
    W_ERC = W_ERC.detach().float()
    factor = quantizer.factor(H_ECC, tokens_E)
    solved = quantizer.solve(W_ERC.repeat(1, len(levels), 1), factor, row_bits=row_bits)
    Q_EBRC = solved.weight.unflatten(1, (len(levels), rows))
    WH_ERC = W_ERC @ H_ECC
    whole = (WH_ERC * W_ERC).sum().double().clamp(min=1e-300)
    c_B = (WH_ERC[:, None] * Q_EBRC).sum((0, 2, 3)).double() / whole
    s_B = ((Q_EBRC @ H_ECC[:, None]) * Q_EBRC).sum((0, 2, 3)).double() / whole
    return c_B.cpu(), s_B.cpu()
