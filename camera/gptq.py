"""GPTQ: round a weight column by column, and let the columns still to come absorb each error.

Shapes: E experts, R rows (outputs), C columns (inputs), N tokens, G scale groups of a row,
B columns of a block. Matrices of one shape are solved as one batch; nothing here does I/O.

    hessian = Hessian(experts=E, columns=C)
    hessian.add(expert, x_NC)                                  # for every expert and every chunk
    solver = GPTQ(group_size=128)
    factor = solver.factor(hessian.H_ECC, hessian.tokens_E)    # once for gate and up
    gate = solver.solve(W_ERC, factor, bits=2)

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers (ICLR 2023), algorithm 1.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from camera.errors import CameraError
from camera.quantizer import ColumnGroups, Grid, GroupStart, check_bits, dequantize

# What the reference does and this solver does not, unless asked to (GPTQ(quirks=...)).
QUIRKS = {
    "stale_ranges": "a group that starts inside a block takes its range from the block's beginning",
    "one_sided_sym": "a symmetric group without negative weights keeps 0 as its lower end",
    "dead_in_damping": "dead columns enter the mean of diag(H), each with a 1",
    "dead_in_ranges": "without groups, ranges are taken before dead columns are zeroed",
}


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


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes and grids of a batch of weights, columns in their original order.

    w = scale[group of the column] * (code - zero[group of the column]). Groups that an expert
    doesn't have (its column segments are fewer than another's) hold 0. bits_ERG broadcasts.
    loss_ER = sum over columns of (w - q)^2 / U_jj^2 / 2, which is half the row's output error
    (w - q) H (w - q)^T under the damped H.
    """

    codes_ERC: torch.Tensor  # uint8
    scale_ERG: torch.Tensor
    zero_ERG: torch.Tensor
    group_EC: torch.Tensor  # int64
    bits_ERG: torch.Tensor  # int64
    groups_E: list[int]
    loss_ER: torch.Tensor
    damping_E: list[float]
    fallback: list[str]

    @property
    def weight_ERC(self) -> torch.Tensor:
        """The dequantised weights, fp32."""
        index = self.group_EC[:, None].expand(self.codes_ERC.shape)
        scale, zero = self.scale_ERG.gather(2, index), self.zero_ERG.gather(2, index)
        return dequantize(self.codes_ERC, scale, zero)

    @property
    def loss_E(self) -> torch.Tensor:
        """The loss of each expert, fp64 where the device has it."""
        return self.loss_ER.sum(1)

    def report(self) -> dict:
        """How many experts needed which damping and which fallback."""
        pairs = list(zip(self.damping_E, self.fallback, strict=True))
        damping = dict(Counter(rung for rung, why in pairs if not why.startswith("rtn")))
        fallback = dict(Counter(why for _, why in pairs if why))
        return {"experts": len(pairs), "damping": damping, "fallback": fallback}


