"""Export of a checkpoint with constants in the place of experts, as vLLM's `approximate_experts`.

config.json names the replaced experts of each layer, `EXPERTS.NUMBER.approx_value` [H] holds the
constant of each, and their matrices are left out. Experts that stay keep their numbers, and the
router all its rows. Read in vLLM 0.33.0 (model_executor/layers/fused_moe/expert_substitution.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from camera.checkpoint.config import save_config
from camera.checkpoint.formats.approximate import ApproximateExperts
from camera.checkpoint.formats.native import native_state
from camera.checkpoint.shards import ShardWriter
from camera.checkpoint.source import copy_companions
from camera.engines.expert_names import expert_names
from camera.engines.plain import PlainModel, Tensors
from camera.moe.families import layer_of
from camera.runtime.errors import CameraError
from camera.runtime.files import published

KEY, VALUE = "approximate_experts", "approx_value"


def export_approximate_experts(checkpoint: str | Path, out: Path, trust_remote_code: bool) -> None:
    """Write a checkpoint with replaced experts for vLLM, a layer at a time.

    CameraError where no expert is replaced by a constant, and for a family whose checkpoints hold
    all experts of a layer in one tensor.
    """
    separator = _Separator()
    plain = PlainModel(checkpoint, 1, trust_remote_code, separator, constants=True)
    forms = {spec["form"] for spec in plain.modules.values()}
    if ApproximateExperts.name not in forms:
        raise CameraError(
            f"{plain.folder} has no experts that are replaced by constants "
            "(method.replaced_by=mean or fitted): export it as native instead."
        )
    separator.names = expert_names(plain, KEY)
    layers = len(plain.source.layers)
    with published(out) as partial:
        partial.mkdir()
        writer = ShardWriter(partial, layers + 1)
        for index, tensors in plain.layers():
            writer.add(index, native_state(plain.model, tensors) | separator.take(plain))
        writer.add(layers, native_state(plain.model, plain.rest()))
        writer.close()
        plain.config.architectures = [type(plain.model).__name__]
        plain.config.dtype = plain.dtype
        save_config(plain.config, partial)
        path = partial / "config.json"
        told = json.loads(path.read_text()) | {KEY: separator.replaced}
        path.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
        copy_companions(plain.folder, partial)


class _Separator:
    """Takes experts with constants apart: a tensor for each matrix that stays and each constant."""

    def __init__(self) -> None:
        self.names: dict[str, dict[int, tuple[str, str, str]]] = {}
        self.replaced: dict[str, list[int]] = {}  # by layer
        self._found: Tensors = {}

    def __call__(self, path: str, module: torch.nn.Module) -> bool:
        """Whether the module was taken apart; others are written as plain weights."""
        if not isinstance(module, ApproximateExperts):
            return False
        self.replaced[str(layer_of(f"{path}."))] = module.replaced
        constants = iter(module.approx_value.detach())
        for expert, (gate, up, down) in self.names[path].items():
            if module.widths[expert]:
                parts = (*module.gate_up(expert).detach().chunk(2), module.down(expert).detach())
                for name, part in zip((gate, up, down), parts, strict=True):
                    self._found[f"{name}.weight"] = part
            else:
                prefix = gate.rpartition(".")[0]
                self._found[f"{prefix}.{VALUE}"] = next(constants)
        return True

    def take(self, plain: PlainModel) -> Tensors:
        """The tensors since the last call, in the dtype of the checkpoint."""
        found, self._found = self._found, {}
        return {name: part.to(plain.dtype).contiguous() for name, part in found.items()}
