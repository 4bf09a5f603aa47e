"""What a layer's router asks of its experts, and the slots that tokens take.

Shapes: E routed experts, K experts per token, T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from camera.moe.expert_module import ExpertModule
from camera.moe.feed_forward import FeedForward, RoutedExperts
from camera.runtime.errors import CameraError


def routed_slots(index_TK: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (expert, slots) for the experts that were hit; slot // K is the token."""
    order = torch.argsort(index_TK.reshape(-1), stable=True)
    counts = torch.bincount(index_TK.reshape(-1), minlength=experts).tolist()
    for expert, slots in enumerate(order.split(counts)):
        if len(slots):
            yield expert, slots


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
    module = routed_experts(ffn).module
    if isinstance(module, ExpertModule) and not module.holds_native:
        return None
    router = router_of(ffn)
    experts = len(routed_experts(ffn).widths)
    held = [getattr(router, name, None) for name in PER_EXPERT]
    row = sum(tensor.numel() // experts for tensor in held if tensor is not None)
    facts = {"experts": experts, "top_k": router.top_k, "row": row}
    # DeepSeek's routers: V2 groups if its topk_method says so, V3 always, by each group's best two
    if getattr(router, "num_group", None) and getattr(router, "topk_method", "") != "greedy":
        facts |= {"groups": router.num_group, "open_groups": router.topk_group}
        facts["least_per_group"] = 1 if hasattr(router, "topk_method") else 2
    return Routing(**facts)


def routed_experts(ffn: FeedForward) -> RoutedExperts:
    """The routed experts of a layer; CameraError where it has none."""
    found = next((group for group in ffn.groups if group.routed), None)
    if found is None:
        raise CameraError(f"'{ffn.groups[0].path}' has no routed experts: there are none to drop.")
    return found


def router_of(ffn: FeedForward) -> nn.Module:
    """The module that decides which experts a token takes."""
    return getattr(ffn.module, ffn.family.router)
