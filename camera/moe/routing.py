"""Constraints of a layer's router on its experts.

Shapes: E routed experts, K experts per token, T tokens, N of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from camera.moe.experts.group import RoutedExperts
from camera.moe.experts.module import ExpertModule
from camera.moe.feed_forward import FeedForward
from camera.runtime.errors import CameraError


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
