"""Round-to-nearest: what any quantiser must beat."""

from dataclasses import dataclass
from typing import ClassVar

from baselines.quantization.gptq import Gptq


@dataclass
class Rtn(Gptq):
    """The same bits everywhere, each weight rounded to the nearest level; needs no calibration."""

    name: ClassVar[str] = "rtn"
    calibrates: ClassVar[bool] = False
