"""What a native experts module must be, and refusals that say what was found instead."""

import torch
from torch import nn

from camera.moe.experts.activation import Activation, gated
from camera.moe.experts.layout import ExpertLayout
from camera.runtime.errors import CameraError

_ODD = {  # what transformers says of an experts module: how it is told, and the plain value
    "has_gate": ("one matrix without a gate", True),
    "has_post_expert_norm": ("a norm after each expert", False),
}
_REACH = 40.0  # of the products that activations are compared at: beyond every clamp


def refuse_layout(path: str, module: nn.Module) -> None:
    """CameraError, saying what was found, unless experts are stored as an `ExpertLayout` says."""
    held = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    odd = [told for name, (told, plain) in _ODD.items() if getattr(module, name, plain) != plain]
    if not hasattr(module, "has_gate"):
        odd.append("code of its own")
    elif not odd and not _fits(ExpertLayout.of(module), held):
        odd.append("other tensors or shapes")
    if odd:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in held.items())
        raise CameraError(
            f"experts at '{path}' ({type(module).__name__}: {shapes or 'no parameters'}; "
            f"{', '.join(odd)}) are not gate_up_proj [E, 2I, H] and down_proj [E, H, I], both or "
            "neither transposed, with or without biases: no declaration can give this layout."
        )


def _fits(layout: ExpertLayout, held: dict[str, tuple[int, ...]]) -> bool:
    if len(held.get("gate_up_proj", ())) != 3 or len(held.get("down_proj", ())) != 3:
        return False
    experts, hidden, width = held["down_proj"]
    if layout.transposed:
        hidden, width = width, hidden
    inputs = (hidden, 2 * width) if layout.transposed else (2 * width, hidden)
    wanted = {"gate_up_proj": (experts, *inputs), "down_proj": held["down_proj"]}
    if layout.biased:
        wanted["gate_up_proj_bias"] = (experts, 2 * width)
        wanted["down_proj_bias"] = (experts, hidden)
    return held == wanted


def refuse_activation(path: str, module: nn.Module, act_fn: Activation) -> None:
    """CameraError where a module's own code computes another activation than its declaration."""
    if not _computes(module, act_fn):
        raise CameraError(
            f"experts at '{path}' ({type(module).__name__}) don't compute act(gate) * up by their "
            f"{type(act_fn).__name__}: declare what they do in `activation` of their Family."
        )


_COMPARED: dict[tuple, bool] = {}  # a layer is looked at a thousand times


def _computes(module: nn.Module, act_fn: Activation) -> bool:
    """Whether both activations are equal on numbers of either sign, compared once for a class and
    the numbers that its module holds: some layers of a model may have a clamp."""
    numbers = [(k, v) for k, v in vars(module).items() if isinstance(v, int | float)]
    key = type(module), type(act_fn), *numbers
    if key not in _COMPARED:
        places = torch.arange(64, device="cpu")
        both = (places * 29 % 64 - 32)[None] * (_REACH / 32)  # each number once, in no order
        own = module._apply_gate(both)
        ours = gated(act_fn, *ExpertLayout.of(module).halves(both, -1))
        _COMPARED[key] = own.is_meta or torch.allclose(own, ours, rtol=1e-4, atol=1e-5)
    return _COMPARED[key]
