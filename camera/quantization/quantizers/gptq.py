"""GPTQ: round a weight column by column, and let the columns still to come absorb each error.

Shapes: E experts, R rows (outputs), C columns (inputs), N tokens, G scale groups of a row,
B columns of a block. Matrices of one shape are solved as one batch; nothing here does I/O.

    hessian = Hessian(experts=E, columns=C)
    hessian.add(expert, x_NC)                                # every expert, every chunk of tokens
    solver = GPTQ(group_size=128)
    factor = solver.factor(hessian.H_ECC, hessian.tokens_E)  # once for gate and up
    gate = solver.solve(W_ERC, factor, bits=2)

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers (ICLR 2023), algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from camera.checkpoint.formats.packed.codes import check_bits
from camera.checkpoint.formats.packed.layout import metadata_bits
from camera.quantization.quantizers.grids import (
    ColumnGroups,
    Grid,
    QuantizedWeight,
    Scales,
    dequantize,
)
from camera.quantization.quantizers.hessian import Factor, inverse_factor
from camera.quantization.quantizers.quantizer import QUANTIZERS
from camera.runtime.errors import CameraError

# What the reference does and this solver does not, unless asked to (GPTQ(quirks=...)).
QUIRKS = {
    "stale_ranges": "a group that starts inside a block takes its range from the block's beginning",
    "one_sided_sym": "a symmetric group without negative weights keeps 0 as its lower end",
    "dead_in_damping": "dead columns enter the mean of diag(H), each with a 1",
    "dead_in_ranges": "without groups, ranges are taken before dead columns are zeroed",
}


@QUANTIZERS.register
@dataclass(frozen=True)
class GPTQ:
    """The one solver: every method that quantises plans bits for it.

    group_size: columns per scale, None for the whole row; the last group may be shorter.
    act_order: columns with the largest diag(H) first. static_groups: scales from the weights as
    they were, with neighbours in a group, rather than from those that earlier errors have changed.
    block_size changes speed, not the result. sym, clip, clip_norm, float_zero, scale_dtype: see
    `Grid`. damping: first rung of the damping ladder, x10 per rung up to 1, then round to nearest.
    fallback, for an expert with fewer than min_tokens tokens: "rtn" or "mean_hessian".
    inblock_feedback=False leaves errors to later blocks only (MC below 4 bits). quirks: see QUIRKS.
    """

    name: ClassVar[str] = "gptq"
    needs_hessian: ClassVar[bool] = True

    group_size: int | None = 128
    sym: bool = False
    act_order: bool = False
    static_groups: bool = False
    block_size: int = 128
    damping: float = 0.01
    fallback: str = "rtn"
    min_tokens: int = 1
    clip: tuple[float, ...] = (1.0,)
    clip_norm: float = 2.4
    float_zero: bool = False
    scale_dtype: torch.dtype | None = None
    inblock_feedback: bool = True
    quirks: tuple[str, ...] = ()

    def __post_init__(self):
        if min(self.block_size, 1 if self.group_size is None else self.group_size) < 1:
            raise CameraError("group_size (null: one scale per row) and block_size start at 1.")
        if not 0 <= self.damping <= 1:
            raise CameraError("damping must lie between 0 and 1.")
        if self.fallback not in ("rtn", "mean_hessian"):
            raise CameraError(f"fallback must be rtn or mean_hessian, not {self.fallback}.")
        if not self.clip or min(self.clip) <= 0:
            raise CameraError("clip must hold at least one factor, all above 0.")
        if unknown := set(self.quirks) - set(QUIRKS):
            raise CameraError(f"quirks has no {min(unknown)}: choose from {', '.join(QUIRKS)}.")

    @property
    def scattered(self) -> bool:
        """Whether the columns of a scale group aren't neighbours."""
        return self.act_order and not self.static_groups

    def metadata_bits(self, bits: int) -> int:
        """Scale and zero of a group, 16 bits each."""
        return metadata_bits(bits, self.sym)

    @property
    def grid(self) -> Grid:
        """The levels this solver rounds to."""
        shape = self.float_zero, "one_sided_sym" in self.quirks
        return Grid(self.sym, self.clip, self.clip_norm, *shape, self.scale_dtype)

    def factor(self, H_ECC: torch.Tensor, tokens_E: torch.Tensor | None = None) -> Factor:
        """Damp, order and invert E Hessians at once; without tokens_E, H = 0 means no tokens."""
        experts, columns = H_ECC.shape[:2]
        H_ECC, device = H_ECC.float(), H_ECC.device
        few_E = (H_ECC.diagonal(0, 1, 2) == 0).all(1) & (columns > 0)
        if tokens_E is not None:
            few_E = few_E | (tokens_E.to(device) < self.min_tokens)
        broken_E = ~H_ECC.isfinite().flatten(1).all(1) & ~few_E
        sources = torch.nonzero(~(few_E | broken_E)).flatten().tolist()
        replace = self.fallback == "mean_hessian" and bool(sources) and bool(few_E.any())
        if replace:
            H_ECC = H_ECC.clone()
            H_ECC[few_E] = sum(H_ECC[expert] for expert in sources) / len(sources)
        rtn_E = broken_E if replace else few_E | broken_E

        diag_EC = torch.where(rtn_E[:, None], 1.0, H_ECC.diagonal(0, 1, 2))
        dead_EC = diag_EC == 0
        # The mean over live columns only, so that the scale of H cancels.
        mean_E = diag_EC.sum(1) / (~dead_EC).sum(1).clamp(min=1)
        fill_E = mean_E
        if "dead_in_damping" in self.quirks:
            fill_E = torch.ones_like(mean_E)
            mean_E = torch.where(dead_EC, 1.0, diag_EC).sum(1) / max(columns, 1)
        diag_EC = torch.where(dead_EC, fill_E[:, None], diag_EC)
        perm_EC = diag_EC.argsort(dim=1, descending=True, stable=True) if self.act_order else None

        U_ECC = torch.eye(columns, device=device).repeat(experts, 1, 1)
        damping_E, damping = [0.0] * experts, self.damping
        left = torch.nonzero(~rtn_E).flatten().tolist() if columns else []
        while left and damping < 2:
            H_LCC = H_ECC[left]
            H_LCC.diagonal(0, 1, 2).copy_(diag_EC[left] + damping * mean_E[left, None])
            if perm_EC is not None:
                H_LCC = H_LCC.take_along_dim(perm_EC[left][:, :, None], 1)
                H_LCC = H_LCC.take_along_dim(perm_EC[left][:, None, :], 2)
            H_LCC, good_L = inverse_factor(H_LCC)
            good = good_L.tolist()
            done = [expert for expert, fine in zip(left, good, strict=True) if fine]
            U_ECC[done] = H_LCC[good_L]
            for expert in done:
                damping_E[expert] = damping
            left = [expert for expert, fine in zip(left, good, strict=True) if not fine]
            damping = damping * 10 if damping else 0.01
        stand_in = "mean_hessian" if replace else "rtn"
        fallback = [stand_in if few else "" for few in few_E.tolist()]
        for expert in [*torch.nonzero(broken_E).flatten().tolist(), *left]:
            fallback[expert], dead_EC[expert] = "rtn_damping", False
            if perm_EC is not None:
                perm_EC[expert] = torch.arange(columns, device=device)
        return Factor(U_ECC, dead_EC, perm_EC, damping_E, fallback)

    def solve(
        self,
        W_ERC: torch.Tensor,
        factor: Factor | None = None,
        *,
        bits: int | None = None,
        row_bits: torch.Tensor | None = None,
        column_bits: torch.Tensor | None = None,
    ) -> QuantizedWeight:
        """Quantise E weights; without a factor (H = I) this is round-to-nearest.

        Bits are one number, or one per row ([R] or [E, R]), or one per column ([C] or [E, C]; a
        scale group ends where they change). The rows of several weights may be concatenated.
        CameraError: bits outside 1..8, weights that aren't finite, segments under a moving order.
        """
        (experts, rows, columns), device = W_ERC.shape, W_ERC.device
        if (bits is not None) + (row_bits is not None) + (column_bits is not None) != 1:
            raise ValueError("give one of bits, row_bits and column_bits")
        if column_bits is not None and self.scattered:
            raise CameraError("act_order tears column segments apart: set static_groups=true too.")
        if not W_ERC.isfinite().all():
            raise CameraError("the weights hold NaN or infinity: check the checkpoint.")
        if column_bits is not None:
            column_bits = check_bits(column_bits).expand(experts, columns)
        groups = ColumnGroups(columns, self.group_size, column_bits, device)
        if column_bits is not None:
            bits_EGR = groups.bits_EG[:, :, None]
        elif row_bits is not None:
            bits_EGR = check_bits(row_bits.to(device)).expand(experts, rows)[:, None]
        else:
            bits_EGR = check_bits(torch.tensor([[[bits]]], device=device))
        scales = Scales(self.grid, bits_EGR, (experts, groups.most, rows), device)

        W_ECR = W_ERC.float().transpose(1, 2).clone(memory_format=torch.contiguous_format)
        order_EC, perm_EC, ranges_ECR = groups.index_EC, None, W_ECR
        if factor is None:
            factor = Factor(None, None, None, [0.0] * experts, ["rtn"] * experts)
        else:
            factor = factor.expand(experts)
            perm_EC = factor.perm_EC
            whole = self.group_size is None and column_bits is None
            if whole and "dead_in_ranges" in self.quirks:
                ranges_ECR = W_ECR.clone()
            W_ECR.masked_fill_(factor.dead_EC[:, :, None], 0)
        static = self.static_groups or ranges_ECR is not W_ECR
        if static:
            for column, start in groups.starts.items():
                scales.fit(start, ranges_ECR[start.experts, column : column + start.length])
        if perm_EC is not None:
            W_ECR = W_ECR.take_along_dim(perm_EC[:, :, None], 1)
            if static:
                order_EC = order_EC.expand(experts, columns).take_along_dim(perm_EC, 1)
        if factor.U_ECC is None:
            codes_ECR, loss_ER = self._nearest(W_ECR, groups, order_EC, scales, static)
        else:
            codes_ECR, loss_ER = self._sweep(W_ECR, factor.U_ECC, groups, order_EC, scales, static)
        group_EC = order_EC.expand(experts, columns)
        if perm_EC is not None:
            back_EC = perm_EC.argsort(1)
            codes_ECR = codes_ECR.take_along_dim(back_EC[:, :, None], 1)
            group_EC = group_EC.take_along_dim(back_EC, 1)
        return QuantizedWeight(
            codes_ERC=codes_ECR.transpose(1, 2).contiguous(),
            scale_ERG=scales.scale_EGR.transpose(1, 2).contiguous(),
            zero_ERG=scales.zero_EGR.transpose(1, 2).contiguous(),
            group_EC=group_EC.contiguous(),
            bits_ERG=bits_EGR.transpose(1, 2),
            groups_E=groups.count * (experts if groups.alike else 1),
            loss_ER=loss_ER,
            damping_E=factor.damping_E,
            fallback=factor.fallback,
        )

    def _nearest(
        self,
        W_ECR: torch.Tensor,
        groups: ColumnGroups,
        order_EC: torch.Tensor,
        scales: Scales,
        static: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [E, C, R] and loss without errors to pass on: what `_sweep` gives with H = I.

        No column depends on another: a block of columns is one piece.
        """
        experts, columns, rows = W_ECR.shape
        if not static:
            for column, start in groups.starts.items():
                scales.fit(start, W_ECR[start.experts, column : column + start.length])
        codes_ECR = torch.empty(W_ECR.shape, dtype=torch.uint8, device=W_ECR.device)
        loss_ER = W_ECR.new_zeros(experts, rows)
        for first in range(0, columns, self.block_size):
            block = slice(first, first + self.block_size)
            index_EBR = order_EC[:, block, None].expand(experts, -1, rows)
            scale_EBR, zero_EBR, maxq_EBR = (t.gather(1, index_EBR) for t in scales.tables)
            w_EBR = W_ECR[:, block]
            code_EBR = self.grid.encode(w_EBR, scale_EBR, zero_EBR, maxq_EBR, scales.binary)
            codes_ECR[:, block] = code_EBR
            error_EBR = w_EBR - dequantize(code_EBR, scale_EBR, zero_EBR)
            loss_ER += error_EBR.square().sum(1) / 2
        return codes_ECR, loss_ER

    def _sweep(self, W_ECR, U_ECC, groups, order_EC, scales, static):
        """The column loop, for all experts at once: codes [E, C, R] and loss; uses W_ECR up."""
        experts, columns, rows = W_ECR.shape
        grid = self.grid
        everyone = torch.arange(experts, device=W_ECR.device)
        # Groups that all experts share are sliced, not gathered.
        alike = order_EC[0].tolist() if len(order_EC) == 1 else None
        codes_ECR = torch.empty(W_ECR.shape, dtype=torch.uint8, device=W_ECR.device)
        loss_ER = W_ECR.new_zeros(experts, rows)
        for first in range(0, columns, self.block_size):
            last = min(first + self.block_size, columns)
            error_EBR = W_ECR.new_empty(experts, last - first, rows)
            stale_EBR = W_ECR[:, first:last].clone() if "stale_ranges" in self.quirks else None
            for c in range(first, last):
                if not static and (start := groups.starts.get(c)):
                    stop, who = c + start.length, start.experts
                    now_SNR, rest_SNR = W_ECR[who, c:stop], W_ECR[who, last:stop]
                    if stale_EBR is not None:
                        now_SNR = torch.cat([stale_EBR[who, c - first :], rest_SNR], 1)
                        now_SNR = now_SNR[:, : start.length]
                    elif first < c and last < stop:
                        # Columns beyond the block have yet to receive this block's errors.
                        U_SBN = U_ECC[who, first:c, last:stop]
                        late_SNR = U_SBN.transpose(1, 2) @ error_EBR[who, : c - first]
                        now_SNR = torch.cat([now_SNR[:, : last - c], rest_SNR - late_SNR], 1)
                    scales.fit(start, now_SNR)
                where = (everyone, order_EC[:, c]) if alike is None else (slice(None), alike[c])
                scale_ER, zero_ER, maxq_ER = (t[where] for t in scales.tables)
                w_ER = W_ECR[:, c]
                code_ER = grid.encode(w_ER, scale_ER, zero_ER, maxq_ER, scales.binary)
                codes_ECR[:, c] = code_ER
                error_ER = w_ER - dequantize(code_ER, scale_ER, zero_ER)
                error_ER /= U_ECC[:, c, c, None]
                if self.inblock_feedback and c + 1 < last:
                    U_EB1 = U_ECC[:, c, c + 1 : last, None]
                    W_ECR[:, c + 1 : last].addcmul_(U_EB1, error_ER[:, None], value=-1)
                error_EBR[:, c - first] = error_ER
            if last < columns:
                U_ENB = U_ECC[:, first:last, last:].transpose(1, 2)
                W_ECR[:, last:].baddbmm_(U_ENB, error_EBR, alpha=-1)
            loss_ER += error_EBR.square().sum(1) / 2
        return codes_ECR, loss_ER
