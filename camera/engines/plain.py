"""A checkpoint of any kind as plain weights in the shapes of one native model, layer by layer.

Shapes: E experts of a layer, W the native width of one expert, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from camera.checkpoint.config import CameraConfig
from camera.checkpoint.formats.format import FORMATS, Format
from camera.checkpoint.formats.narrow import PROJECTIONS, padded_mlp
from camera.checkpoint.modules import build_native
from camera.checkpoint.source import resolve_model
from camera.moe.experts.layout import ExpertLayout
from camera.moe.families import layer_of
from camera.runtime.device.finite import all_finite
from camera.runtime.errors import CameraError
from camera.streaming.meta_build import tied_names
from camera.streaming.skeleton import MetaModel

Tensors = dict[str, torch.Tensor]
WIDTH_MULTIPLE = 8  # of experts in exports, unless another is asked for


class PlainModel:
    """What a checkpoint holds, unpacked, every expert zero-padded to one width for the model.

    A padded micro-expert gives act(0) * 0 = 0, so that the logits stay the same. The one width is
    the widest expert's, rounded up to a multiple of `width_multiple`. One layer is in memory at a
    time. Names are those of the model in memory; dtypes are those of the checkpoint. taken: is
    shown every compressed module by its path and says whether its tensors are written otherwise.
    constants: whether it does so with constants in the place of experts, which are refused else.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        width_multiple: int = 1,
        trust_remote_code: bool = False,
        taken: Callable[[str, nn.Module], bool] = lambda path, module: False,
        constants: bool = False,
    ):
        if width_multiple < 1:
            raise CameraError(f"width_multiple={width_multiple} must be at least 1.")
        self._taken = taken
        self.folder = resolve_model(str(checkpoint))
        self.source = MetaModel(self.folder, trust_remote_code=trust_remote_code)
        stored = self.source.compressed
        self.modules = stored.modules if isinstance(stored, CameraConfig) else {}
        self.compressed = isinstance(stored, CameraConfig)
        if not constants:
            self._refuse_constants()
        self.family, self.dtype = self.source.family, self.source.stored_dtype
        self.widths = self._stored_widths()
        self.config: PretrainedConfig = copy.deepcopy(self.source.config)
        if self.compressed:
            del self.config.quantization_config
            for key, width in self._uniform_widths(width_multiple).items():
                setattr(self.config.get_text_config(), key, width)
        self.model = build_native(
            self.config, dtype=self.dtype, trust_remote_code=trust_remote_code
        )
        self.tied = tied_names(self.model)
        self.shapes = {
            name: tuple(tensor.shape)
            for name, tensor in self.model.state_dict().items()
            if name not in self.tied
        }

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(
            torch.Size(shape).numel() * self.dtype_of(name).itemsize
            for name, shape in self.shapes.items()
        )

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a tensor: that of its place in the checkpoint; of an unpacked one the
        checkpoint's own."""
        if self._packed(name):
            return self.dtype
        return self.source.dtype_on_disk(name)

    def layers(self) -> Iterator[tuple[int, Tensors]]:
        """Each layer's number and tensors."""
        for index in range(len(self.source.layers)):
            self.source.load_layer(index)
            unpacked = self._unpack(index)
            layer = self.source.layers[index]
            yield index, self.source.take_out(layer, f"{self.source.root}.{index}.") | unpacked

    def rest(self) -> Tensors:
        """The tensors outside the layers, tied ones once."""
        self.source.load_rest()
        unpacked = self._unpack(None)
        rest = self.source.take_out(self.source.model) | unpacked
        return {name: tensor for name, tensor in rest.items() if name not in self.tied}

    def _refuse_constants(self) -> None:
        for path, spec in self.modules.items():
            if FORMATS[spec["form"]].holds_constants:
                raise CameraError(
                    f"experts at {path} are replaced by constants, which no native model and no "
                    "GGUF can hold: export with --format approximate-experts, for vLLM."
                )

    def _stored_widths(self) -> list[tuple[str, int]]:
        """(key of config.json, width of the widest expert) of every module of experts."""
        keys, found = self.family.keys, []
        for index in range(len(self.source.layers)):
            for group in self.source.feed_forward(index).groups:
                key = keys.width if group.routed else keys.dense_width
                if self.family.is_shared(group.path):
                    key = keys.shared_count or keys.shared_width
                found.append((key, max(group.widths)))
        return found

    def _uniform_widths(self, multiple: int) -> dict[str, int]:
        """{key of config.json: value} that holds the widest expert of each kind."""
        keys, found = self.family.keys, {}
        for key, width in self.widths:
            found[key] = max(found.get(key, 1), width)
        count = keys.shared_count
        found = {k: w if k == count else -(-w // multiple) * multiple for k, w in found.items()}
        if count in found:  # a shared expert is as wide as a whole number of routed ones
            found[count] = -(-found[count] // found[keys.width])
        return found

    def _packed(self, name: str) -> bool:
        return any(name.startswith(f"{path}.") for path in self.modules)

    @torch.no_grad()
    def _unpack(self, layer: int | None) -> Tensors:
        """Plain tensors of the compressed modules of a layer, or of those outside the layers, which
        then are out of the model."""
        found: Tensors = {}
        for path in [path for path in self.modules if layer_of(f"{path}.") == layer]:
            module, native = self.source.model.get_submodule(path), self.model.get_submodule(path)
            width, packed = _native_width(native), self._taken(path, module)
            if packed:
                self.source.model.set_submodule(path, nn.Module())
                continue
            plain = module.dequantize(native) if isinstance(module, Format) else module
            if isinstance(plain, Format):
                tensors = plain.to_native(width)
            elif width is not None and all(hasattr(plain, name) for name in PROJECTIONS):
                tensors = padded_mlp(plain, width)
            else:
                tensors = dict(plain.state_dict())
            self.source.model.set_submodule(path, nn.Module())
            for name in list(tensors):
                found[f"{path}.{name}"] = self._stored(f"{path}.{name}", tensors.pop(name))
        return found

    def _stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        stored = tensor.to(self.dtype)
        if not all_finite(stored):
            dtype = str(self.dtype).removeprefix("torch.")
            raise CameraError(f"tensor '{name}' of {self.folder} doesn't fit {dtype} unpacked.")
        return stored


def _native_width(native: nn.Module) -> int | None:
    """Width of native experts or of a native MLP; None for any other module."""
    if hasattr(native, "gate_up_proj"):
        return ExpertLayout.of(native).width(native)
    return native.up_proj.out_features if hasattr(native, "up_proj") else None
