"""Plain weights in the place of packed and factored ones."""

import torch
from torch import nn
from transformers import PreTrainedModel

from camera.checkpoint.config import CameraConfig
from camera.checkpoint.formats.format import Format, Spec
from camera.checkpoint.formats.narrow import PROJECTIONS, narrow_spec
from camera.checkpoint.quantizer import build_native


@torch.no_grad()
def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Unpack a loaded compressed model, in place: ragged experts and ordinary linear layers remain.

    It is larger and, where unpacking takes time (small batches, CPUs), faster. What it computes is
    the same. A model that isn't compressed is returned as it is.
    """
    stored = getattr(model.config, "quantization_config", None)
    if not isinstance(stored, CameraConfig):
        return model
    plain_config = type(model.config).from_dict(model.config.to_dict())
    del plain_config.quantization_config
    native = build_native(plain_config)
    for path in list(stored.modules):
        module = model.get_submodule(path)
        if not isinstance(module, Format):  # a narrower native module
            continue
        plain = module.dequantize(native.get_submodule(path))
        model.set_submodule(path, plain)
        spec = _spec_of(plain)
        if spec is None:
            del stored.modules[path]
        else:
            stored.modules[path] = spec
    return model


def _spec_of(plain: nn.Module) -> Spec | None:
    """The spec of a dequantised module; None for a native one of the width in config.json."""
    if isinstance(plain, Format):
        return plain.spec()
    is_mlp = all(hasattr(plain, name) for name in PROJECTIONS)
    return narrow_spec(plain) if is_mlp else None
