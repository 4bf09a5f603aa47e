"""Export of a quantised checkpoint in compressed-tensors' format `pack-quantized`.

Nothing is quantised anew: codes, scales and zeros are written in the other layout. Serving engines
take 2 to 8 bits with one scheme for all experts of a layer, and one width for the model.

Shapes: R rows (outputs), C columns (inputs), G scale groups of a row, E experts.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from camera.checkpoint.config import save_config
from camera.checkpoint.formats.format import Spec
from camera.checkpoint.formats.narrow import PROJECTIONS
from camera.checkpoint.formats.native import native_state
from camera.checkpoint.formats.packed.base import PackedBuffers
from camera.checkpoint.formats.packed.experts import PackedExperts
from camera.checkpoint.formats.packed.linear import PackedLinear
from camera.checkpoint.formats.packed.mlp import PackedMlp
from camera.checkpoint.formats.packed.segments import QuantizedMatrix
from camera.checkpoint.shards import ShardWriter
from camera.checkpoint.source import copy_companions
from camera.engines.expert_names import expert_names
from camera.engines.plain import PlainModel, Tensors
from camera.moe.families import family_of
from camera.runtime.errors import CameraError
from camera.runtime.files import published

log = logging.getLogger("camera")
BITS = range(2, 9)


@dataclass(frozen=True)
class Scheme:
    """How the weights of one group of modules are stored; group_size None: one scale a row."""

    bits: int
    sym: bool
    group_size: int | None

    def config(self, targets: list[str]) -> dict[str, Any]:
        """An entry of `config_groups`."""
        strategy = {"strategy": "channel"}
        if self.group_size is not None:
            strategy = {"strategy": "group", "group_size": self.group_size}
        return {
            "targets": targets,
            "format": "pack-quantized",
            "weights": {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": self.sym,
                "dynamic": False,
                **strategy,
            },
            "input_activations": None,
            "output_activations": None,
        }


def export_compressed_tensors(checkpoint: str | Path, out: Path, trust_remote_code: bool) -> None:
    """Write a quantised checkpoint for vLLM, a layer at a time.

    CameraError where its bits, groups or widths are none that the format has: bits per expert or
    1 bit, groups that don't divide a row, experts of several widths.
    """
    packing = import_packing()
    packer = _Packer(packing)
    plain = PlainModel(checkpoint, 1, trust_remote_code, packer)
    if not plain.compressed:
        raise CameraError(f"{plain.folder} is not a compressed checkpoint: nothing to export.")
    require_packable(plain.modules, plain.config.model_type)
    for key in {key for key, _ in plain.widths}:  # of layers without a spec too
        _require_one({width for other, width in plain.widths if other == key})
    packer.names, packer.dtype = expert_names(plain, "compressed-tensors"), plain.dtype
    layers = len(plain.source.layers)
    with published(out) as partial:
        partial.mkdir()
        writer = ShardWriter(partial, layers + 1)
        for index, tensors in plain.layers():
            writer.add(index, native_state(plain.model, tensors) | packer.take())
        writer.add(layers, native_state(plain.model, plain.rest()) | packer.take())
        writer.close()
        plain.config.architectures = [type(plain.model).__name__]
        plain.config.dtype = plain.dtype
        save_config(plain.config, partial)
        packer.write_config(partial / "config.json", plain)
        copy_companions(plain.folder, partial)


def import_packing() -> Any:
    """compressed-tensors' own packing of codes; CameraError where it isn't installed or too old."""
    try:
        helpers = import_module("compressed_tensors.compressors.pack_quantized.helpers")
    except ImportError as error:
        raise CameraError(
            "this export needs compressed-tensors from 0.18 on: pip install "
            "'camera-moe[compressed-tensors]'."
        ) from error
    return helpers.pack_to_int32


def require_packable(modules: Mapping[str, Spec], model_type: str) -> None:
    """CameraError where the format has no place for what these specs tell, by module path: several
    bits in a module, 1 bit, rows that aren't whole groups, experts of several widths."""
    family = family_of(model_type)
    kept: dict[tuple[bool, bool], set[int]] = {}  # widths by kind: routed, shared, dense
    for path, spec in modules.items():
        widths = spec.get("widths") or [spec[key] for key in ("width",) if key in spec]
        kept.setdefault((family.is_routed(path), family.is_shared(path)), set()).update(widths)
        bits, size = bits_of(spec), spec.get("group_size")
        if len(bits) > 1:
            raise _uneven(path)
        if bits and not bits <= set(BITS):
            raise CameraError(f"module {path} has {bits.pop()} bits: engines take 2 to 8.")
        if not bits or size is None:
            continue
        for row in [spec["hidden"], *widths] if widths else spec["shape"][1:]:
            if size <= row and row % size:
                raise CameraError(
                    f"module {path}: its rows of {row} aren't whole groups of {size}: set "
                    "group_size to a divisor of hidden size and width."
                )
    for found in kept.values():
        _require_one(found)


def _require_one(widths: set[int]) -> None:
    if len(widths) > 1:
        raise CameraError(
            f"its experts are {min(widths)} to {max(widths)} wide and engines take one width: "
            "quantise a model of uniform width."
        )


