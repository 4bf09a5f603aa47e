"""What all packed modules share: buffers laid out by a spec, and the dtype they are read in."""

from typing import Any

import torch

from camera.checkpoint.formats.format import Form
from camera.checkpoint.formats.packed.layout import PackedMatrices
from camera.checkpoint.formats.packed.segments import Solved
from camera.checkpoint.formats.packed.spec import layouts_of, spec_code_bits, spec_weights


class PackedForm(Form):
    """Mixin of a module whose matrices are packed into buffers as its spec says."""

    def _register(
        self, spec: dict[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        self._spec = spec
        self._layouts = layouts_of(spec)
        for name, layout in self._layouts.items():
            for suffix, (size, kind) in layout.sizes.items():
                empty = torch.zeros(size, dtype=kind, device=device)
                self.register_buffer(name + suffix, empty)
        # Integers know no precision: this follows `.to(dtype)` in their place. Never on meta, so
        # that it can be moved once the buffers are loaded.
        like = torch.empty(0, dtype=dtype or torch.get_default_dtype(), device="cpu")
        self.register_buffer("_like", like, persistent=False)

    def spec(self) -> dict[str, Any]:
        return self._spec

    @classmethod
    def weights(cls, spec: dict[str, Any]) -> int:
        return spec_weights(spec)

    @classmethod
    def raw_bits(cls, spec: dict[str, Any]) -> int:
        return spec_code_bits(spec)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are dequantised to; the stored scales are fp16 whatever it is."""
        return self._like.dtype

    def _store(self, name: str, expert: int, *solved: Solved) -> None:
        layout, tensors = self._packed(name)
        layout.put(tensors, expert, *solved)

    def _weight(self, name: str, expert: int = 0) -> torch.Tensor:
        layout, tensors = self._packed(name)
        return layout.weight(tensors, expert).to(self.dtype)

    def _packed(self, name: str) -> tuple[PackedMatrices, dict[str, torch.Tensor]]:
        layout = self._layouts[name]
        return layout, {suffix: getattr(self, name + suffix) for suffix in layout.sizes}
