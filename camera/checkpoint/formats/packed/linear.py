"""A packed linear layer, and a packed router.

Shapes: N tokens, R rows (outputs), C columns (inputs).
"""

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from camera.checkpoint.formats.format import Spec
from camera.checkpoint.formats.packed.base import PackedBuffers
from camera.checkpoint.formats.packed.layout import PackedLayout
from camera.checkpoint.formats.packed.segments import BitSegments, QuantizedMatrix


class PackedLinear(nn.Module, PackedBuffers):
    """Drop-in for nn.Linear. spec: `linear_spec`; a bias stays as it was.

    `weight` holds the codes: a reader that doesn't know this format stops at its shape.
    """

    name = "packed_linear"

    def __init__(
        self,
        spec: Spec,
        bias: torch.Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = spec["shape"]
        self._register(spec, device, dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_spec(cls, native: nn.Module, spec: Spec) -> "PackedLinear":
        bias = None if native.bias is None else native.bias.detach()
        return cls(spec, bias, "meta", native.weight.dtype)

    @classmethod
    def layouts(cls, spec: Spec) -> dict[str, PackedLayout]:
        return {"weight": _layout(spec)}

    def store(self, solved: QuantizedMatrix) -> None:
        """Store the quantised weight."""
        self._store("weight", 0, solved)

    def dense(self) -> torch.Tensor:
        """The dequantised weight [R, C]."""
        return self._weight("weight")

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        """x W^T + bias."""
        return F.linear(x_NC, self.dense(), self.bias)

    def dequantize(self, native: nn.Module | None = None) -> nn.Linear:
        """A plain linear layer of these weights, in this module's dtype."""
        plain = nn.Linear(self.in_features, self.out_features, device="meta")
        plain.weight = nn.Parameter(self.dense(), requires_grad=False)
        plain.bias = self.bias
        return plain

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedRouter(PackedBuffers):
    """The native router itself, its `weight` dequantised from the buffer `packed` on access.

    The module keeps the forward and the other tensors of its class, which must read `self.weight`;
    only this parameter is replaced.
    """

    name = "packed_router"

    @classmethod
    def from_spec(cls, native: nn.Module, spec: Spec) -> nn.Module:
        return cls.of(native, spec, "meta")

    @classmethod
    def layouts(cls, spec: Spec) -> dict[str, PackedLayout]:
        return {"packed": _layout(spec)}

    @staticmethod
    def of(
        native: nn.Module, spec: Spec, device: torch.device | str | None = None
    ) -> "PackedRouter":
        """Turn a native router into a packed one, in place; `store` its weight next."""
        dtype = native.weight.dtype
        del native.weight
        native.__class__ = _packed_class(type(native))
        native._register(spec, device, dtype)
        return native

    def store(self, solved: QuantizedMatrix) -> None:
        """Store the quantised weight."""
        self._store("packed", 0, solved)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight [experts, hidden]."""
        return self._weight("packed")

    def dequantize(self, native: nn.Module | None = None) -> nn.Module:
        """The native router with a plain weight again, in place."""
        weight = nn.Parameter(self.weight, requires_grad=False)
        names = ["_like", *("packed" + suffix for suffix in self._layouts["packed"].sizes)]
        for name in names:
            delattr(self, name)
        del self._spec, self._layouts
        self.__class__ = type(self).__bases__[1]
        self.weight = weight
        return self


def _layout(spec: Spec) -> PackedLayout:
    segments = BitSegments.from_json(spec["cut"])
    return PackedLayout([tuple(spec["shape"])], segments, spec["group_size"], spec["sym"])


@cache
def _packed_class(native: type[nn.Module]) -> type[nn.Module]:
    # A new class per native one, as torch's own parametrisation makes them: isinstance still holds.
    return type(f"Packed{native.__name__}", (PackedRouter, native), {})