@dataclass(frozen=True)
class GPTQ:
    """The one solver: every method that quantises plans bits for it.

    group_size: columns per scale, None for the whole row; the last group may be shorter.
    act_order: columns with the largest diag(H) first. static_groups: scales from the weights as
    they were, with neighbours in a group, rather than from those that earlier errors have changed.
    block_size changes speed, not the result. sym, clip, clip_norm, float_zero, scale_dtype: see
    `Grid`. percdamp: first rung of the damping ladder, x10 per rung up to 1, then round to nearest.
    fallback, for an expert with fewer than min_tokens tokens: "rtn" or "mean_hessian".
    inblock_feedback=False leaves errors to later blocks only (MC below 4 bits). quirks: see QUIRKS.
    """

    group_size: int | None = 128
    sym: bool = False
    act_order: bool = False
    static_groups: bool = False
    block_size: int = 64
    percdamp: float = 0.01
    fallback: str = "rtn"
    min_tokens: int = 1
    clip: tuple[float, ...] = (1.0,)
    clip_norm: float = 2.4
    float_zero: bool = False
    scale_dtype: torch.dtype | None = None
    inblock_feedback: bool = True
    quirks: tuple[str, ...] = ()

    def __post_init__(self):
        if self.group_size is not None and self.group_size < 1:
            raise CameraError("group_size must be at least 1, or null for one scale per row.")
        if self.block_size < 1:
            raise CameraError("block_size must be at least 1.")
        if not 0 <= self.percdamp <= 1:
            raise CameraError("percdamp must lie between 0 and 1.")
        if self.fallback not in ("rtn", "mean_hessian"):
            raise CameraError(f"fallback must be rtn or mean_hessian, not {self.fallback}.")
        if not self.clip or min(self.clip) <= 0:
            raise CameraError("clip must hold at least one factor, all above 0.")
        if unknown := set(self.quirks) - set(QUIRKS):
            raise CameraError(f"quirks has no {min(unknown)}: choose from {', '.join(QUIRKS)}.")

    @property
    def grid(self) -> Grid:
        """The levels this solver rounds to."""
        one_sided = "one_sided_sym" in self.quirks
        clip = self.clip, self.clip_norm
        return Grid(self.sym, *clip, self.float_zero, one_sided, self.scale_dtype)

    def factor(self, H_ECC: torch.Tensor, tokens_E: torch.Tensor | None = None) -> Factor:
        """Damp, order and invert the Hessians of E experts, all in one batch.

        Without tokens_E, an expert whose Hessian is all zero counts as one without tokens.
        """
        experts, columns = H_ECC.shape[:2]
        H_ECC, device = H_ECC.float(), H_ECC.device
        few_E = (H_ECC.diagonal(0, 1, 2) == 0).all(1) & (columns > 0)
        if tokens_E is not None:
            few_E = few_E | (tokens_E.to(device) < self.min_tokens)
        broken_E = ~H_ECC.isfinite().flatten(1).all(1) & ~few_E
        source_E = ~(few_E | broken_E)
        replace = self.fallback == "mean_hessian" and bool(source_E.any()) and bool(few_E.any())
        if replace:
            H_ECC = torch.where(few_E[:, None, None], H_ECC[source_E].mean(0), H_ECC)
        rtn_E = broken_E if replace else few_E | broken_E

        diag_EC = H_ECC.diagonal(0, 1, 2)
        dead_EC = (diag_EC == 0) & ~rtn_E[:, None]
        live = (diag_EC != 0).sum(1).clamp(min=1)
        mean_E = diag_EC.sum(1) / live  # over live columns only, so that H's scale cancels
        fill_E = mean_E
        if "dead_in_damping" in self.quirks:
            fill_E = torch.ones_like(mean_E)
            mean_E = torch.where(dead_EC, 1.0, diag_EC).sum(1) / max(columns, 1)
        diag_EC = torch.where(dead_EC, fill_E[:, None], diag_EC)
        perm_EC = None
        if self.act_order:
            perm_EC = torch.argsort(diag_EC, dim=1, descending=True, stable=True)

        eye = torch.eye(columns, device=device)
        U_ECC = eye.repeat(experts, 1, 1)
        damping_E, damping = [0.0] * experts, self.percdamp
        left = torch.nonzero(~rtn_E).flatten().tolist()
        while left and columns:
            # H = R R^T with R upper triangular, by the Cholesky factor of H read backwards;
            # then U = R^-1, without inverting H first.
            H_LCC = H_ECC[left]
            H_LCC.diagonal(0, 1, 2).copy_(diag_EC[left] + damping * mean_E[left, None])
            if perm_EC is not None:
                H_LCC = H_LCC.take_along_dim(perm_EC[left, :, None], 1)
                H_LCC = H_LCC.take_along_dim(perm_EC[left, None, :], 2)
            L_LCC, info_L = torch.linalg.cholesky_ex(H_LCC.flip(1, 2))
            U_LCC = torch.linalg.solve_triangular(L_LCC, eye, upper=False).flip(1, 2)
            solved = ((info_L == 0) & U_LCC.isfinite().flatten(1).all(1)).tolist()
            done = [expert for expert, ok in zip(left, solved, strict=True) if ok]
            U_ECC[done] = U_LCC[torch.tensor(solved, device=device)]
            for expert in done:
                damping_E[expert] = damping
            left = [expert for expert, ok in zip(left, solved, strict=True) if not ok]
            damping = damping * 10 if damping else 0.01
            if damping > 1 + 1e-9:
                break
        reasons = zip(few_E.tolist(), broken_E.tolist(), strict=True)
        few_name = "mean_hessian" if replace else "rtn"
        fallback = [few_name if few else "rtn_damping" if bad else "" for few, bad in reasons]
        for expert in left if columns else []:
            fallback[expert] = "rtn_damping"
            dead_EC[expert] = False
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
        experts, rows, columns = W_ERC.shape
        device = W_ERC.device
        if (bits is not None) + (row_bits is not None) + (column_bits is not None) != 1:
            raise ValueError("give one of bits, row_bits and column_bits")
        if column_bits is not None and self.act_order and not self.static_groups:
            raise CameraError(
                "act_order would tear column segments apart: set static_groups=true with it."
            )
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
        scales = _Scales(self.grid, bits_EGR, (experts, groups.most, rows), device)

        W_ECR = W_ERC.float().transpose(1, 2).clone(memory_format=torch.contiguous_format)
        order_EC, perm_EC, ranges_ECR = groups.index_EC, None, W_ECR
        if factor is None:
            factor = Factor(None, None, None, [0.0] * experts, ["rtn"] * experts)
        else:
            factor = factor.expand(experts)
            perm_EC = factor.perm_EC
            if "dead_in_ranges" in self.quirks and groups.most == 1:
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

    def _sweep(self, W_ECR, U_ECC, groups, order_EC, scales, static):
        """The column loop, for all experts at once: codes and loss; W_ECR is used up."""
        experts, columns, rows = W_ECR.shape
        grid, feedback = self.grid, U_ECC is not None
        everyone = torch.arange(experts, device=W_ECR.device)
        # Groups that are the same for all experts are sliced, not gathered.
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
                    now_SNR = W_ECR[who, c:stop]
                    if stale_EBR is not None:
                        now_SNR = torch.cat([stale_EBR[who, c - first :], W_ECR[who, last:stop]], 1)
                        now_SNR = now_SNR[:, : start.length]
                    elif feedback and first < c and last < stop:
                        # Columns beyond the block have yet to receive this block's errors.
                        U_SBN = U_ECC[who, first:c, last:stop]
                        late_SNR = U_SBN.transpose(1, 2) @ error_EBR[who, : c - first]
                        now_SNR = torch.cat(
                            [now_SNR[:, : last - c], now_SNR[:, last - c :] - late_SNR], 1
                        )
                    scales.fit(start, now_SNR)
                where = (everyone, order_EC[:, c]) if alike is None else (slice(None), alike[c])
                scale_ER, zero_ER, maxq_ER = (t[where] for t in scales.tables)
                w_ER = W_ECR[:, c]
                code_ER = grid.encode(w_ER, scale_ER, zero_ER, maxq_ER, scales.binary)
                codes_ECR[:, c] = code_ER
                error_ER = w_ER - dequantize(code_ER, scale_ER, zero_ER)
                if feedback:
                    error_ER /= U_ECC[:, c, c, None]
                    if self.inblock_feedback and c + 1 < last:
                        U_EB1 = U_ECC[:, c, c + 1 : last, None]
                        W_ECR[:, c + 1 : last].addcmul_(U_EB1, error_ER[:, None], value=-1)
                error_EBR[:, c - first] = error_ER
            if feedback and last < columns:
                U_ENB = U_ECC[:, first:last, last:].transpose(1, 2)
                W_ECR[:, last:].baddbmm_(U_ENB, error_EBR, alpha=-1)
            loss_ER += error_EBR.square().sum(1) / 2
        return codes_ECR, loss_ER


class _Scales:
    """Scale, zero and largest code of every (expert, group, row), filled group by group."""

    def __init__(self, grid, bits_EGR, shape, device):
        self._grid = grid
        self.binary = bool((bits_EGR == 1).any())
        self.scale_EGR = torch.zeros(shape, device=device)
        self.zero_EGR = torch.zeros(shape, device=device)
        maxq_EGR = (2**bits_EGR - 1).float().expand(shape)
        self.tables = (self.scale_EGR, self.zero_EGR, maxq_EGR)

    def fit(self, start: GroupStart, W_SNR: torch.Tensor) -> None:
        """Set the scales of the groups that start together from their columns."""
        where = (start.experts, start.groups)
        scale_SR, zero_SR = self._grid.fit(W_SNR, self.tables[2][where], start.valid_SN)
        self.scale_EGR[where], self.zero_EGR[where] = scale_SR, zero_SR
