"""Export of a compressed checkpoint as a native one.

Shapes: E experts, W native width of one expert, H hidden.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from camera.checkpoint.config import CameraConfig, save_config
from camera.checkpoint.dequantize import dequantize
from camera.checkpoint.formats.format import FORMATS, Format
from camera.checkpoint.formats.narrow import padded_mlp
from camera.checkpoint.loading import DTYPES, load_model
from camera.checkpoint.matching import require_whole
from camera.checkpoint.source import copy_companions
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.runtime.errors import CameraError
from camera.runtime.files import replace_durably


def export(checkpoint: str | Path, out: str | Path, width_multiple: int = 8) -> Path:
    """Unpack what is packed; zero-pad every expert to the widest one's width, a multiple of
    `width_multiple`.

    The result is a native checkpoint of the base model's type whose logits equal the compressed
    model's (a padded micro-expert gives act(0) * 0 = 0). Raises CameraError for a model
    that isn't compressed and for a folder that exists.
    """
    out = Path(out).expanduser()
    if width_multiple < 1:
        raise CameraError(f"width_multiple={width_multiple} must be at least 1.")
    if out.exists():
        raise CameraError(f"{out} exists already: delete it or choose another folder.")
    model = dequantize(load_model(checkpoint, device="cpu", dtype=_stored_dtype(checkpoint)))
    stored = getattr(model.config, "quantization_config", None)
    if not isinstance(stored, CameraConfig):
        raise CameraError(f"{checkpoint} is not a compressed checkpoint: nothing to export.")
    config = copy.deepcopy(model.config)
    del config.quantization_config
    for key, width in native_widths(config, stored, width_multiple).items():
        setattr(config, key, width)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(padded_state(model, plain, stored), assign=True)
    plain.tie_weights()
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        plain.save_pretrained(partial)
        save_config(plain.config, partial)
        copy_companions(Path(checkpoint).expanduser(), partial)
        require_whole(config, partial)
        replace_durably(partial, out)
    except (OSError, SafetensorError) as error:
        raise CameraError(
            f"can't write {out} ({error}): free space on that disk or choose another folder."
        ) from error
    return out


def _stored_dtype(checkpoint: str | Path) -> str:
    """The dtype that config.json names: what is exported stays in it, on a CPU too."""
    try:
        dtype = AutoConfig.from_pretrained(str(Path(checkpoint).expanduser())).dtype
    except (OSError, ValueError):
        return "auto"  # `load_model` says what is wrong
    name = str(dtype).removeprefix("torch.")
    return name if name in DTYPES else "auto"


def native_widths(config: Any, stored: CameraConfig, multiple: int) -> dict[str, int]:
    """{config key: width} that holds the widest expert of each kind; one width for all layers."""
    family = family_of(config.model_type)
    found: dict[str, int] = {}
    for path, spec in stored.modules.items():
        format = FORMATS[spec["form"]]
        key, width = format.width_key(family, path), format.widest(spec)
        if family.is_shared(path) and family.keys.shared_count:
            width = -(-width // getattr(config, family.keys.shared_count))
        width = -(-max(width, 1) // multiple) * multiple
        found[key] = max(found.get(key, 0), width)
    return found


def padded_state(
    model: nn.Module, plain: nn.Module, stored: CameraConfig
) -> dict[str, torch.Tensor]:
    """The compressed model's tensors in the shapes of the native one."""
    state = model.state_dict()
    for path in stored.modules:
        module, native = model.get_submodule(path), plain.get_submodule(path)
        if isinstance(module, Format):
            padded = module.to_native(native.down_proj.shape[-1])
        else:
            padded = padded_mlp(module, native.up_proj.out_features)
        state |= {f"{path}.{name}": tensor for name, tensor in padded.items()}
    return state


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
