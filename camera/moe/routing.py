"""Constraints of a layer's router on its experts, and the slots that tokens take.

Shapes: E routed experts, K experts per token, T tokens, N of them, S = T * K slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from camera.moe.experts.module import ExpertModule
from camera.moe.feed_forward import FeedForward, RoutedExperts
from camera.runtime.errors import CameraError


def sorted_slots(expert_S: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of slots by expert (stable), and where each expert's end in it, [E]; never waits.

    Slots of numbers from E on come last, and are nobody's.
    """
    sorted_S, order_S = expert_S.sort(stable=True)
    number_E = torch.arange(experts, dtype=expert_S.dtype, device=expert_S.device)
    return order_S, torch.searchsorted(sorted_S, number_E, right=True)


def counts_of(end_E: torch.Tensor) -> list[int]:
    """How many slots each expert has, from their ends; waits for the device once."""
    ends = end_E.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def routed_slots(index_TK: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (expert, slots) for the experts that were hit; slot // K is the token."""
    order_S, end_E = sorted_slots(index_TK.reshape(-1), experts)
    for expert, slots in enumerate(order_S.split(counts_of(end_E))):
        if len(slots):
            yield expert, slots


@dataclass(frozen=True)
class RouterConstraints:
    """Constraints of a router on the experts that remain.

    row: parameters of the router for one expert. A group-limited router chooses from the
    `open_groups` best of `groups` groups of neighbouring experts, which must stay equal in size and
    hold `least_per_group` experts.
    """

    experts: int
    top_k: int
    row: int
    groups: int = 1
    open_groups: int = 1
    least_per_group: int = 1

    @property
    def most(self) -> int:
        """The largest number of experts that can be removed, a multiple of `groups`.

        E - groups * max(least_per_group, ceil(K / open_groups)): top-k stays possible.
        """
        stay = max(self.least_per_group, -(-self.top_k // self.open_groups))
        return max(self.experts - self.groups * stay, 0)


def router_constraints(ffn: FeedForward) -> RouterConstraints | None:
    """Constraints of a layer's router, on any device; None where no expert can be removed.

    That is a dense FFN, and experts in a compressed format.
    """
    if not ffn.is_moe:
        return None
    module = routed_experts(ffn).module
    if isinstance(module, ExpertModule) and not module.holds_native:
        return None
    router = router_of(ffn)
    experts = len(routed_experts(ffn).widths)
    row = sum(tensor.numel() // experts for *_, tensor in rows_of_experts(ffn))
    groups = ffn.family.groups(router)
    return RouterConstraints(experts, router.top_k, row, groups.count, groups.open, groups.least)


def routed_experts(ffn: FeedForward) -> RoutedExperts:
    """The routed experts of a layer; CameraError where it has none."""
    found = next((group for group in ffn.groups if group.routed), None)
    if found is None:
        raise CameraError(f"'{ffn.groups[0].path}' has no routed experts: there are none to drop.")
    return found


def rows_of_experts(ffn: FeedForward) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """(module, name there, tensor) of what chooses experts and has one row, or entry, of each."""
    family = ffn.family
    for root, paths in ((router_of(ffn), family.router_rows), (ffn.module, family.block_rows)):
        for path in paths:
            *parents, name = path.split(".")
            module = dict(root.named_modules()).get(".".join(parents))
            tensor = getattr(module, name, None)
            if tensor is not None:
                yield module, name, tensor


def routed(ffn: FeedForward, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits_TE, weight_TK, index_TK) of the layer's own router, called as the layer calls it."""
    added = [getattr(ffn.module, name, None) for name in ffn.family.block_rows]
    return router_of(ffn)(ffn.family.router_input(x_TH), *added)


def gates(weight_NK: torch.Tensor, index_NK: torch.Tensor, experts: int) -> torch.Tensor:
    """Routing as a matrix [N, E] in fp32: an expert's weight, 0 where it was not chosen."""
    gates_NE = weight_NK.new_zeros((len(weight_NK), experts), dtype=torch.float32)
    return gates_NE.scatter_(1, index_NK, weight_NK.float())


def router_of(ffn: FeedForward) -> nn.Module:
    """The module that chooses the experts of a token."""
    return getattr(ffn.module, ffn.family.router)
