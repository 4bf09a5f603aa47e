"""Base classes of packed modules: buffers laid out by a spec, and the dtype they are read in."""

import torch

from camera.checkpoint.formats.format import Format, Spec
from camera.checkpoint.formats.packed.layout import PackedLayout
from camera.checkpoint.formats.packed.segments import QuantizedMatrix


class PackedFormat(Format):
    """A format whose matrices are packed; sizes of all buffers follow from the spec."""

    _spec: Spec

    def spec(self) -> Spec:
        return self._spec

    @classmethod
    def layouts(cls, spec: Spec) -> dict[str, PackedLayout]:
        """Layouts of a module's matrices, by the name of their codes."""
        raise NotImplementedError

    @classmethod
    def nbytes(cls, spec: Spec) -> int:
        """Bytes of codes, scales, zeros and permutations."""
        return sum(layout.bytes for layout in cls.layouts(spec).values())

    @classmethod
    def weights(cls, spec: Spec) -> int:
        return sum(layout.weights for layout in cls.layouts(spec).values())

    @classmethod
    def code_bits(cls, spec: Spec) -> int:
        return sum(layout.code_bits for layout in cls.layouts(spec).values())


class PackedBuffers(PackedFormat):
    """Mixin of a module that holds packed matrices as its own buffers."""

    def _register(
        self, spec: Spec, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        self._spec = spec
        self._layouts = self.layouts(spec)
        for name, layout in self._layouts.items():
            for suffix, (size, kind) in layout.sizes.items():
                empty = torch.zeros(size, dtype=kind, device=device)
                self.register_buffer(name + suffix, empty)
        # Integers know no precision: this follows `.to(dtype)` in their place. Never on meta, so
        # that it can be moved once the buffers are loaded.
        like = torch.empty(0, dtype=dtype or torch.get_default_dtype(), device="cpu")
        self.register_buffer("_like", like, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of dequantised weights; stored scales are always fp16."""
        return self._like.dtype

    def _store(self, name: str, expert: int, *solved: QuantizedMatrix) -> None:
        layout, tensors = self._packed(name)
        layout.store(tensors, expert, *solved)

    def _weight(self, name: str, expert: int = 0) -> torch.Tensor:
        layout, tensors = self._packed(name)
        return layout.weight(tensors, expert).to(self.dtype)

    def bits(self, name: str) -> tuple[int, ...]:
        """The bits that occur among the codes of a matrix of all experts, the most first."""
        return self._layouts[name].cut.bits

    def stored(self, name: str, expert: int = 0) -> list[QuantizedMatrix]:
        """The parts of one expert's matrix in codes; ValueError where its bits aren't uniform."""
        layout, tensors = self._packed(name)
        return layout.stored(tensors, expert)

    def _packed(self, name: str) -> tuple[PackedLayout, dict[str, torch.Tensor]]:
        layout = self._layouts[name]
        return layout, {suffix: getattr(self, name + suffix) for suffix in layout.sizes}
