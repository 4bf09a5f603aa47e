"""Round-to-nearest, the quantiser without calibration.

Shapes: E experts, R rows (outputs), C columns (inputs).
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from camera.checkpoint.formats.packed.layout import metadata_bits
from camera.quantization.quantizers.gptq import GPTQ
from camera.quantization.quantizers.grids import QuantizedWeight
from camera.quantization.quantizers.quantizer import QUANTIZERS


@QUANTIZERS.register
@dataclass(frozen=True)
class RoundToNearest:
    """Rounds every weight to the nearest level of its group's grid: GPTQ with H = I.

    Settings of the grid are those of `camera.quantization.quantizers.grids.Grid`.
    """

    name: ClassVar[str] = "rtn"
    needs_hessian: ClassVar[bool] = False
    scattered: ClassVar[bool] = False
    min_tokens: ClassVar[int] = 1
    fallback: ClassVar[str] = "rtn"

    group_size: int | None = 128
    sym: bool = False
    clip: tuple[float, ...] = (1.0,)
    clip_norm: float = 2.4
    float_zero: bool = False
    scale_dtype: torch.dtype | None = None

    def metadata_bits(self, bits: int) -> int:
        """Scale and zero, 16 bits each."""
        return metadata_bits(bits, self.sym)

    def factor(self, H_ECC: torch.Tensor, tokens_E: torch.Tensor | None = None) -> None:
        """Hessians aren't used."""

    def solve(self, W_ERC: torch.Tensor, factor: Any = None, **bits: Any) -> QuantizedWeight:
        """Quantises E weights; `bits`, `row_bits` or `column_bits` as in `GPTQ.solve`."""
        grid = {field.name: getattr(self, field.name) for field in fields(self)}
        return GPTQ(**grid).solve(W_ERC, **bits)
