"""Plain weights in the place of packed and factored ones: what a model computes stays the same."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from camera.checkpoint.config import CameraConfig
from camera.checkpoint.formats.delta import DeltaExperts
from camera.checkpoint.formats.narrow import NarrowMlp
from camera.checkpoint.formats.packed.experts import PackedExperts
from camera.checkpoint.formats.packed.linear import PackedLinear, PackedRouter
from camera.checkpoint.formats.packed.mlp import PackedMlp
from camera.checkpoint.formats.ragged import RaggedExperts


@torch.no_grad()
def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Unpack a loaded compressed model, in place: ragged experts and ordinary linear layers remain.

    It is larger and, where unpacking takes time (small batches, CPUs), faster; what it computes is
    the same. A model that isn't compressed is returned as it is.
    """
    stored = getattr(model.config, "quantization_config", None)
    if not isinstance(stored, CameraConfig):
        return model
    plain_config = type(model.config).from_dict(model.config.to_dict())
    del plain_config.quantization_config
    with torch.device("meta"):
        native = AutoModelForCausalLM.from_config(plain_config)
    for path in list(stored.modules):
        module = model.get_submodule(path)
        if isinstance(module, PackedExperts | DeltaExperts):
            module = ragged(module)
            stored.modules[path] = module.spec()
        elif isinstance(module, PackedMlp):
            width = module.widths[0]
            module = module.dequantize(native.get_submodule(path))
            stored.modules[path] = {"form": NarrowMlp.form, "width": width}
        elif isinstance(module, PackedLinear | PackedRouter):
            module = module.dequantize()
            del stored.modules[path]
        model.set_submodule(path, module)
    return model


def ragged(experts: nn.Module) -> RaggedExperts:
    """Routed experts of any form with plain weights, in their own dtype."""
    like = experts.down(0)
    plain = RaggedExperts(
        like.shape[0], experts.widths, experts.act_fn, like.device, like.dtype
    ).requires_grad_(False)
    for expert in range(len(experts.widths)):
        plain.gate_up(expert).copy_(experts.gate_up(expert))
        plain.down(expert).copy_(experts.down(expert))
    return plain
