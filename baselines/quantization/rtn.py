"""Round-to-nearest, the control of quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.quantization.gptq import Gptq


@dataclass(frozen=True)
class Rtn(Gptq):
    """The same bits everywhere, each weight rounded to the nearest level; needs no calibration."""

    name: ClassVar[str] = "rtn"
    calibrates: ClassVar[bool] = False

    quantizer: str = "rtn"
