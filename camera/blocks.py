"""What the feed-forward part of a decoder layer, of any family, looks like to a method.

Shapes: T tokens, H hidden, K experts per token, E experts, W width of one expert, N tokens of one
expert (or micro-experts of a pool, where a tensor is named so).

A layer's pool is its shared expert (if any) and then its routed experts, or the one expert that a
dense FFN is. `FeedForward.observe` runs the layer's own router and calls an observer with what
each expert saw; nothing of the routing is computed here.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from camera.errors import CameraError
from camera.experts import RaggedExperts
from camera.families import Family

Observer = Callable[["ExpertGroup", int, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""observe(group, expert, x_NH, h_NW, a_N): the tokens one expert saw, its activations and routing
weights (None for 1); the micro-expert outputs are phi_NW = a_N * h_NW."""


class ExpertGroup:
    """Experts that live in one module: the routed ones of a layer, or a single MLP."""

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

    @property
    def act_fn(self) -> nn.Module:
        return self.module.act_fn


class RoutedExperts(ExpertGroup):
    """The routed experts of a layer, native (3-D parameters) or already ragged."""

    routed = True

    def __init__(self, path: str, module: nn.Module):
        super().__init__(path, module)
        if isinstance(module, RaggedExperts):
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
        if isinstance(self.module, RaggedExperts):
            return self.module.down(expert)
        return self.module.down_proj[expert]

    def activations(self, expert: int, x_NH: torch.Tensor) -> torch.Tensor:
        return self.module._apply_gate(F.linear(x_NH, self._fused(expert)).float())

    def _fused(self, expert: int) -> torch.Tensor:
        if isinstance(self.module, RaggedExperts):
            return self.module.gate_up(expert)
        return self.module.gate_up_proj[expert]


class MlpExpert(ExpertGroup):
    """A shared expert or a dense FFN: one expert made of three linear layers."""

    routed = False

    def __init__(self, path: str, module: nn.Module, gate: nn.Module | None = None):
        super().__init__(path, module)
        self.gate = gate
        self.widths = [module.up_proj.out_features]

    def gate_up(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module.gate_proj.weight, self.module.up_proj.weight

    def down(self, expert: int) -> torch.Tensor:
        return self.module.down_proj.weight

    def activations(self, expert: int, x_NH: torch.Tensor) -> torch.Tensor:
        gate, up = self.module.gate_proj(x_NH).float(), self.module.up_proj(x_NH).float()
        return self.module.act_fn(gate) * up

    def scale(self, x_NH: torch.Tensor) -> torch.Tensor | None:
        """The weight a_N the layer gives this expert's output; None for 1."""
        return None if self.gate is None else torch.sigmoid(self.gate(x_NH)).float().squeeze(-1)


class FeedForward:
    """The feed-forward part of one decoder layer and the expert groups of its pool."""

    def __init__(self, layer: nn.Module, family: Family, path: str):
        self.module: nn.Module = getattr(layer, family.ffn)
        self.is_moe = hasattr(self.module, family.experts)
        self.residual_scale: float = (
            getattr(layer, family.residual_scale) if family.residual_scale else 1.0
        )
        self._family = family
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

    @property
    def widths(self) -> list[int]:
        """Width of every expert of the pool, in pool order."""
        return [width for group in self.groups for width in group.widths]

    def observe(
        self,
        x_BLH: torch.Tensor,
        observer: Observer,
        mask_T: torch.Tensor | None = None,
        output: bool = False,
    ) -> torch.Tensor | None:
        """Call `observer` for every expert that x reaches; the FFN's own output if `output`.

        Only routed tokens are computed. Tokens where `mask_T` is False (padding) are routed as the
        model would, but not shown to the observer.
        """
        if not self.is_moe:
            y = _observe_mlp(self.groups[0], x_BLH, observer, mask_T, output)
            return y if output else None
        family, taps = self._family, ExitStack()
        for group in self.groups:
            if isinstance(group, MlpExpert):
                tap = Tap(lambda x, g=group: _observe_mlp(g, x, observer, mask_T, output))
                taps.enter_context(swapped(self.module, family.shared, tap))
            else:
                tap = Tap(
                    lambda x, index, weight, g=group: _observe_routed(
                        g, x, index, weight, observer, mask_T, output
                    )
                )
                taps.enter_context(swapped(self.module, family.experts, tap))
        with taps:
            y = self.module(x_BLH)
        return y if output else None


class Tap(nn.Module):
    """A module that calls a function: stands in for a part of a layer while the layer runs."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@contextmanager
def swapped(parent: nn.Module, name: str, stand_in: nn.Module) -> Iterator[None]:
    """Put `stand_in` in the place of a submodule for the length of a block."""
    original = getattr(parent, name)
    setattr(parent, name, stand_in)
    try:
        yield
    finally:
        setattr(parent, name, original)


def routed_slots(index_TK: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (expert, slots) for the experts that were hit; slot // K is the token."""
    order = torch.argsort(index_TK.reshape(-1), stable=True)
    counts = torch.bincount(index_TK.reshape(-1), minlength=experts).tolist()
    for expert, slots in enumerate(order.split(counts)):
        if len(slots):
            yield expert, slots


def _observe_routed(group, x_TH, index_TK, weight_TK, observer, mask_T, output) -> torch.Tensor:
    top_k = index_TK.shape[-1]
    y_TH = torch.zeros_like(x_TH)
    for expert, slots in routed_slots(index_TK, len(group.widths)):
        tokens = slots // top_k
        if not output and mask_T is not None:
            slots = slots[mask_T[tokens]]
            tokens = slots // top_k
        x_NH, a_N = x_TH[tokens], weight_TK.reshape(-1)[slots].float()
        h_NW = group.activations(expert, x_NH)
        if output:
            out = F.linear(h_NW.to(x_TH.dtype), group.down(expert)) * a_N[:, None]
            y_TH.index_add_(0, tokens, out.to(y_TH.dtype))
        if mask_T is not None and output:
            shown = mask_T[tokens]
            x_NH, h_NW, a_N = x_NH[shown], h_NW[shown], a_N[shown]
        if len(a_N):
            observer(group, expert, x_NH, h_NW, a_N)
    return y_TH


def _observe_mlp(group, x, observer, mask_T, output) -> torch.Tensor:
    x_TH = x.reshape(-1, x.shape[-1])
    shown_NH = x_TH if mask_T is None else x_TH[mask_T]
    h_TW = group.activations(0, x_TH if output else shown_NH)
    h_NW = h_TW if mask_T is None or not output else h_TW[mask_T]
    observer(group, 0, shown_NH, h_NW, group.scale(shown_NH))
    if not output:
        return torch.zeros_like(x)
    return group.module.down_proj(h_TW.to(x.dtype)).reshape(x.shape)
