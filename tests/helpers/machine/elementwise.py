"""Bytes that operators other than matrix products read and write on a device."""

import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
NOTHING_MOVED = {
    "detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "set_", "record_stream",
    "_unsafe_view", "lift_fresh", "_local_scalar_dense",
}  # fmt: skip
ROWS = {"index_select", "index", "gather", "embedding"}  # read what they write, and the numbers


class ElementwiseBytes(TorchDispatchMode):
    """Counts, while it is entered, what this thread asks of a kind of device; attention's inside
    is left out, which is one kernel on a card."""

    def __init__(self, device: str):
        super().__init__()
        self._device, self.by_operator = device, Counter[str]()

    @property
    def total(self) -> int:
        return sum(self.by_operator.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        skipped = name in PRODUCTS or name in NOTHING_MOVED or function.is_view
        if not skipped and not _in_attention():
            self.by_operator[name] += self._moved(name, (args, kwargs), found)
        return found

    def _moved(self, name: str, given: Any, found: Any) -> int:
        inputs, outputs = self._there(given), self._there(found)
        if not inputs or not outputs:  # copied from or to the host
            return 0
        if name in ROWS:
            return 2 * _size(outputs) + _size([t for t in inputs if t.dtype == torch.int64])
        if name == "index_copy_":
            return 2 * _size(inputs[1:])
        if name == "copy_":
            return _size(inputs) * (len(inputs) > 1)
        return _size(inputs) + _size(outputs)

    def _there(self, tree: Any) -> list[torch.Tensor]:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        return [tensor for tensor in tensors if tensor.device.type == self._device]


def _in_attention() -> bool:
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "__torch_dispatch__":
        if frame.f_code.co_name == "sdpa_attention_forward":
            return True
        frame = frame.f_back
    return False


def _size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
