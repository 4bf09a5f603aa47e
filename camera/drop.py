"""Whole routed experts out of a layer: what its router allows, and the removal itself.

What is left is a native layer with a smaller router: nothing of this package is needed to run it.
Shapes: E routed experts, K experts per token, T tokens, H hidden, I width of one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from camera.blocks import FeedForward, RoutedExperts
from camera.errors import CameraError
from camera.experts import Form
from camera.families import family_of
from camera.visited import VisitedExperts

# what a router holds of each expert along its first dimension
PER_EXPERT = ("weight", "bias", "e_score_correction_bias")


@dataclass(frozen=True)
class Routing:
    """What a layer's router asks of the experts that stay.

    A group-limited router takes a token's experts from the `open_groups` best of `groups` groups
    of neighbouring experts, which must stay equal in size.
    """

    experts: int
    top_k: int
    row: int  # parameters of the router for one expert
    groups: int = 1
    open_groups: int = 1
    least_per_group: int = 1  # as many as a group's score is made of

    @property
    def most(self) -> int:
        """The largest number of experts that may go: a multiple of `groups`, top-k stay in reach.

        E - groups * max(least_per_group, ceil(K / open_groups)).
        """
        stay = max(self.least_per_group, -(-self.top_k // self.open_groups))
        return max(self.experts - self.groups * stay, 0)


def routing_of(ffn: FeedForward) -> Routing | None:
    """The facts of a layer's router, on any device; None where no experts could be dropped.

    That is a dense FFN, and experts that already stand in a compressed form.
    """
    if not ffn.is_moe:
        return None
    if isinstance(_experts(ffn).module, Form) and not isinstance(
        _experts(ffn).module, VisitedExperts
    ):
        return None
    router = _router(ffn)
    experts = len(_experts(ffn).widths)
    held = [getattr(router, name, None) for name in PER_EXPERT]
    row = sum(tensor.numel() // experts for tensor in held if tensor is not None)
    facts = {"experts": experts, "top_k": router.top_k, "row": row}
    # DeepSeek's routers: V2 groups if its topk_method says so, V3 always, by each group's best two
    if getattr(router, "num_group", None) and getattr(router, "topk_method", "") != "greedy":
        facts |= {"groups": router.num_group, "open_groups": router.topk_group}
        facts["least_per_group"] = 1 if hasattr(router, "topk_method") else 2
    return Routing(**facts)


def drop_experts(ffn: FeedForward, keep: Sequence[int]) -> None:
    """Keep only these routed experts of a loaded native layer, and their rows of the router.

    The layer is then what `from_pretrained` builds with the smaller count in config.json; order and
    top-k stay. Raises CameraError for experts in a compressed form, for fewer than the router's
    top-k and for groups of unequal size.
    """
    group, routing = _experts(ffn), routing_of(ffn)
    if routing is None:
        raise CameraError(
            f"the experts at '{group.path}' are already compressed ({type(group.module).__name__})"
            ": whole experts can only be dropped from a model's native weights."
        )
    stay = sorted(set(keep))
    _refuse(group.path, stay, routing)
    router, parts = _router(ffn), [(_router(ffn), PER_EXPERT)]
    if isinstance(group.module, VisitedExperts):
        group.module = group.module.whole(stay)
        ffn.replace(group, group.module)
    else:
        parts.append((group.module, ("gate_up_proj", "down_proj")))
    index = torch.tensor(stay, device=group.module.down_proj.device)
    for module, names in parts:
        for name in names:
            tensor = getattr(module, name, None)
            if isinstance(tensor, nn.Parameter):
                setattr(module, name, nn.Parameter(tensor.data[index], tensor.requires_grad))
            elif tensor is not None:
                setattr(module, name, tensor[index])
    for module in (ffn.module, router, group.module):
        if hasattr(module, "num_experts"):
            module.num_experts = len(stay)
    if isinstance(router, nn.Linear):
        router.out_features = len(stay)
    group.widths = [group.widths[expert] for expert in stay]


def smaller_config(config: Any, experts: int) -> dict[str, int]:
    """The keys of config.json that say how many routed experts a layer has, with a new count."""
    return {family_of(config.model_type).count_key: experts}


def _experts(ffn: FeedForward) -> RoutedExperts:
    found = next((group for group in ffn.groups if group.routed), None)
    if found is None:
        raise CameraError(f"'{ffn.groups[0].path}' has no routed experts: there are none to drop.")
    return found


def _router(ffn: FeedForward) -> nn.Module:
    return getattr(ffn.module, ffn.family.router)


def _refuse(path: str, stay: list[int], routing: Routing) -> None:
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
