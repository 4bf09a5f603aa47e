"""Statistics of layers and their files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from camera.runtime.errors import CameraError
from camera.runtime.files import usual_mode
from camera.runtime.registry import Registry

if TYPE_CHECKING:
    import torch

KINDS = Registry(
    "kind of statistics",
    "statistics.kind",
    packages=("camera.calibration", "camera.quantization", "baselines"),
)


@dataclass
class LayerStatistics:
    """Statistics of one layer's pool; every field that a subclass adds is a tensor.

    A field `tokens_E`, where there is one, counts the tokens that each expert of the pool saw.
    """

    kind: ClassVar[str]
    travels: ClassVar[bool] = True  # copied into the checkpoint they led to
    # how shares of the tokens combine, by field; None: they don't add up over processes
    reduced: ClassVar[Mapping[str, Literal["sum", "max"]] | None] = None
    groups: dict[str, list[int]]  # module path -> width of each of its experts, in pool order

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        KINDS.register(cls, cls.kind)

    @property
    def widths(self) -> list[int]:
        """Width of every expert of the pool."""
        return [width for widths in self.groups.values() for width in widths]

    def unreached(self) -> list[tuple[str, int]]:
        """(module path, expert) of the experts that no calibration token reached."""
        tokens_E = getattr(self, "tokens_E", None)
        if tokens_E is None:
            return []
        experts = [(path, e) for path, widths in self.groups.items() for e in range(len(widths))]
        return [place for place, n in zip(experts, tokens_E.tolist(), strict=True) if n == 0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by the name of their field."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "groups"}

    def all_reduced(self) -> Self:
        """Statistics of all ranks' tokens together, by the rule of each field.

        CameraError where they hold NaN or inf: a ranking by these would be one by place.
        """
        from camera.runtime.distributed import all_combined, world

        if world() > 1:
            for name, how in sorted((self.reduced or {}).items()):
                setattr(self, name, all_combined(getattr(self, name), how))
        for name, tensor in self.tensors().items():
            if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
                raise CameraError(
                    f"statistics {name} of {', '.join(self.groups)} hold NaN or inf: its "
                    "activations or output weights are too large to be squared; check the weights."
                )
        return self

    def stored(self) -> LayerStatistics:
        """What is kept in files once the layer is compressed."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


class Statistics:
    """The statistics of a whole model, layer by layer, with what they were measured on."""

    def __init__(self, layers: dict[int, LayerStatistics], about: dict[str, Any]):
        self.layers, self.about = layers, about

    @property
    def travels(self) -> bool:
        """Whether the statistics are copied into the checkpoint."""
        return all(layer.travels for layer in self.layers.values())

    def save(self, path: Path) -> None:
        """Write all to one safetensors file, `about` in its header."""
        from safetensors.torch import save_file

        tensors = {
            f"{i}.{name}": tensor.contiguous()
            for i, layer in self.layers.items()
            for name, tensor in layer.tensors().items()
        }
        header = {
            "groups": {str(i): layer.groups for i, layer in self.layers.items()},
            "kind": next((layer.kind for layer in self.layers.values()), None),
            "about": self.about,
        }
        # one entry only: safetensors writes several in any order, and files are compared by bytes
        with usual_mode(path):
            save_file(tensors, path, metadata={"camera": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read a file of `save`; CameraError if it is missing or broken."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["camera"])
                found: dict[str, dict[str, torch.Tensor]] = {i: {} for i in header["groups"]}
                for key in file.keys():  # noqa: SIM118 (a file is no dict)
                    layer, _, name = key.partition(".")
                    found[layer][name] = file.get_tensor(key)
                kind = KINDS[header["kind"]] if found else LayerStatistics
                layers = {
                    int(i): kind(groups=header["groups"][i], **tensors)
                    for i, tensors in found.items()
                }
                return cls(layers, header["about"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, CameraError) as error:
            raise CameraError(
                f"statistics file {path} can't be read ({error}): delete it and run again."
            ) from error

    def __iter__(self) -> Iterator[tuple[int, LayerStatistics]]:
        return iter(sorted(self.layers.items()))
