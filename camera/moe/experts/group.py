"""The experts of one module, of any family: the routed ones of a layer, or a single MLP.

Shapes: T tokens, H hidden, E experts, W width of one expert, N tokens of one expert, R rows of all
experts.
"""

import torch
from torch import nn
from torch.nn import functional as F

from camera.moe.experts.activation import Activation, ClampedGate, gated
from camera.moe.experts.checks import refuse_activation, refuse_layout
from camera.moe.experts.layout import ExpertLayout
from camera.moe.experts.module import ExpertModule
from camera.moe.families.family import Family
from camera.moe.grouped.products import grouped_products
from camera.moe.grouped.rows import GroupRows
from camera.runtime.errors import CameraError


class ExpertGroup:
    """Experts of one module: the routed ones of a layer, or a single MLP.

    act_fn: the activation of each. scale: what the layer multiplies their sum by.
    """

    routed: bool
    widths: list[int]
    scale: float = 1.0

    def __init__(self, path: str, module: nn.Module, act_fn: Activation):
        self.path, self.module, self.act_fn = path, module, act_fn

    def preactivations(self, expert: int, x_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gate x and up x, both [N, W] in fp32: the products in the weights' own precision."""
        raise NotImplementedError

    def activations(self, expert: int, x_NH: torch.Tensor) -> torch.Tensor:
        """h_NW = act(gate x) * (up x) in fp32."""
        return gated(self.act_fn, *self.preactivations(expert, x_NH))

    def gate_up(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of one expert, gate [W, H] and up [W, H]."""
        raise NotImplementedError

    def down(self, expert: int) -> torch.Tensor:
        """Output weights of one expert, [H, W]: column i is micro-expert i's basis vector."""
        raise NotImplementedError

    def gate_up_bias(self, expert: int) -> torch.Tensor | None:
        """Biases of gate and up of one expert, [2W]: gate first; None where there are none."""
        raise NotImplementedError

    def down_bias(self, expert: int) -> torch.Tensor | None:
        """What one expert adds to its output, [H]; None where it has no bias."""
        raise NotImplementedError

    @property
    def goes_together(self) -> bool:
        """Whether its experts can be computed together: as their module stores them by default, and
        gated by act(gate) * up."""
        raise NotImplementedError

    def gates_and_ups(self, x_RH: torch.Tensor, rows: GroupRows) -> tuple[torch.Tensor, ...]:
        """gate_RW and up_RW of all experts, in the model's precision; x of an MLP is x_TH."""
        raise NotImplementedError

    def outputs(self, phi_RW: torch.Tensor, rows: GroupRows) -> torch.Tensor:
        """phi_RW @ w_down of each row's expert, [R, H]."""
        raise NotImplementedError

    def project(
        self, expert: int, phi_NW: torch.Tensor, a_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """phi_NW @ w_down, [N, H]: the contribution of these activations to the layer's output.

        An expert's bias is among it, times the routing weights a_N that phi contains (None: 1).
        """
        out_NH, bias_H = F.linear(phi_NW, self.down(expert)), self.down_bias(expert)
        if bias_H is None:
            return out_NH
        return out_NH + (bias_H if a_N is None else a_N[:, None].to(out_NH.dtype) * bias_H)

    @property
    def module_size(self) -> int:
        """Number of parameters of the module."""
        return sum(parameter.numel() for parameter in self.module.parameters())


class RoutedExperts(ExpertGroup):
    """The routed experts of a layer, native (3-D parameters) or in a compressed format."""

    routed = True

    def __init__(
        self,
        path: str,
        module: nn.Module,
        family: Family = Family(),  # noqa: B008 (frozen)
        scale: float = 1.0,
    ):
        self.scale = scale
        if isinstance(module, ExpertModule):
            super().__init__(path, module, module.act_fn)
            self.layout, self.widths = module.layout, module.widths
            return
        refuse_layout(path, module)
        super().__init__(path, module, family.activation(module))
        refuse_activation(path, module, self.act_fn)
        self.layout = ExpertLayout.of(module)
        self.widths = [self.layout.width(module)] * len(module.down_proj)

    def gate_up(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._halves(self._fused(expert))

    def down(self, expert: int) -> torch.Tensor:
        if isinstance(self.module, ExpertModule):
            return self.module.down(expert)
        return self.layout.down(self.module, expert)

    def gate_up_bias(self, expert: int) -> torch.Tensor | None:
        bias_2W = self._fused_bias(expert)
        return None if bias_2W is None else torch.cat(self._halves(bias_2W))

    def down_bias(self, expert: int) -> torch.Tensor | None:
        if isinstance(self.module, ExpertModule):
            return self.module.down_bias(expert)
        return self.module.down_proj_bias[expert] if self.layout.biased else None

    def preactivations(self, expert: int, x_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = F.linear(x_NH, self._fused(expert), self._fused_bias(expert))
        return self._halves(both.float(), -1)

    def _halves(self, both: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.module, ExpertModule):
            return both.chunk(2, dim)
        return self.layout.halves(both, dim)

    @property
    def goes_together(self) -> bool:
        if isinstance(self.module, ExpertModule) or isinstance(self.act_fn, ClampedGate):
            return False
        return self.layout == ExpertLayout()

    def gates_and_ups(self, x_RH: torch.Tensor, rows: GroupRows) -> tuple[torch.Tensor, ...]:
        gate_up_EHW = self.module.gate_up_proj.transpose(1, 2)
        return grouped_products(x_RH, gate_up_EHW, rows.bounds).chunk(2, dim=1)

    def outputs(self, phi_RW: torch.Tensor, rows: GroupRows) -> torch.Tensor:
        return grouped_products(phi_RW, self.module.down_proj.transpose(1, 2), rows.bounds)

    def _fused(self, expert: int) -> torch.Tensor:
        if isinstance(self.module, ExpertModule):
            return self.module.gate_up(expert)
        return self.layout.fused(self.module, expert)

    def _fused_bias(self, expert: int) -> torch.Tensor | None:
        if isinstance(self.module, ExpertModule):
            return self.module.gate_up_bias(expert)
        return self.module.gate_up_proj_bias[expert] if self.layout.biased else None


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
        self.gate, self._names = gate, family.mlp
        if not all(hasattr(module, name) for name in self._names):
            there = ", ".join(name for name, _ in module.named_children()) or "no modules"
            raise CameraError(
                f"'{path}' ({type(module).__name__}) has {there} instead of the linear layers "
                f"{', '.join(self._names)}: declare its own in `mlp` of its Family, or, if routed "
                "experts are in there, their module in `experts`."
            )
        super().__init__(path, module, family.activation(module))
        self.widths = [self.linear_layers[1].out_features]

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

    def gate_up_bias(self, expert: int) -> torch.Tensor | None:
        biases = [linear.bias for linear in self.linear_layers[:2]]
        return None if any(bias is None for bias in biases) else torch.cat(biases)

    def down_bias(self, expert: int) -> torch.Tensor | None:
        return self.linear_layers[2].bias

    def preactivations(self, expert: int, x_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up, _ = self.linear_layers
        return gate(x_NH).float(), up(x_NH).float()

    def project(
        self, expert: int, phi_NW: torch.Tensor, a_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        # no family has both a gated shared expert and a bias, so the bias's weight is 1
        return self.linear_layers[2](phi_NW)

    @property
    def goes_together(self) -> bool:
        return not isinstance(self.act_fn, ClampedGate)

    def gates_and_ups(self, x_RH: torch.Tensor, rows: GroupRows) -> tuple[torch.Tensor, ...]:
        gate, up, _ = self.linear_layers
        return rows.filled(gate(x_RH)), rows.filled(up(x_RH))

    def outputs(self, phi_RW: torch.Tensor, rows: GroupRows) -> torch.Tensor:
        return self.project(0, phi_RW)

    def output(self, x_NH: torch.Tensor) -> torch.Tensor:
        """What the module puts out, times its routing weight."""
        gate = 1 if self.gate is None else torch.sigmoid(self.gate(x_NH))
        return self.module(x_NH) * gate

    def weight(self, x_NH: torch.Tensor) -> torch.Tensor | None:
        """Routing weight a_N of a gated shared expert; None for 1."""
        return None if self.gate is None else torch.sigmoid(self.gate(x_NH)).float().squeeze(-1)
