"""Quantised matrices of several experts, packed into a few 1-D tensors.

Shapes: R rows (outputs), C columns (inputs), G scale groups of a row, P parts of a matrix that are
stored together (gate and up are two).

w = scale * (code - zero), one scale and zero per row and group of `group_size` columns. A matrix is
divided along an axis into segments of uniform bits; a group ends where a column segment does, and
the last group of a row or segment may be shorter. The tensors of one kind of matrix hold, expert by
expert and segment by segment:

    ""        uint8: codes, one run (see codes.py) of [P, rows, columns]
    "_scales" int16: fp16 bit patterns, [P, rows, G]
    "_zeros"  int16: the same; none where the grid implies them (sym: 2^(bits - 1), 1 bit: 1/2)
    "_rows", "_columns" int16 or int32: where each row [P, R] or column [P, C] of the matrix stands
              in the stored one; only along permuted axes
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from camera.checkpoint.formats.packed.codes import pack, packed_bytes, unpack
from camera.checkpoint.formats.packed.segments import AXES, BitSegments, QuantizedMatrix


def metadata_bits(bits: int, sym: bool = False) -> int:
    """Stored bits beside the codes of one group: scale and zero in 16 bits each.

    The 1-bit and the symmetric grids imply their zero; 0 bits store nothing.
    """
    return 0 if bits == 0 else 32 if stores_zeros(bits, sym) else 16


def stores_zeros(bits: int, sym: bool) -> bool:
    """Whether the zeros of a grid are stored; others follow from its bits."""
    return bits > 1 and not sym


def index_dtype(length: int) -> torch.dtype:
    """The integer type of an order of so many rows or columns."""
    return torch.int16 if length <= 2**15 else torch.int32


def index_bits(length: int) -> int:
    """Stored bits of an order of so many rows or columns."""
    return 8 * length * index_dtype(length).itemsize


def groups_of(columns: Any, group_size: int | None) -> Any:
    """ceil(columns / group_size), for a number or a tensor; group_size None (or 0): one group."""
    if not group_size:
        return (columns > 0) * 1
    return -(-columns // group_size)


class SegmentLayout(NamedTuple):
    """Place of one segment of one matrix, all its parts, in the tensors."""

    bits: int
    rows: slice
    columns: slice
    shape: tuple[int, int, int]  # P, rows, columns
    groups: slice
    codes: int
    scales: int
    zeros: int | None


class PackedLayout:
    """Layout of one kind of matrix of all experts; the owner of the tensors passes them in.

    shapes: (R, C) of one part of every expert's matrix. `sizes` are the tensors by suffix with
    their dtypes, `bytes` their total, `weights` the number of original weights, `code_bits` the
    bits of all codes. ValueError: segments that don't cover the shapes.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        cut: BitSegments,
        group_size: int | None,
        sym: bool,
        parts: int = 1,
    ):
        self.shapes, self.cut, self.parts = list(shapes), cut, parts
        self.group_size, self.sym = group_size, sym
        self.weights = parts * sum(rows * columns for rows, columns in self.shapes)
        self.code_bits = 0
        self._codes = self._scales = self._zeros = 0
        self._runs = [self._lay_out(expert) for expert in range(len(self.shapes))]
        self.sizes: dict[str, tuple[int, torch.dtype]] = {"": (self._codes, torch.uint8)}
        # fp16 as bit patterns: no `.to(bfloat16)` and no loader ever rounds an integer.
        for suffix, size in (("_scales", self._scales), ("_zeros", self._zeros)):
            if size:
                self.sizes[suffix] = (size, torch.int16)
        for axis in cut.permuted:
            lengths = [shape[AXES.index(axis)] for shape in self.shapes]
            dtype = index_dtype(max(lengths, default=0))
            if sum(lengths):
                self.sizes[f"_{axis}"] = (parts * sum(lengths), dtype)

    @property
    def bytes(self) -> int:
        """Codes, scales, zeros and permutations."""
        return sum(size * dtype.itemsize for size, dtype in self.sizes.values())

    def store(
        self, tensors: Mapping[str, torch.Tensor], expert: int, *solved: QuantizedMatrix
    ) -> None:
        """Store an expert's matrix: its parts, or one matrix of all parts stacked by rows.

        ValueError: codes, groups, zeros or an order that this layout can't hold.
        """
        stacked = len(solved) == 1 and self.parts > 1
        parts = [s.grouped() for s in (solved[0].chunk(self.parts) if stacked else solved)]
        shape, columns = self.shapes[expert], self._group_of_columns(expert)
        if len(parts) != self.parts or any(tuple(p.codes_RC.shape) != shape for p in parts):
            raise ValueError(f"expert {expert} needs {self.parts} matrices {list(shape)}")
        if any(part.group_C.tolist() != columns for part in parts):
            raise ValueError(f"expert {expert}: its columns are grouped otherwise than the layout")
        for run in self._runs[expert]:
            codes = torch.stack([part.codes_RC[run.rows, run.columns] for part in parts])
            scale, zero = (
                torch.stack([table[run.rows, run.groups] for table in tables]).reshape(-1).half()
                for tables in ([p.scale_RG for p in parts], [p.zero_RG for p in parts])
            )
            packed = pack(codes, run.bits)
            tensors[""][run.codes :][: len(packed)] = packed
            if len(scale):
                tensors["_scales"][run.scales :][: len(scale)] = scale.view(torch.int16)
            if run.zeros is None:
                if not (zero == _implied_zero(run.bits)).all():
                    raise ValueError(f"expert {expert}: its zeros aren't those of its grid")
            elif len(zero):
                tensors["_zeros"][run.zeros :][: len(zero)] = zero.view(torch.int16)
        for axis, length in zip(AXES, shape, strict=True):
            for part, index in enumerate(getattr(p, axis) for p in parts):
                if axis in self.cut.permuted:
                    index = torch.arange(length) if index is None else index
                    self._index(tensors, expert, axis)[part].copy_(index.argsort())
                elif index is not None and index.tolist() != list(range(length)):
                    raise ValueError(
                        f"the {axis} of expert {expert} are permuted, but the layout keeps no index"
                    )

    def weight(self, tensors: Mapping[str, torch.Tensor], expert: int) -> torch.Tensor:
        """The dequantised matrix of one expert, fp32 [P * R, C], parts stacked by rows."""
        rows, columns = self.shapes[expert]
        W_PRC = torch.empty(self.parts, rows, columns, device=tensors[""].device)
        for run in self._runs[expert]:
            self._dequantize(tensors, run, W_PRC[:, run.rows, run.columns])
        for dim, axis in enumerate(AXES):
            if axis in self.cut.permuted and W_PRC.numel():
                index = self._index(tensors, expert, axis).int()
                pieces = zip(W_PRC, index, strict=True)
                W_PRC = torch.stack([W_RC.index_select(dim, where) for W_RC, where in pieces])
        return W_PRC.view(self.parts * rows, columns)

    def stored(self, tensors: Mapping[str, torch.Tensor], expert: int) -> list[QuantizedMatrix]:
        """The parts of one expert's matrix as they were given to `store`.

        ValueError: the matrix has several segments, or rows or columns in another order.
        """
        (run, *more) = [run for run in self._runs[expert] if 0 not in run.shape]
        if more or self.cut.permuted:
            raise ValueError(f"expert {expert} is stored in several segments, or permuted")
        parts, rows, columns = run.shape
        packed = tensors[""][run.codes :]
        count = parts * rows * columns
        codes_PRC = unpack(packed[: packed_bytes(count, run.bits)], run.bits, count).view(run.shape)
        shape_PRG = (parts, rows, run.groups.stop - run.groups.start)
        scale_PRG = _floats(tensors["_scales"], run.scales, shape_PRG)
        zero_PRG = torch.full(shape_PRG, _implied_zero(run.bits), device=codes_PRC.device)
        if run.zeros is not None:
            zero_PRG = _floats(tensors["_zeros"], run.zeros, shape_PRG)
        group_C = torch.tensor(self._group_of_columns(expert), device=codes_PRC.device)
        parts = zip(codes_PRC, scale_PRG, zero_PRG, strict=True)
        return [QuantizedMatrix(*part, group_C) for part in parts]

    def _dequantize(self, tensors, run: SegmentLayout, W_PRC: torch.Tensor) -> None:
        parts, rows, columns = run.shape
        count = W_PRC.numel()
        if not count:
            return
        packed = tensors[""][run.codes :][: packed_bytes(count, run.bits)]
        W_PRC.copy_(unpack(packed, run.bits, count).view(run.shape))
        shape_PRG = (parts, rows, run.groups.stop - run.groups.start)
        scale_PRG = _floats(tensors["_scales"], run.scales, shape_PRG)
        zero = _implied_zero(run.bits)
        if run.zeros is not None:
            zero = _floats(tensors["_zeros"], run.zeros, shape_PRG)
        length = self.group_size or columns
        whole = columns // length
        # The groups of full length, then the shorter last one.
        for group, count, size in ((0, whole, length), (whole, 1, columns - whole * length)):
            if count and size:
                some = slice(group, group + count)
                start = group * length
                W_PRGN = W_PRC[..., start : start + count * size].unflatten(2, (count, size))
                W_PRGN.sub_(zero if run.zeros is None else zero[..., some, None])
                W_PRGN.mul_(scale_PRG[..., some, None])

    def _lay_out(self, expert: int) -> list[SegmentLayout]:
        rows, columns = self.shapes[expert]
        by_rows = self.cut.axis == "rows"
        counts = [counts[expert] for counts in self.cut.counts]
        if sum(counts) != (rows if by_rows else columns):
            raise ValueError(f"segments {counts} don't cover the {self.cut.axis} of a matrix")
        runs, first, group = [], 0, 0
        for bits, count in zip(self.cut.bits, counts, strict=True):
            segment, everything = slice(first, first + count), slice(None)
            shape = (self.parts, count, columns) if by_rows else (self.parts, rows, count)
            groups = groups_of(shape[2], self.group_size)
            stored_zeros = stores_zeros(bits, self.sym)
            run = SegmentLayout(
                bits,
                segment if by_rows else everything,
                everything if by_rows else segment,
                shape,
                slice(group, group + groups),
                self._codes,
                self._scales,
                self._zeros if stored_zeros else None,
            )
            lines = shape[0] * shape[1]
            self.code_bits += lines * shape[2] * bits
            self._codes += packed_bytes(lines * shape[2], bits)
            self._scales += lines * groups
            self._zeros += lines * groups if stored_zeros else 0
            first, group = first + count, group if by_rows else group + groups
            runs.append(run)
        return runs

    def _group_of_columns(self, expert: int) -> list[int]:
        columns, size = self.shapes[expert][1], self.group_size
        if self.cut.axis == "rows":
            return [c // (size or columns) for c in range(columns)]
        runs = self._runs[expert]
        lengths = [(run.groups.start, run.shape[2]) for run in runs]
        return [first + c // (size or n) for first, n in lengths for c in range(n)]

    def _index(self, tensors, expert: int, axis: str) -> torch.Tensor:
        """Places of the rows (or columns) of each part in the stored matrix, a view."""
        lengths = [shape[AXES.index(axis)] for shape in self.shapes]
        start, length = self.parts * sum(lengths[:expert]), lengths[expert]
        index = tensors.get(f"_{axis}", torch.empty(0))
        return index[start : start + self.parts * length].view(self.parts, length)


def _implied_zero(bits: int) -> float:
    return 0.5 if bits == 1 else 2.0 ** (bits - 1)


def _floats(table: torch.Tensor, start: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """fp16 bit patterns as fp32."""
    size = shape[0] * shape[1] * shape[2]
    return table[start : start + size].view(torch.float16).view(shape).float()
