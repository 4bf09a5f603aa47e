"""Removal of routed experts from a layer, and constants in the place of some.

Without constants the result is a native layer with a smaller router, which runs without this
package. With constants the router stays as it is.
Shapes: E routed experts, K experts per token, T tokens, H hidden, I width of one expert, R removed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from camera.checkpoint.formats.approximate import ApproximateExperts
from camera.checkpoint.formats.ragged import ragged_of
from camera.moe.experts.module import ExpertModule
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.routing import (
    RouterConstraints,
    routed_experts,
    router_constraints,
    router_of,
    rows_of_experts,
)
from camera.runtime.errors import CameraError


def remove_experts(ffn: FeedForward, keep: Sequence[int]) -> None:
    """Keep only these routed experts of a loaded native layer, and their rows of the router.

    The layer is then what `from_pretrained` builds with the smaller count in config.json; order and
    top-k stay. Raises CameraError for experts in a compressed format, for fewer than the router's
    top-k and for groups of unequal size.
    """
    group, routing = routed_experts(ffn), router_constraints(ffn)
    if routing is None:
        raise CameraError(
            f"the experts at '{group.path}' are already compressed ({type(group.module).__name__})"
            ": whole experts can only be dropped from a model's native weights."
        )
    stay = sorted(set(keep))
    _refuse(group.path, stay, routing)
    parts, modules = list(rows_of_experts(ffn)), [ffn.module, router_of(ffn)]
    if isinstance(group.module, ExpertModule):
        group.module = group.module.materialize(stay)
        ffn.replace(group, group.module)
    else:
        parts += [(group.module, name, tensor) for name, tensor in group.module.named_parameters()]
    index = torch.tensor(stay, device=group.module.down_proj.device)
    for module, name, tensor in parts:
        axis = 0 if tensor.shape[0] == routing.experts else -1
        rows = tensor.detach().index_select(axis, index)
        if isinstance(tensor, nn.Parameter):
            rows = nn.Parameter(rows, tensor.requires_grad)
        setattr(module, name, rows)
        if isinstance(module, nn.Linear):
            module.out_features = len(stay)
    for module in (*modules, group.module):
        if hasattr(module, "num_experts"):
            module.num_experts = len(stay)
    group.widths = [group.widths[expert] for expert in stay]


def replace_experts(
    ffn: FeedForward, keep: Sequence[bool], constants_RH: torch.Tensor
) -> dict[str, dict[str, Any]]:
    """Put a constant in the place of each routed expert that isn't kept; the spec by module path.

    A layer of which all are kept has no constants and stays the same function.
    """
    group = routed_experts(ffn)
    if all(keep):
        module = ragged_of(group, [torch.arange(width) for width in group.widths])
    else:
        module = ApproximateExperts.of(group, keep, constants_RH)
    ffn.replace(group, module)
    return {group.path: module.spec()}


def smaller_config(config: Any, experts: int) -> dict[str, int]:
    """The keys of config.json that say how many routed experts a layer has, with a new count."""
    return {family_of(config.model_type).keys.experts: experts}


def _refuse(path: str, stay: list[int], routing: RouterConstraints) -> None:
    if not stay or stay[0] < 0 or stay[-1] >= routing.experts:
        raise CameraError(f"experts {stay} of '{path}': there are 0 to {routing.experts - 1}.")
    size = routing.experts // routing.groups
    counts = [sum(e // size == g for e in stay) for g in range(routing.groups)]
    if len(set(counts)) > 1:
        raise CameraError(
            f"the router of '{path}' has {routing.groups} groups of experts, which must keep "
            f"equally many; these keep {counts}: drop the same number from each."
        )
    if routing.experts - len(stay) > routing.most:
        raise CameraError(
            f"{len(stay)} experts of '{path}' are fewer than its router needs to choose "
            f"{routing.top_k} from: keep at least {routing.experts - routing.most}."
        )
