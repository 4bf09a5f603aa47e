"""The FFN of a decoder layer of any family, as groups of experts.

Shapes: T tokens, H hidden, K experts per token, E experts, W width of one expert, N tokens of one
expert (or micro-experts of a pool, where a tensor is named so).

A layer's pool is its shared expert (if any) and then its routed experts; a dense FFN is a pool of
one expert.
"""

import torch
from torch import nn
from torch.nn import functional as F

from camera.moe.expert_module import ExpertModule
from camera.moe.families import Family
from camera.runtime.errors import CameraError


class ExpertGroup:
    """Experts of one module: the routed ones of a layer, or a single MLP."""

    routed: bool
    widths: list[int]

    def __init__(self, path: str, module: nn.Module):
        self.path, self.module = path, module

    def activations(self, expert: int, x_NH: torch.Tensor) -> torch.Tensor:
        """h_NW = act(gate x) * (up x) in fp32: the matrix product in the weights' own precision."""
        raise NotImplementedError

    def gate_up(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of one expert, gate [W, H] and up [W, H]."""
        raise NotImplementedError

    def down(self, expert: int) -> torch.Tensor:
        """Output weights of one expert, [H, W]: column i is micro-expert i's basis vector."""
        raise NotImplementedError

    def project(self, expert: int, phi_NW: torch.Tensor) -> torch.Tensor:
        """phi_NW @ w_down, [N, H]: the contribution of these activations to the layer's output."""
        return F.linear(phi_NW, self.down(expert))

    @property
    def act_fn(self) -> nn.Module:
        return self.module.act_fn

    @property
    def module_size(self) -> int:
        """Number of parameters of the module."""
        return sum(parameter.numel() for parameter in self.module.parameters())


class RoutedExperts(ExpertGroup):
    """The routed experts of a layer, native (3-D parameters) or in a compressed format."""

    routed = True

    def __init__(self, path: str, module: nn.Module):
        super().__init__(path, module)
        if isinstance(module, ExpertModule):
            self.widths = module.widths
            return
        plain = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
        odd = (
            getattr(module, "is_transposed", False)
            or getattr(module, "has_bias", False)
            or getattr(module, "has_post_expert_norm", False)
        )
        if not plain or odd or module.down_proj.dim() != 3:
            raise CameraError(
                f"experts at '{path}' ({type(module).__name__}) are not stored as gate_up_proj "
                "[E, 2I, H] and down_proj [E, H, I]: this layout is not supported."
            )
        experts, _, width = module.down_proj.shape
        self.widths = [width] * experts

    def gate_up(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._fused(expert).chunk(2)

    def down(self, expert: int) -> torch.Tensor:
        if isinstance(self.module, ExpertModule):
            return self.module.down(expert)
        return self.module.down_proj[expert]

    def activations(self, expert: int, x_NH: torch.Tensor) -> torch.Tensor:
        gate_up = F.linear(x_NH, self._fused(expert)).float()
        if isinstance(self.module, ExpertModule):
            gate, up = gate_up.chunk(2, dim=-1)
            return self.module.act_fn(gate) * up
        return self.module._apply_gate(gate_up)

    def _fused(self, expert: int) -> torch.Tensor:
        if isinstance(self.module, ExpertModule):
            return self.module.gate_up(expert)
        return self.module.gate_up_proj[expert]


class MlpExpert(ExpertGroup):
    """A shared expert or a dense FFN: one expert of three linear layers."""

    routed = False

    def __init__(self, path: str, module: nn.Module, gate: nn.Module | None = None):
        super().__init__(path, module)
        self.gate = gate
        self.widths = [module.up_proj.out_features]

    def gate_up(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.module, ExpertModule):
            return self.module.gate_up(expert).chunk(2)
        return self.module.gate_proj.weight, self.module.up_proj.weight

    def down(self, expert: int) -> torch.Tensor:
        if isinstance(self.module, ExpertModule):
            return self.module.down(expert)
        return self.module.down_proj.weight

    def activations(self, expert: int, x_NH: torch.Tensor) -> torch.Tensor:
        gate, up = self.module.gate_proj(x_NH).float(), self.module.up_proj(x_NH).float()
        return self.module.act_fn(gate) * up

    def project(self, expert: int, phi_NW: torch.Tensor) -> torch.Tensor:
        # no family has both a gated shared expert and a bias, so the bias's weight is 1
        return self.module.down_proj(phi_NW)

    def scale(self, x_NH: torch.Tensor) -> torch.Tensor | None:
        """Routing weight a_N of a gated shared expert; None for 1."""
        return None if self.gate is None else torch.sigmoid(self.gate(x_NH)).float().squeeze(-1)


class FeedForward:
    """The feed-forward part of one decoder layer and the expert groups of its pool."""

    def __init__(self, layer: nn.Module, family: Family, path: str):
        self.layer, self.path = layer, path
        self.module: nn.Module = getattr(layer, family.ffn)
        self.is_moe = hasattr(self.module, family.experts)
        self.residual_scale: float = (
            getattr(layer, family.residual_scale) if family.residual_scale else 1.0
        )
        self.family = family
        root = f"{path}.{family.ffn}"
        self.groups: list[ExpertGroup] = []
        if not self.is_moe:
            self.groups.append(MlpExpert(root, self.module))
            return
        if family.shared and getattr(self.module, family.shared, None) is not None:
            gate = getattr(self.module, family.shared_gate) if family.shared_gate else None
            shared = getattr(self.module, family.shared)
            self.groups.append(MlpExpert(f"{root}.{family.shared}", shared, gate))
        experts = getattr(self.module, family.experts)
        self.groups.append(RoutedExperts(f"{root}.{family.experts}", experts))

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
