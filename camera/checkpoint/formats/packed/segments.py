"""Segments of uniform bits of quantised matrices, and one quantised matrix.

Shapes: E experts, R rows (outputs), C columns (inputs), G scale groups of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from camera.checkpoint.formats.packed.codes import MAX_BITS

AXES = ("rows", "columns")


@dataclass(frozen=True)
class BitSegments:
    """Segments of uniform bits of the matrices of one kind.

    counts[s][e] rows (or columns) of expert e have bits[s]; bits descend, counts may be 0.
    permuted: the axes along which every matrix keeps an index of its reordered rows or columns.
    ValueError: impossible axes, bits or counts.
    """

    axis: str
    bits: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    permuted: tuple[str, ...] = ()

    def __post_init__(self):
        if self.axis not in AXES or not set(self.permuted) <= set(AXES):
            raise ValueError(f"axes are {AXES}, not {self.axis}, {self.permuted}")
        if list(self.bits) != sorted(set(self.bits) & set(range(1, MAX_BITS + 1)), reverse=True):
            raise ValueError(
                f"bits of segments must descend and lie in 1..{MAX_BITS}, not {self.bits}"
            )
        if len(self.counts) != len(self.bits):
            raise ValueError("segments need one row of counts for each of its bits")

    @classmethod
    def of(
        cls,
        axis: str,
        bits_of: Sequence[torch.Tensor | list[int]],
        permuted: Sequence[str] = (),
    ) -> "BitSegments":
        """From the bits of every row (or column) of every expert, in any order."""
        experts = [torch.as_tensor(bits, dtype=torch.int64).cpu() for bits in bits_of]
        used = sorted({b for bits in experts for b in bits.unique().tolist()}, reverse=True)
        counts = tuple(tuple(int((bits == b).sum()) for bits in experts) for b in used)
        return cls(axis, tuple(used), counts, tuple(permuted))

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "BitSegments":
        """The inverse of `json`."""
        counts = tuple(tuple(row) for row in stored["counts"])
        return cls(stored["axis"], tuple(stored["bits"]), counts, tuple(stored["permuted"]))

    def json(self) -> dict[str, Any]:
        """For config.json."""
        return {
            "axis": self.axis,
            "bits": list(self.bits),
            "counts": [list(row) for row in self.counts],
            "permuted": list(self.permuted),
        }


@dataclass(frozen=True)
class QuantizedMatrix:
    """One quantised matrix, in the order in which it was solved.

    w = scale * (code - zero), group_C the group of each column; groups beyond these are ignored.
    rows: solved row i is row rows[i] of the matrix; columns likewise; None: as they stand.
    """

    codes_RC: torch.Tensor
    scale_RG: torch.Tensor
    zero_RG: torch.Tensor
    group_C: torch.Tensor
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def chunk(self, parts: int) -> list["QuantizedMatrix"]:
        """The matrices of a stack by rows, as gate and up may be."""
        per_row = (self.codes_RC, self.scale_RG, self.zero_RG)
        height = len(self.codes_RC) // parts
        bands = [slice(part * height, (part + 1) * height) for part in range(parts)]
        return [
            QuantizedMatrix(*(t[band] for t in per_row), self.group_C, self.rows, self.columns)
            for band in bands
        ]

    def grouped(self) -> "QuantizedMatrix":
        """With the columns of a group side by side, as they are stored."""
        order_C = self.group_C.argsort(stable=True)
        if torch.equal(self.group_C, self.group_C[order_C]):
            return self
        columns = order_C if self.columns is None else self.columns.to(order_C.device)[order_C]
        codes_RC, group_C = self.codes_RC[:, order_C], self.group_C[order_C]
        return QuantizedMatrix(codes_RC, self.scale_RG, self.zero_RG, group_C, self.rows, columns)
