"""The FFN of a decoder layer of any family, as groups of experts.

Shapes: B samples, L positions, H hidden.

A layer's pool is its shared expert (if any) and then its routed experts; a dense FFN is a pool of
one expert.
"""

from typing import Any

import torch
from torch import nn

from camera.moe.experts.group import ExpertGroup, MlpExpert, RoutedExperts
from camera.moe.families.family import Family
from camera.runtime.errors import CameraError


class FeedForward:
    """The feed-forward part of one decoder layer and the expert groups of its pool."""

    def __init__(self, layer: nn.Module, family: Family, path: str):
        self.layer, self.path = layer, path
        self.module: nn.Module = _part(layer, family.ffn, "ffn", path)
        self.is_moe = hasattr(self.module, family.experts)
        self.residual_scale: float = (
            getattr(layer, family.residual_scale) if family.residual_scale else 1.0
        )
        self.family = family
        root = f"{path}.{family.ffn}"
        self.groups: list[ExpertGroup] = []
        if not self.is_moe:
            self.groups.append(MlpExpert(root, self.module, family=family))
            return
        _part(self.module, family.router, "router", root)
        if family.shared and getattr(self.module, family.shared, None) is not None:
            gate = None
            if family.shared_gate:
                gate = _part(self.module, family.shared_gate, "shared_gate", root)
            shared = getattr(self.module, family.shared)
            place = f"{root}.{family.shared}"
            self.groups.append(MlpExpert(place, shared, gate, family))
        experts = getattr(self.module, family.experts)
        scale = getattr(self.module, family.routed_scale) if family.routed_scale else 1.0
        self.groups.append(RoutedExperts(f"{root}.{family.experts}", experts, family, scale))

    def replace(self, group: ExpertGroup, module: nn.Module) -> None:
        """Replace the module of a group; the groups of this object are then out of date."""
        if not self.is_moe:
            setattr(self.layer, self.family.ffn, module)
            self.module = module
        else:
            name = self.family.experts if group.routed else self.family.shared
            setattr(self.module, name, module)

    @property
    def routed(self) -> RoutedExperts | None:
        """The routed experts of the layer; None where it has none."""
        return next((group for group in self.groups if group.routed), None)

    @property
    def widths(self) -> list[int]:
        """Width of every expert of the pool, in pool order."""
        return [width for group in self.groups for width in group.widths]

    def returned(self, out_BLH: torch.Tensor) -> Any:
        """What the layer takes from its FFN where this is the FFN's output."""
        return (out_BLH, None) if self.family.returns_routing and self.is_moe else out_BLH

    def added(self, out_BLH: torch.Tensor) -> torch.Tensor:
        """What the layer adds to its residual where this is the output of the FFN."""
        if self.family.output_norm:
            out_BLH = getattr(self.layer, self.family.output_norm)(out_BLH)
        return out_BLH * self.residual_scale


def _part(module: nn.Module, name: str, what: str, path: str) -> nn.Module:
    """A submodule that a declaration names; CameraError, naming those there are, if it lacks."""
    if getattr(module, name, None) is None:
        there = ", ".join(child for child, _ in module.named_children()) or "nothing"
        raise CameraError(
            f"'{path}' ({type(module).__name__}) has no '{name}', but {there}: declare its own "
            f"name in `{what}` of its Family."
        )
    return getattr(module, name)
