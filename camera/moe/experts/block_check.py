"""Whether a block adds its experts up as a declaration says, tried on stand-ins of its parts.

Shapes: L tokens of a sample, T = L tokens, H hidden, G groups of experts (shared ones, routed).
"""

import copy

import torch
from torch import nn

from camera.moe.capture import ModuleStub, unwrap
from camera.moe.experts.group import MlpExpert
from camera.moe.feed_forward import FeedForward
from camera.runtime.errors import CameraError

TOKENS = 5


@torch.no_grad()
def refuse_other_sums(ffn: FeedForward, hidden: int) -> None:
    """CameraError unless a native block puts out scale * routed experts + weight * shared expert.

    The block's own code runs once, with a router of random weights and experts that put out given
    numbers, so that it needs no weights: a factor, a mean or a norm that no declaration tells of
    would else make every score wrong, silently.
    """
    family, draw = ffn.family, torch.Generator().manual_seed(0)
    block, outputs_GTH, weights = _without_experts(ffn, draw), [], []
    x_1LH = torch.randn(1, TOKENS, hidden, generator=draw, device="cpu")
    for group in ffn.groups:
        out_TH = torch.randn(TOKENS, hidden, generator=draw, device="cpu")
        weight_T1 = torch.full((TOKENS, 1), float(group.scale), device="cpu")
        if isinstance(group, MlpExpert) and family.shared_gate:
            weight_T1 = torch.sigmoid(getattr(block, family.shared_gate)(x_1LH[0]))
        name = family.experts if group.routed else family.shared
        setattr(block, name, ModuleStub(lambda x, *_, out=out_TH: out.view_as(x)))
        outputs_GTH.append(out_TH)
        weights.append(weight_T1)
    found_TH = unwrap(block(x_1LH)).reshape(TOKENS, hidden)
    told_GTH = [weight_T1 * out_TH for weight_T1, out_TH in zip(weights, outputs_GTH, strict=True)]
    if torch.allclose(found_TH, sum(told_GTH), rtol=1e-3, atol=1e-3):
        return
    parts_NG = torch.stack(told_GTH, -1).flatten(0, 1)
    factor_G = torch.linalg.lstsq(parts_NG, found_TH.reshape(-1, 1)).solution[:, 0]
    is_sum = torch.allclose(parts_NG @ factor_G, found_TH.flatten(), rtol=1e-2, atol=1e-2)
    names = ["its routed experts" if group.routed else "its shared expert" for group in ffn.groups]
    terms = [f"{f:.4g} times {name}" for f, name in zip(factor_G.tolist(), names, strict=True)]
    told = " and ".join(terms) if is_sum else "something else than a sum of its experts"
    raise CameraError(
        f"'{ffn.path}.{family.ffn}' ({type(ffn.module).__name__}) puts out {told}: declare the "
        "attribute by which it multiplies its routed experts in `routed_scale` of its Family; "
        "nothing else can be declared."
    )


def _without_experts(ffn: FeedForward, draw: torch.Generator) -> nn.Module:
    """A copy of the block on the CPU, of random weights, in which groups of experts are missing."""
    shared = {id(group.module): nn.Identity() for group in ffn.groups}
    for module in ffn.module.modules():
        config = getattr(module, "config", None)
        shared[id(config)] = config  # the same object: copying it takes longer than all else
    block = copy.deepcopy(ffn.module, shared).to_empty(device="cpu").float()
    for tensor in [*block.parameters(), *block.buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=draw, device="cpu"))
    return block
