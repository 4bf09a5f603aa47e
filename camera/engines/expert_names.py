"""Names of the matrices of single experts in checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from camera.checkpoint.formats.native import native_state
from camera.checkpoint.modules import build_native
from camera.engines.plain import PlainModel
from camera.moe.families import family_of
from camera.runtime.errors import CameraError


def expert_names(plain: PlainModel, format: str) -> dict[str, dict[int, tuple[str, str, str]]]:
    """{path of experts: {expert: names of its gate, up and down}} in checkpoints of the family.

    CameraError, with the name of the format, for a family whose checkpoints hold all experts of a
    layer in one tensor.
    """
    found: dict[str, dict[int, tuple[str, str, str]]] = {}
    for path in plain.modules:
        if not plain.family.is_routed(path):
            continue
        experts = plain.shapes[f"{path}.down_proj"][0]
        names: dict[int, str] = {}
        for key, mark in _marks(plain.model, path, experts).items():
            if mark.numel() != 1:
                raise CameraError(
                    f"checkpoints of {plain.config.model_type} hold all experts of a layer in one "
                    f"tensor ('{key}'), and {format} names one for each expert."
                )
            names[int(mark)] = key.removesuffix(".weight")
        found[path] = {
            e: (names[3 * e], names[3 * e + 1], names[3 * e + 2]) for e in range(experts)
        }
    return found


def names_each_expert(config: Any) -> bool:
    """Whether checkpoints of this config's family have a tensor for each matrix of an expert, or
    its model has no experts."""
    plain = copy.deepcopy(config)
    if getattr(plain, "quantization_config", None) is not None:
        del plain.quantization_config
    model, family = build_native(plain), family_of(config.model_type)
    for path, module in model.named_modules():
        if family.is_routed(path) and hasattr(module, "down_proj"):
            marks = _marks(model, path, len(module.down_proj)).values()
            return all(mark.numel() == 1 for mark in marks)
    return True


def _marks(model: PreTrainedModel, path: str, experts: int) -> dict[str, torch.Tensor]:
    """By names on disk, tensors of a number for each matrix: 3 e, + 1 for up, + 2 for down."""
    marks_E = 3.0 * torch.arange(experts)[:, None, None]
    gate_up = torch.cat((marks_E, marks_E + 1), 1)
    return native_state(model, {f"{path}.gate_up_proj": gate_up, f"{path}.down_proj": marks_E + 2})
