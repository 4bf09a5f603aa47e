"""Names of the matrices of single experts in checkpoints."""

from __future__ import annotations

import torch

from camera.checkpoint.formats.native import native_state
from camera.engines.plain import PlainModel
from camera.runtime.errors import CameraError


def expert_names(plain: PlainModel, format: str) -> dict[str, dict[int, tuple[str, str, str]]]:
    """{path of experts: {expert: names of its gate, up and down}} in checkpoints of the family.

    CameraError, with the name of the format, for a family whose checkpoints hold all experts of a
    layer in one tensor.
    """
    found: dict[str, dict[int, tuple[str, str, str]]] = {}
    for path in plain.modules:
        name = f"{path}.down_proj"
        if not plain.family.is_routed(path):
            continue
        experts = plain.shapes[name][0]
        marks_E = 3.0 * torch.arange(experts)[:, None, None]
        marked = {
            f"{path}.gate_up_proj": torch.cat((marks_E, marks_E + 1), 1),
            name: marks_E + 2,
        }
        names: dict[int, str] = {}
        for key, mark in native_state(plain.model, marked).items():
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
