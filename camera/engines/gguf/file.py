"""The GGUF file: metadata, then every tensor, a layer of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from camera.engines.gguf.architectures import architecture_of, metadata
from camera.engines.gguf.tensors import TensorNames, converted, stored_type
from camera.engines.gguf.tokenizer import add_tokenizer, copy_tokenizer
from camera.moe.families import layer_of
from camera.runtime.errors import CameraError
from camera.runtime.files import published

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from camera.engines.plain import PlainModel, Tensors

TYPES = ("F32", "F16", "BF16", "Q8_0")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def export_gguf(
    plain: PlainModel,
    out: Path,
    type: str | None = None,
    template: Path | None = None,
    pre: str | None = None,
) -> None:
    """Write a model for llama.cpp.

    type: of the matrices (F32, F16, BF16, Q8_0), by default the checkpoint's own; vectors and
    routers are F32. template: a GGUF of the same model, whose tokenizer is taken; else it is made
    of tokenizer.json, `pre` being llama.cpp's name of its splitting. CameraError for models that
    llama.cpp computes otherwise.
    """
    gguf = require_gguf()
    architecture = architecture_of(plain.config)
    kind = type or {torch.float32: "F32", torch.bfloat16: "BF16"}.get(plain.dtype, "F16")
    if kind not in TYPES:
        raise CameraError(f"type={type} is none of {', '.join(TYPES)}.")
    vocabulary = plain.shapes[EMBEDDING][0]
    with published(out) as partial:
        writer = gguf.GGUFWriter(partial, architecture.name)
        writer.add_type("model")
        writer.add_name(plain.folder.name)
        told = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
        writer.add_file_type(gguf.LlamaFileType[told])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata(plain.config, architecture).items():
            _add(writer, f"{architecture.name}.{key}", value)
        if template is not None:
            copy_tokenizer(writer, template, vocabulary)
        else:
            add_tokenizer(writer, plain.folder, vocabulary, pre)
        tensors = _Tensors(plain, kind, writer)
        tensors.announce()
        tensors.write()


def require_gguf() -> ModuleType:
    """The package `gguf`; CameraError where it isn't installed."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise CameraError("GGUF needs the package gguf: pip install 'camera-moe[gguf]'.") from error


def _add(writer: GGUFWriter, key: str, value: int | float | bool | str) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds.get(type(value), writer.add_string)(key, value)


class _Tensors:
    """Announces all tensors, then writes them in the same order, layer by layer."""

    def __init__(self, plain: PlainModel, kind: str, writer: GGUFWriter):
        self._plain, self._kind, self._writer = plain, kind, writer
        self._architecture = architecture_of(plain.config)
        self._layers = plain.config.num_hidden_layers
        self._names = TensorNames(self._architecture, self._layers)

    def announce(self) -> None:
        """Write down names, shapes and types of all tensors."""
        gguf = require_gguf()
        parts: dict[int, Tensors] = {}
        for name, shape in self._plain.shapes.items():
            layer = layer_of(name)
            part = parts.setdefault(self._layers if layer is None else layer, {})
            part[name] = torch.empty(shape, device="meta")
        for index in sorted(parts):
            for name, tensor in self._converted(parts[index]):
                kind = gguf.GGMLQuantizationType[self._type(name, tensor)]
                values, size = gguf.GGML_QUANT_SIZES[kind]
                size = tensor.numel() // values * size
                shape = tuple(tensor.shape)
                self._writer.add_tensor_info(name, shape, np.float32, size, raw_dtype=kind)

    def write(self) -> None:
        """Write the file: header, metadata, then the tensors."""
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        for _, layer in self._plain.layers():
            self._write(layer)
        self._write(self._plain.rest())
        self._writer.close()

    def _write(self, tensors: Tensors) -> None:
        for name, tensor in self._converted(tensors):
            due = next(iter(self._writer.tensors[0]))
            if name != due:
                raise RuntimeError(f"tensor '{name}' is written in the place of '{due}'")
            self._writer.write_tensor_data(encoded(tensor, self._type(name, tensor)))

    def _converted(self, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        if EMBEDDING in tensors and HEAD not in tensors and self._architecture.own_head:
            tensors = tensors | {HEAD: tensors[EMBEDDING]}
        for name in sorted(tensors):
            settings = self._plain.config, self._architecture, self._names
            yield from converted(name, tensors[name], *settings)

    def _type(self, name: str, tensor: torch.Tensor) -> str:
        return stored_type(name, tuple(tensor.shape), self._kind)


def encoded(tensor: torch.Tensor, kind: str) -> np.ndarray:
    """A tensor's values as GGUF stores them; F16 is rounded once, from what is there."""
    gguf = require_gguf()
    if kind == "BF16":
        bits = tensor.to(torch.bfloat16).contiguous().view(torch.int16)
        return bits.numpy().view(np.uint8)
    if kind == "F16":
        return tensor.to(torch.float16).contiguous().numpy()
    values = tensor.to(torch.float32).contiguous().numpy()
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
