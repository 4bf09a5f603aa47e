"""Unpacking as one of transformers' rules for the keys of checkpoints, for `from_pretrained`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from camera.checkpoint.places import PackedPlace
from camera.checkpoint.quantized.opening import names_on_disk, weights_of


def unpacking_rules(folder: Path) -> list[WeightConverter]:
    """A rule for each tensor of a folder that is stored packed."""
    reader, found = weights_of(folder), []
    for key, (parts, beside) in names_on_disk(reader).items():
        patterns = [f"^{re.escape(name)}$" for name in parts + beside]
        found.append(WeightConverter(patterns, key, [_Unpack(reader.places[key])]))
    return found


class _Unpack(ConversionOps):
    """The plain tensor of its parts, which transformers leaves in their own dtypes."""

    def __init__(self, place: PackedPlace):
        self.hf_quantizer = True  # by this transformers knows that parts aren't to be cast
        self._place = place

    def __deepcopy__(self, _: Any) -> "_Unpack":
        return self

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        full_layer_name: str,
        model: nn.Module,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        parts = {
            role: input_dict[pattern][0]
            for role, pattern in zip(self._place.parts, source_patterns, strict=False)
        }
        dtype = model.get_parameter(full_layer_name).dtype
        return {full_layer_name: self._place.unpack(parts).to(dtype)}
