"""Methods as papers name them, in the order of a table's rows, and which of them are floors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["original", "floor", "method"]


@dataclass(frozen=True)
class MethodName:
    """A method's name in tables; `floor`: what any method is expected to beat."""

    name: str
    title: str
    role: Role = "method"


# In the order of rows: the original, floors, methods of others, those of this project.
METHODS = (
    MethodName("dense", "Dense", "original"),
    MethodName("random", "Random", "floor"),
    MethodName("magnitude", "Magnitude", "floor"),
    MethodName("rtn", "RTN", "floor"),
    MethodName("frequency", "Frequency"),
    MethodName("aimer", "AIMER"),
    MethodName("naee", "NAEE"),
    MethodName("d2_moe", "D²-MoE"),
    MethodName("reap", "REAP"),
    MethodName("mone", "MoNE"),
    MethodName("heapr", "HEAPr"),
    MethodName("gptq", "GPTQ"),
    MethodName("mc", "MC"),
    MethodName("layerwise_bits", "Layer-wise bits"),
    MethodName("camera_p", "Camera-P"),
    MethodName("camera_plus", "Camera-Plus"),
    MethodName("camera_q_dagger", "Camera-Q†"),
    MethodName("camera_q", "Camera-Q"),
)
_BY_NAME = {method.name: (place, method) for place, method in enumerate(METHODS)}


def display_name(method: str) -> str:
    """The name of a method in tables, figures and reports; of one not listed here its own."""
    return _BY_NAME[method][1].title if method in _BY_NAME else method


def method_order(method: str) -> tuple[int, str]:
    """A key that sorts methods as tables do; a user's own methods come last, by name."""
    return _BY_NAME[method][0] if method in _BY_NAME else len(METHODS), method


def is_ranked(method: str) -> bool:
    """Whether a method takes part in best and second: not the original, nor a floor."""
    return method not in _BY_NAME or _BY_NAME[method][1].role == "method"
