"""The FFN of a decoder layer of any family, as groups of experts.

Shapes: T tokens, H hidden, K experts per token, E experts, W width of one expert, N tokens of one
expert (or micro-experts of a pool, where a tensor is named so), R rows of all experts.

A layer's pool is its shared expert (if any) and then its routed experts; a dense FFN is a pool of
one expert.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from camera.moe.expert_module import ExpertModule
from camera.moe.families.family import Family
from camera.moe.grouped.products import grouped_products
from camera.moe.grouped.rows import GroupRows
from camera.runtime.errors import CameraError

USUAL_GATE = "transformers.integrations.moe"  # where act(gate) * up stands for all that say nothing


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
    def goes_together(self) -> bool:
        """Whether its experts can be computed together: of one width, and gated as usual."""
        raise NotImplementedError

    def gates_and_ups(self, x_RH: torch.Tensor, rows: GroupRows) -> tuple[torch.Tensor, ...]:
        """gate_RW and up_RW of all experts, in the model's precision; x of an MLP is x_TH."""
        raise NotImplementedError

    def outputs(self, phi_RW: torch.Tensor, rows: GroupRows) -> torch.Tensor:
        """phi_RW @ w_down of each row's expert, [R, H]."""
        raise NotImplementedError

    @property
    def act_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
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
        _refuse_layout(path, module)
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

    @property
    def goes_together(self) -> bool:
        own = getattr(type(self.module), "_apply_gate", None)
        usual = getattr(own, "__module__", "") == USUAL_GATE
        return usual and not isinstance(self.module, ExpertModule)

    def gates_and_ups(self, x_RH: torch.Tensor, rows: GroupRows) -> tuple[torch.Tensor, ...]:
        gate_up_EHW = self.module.gate_up_proj.transpose(1, 2)
        return grouped_products(x_RH, gate_up_EHW, rows.bounds).chunk(2, dim=1)

    def outputs(self, phi_RW: torch.Tensor, rows: GroupRows) -> torch.Tensor:
        return grouped_products(phi_RW, self.module.down_proj.transpose(1, 2), rows.bounds)

    def _fused(self, expert: int) -> torch.Tensor:
        if isinstance(self.module, ExpertModule):
            return self.module.gate_up(expert)
        return self.module.gate_up_proj[expert]


class MlpExpert(ExpertGroup):
    """A shared expert or a dense FFN: one expert of three linear layers."""

    routed = False

    def __init__(
        self,
        path: str,
        module: nn.Module,
        gate: nn.Module | None = None,
        family: Family = Family(),  # noqa: B008 (frozen)
    ):
        super().__init__(path, module)
        self.gate, self._names, self._act = gate, family.mlp, family.mlp_act
        names = self._names
        if not all(hasattr(module, name) for name in names):
            there = ", ".join(name for name, _ in module.named_children()) or "no modules"
            raise CameraError(
                f"'{path}' ({type(module).__name__}) has {there} instead of the linear layers "
                f"{', '.join(names)}: declare its own in `mlp` of its Family, or, if routed "
                "experts are in there, their module in `experts`."
            )
        self.widths = [self.linear_layers[1].out_features]

    @property
    def act_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return getattr(F, self._act) if self._act else self.module.act_fn

    @property
    def linear_layers(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Gate, up and down."""
        gate, up, down = (getattr(self.module, name) for name in self._names)
        return gate, up, down

    def gate_up(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.module, ExpertModule):
            return self.module.gate_up(expert).chunk(2)
        gate, up, _ = self.linear_layers
        return gate.weight, up.weight

    def down(self, expert: int) -> torch.Tensor:
        if isinstance(self.module, ExpertModule):
            return self.module.down(expert)
        return self.linear_layers[2].weight

    def activations(self, expert: int, x_NH: torch.Tensor) -> torch.Tensor:
        gate, up, _ = self.linear_layers
        return self.act_fn(gate(x_NH).float()) * up(x_NH).float()

    def project(self, expert: int, phi_NW: torch.Tensor) -> torch.Tensor:
        # no family has both a gated shared expert and a bias, so the bias's weight is 1
        return self.linear_layers[2](phi_NW)

    @property
    def goes_together(self) -> bool:
        return True

    def gates_and_ups(self, x_RH: torch.Tensor, rows: GroupRows) -> tuple[torch.Tensor, ...]:
        gate, up, _ = self.linear_layers
        return rows.filled(gate(x_RH)), rows.filled(up(x_RH))

    def outputs(self, phi_RW: torch.Tensor, rows: GroupRows) -> torch.Tensor:
        return self.project(0, phi_RW)

    def output(self, x_NH: torch.Tensor) -> torch.Tensor:
        """What the module puts out, times its routing weight."""
        gate = 1 if self.gate is None else torch.sigmoid(self.gate(x_NH))
        return self.module(x_NH) * gate

    def scale(self, x_NH: torch.Tensor) -> torch.Tensor | None:
        """Routing weight a_N of a gated shared expert; None for 1."""
        return None if self.gate is None else torch.sigmoid(self.gate(x_NH)).float().squeeze(-1)


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


_ODD = {  # what transformers says of an experts module: how it is told, and the plain value
    "has_gate": ("one matrix without a gate", True),
    "is_concatenated": ("gate and up interleaved", True),
    "is_transposed": ("transposed matrices", False),
    "has_bias": ("biases", False),
    "has_post_expert_norm": ("a norm after each expert", False),
}


def _refuse_layout(path: str, module: nn.Module) -> None:
    """CameraError, saying what was found, unless experts are stored as [E, 2I, H], [E, H, I]."""
    held = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    odd = [told for name, (told, plain) in _ODD.items() if getattr(module, name, plain) != plain]
    gate_up, down = held.pop("gate_up_proj", ()), held.pop("down_proj", ())
    fused = len(gate_up) == len(down) == 3 and gate_up[0] == down[0] and not held
    if fused and gate_up[1:] != (2 * down[2], down[1]):
        odd.append("other shapes")
    if not hasattr(module, "has_gate"):
        odd.append("code of its own")
    if odd or not fused:
        shapes = ", ".join(f"{n} {list(p.shape)}" for n, p in module.named_parameters())
        raise CameraError(
            f"experts at '{path}' ({type(module).__name__}: {shapes or 'no parameters'}"
            f"{'; ' if odd else ''}{', '.join(odd)}) are not gate_up_proj [E, 2I, H] and down_proj "
            "[E, H, I], gate first, without more: no declaration can give this layout."
        )
