"""Write a compressed checkpoint as a plain native one, for programs that know no ragged experts.

Shapes: E experts, W native width of one expert, H hidden.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from camera.checkpoint import CameraConfig, load_model
from camera.errors import CameraError
from camera.experts import RaggedExperts
from camera.source import copy_companions

WIDTH_KEYS = {  # config.json's name for the width of one routed expert, where it is not the first
    "mixtral": "intermediate_size",
    "phimoe": "intermediate_size",
    "olmoe": "intermediate_size",
    "granitemoe": "intermediate_size",
}


def export(checkpoint: str | Path, out: str | Path, width_multiple: int = 8) -> Path:
    """Zero-pad every expert to the widest one's width, a multiple of `width_multiple`.

    The result is a native checkpoint of the base model's type whose logits equal the compressed
    model's (a padded micro-expert gives act(0) * 0 = 0). Raises CameraError where the family's
    config can't say the widths.
    """
    out = Path(out)
    if out.exists():
        raise CameraError(f"{out} exists already: delete it or choose another folder.")
    model = load_model(checkpoint, device="cpu")
    stored = getattr(model.config, "quantization_config", None)
    if not isinstance(stored, CameraConfig):
        raise CameraError(f"{checkpoint} is not a compressed checkpoint: nothing to export.")
    config = copy.deepcopy(model.config)
    del config.quantization_config
    widths = native_widths(config, stored, width_multiple)
    for key, width in widths.items():
        setattr(config, key, width)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    state = model.state_dict()
    for path in stored.experts:
        experts = model.get_submodule(path)
        native = plain.get_submodule(path)
        state[f"{path}.gate_up_proj"], state[f"{path}.down_proj"] = pad_experts(
            experts, native.down_proj.shape[-1]
        )
    for path in stored.mlps:
        width = plain.get_submodule(path).up_proj.out_features
        state |= pad_mlp(path, model.get_submodule(path), width)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    out.mkdir(parents=True)
    plain.save_pretrained(out)
    copy_companions(Path(checkpoint), out)
    return out


def native_widths(config, stored: CameraConfig, multiple: int) -> dict[str, int]:
    """{config key: width} that holds the widest expert of each kind; one width for all layers."""
    found: dict[str, int] = {}

    def widen(key: str, width: int, per: int = 1) -> None:
        padded = max(-(-width // multiple) * multiple, multiple)
        found[key] = max(found.get(key, 0), -(-padded // per))

    for widths in stored.experts.values():
        widen(WIDTH_KEYS.get(config.model_type, "moe_intermediate_size"), max(widths))
    for path, width in stored.mlps.items():
        if path.endswith("shared_expert"):
            widen("shared_expert_intermediate_size", width)
        elif path.endswith("shared_experts"):
            widen("moe_intermediate_size", width, per=config.n_shared_experts)
        else:
            widen("intermediate_size", width)
    return found


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


def main() -> None:
    """`python -m camera.export FROM TO`."""
    parser = argparse.ArgumentParser(description=export.__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder of a compressed checkpoint")
    parser.add_argument("out", help="folder to write; must not exist")
    parser.add_argument("--width-multiple", type=int, default=8)
    arguments = parser.parse_args()
    try:
        path = export(arguments.checkpoint, arguments.out, arguments.width_multiple)
    except CameraError as error:
        raise SystemExit(f"error: {error}") from None
    config = json.loads((path / "config.json").read_text())
    print(f"{path}: {config['model_type']}, uniform width")


if __name__ == "__main__":
    main()
