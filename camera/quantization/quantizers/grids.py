"""Quantisation grids, groups of columns that share one, and quantised weights.

Shapes: E experts, R rows (outputs), C columns (inputs), N columns of one group, G groups of a row,
S experts of a batch that start a group at the same column.
Weights stand column by column here (W_ENR), because the solver walks over columns.
"""

from dataclasses import dataclass

import torch

from camera.checkpoint.formats.packed.segments import QuantizedMatrix

# Factors that a clip search tries on the range, as the references do.
CLIPS = {
    "none": (1.0,),
    "gptq": tuple(1 - i / 100 for i in range(80)),
    "mc": (1.0, *(1 + i / 500 for i in range(1, 51)), *(1 - i / 500 for i in range(1, 51))),
}


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """w = scale * (code - zero), of any shapes that broadcast."""
    return scale * (codes - zero)


@dataclass(frozen=True)
class Grid:
    """The levels that one (row, group) may take: w = scale * (code - zero), code in 0..2^bits - 1.

    bits >= 2, asymmetric: the range [lo, hi] of w, widened to hold 0, is cut into 2^bits - 1 steps,
        scale = (hi - lo) / (2^bits - 1), zero = round(-lo / scale);
    bits >= 2, symmetric: hi = max|w|, lo = -hi, zero = 2^(bits - 1);
    bits = 1: +-mean|w|, scale = 2 mean|w|, zero = 1/2, and 0 counts as positive.

    clip: factors tried on the range; the first that makes sum |w - q|^clip_norm smallest wins.
    float_zero: zero = -lo / scale, not rounded (MC).
    one_sided_sym: a symmetric group without negative weights keeps lo = 0 (GPTQ's reference).
    scale_dtype: scales (and float zeros) are rounded to this type, so that it stores them exactly.
    Source: GPTQ (ICLR 2023); the 1-bit grid: Mixture Compressor (ICLR 2025).
    """

    sym: bool = False
    clip: tuple[float, ...] = (1.0,)
    clip_norm: float = 2.4
    float_zero: bool = False
    one_sided_sym: bool = False
    scale_dtype: torch.dtype | None = None

    def fit(
        self,
        W_ENR: torch.Tensor,
        maxq_ER: torch.Tensor,
        valid_EN: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero [E, R] of one group per expert; columns outside valid_EN don't count.

        maxq_ER = 2^bits - 1, as floats.
        """
        if valid_EN is not None:
            W_ENR = W_ENR * valid_EN[:, :, None]
        lo, hi = W_ENR.amin(1).clamp(max=0), W_ENR.amax(1).clamp(min=0)
        hi = torch.where((lo == 0) & (hi == 0), torch.ones_like(hi), hi)  # all 0: any scale serves
        if self.sym:
            top = torch.maximum(-lo, hi)
            lo = torch.where(lo < 0, -top, lo) if self.one_sided_sym else -top
            hi = top
        scale, zero = self._steps(lo * self.clip[0], hi * self.clip[0], maxq_ER)
        if len(self.clip) > 1:
            best = torch.full_like(scale, torch.inf)
            for factor in self.clip:
                trial = self._steps(lo * factor, hi * factor, maxq_ER)
                codes = self._round(W_ENR, trial[0][:, None], trial[1][:, None], maxq_ER[:, None])
                miss = (dequantize(codes, trial[0][:, None], trial[1][:, None]) - W_ENR).abs_()
                miss = miss.pow_(self.clip_norm)
                if valid_EN is not None:
                    miss *= valid_EN[:, :, None]
                error = miss.sum(1)
                better = error < best
                best = torch.where(better, error, best)
                scale = torch.where(better, trial[0], scale)
                zero = torch.where(better, trial[1], zero)
        count = W_ENR.shape[1] if valid_EN is None else valid_EN.sum(1, keepdim=True)
        mean = self._stored(2 * W_ENR.abs().sum(1) / count, smallest=0.0)
        binary = maxq_ER == 1
        return torch.where(binary, mean, scale), torch.where(binary, 0.5, zero)

    def encode(
        self,
        w: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        maxq: torch.Tensor,
        binary: bool = True,
    ) -> torch.Tensor:
        """Codes (as floats) of the levels nearest to w; binary: whether any maxq may be 1."""
        codes = self._round(w, scale, zero, maxq)
        return torch.where(maxq == 1, (w >= 0).to(w.dtype), codes) if binary else codes

    def _round(self, w, scale, zero, maxq) -> torch.Tensor:
        codes = (w / scale + zero).round_() if self.float_zero else (w / scale).round_().add_(zero)
        return torch.minimum(codes.clamp_(min=0), maxq)

    def _steps(self, lo, hi, maxq) -> tuple[torch.Tensor, torch.Tensor]:
        tiny = torch.finfo(lo.dtype).smallest_normal  # denormal weights must not divide by 0
        scale = self._stored(((hi - lo) / maxq).clamp(min=tiny), smallest=None)
        if self.sym:
            return scale, ((maxq + 1) / 2).expand_as(scale)
        if self.float_zero:
            return scale, self._stored(-lo / scale, smallest=0.0)
        return scale, torch.minimum((-lo / scale).round_(), maxq)

    def _stored(self, value: torch.Tensor, smallest: float | None) -> torch.Tensor:
        if self.scale_dtype is None:
            return value
        info = torch.finfo(self.scale_dtype)
        smallest = info.smallest_normal * info.eps if smallest is None else smallest
        return value.clamp(smallest, info.max).to(self.scale_dtype).to(value.dtype)


@dataclass(frozen=True)
class GroupStart:
    """The groups that start at one column, of all experts or of S of them."""

    experts: torch.Tensor | slice
    groups: torch.Tensor | int  # one number per expert, or one for all
    valid_SN: torch.Tensor | None  # which columns count, where the groups' lengths differ
    length: int  # of the longest


class ColumnGroups:
    """Groups of columns that share a scale; a group ends after `group_size` or where bits change.

    index_EC is the group of each column, count the number of groups of each expert, starts the
    groups that start at a column, bits_EG the bits of each group if column_bits_EC gives them.
    Where all experts have the same groups, the first dimension is 1.
    """

    def __init__(
        self,
        columns: int,
        group_size: int | None,
        column_bits_EC: torch.Tensor | None,
        device: torch.device,
    ):
        step = group_size or max(columns, 1)
        rows = [[0] * columns] if column_bits_EC is None else column_bits_EC.tolist()
        if all(row == rows[0] for row in rows):
            rows = rows[:1]
        spans = [_spans(row, step) for row in rows]
        self.alike = len(rows) == 1
        self.count = [len(span) for span in spans]
        self.most = max(self.count, default=0)
        index = [[g for g, (_, n) in enumerate(span) for _ in range(n)] for span in spans]
        self.index_EC = torch.tensor(index, dtype=torch.int64, device=device)
        self.index_EC = self.index_EC.reshape(len(rows), columns)
        self.bits_EG = None
        if column_bits_EC is not None:
            bits = [
                [row[start] for start, _ in span] + [0] * (self.most - len(span))
                for row, span in zip(rows, spans, strict=True)
            ]
            self.bits_EG = torch.tensor(bits, dtype=torch.int64, device=device)
            self.bits_EG = self.bits_EG.reshape(len(rows), self.most)
        places: dict[int, list[tuple[int, int, int]]] = {}
        for expert, span in enumerate(spans):
            for group, (start, length) in enumerate(span):
                places.setdefault(start, []).append((expert, group, length))
        self.starts = {start: self._start(place, device) for start, place in sorted(places.items())}

    def _start(self, place: list[tuple[int, int, int]], device: torch.device) -> GroupStart:
        experts, groups, lengths = zip(*place, strict=True)
        longest = max(lengths)
        if self.alike:
            return GroupStart(slice(None), groups[0], None, longest)
        valid_SN = None
        if min(lengths) < longest:
            length_S = torch.tensor(lengths, device=device)
            valid_SN = torch.arange(longest, device=device) < length_S[:, None]
        as_index = (torch.tensor(x, device=device) for x in (experts, groups))
        return GroupStart(*as_index, valid_SN, longest)


def _spans(bits: list[int], step: int) -> list[tuple[int, int]]:
    """(start, length) of every group of one expert."""
    spans: list[tuple[int, int]] = []
    for column, here in enumerate(bits):
        if spans and spans[-1][1] < step and bits[column - 1] == here:
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((column, 1))
    return spans


class Scales:
    """Scale, zero and largest code of every (expert, group, row), filled group by group."""

    def __init__(
        self,
        grid: Grid,
        bits_EGR: torch.Tensor,
        shape: tuple[int, int, int],
        device: torch.device,
    ):
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
    def weight(self) -> torch.Tensor:
        """The dequantised weights, fp32 [E, R, C]."""
        index = self.group_EC[:, None].expand(self.codes_ERC.shape)
        scale, zero = self.scale_ERG.gather(2, index), self.zero_ERG.gather(2, index)
        return dequantize(self.codes_ERC, scale, zero)

    def matrix(
        self,
        expert: int,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
    ) -> QuantizedMatrix:
        """The matrix of one expert; `rows` and `columns`: where the solved ones belong."""
        tensors = (self.codes_ERC, self.scale_ERG, self.zero_ERG, self.group_EC)
        return QuantizedMatrix(*(tensor[expert] for tensor in tensors), rows, columns)
