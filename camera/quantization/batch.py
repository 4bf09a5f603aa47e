"""Quantisation of the matrices of several experts as one batch, and its errors.

Shapes: E experts of a batch, R rows, C columns, G scale groups of a row.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from camera.checkpoint.formats.packed.segments import QuantizedMatrix
from camera.quantization.quantizers.hessian import output_error
from camera.quantization.quantizers.quantizer import Quantizer


def quantize_batch(
    quantizer: Quantizer,
    matrices: list[torch.Tensor],
    bits: list[torch.Tensor],
    axis: str,
    hessians: list[torch.Tensor] | torch.Tensor | None,
    tokens_E: torch.Tensor | None,
    report: tuple["QuantizationReport", list[int]],
    fallback: list[str | None] | None = None,
) -> tuple[list[QuantizedMatrix], list[torch.Tensor]]:
    """Quantises matrices [R, C] of several experts; returns them, and dequantised in fp32.

    Bits are those of every row or every column (`axis`), descending along columns. Smaller matrices
    are padded: by rows, which are solved one by one anyway, and by dead columns in groups of their
    own, so that no padding changes a result.
    """
    rows, columns = (max(w.shape[i] for w in matrices) for i in (0, 1))
    pads = [(0, columns - w.shape[1], 0, rows - w.shape[0]) for w in matrices]
    W_ERC = torch.stack([F.pad(w.float(), p) for w, p in zip(matrices, pads, strict=True)])
    even = all(w.shape[1] == columns for w in matrices)
    if axis == "rows":
        padded = [F.pad(b, (0, rows - len(b)), value=1) for b in bits]
        asked = {"row_bits": torch.stack(padded)}
    elif even and columns and all((b == b[0]).all() for b in bits):
        # one width in each matrix: columns may be solved in any order
        asked = {"row_bits": torch.stack([b[:1].expand(rows) for b in bits])}
    else:
        asked = {"column_bits": torch.stack([_pad_bits(b, columns) for b in bits])}
    H_ECC, factor = None, None
    if hessians is not None:
        H_ECC = torch.stack([F.pad(H, (0, columns - len(H)) * 2) for H in hessians])
        factor = quantizer.factor(H_ECC, tokens_E)
        if factor is not None and fallback is not None:
            names = [b or a for a, b in zip(factor.fallback, fallback, strict=True)]
            factor = replace(factor, fallback=names)
    quantized = quantizer.solve(W_ERC, factor, **asked)
    weight_ERC = quantized.weight
    nearest = None
    if factor is not None:
        nearest = quantizer.solve(W_ERC, **asked).weight
    entries, experts = report
    entries.add(experts, W_ERC, weight_ERC, nearest, H_ECC, quantized.damping_E, quantized.fallback)
    solved, counts = [], _group_counts(quantized.group_EC, [w.shape[1] for w in matrices])
    for (e, w), groups in zip(enumerate(matrices), counts, strict=True):
        r, c = w.shape
        group_C = quantized.group_EC[e, :c]
        solved.append(
            QuantizedMatrix(
                quantized.codes_ERC[e, :r, :c],
                quantized.scale_ERG[e, :r, :groups],
                quantized.zero_ERG[e, :r, :groups],
                group_C,
            )
        )
    return solved, [weight_ERC[e, : w.shape[0], : w.shape[1]] for e, w in enumerate(matrices)]


def _group_counts(group_EC: torch.Tensor, columns_E: list[int]) -> list[int]:
    """Scale groups of every expert's own columns, without those of the padding; waits once."""
    if not group_EC.shape[1]:
        return [0] * len(columns_E)
    device = group_EC.device
    own_EC = torch.arange(group_EC.shape[1]) < torch.tensor(columns_E)[:, None]
    return (group_EC.where(own_EC.to(device), -1).amax(1) + 1).tolist()


def _pad_bits(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """Bits of padded columns differ from those beside them, so that no group holds both."""
    other = 7 if len(bits) and bits[-1] == 8 else 8
    return F.pad(bits, (0, columns - len(bits)), value=other)


class QuantizationReport:
    """Errors, damping and fallbacks of the experts of one module, as they are solved.

    Errors are relative: |Wx - Qx|^2 / |Wx|^2 over the calibration tokens that reached the expert
    (without tokens: of the weights), for the solver's Q and for round-to-nearest's.
    """

    def __init__(self, experts: int):
        self.error_E = torch.zeros(3, experts, dtype=torch.float64)  # solved, nearest, whole
        self.damping: Counter[str] = Counter()
        self.fallback: Counter[str] = Counter()

    def add(self, experts, W_ERC, weight_ERC, nearest_ERC, H_ECC, damping_E, fallback) -> None:
        """Enter a quantised batch."""
        for row, Q_ERC in enumerate((weight_ERC, nearest_ERC, torch.zeros_like(W_ERC))):
            if Q_ERC is None:
                Q_ERC = weight_ERC
            if H_ECC is None:
                miss_E = (W_ERC - Q_ERC).square().sum((1, 2))
            else:
                miss_E = output_error(W_ERC, Q_ERC, H_ECC).sum(1)
            self.error_E[row, experts] += miss_E.double().cpu()
        for damping, why in zip(damping_E, fallback, strict=True):
            if why and H_ECC is not None:
                self.fallback[why] += 1
            if not why.startswith("rtn"):
                self.damping[str(damping)] += 1

    def report(self) -> dict[str, Any]:
        """Per expert and in all."""
        solved_E, nearest_E, whole_E = self.error_E

        def relative(error: torch.Tensor, whole: torch.Tensor) -> list[float] | float:
            share = torch.where(whole > 0, error / whole.clamp(min=1e-300), 0.0)
            return [round(value, 6) for value in share.tolist()] if share.dim() else share.item()

        return {
            "error": relative(solved_E, whole_E),
            "error_rtn": relative(nearest_E, whole_E),
            "error_all": relative(solved_E.sum(), whole_E.sum()),
            "error_rtn_all": relative(nearest_E.sum(), whole_E.sum()),
            "damping": dict(self.damping),
            "fallback": dict(self.fallback),
        }