def bits_of(spec: Spec) -> set[int]:
    """The bits that a module's weights have; none where it isn't quantised."""
    return {
        bits for part in spec.values() if isinstance(part, Mapping) for bits in part.get("bits", ())
    }


class _Packer:
    """Writes packed modules in the other layout, and remembers the scheme of each."""

    def __init__(self, pack: Any):
        self._pack = pack
        self.dtype, self.wide_scales = torch.float16, False
        self.names: Mapping[str, Mapping[int, tuple[str, str, str]]] = {}
        self.schemes: dict[Scheme, list[str]] = {}
        self._packed: Tensors = {}

    def __call__(self, path: str, module: torch.nn.Module) -> bool:
        """Whether a module has been packed; others are written as plain weights."""
        if isinstance(module, PackedExperts):
            schemes = set()
            for expert, (gate, up, down) in self.names[path].items():
                for codes, names in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
                    schemes |= self._add(names, module, codes, expert, path)
            self._remember(schemes, path, rf"re:.*{re.escape(path.partition('.')[2])}\..*")
            return True
        linears: list[tuple[str, PackedBuffers]] = []
        if isinstance(module, PackedMlp):
            linears = [(f"{path}.{name}", getattr(module, name)) for name in PROJECTIONS]
        elif isinstance(module, PackedLinear):
            linears = [(path, module)]
        for name, linear in linears:
            self._remember(self._add((name,), linear, "weight", 0, name), name, name)
            if linear.bias is not None:
                self._packed[f"{name}.bias"] = linear.bias.detach()
        return bool(linears)

    def take(self) -> Tensors:
        """The tensors packed since the last call."""
        taken, self._packed = self._packed, {}
        return taken

    def write_config(self, path: Path, plain: PlainModel) -> None:
        """Add the schemes to config.json; warn where transformers would read them wrongly."""
        if not self.schemes:
            raise CameraError(
                f"nothing of {plain.folder} is quantised: export it as native instead."
            )
        groups = {
            f"group_{number}": scheme.config(sorted(targets))
            for number, (scheme, targets) in enumerate(self.schemes.items())
        }
        told = json.loads(path.read_text())
        told["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ["lm_head"],
        }
        path.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
        if self.wide_scales:
            dtype = str(self.dtype).removeprefix("torch.")
            log.warning(
                "scales are written in float32: an engine that runs this model in %s rounds them. "
                "Quantise with method.scale_dtype=%s to have it compute with exactly these.",
                dtype,
                dtype,
            )
        if len(self.schemes) > 1 or not all(scheme.sym for scheme in self.schemes):
            log.warning(
                "vLLM reads this checkpoint; transformers 5.23 doesn't read experts of several "
                "bits or with zero points in this format: it would load wrong weights."
            )

    def _add(
        self, names: Sequence[str], module: PackedBuffers, codes: str, expert: int, path: str
    ) -> set[Scheme]:
        """Pack the parts of one expert's matrix under these names; their schemes."""
        try:
            matrices = module.stored(codes, expert)
        except ValueError as error:
            raise _uneven(path) from error
        (bits,), spec = module.bits(codes), module.spec()
        return {
            self._add_matrix(name, matrix, bits, spec, path)
            for name, matrix in zip(names, matrices, strict=True)
        }

    def _add_matrix(
        self, name: str, matrix: QuantizedMatrix, bits: int, spec: Mapping[str, Any], path: str
    ) -> Scheme:
        rows, columns = matrix.codes_RC.shape
        size = spec["group_size"]
        if size is not None and size > columns:
            size = None
        half = 2 ** (bits - 1)
        zero_RG = matrix.zero_RG - half
        if not torch.equal(zero_RG, zero_RG.round()):
            raise CameraError(f"module {path} has fractional zeros, which this format can't hold.")
        scheme = Scheme(bits, not zero_RG.any() and spec["sym"], size)
        codes_RC = (matrix.codes_RC.short() - half).to(torch.int8)
        found = {
            "weight_packed": self._pack(codes_RC, bits),
            "weight_scale": self._scales(matrix.scale_RG),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not scheme.sym:
            found["weight_zero_point"] = self._pack(zero_RG.to(torch.int8), bits, packed_dim=0)
        self._packed |= {f"{name}.{part}": tensor for part, tensor in found.items()}
        return scheme

    def _scales(self, scale_RG: torch.Tensor) -> torch.Tensor:
        """In the model's dtype where that holds them exactly, else in fp32."""
        stored = scale_RG.to(self.dtype)
        if torch.equal(stored.float(), scale_RG):
            return stored
        self.wide_scales = True
        return scale_RG

    def _remember(self, schemes: set[Scheme], path: str, target: str) -> None:
        if len(schemes) > 1:
            raise CameraError(
                f"module {path}: engines take one scheme for all experts of a layer, and it has "
                f"{len(schemes)}."
            )
        (scheme,) = schemes
        self.schemes.setdefault(scheme, []).append(target)


def _uneven(path: str) -> CameraError:
    return CameraError(
        f"module {path} has weights of several bits or in another order, and compressed-tensors "
        "has the same bits for all weights of a layer's experts: use gptq, rtn or layerwise_bits."
    )
