"""Rounding of attention and router to nearest."""

from typing import Any

from torch import nn

from camera.checkpoint.formats.packed.linear import PackedLinear, PackedRouter
from camera.checkpoint.formats.packed.segments import BitSegments
from camera.checkpoint.formats.packed.spec import linear_spec, router_spec
from camera.moe.feed_forward import FeedForward
from camera.quantization.quantizers.quantizer import Quantizer


def round_outside(
    ffn: FeedForward, quantizer: Quantizer, attn_bits: int | None, router_bits: int | None
) -> dict[str, dict[str, Any]]:
    """Round a layer's attention and router to nearest, in place; specs by path."""
    forms: dict[str, dict[str, Any]] = {}
    router = getattr(ffn.module, ffn.family.router, None) if ffn.is_moe else None
    for name, module in list(ffn.layer.named_modules()):
        parent, _, last = name.rpartition(".")
        owner = ffn.layer.get_submodule(parent)
        inside = name == ffn.family.ffn or name.startswith(f"{ffn.family.ffn}.")
        in_router = router is not None and any(module is part for part in router.modules())
        bits = router_bits if in_router else None if inside else attn_bits
        weight = getattr(module, "weight", None)
        plain = type(module) is nn.Linear  # a router may be a subclass that returns more
        if bits is None or weight is None or not (plain or (in_router and weight.dim() == 2)):
            continue
        shape = tuple(weight.shape)
        cut = BitSegments.of("rows", [[bits] * shape[0]])
        quantized = quantizer.solve(weight.detach()[None], bits=bits)
        make = linear_spec if plain else router_spec
        spec = make(*shape, cut, quantizer.group_size, quantizer.sym)
        if plain:
            packed = PackedLinear(spec, module.bias, weight.device, weight.dtype)
            setattr(owner, last, packed)
        else:
            packed = PackedRouter.of(module, spec, weight.device)
        packed.store(quantized.matrix(0))
        forms[f"{ffn.path}.{name}"] = spec
    return forms
