"""Write a compressed checkpoint as a plain native one, for programs that know only these.

Shapes: E experts, W native width of one expert, H hidden.
"""

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from camera.checkpoint.config import CameraConfig
from camera.checkpoint.dequantize import dequantize
from camera.checkpoint.formats.ragged import RaggedExperts
from camera.checkpoint.loading import load_model
from camera.checkpoint.source import copy_companions
from camera.moe.families import family_of
from camera.runtime.errors import CameraError


def export(checkpoint: str | Path, out: str | Path, width_multiple: int = 8) -> Path:
    """Unpack what is packed; zero-pad every expert to the widest one's width, a multiple of
    `width_multiple`.

    The result is a native checkpoint of the base model's type whose logits equal the compressed
    model's (a padded micro-expert gives act(0) * 0 = 0). Raises CameraError where the family's
    config can't say the widths.
    """
    out = Path(out)
    if width_multiple < 1:
        raise CameraError(f"width_multiple={width_multiple} must be at least 1.")
    if out.exists():
        raise CameraError(f"{out} exists already: delete it or choose another folder.")
    model = dequantize(load_model(checkpoint, device="cpu"))
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
        copy_companions(Path(checkpoint), partial)
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        raise CameraError(
            f"can't write {out} ({error}): free space on that disk or choose another folder."
        ) from error
    return out


def native_widths(config: Any, stored: CameraConfig, multiple: int) -> dict[str, int]:
    """{config key: width} that holds the widest expert of each kind; one width for all layers."""
    family = family_of(config.model_type)
    found: dict[str, int] = {}

    def widen(key: str, width: int, parts: int = 1) -> None:
        width = max(-(-width // parts), 1)
        found[key] = max(found.get(key, 0), -(-width // multiple) * multiple)

    for path, spec in stored.modules.items():
        if "widths" in spec:
            widen(family.width_key, max(spec["widths"]))
            continue
        width = spec["width"]
        if family.shared and path.endswith(f".{family.shared}"):
            count = getattr(config, family.shared_count_key) if family.shared_count_key else 1
            widen(family.shared_width_key, width, count)
        else:
            widen(family.dense_width_key, width)
    return found


def padded_state(
    model: nn.Module, plain: nn.Module, stored: CameraConfig
) -> dict[str, torch.Tensor]:
    """The compressed model's tensors in the shapes of the native one."""
    state = model.state_dict()
    for path in stored.modules:
        module, native = model.get_submodule(path), plain.get_submodule(path)
        if isinstance(module, RaggedExperts):
            padded = pad_experts(module, native.down_proj.shape[-1])
            state[f"{path}.gate_up_proj"], state[f"{path}.down_proj"] = padded
        else:
            state |= pad_mlp(path, module, native.up_proj.out_features)
    return state


def native_state(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors of a native model under the names and in the shapes its checkpoints have on disk."""
    return revert_weight_conversion(model, tensors)


def pad_experts(experts: RaggedExperts, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The native tensors of ragged experts: gate_up [E, 2W, H] and down [E, H, W], zero-padded."""
    count, hidden = experts.num_experts, experts.hidden_dim
    table = experts.gate_up_proj
    gate_up = torch.zeros(count, 2 * width, hidden, dtype=table.dtype)
    down = torch.zeros(count, hidden, width, dtype=table.dtype)
    for e, kept in enumerate(experts.widths):
        gate, up = experts.gate_up(e).detach().chunk(2)
        gate_up[e, :kept], gate_up[e, width : width + kept] = gate, up
        down[e, :, :kept] = experts.down(e).detach()
    return gate_up, down


def pad_mlp(path: str, mlp: nn.Module, width: int) -> dict[str, torch.Tensor]:
    """An MLP's tensors with zero rows (gate, up) and columns (down) up to `width`."""
    padded = {}
    for name in ("gate_proj", "up_proj"):
        for part, tensor in getattr(mlp, name).state_dict().items():
            shape = (width, *tensor.shape[1:])
            padded[f"{path}.{name}.{part}"] = tensor.new_zeros(shape)
            padded[f"{path}.{name}.{part}"][: len(tensor)] = tensor
    weight = mlp.down_proj.weight.detach()
    padded[f"{path}.down_proj.weight"] = weight.new_zeros(len(weight), width)
    padded[f"{path}.down_proj.weight"][:, : weight.shape[1]] = weight
    return padded
