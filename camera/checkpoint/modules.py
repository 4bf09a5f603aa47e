"""The modules of a compressed checkpoint in the place of native ones, and plain ones in theirs."""

from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from camera.checkpoint.config import CameraConfig, auto_class, reason_of
from camera.checkpoint.formats.format import FORMATS, Format, Spec
from camera.checkpoint.formats.narrow import PROJECTIONS, narrow_spec
from camera.moe.families import known_family
from camera.moe.families.family import Family
from camera.runtime.errors import CameraError


def build_native(config: Any, **options: Any) -> nn.Module:
    """The model of a config on meta, its blocks as this package calls them."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config, **options)
    _adapt(model)
    return model


def _adapt(model: nn.Module) -> None:
    family = known_family(model.config.model_type)
    if family is not None and family.adapt is not None:
        import_module(family.adapt).adapt(model)


def build_forms(model: nn.Module, config: CameraConfig) -> None:
    """Replace modules of a freshly built model (on meta) by those of a compressed checkpoint.

    CameraError, with the module's path, for a spec that doesn't fit the model.
    """
    _adapt(model)
    # what was compressed loads without the package that declared its family
    family = known_family(model.config.model_type) or Family()
    for path, spec in config.modules.items():
        form = spec.get("form") if isinstance(spec, dict) else None
        if not isinstance(form, str) or form not in FORMATS:
            raise CameraError(
                f"module {path} has the form '{form}', which this package doesn't know "
                f"({', '.join(sorted(FORMATS))}): upgrade camera-moe."
            )
        try:
            native = model.get_submodule(path)
        except AttributeError as error:
            raise CameraError(
                f"quantization_config of config.json names module {path}, which the model doesn't "
                "have: take the config.json that was written with these weights."
            ) from error
        try:
            if family.is_ffn(path) and not hasattr(native, "act_fn"):
                native.act_fn = family.activation(native)
            module = FORMATS[form].from_spec(native, spec)
        except Exception as error:  # a spec is data: what it leads to depends on what is wrong
            raise CameraError(
                f"quantization_config of config.json has no usable spec of module {path} "
                f"({reason_of(error)}): take the config.json that was written with "
                "these weights."
            ) from error
        model.set_submodule(path, module)


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
