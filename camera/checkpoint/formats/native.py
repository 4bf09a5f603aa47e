"""Native tensors: of formats whose widths are equal, and by the names that checkpoints have.

Shapes: E experts, W native width of one expert, H hidden.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from camera.checkpoint.formats.format import Format
from camera.moe.feed_forward import FeedForward


@torch.no_grad()
def native_modules(ffn: FeedForward) -> None:
    """Put plain tensors, by their native names, in the place of formats whose widths are equal."""
    for group in ffn.groups:
        if not isinstance(group.module, Format):
            continue
        plain = nn.Module()
        for name, tensor in group.module.to_native(max(group.widths)).items():
            plain.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        ffn.replace(group, plain)


def native_state(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors of a native model by the names and in the shapes of its checkpoints on disk."""
    return revert_weight_conversion(model, tensors)
