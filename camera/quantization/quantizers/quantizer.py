"""The protocol of a quantiser, and the registry of those that ship.

Shapes: E experts, R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from camera.runtime.registry import Registry

if TYPE_CHECKING:
    import torch

    from camera.quantization.quantizers.grids import QuantizedWeight


class Factored(Protocol):
    """What a quantiser needs of Hessians; `fallback` says per expert what replaced its own."""

    fallback: list[str]


class Quantizer(Protocol):
    """Rounds matrices to given bits, by a grid whose codes are packed: w = scale (code - zero).

    group_size: columns that share a scale, None for a whole row. sym: zeros follow from the bits
    and aren't stored. scattered: the columns of a group aren't neighbours, so that their order is
    stored. An expert of fewer than `min_tokens` tokens gets `fallback`: rtn, or mean_hessian where
    experts share their inputs.
    """

    name: ClassVar[str]
    needs_hessian: ClassVar[bool]
    group_size: int | None
    sym: bool
    scattered: bool
    min_tokens: int
    fallback: str

    def metadata_bits(self, bits: int) -> int:
        """Stored bits beside the codes of one group."""

    def factor(self, H_ECC: torch.Tensor, tokens_E: torch.Tensor | None = None) -> Factored | None:
        """Prepares Hessians, once for all weights of the same inputs; None if it needs none."""

    def solve(
        self,
        W_ERC: torch.Tensor,
        factor: Any = None,
        *,
        bits: int | None = None,
        row_bits: torch.Tensor | None = None,
        column_bits: torch.Tensor | None = None,
    ) -> QuantizedWeight:
        """Quantises E weights to bits of all, of each row or of each column.

        Without a factor to nearest.
        """


QUANTIZERS: Registry[Quantizer] = Registry(
    "quantizer",
    "method.quantizer",
    ("camera.quantization",),
    entry_points="camera.quantizers",
)
