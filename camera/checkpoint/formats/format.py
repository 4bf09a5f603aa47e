"""Base class and registry of module formats."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from camera.moe.experts.module import ExpertModule
from camera.moe.families.family import Family
from camera.runtime.registry import Registry

Spec = dict[str, Any]

_HERE = "camera.checkpoint.formats"
FORMATS: Registry["Format"] = Registry(
    "module format", "form", ("camera.checkpoint.formats",), entry_points="camera.formats"
)


class Format(ExpertModule):
    """A way to hold a module's weights in a compressed checkpoint.

    `name` is the value of "form" in config.json; subclasses that have one are registered. `spec`
    and `from_spec` are inverse. Class methods answer for a module that isn't built: its widths,
    bytes and weights follow from the spec. holds_constants: adds constants to what its experts put
    out, so that it can't be compressed further.
    """

    name: ClassVar[str]
    holds_constants: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            FORMATS.register(cls)

    def spec(self) -> Spec:
        """All that `from_spec` needs besides the native module, JSON-able, with the name."""
        raise NotImplementedError

    @classmethod
    def from_spec(cls, native: nn.Module, spec: Spec) -> nn.Module:
        """The module, empty and on meta, in the place of a freshly built native one."""
        raise NotImplementedError

    def dequantize(self, native: nn.Module | None = None) -> nn.Module:
        """A module of plain weights that computes the same; itself where they are plain.

        `native`: the freshly built native module, of any width and on meta, where the plain weights
        need one; it is used up.
        """
        return self

    def select(self, rows: Sequence[torch.Tensor]) -> "Format":
        """Experts with these micro-experts only, one tensor of rows for each expert."""
        raise NotImplementedError(f"the format {self.name} can't be pruned")

    def to_native(self, width: int) -> dict[str, torch.Tensor]:
        """Plain weights by native names, zero-padded to a width."""
        raise NotImplementedError(f"the format {self.name} must be dequantised first")

    @classmethod
    def width_key(cls, family: Family, path: str) -> str:
        """The key of config.json that holds the width of a module at this path."""
        raise NotImplementedError(f"the format {cls.name} has no width")

    @classmethod
    def widest(cls, spec: Spec) -> int:
        """The largest width of its experts."""
        raise NotImplementedError(f"the format {cls.name} has no width")

    @classmethod
    def nbytes(cls, spec: Spec) -> int | None:
        """Bytes of its tensors without biases; None where they depend on the native module."""
        return None

    @classmethod
    def weights(cls, spec: Spec) -> int | None:
        """Number of original weights that it replaces; None: as many as its tensors hold."""
        return None

    @classmethod
    def code_bits(cls, spec: Spec) -> int | None:
        """Bits of its codes, without scales; None where nothing is quantised."""
        return None
