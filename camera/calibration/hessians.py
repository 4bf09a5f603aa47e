"""Energies and Hessians of a layer, what quantisation needs, gathered in one pass.

Shapes: E experts of the pool, N tokens of one expert (micro-experts of the pool, where a tensor is
named so), H hidden, W width of one expert, F = sum of W^2 over the experts (their Hessians, one
after the other), P inputs kept of all experts.

A Hessian is the plain sum of x x^T over tokens, so shares of the calibration add up.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.scores.energy import EnergyObserver, EnergyStatistics
from camera.moe.feed_forward import FeedForward
from camera.moe.observer import ExpertCall
from camera.moe.pool import LayerShape, PoolIndex


@dataclass
class HessianStatistics(EnergyStatistics):
    """Energies of a layer's pool, and of each expert the Hessians of its matrices, in fp32.

    input_EHH = sum x x^T over the expert's tokens: the inputs of gate and up, which share it.
    hidden_F = sum h h^T, [W, W] for each expert in turn: the inputs of down.
    input_max2_EH = max over tokens of x^2 (the sum over tokens is the diagonal of input_EHH).
    kept_PH, kept_E = the first inputs of every expert, as asked for, and how many these are.

    input_EHH and hidden_F, as large as the layer, lie on its device; all other fields on the CPU.
    """

    kind: ClassVar[str] = "hessians"
    reduced: ClassVar[dict[str, str]] = EnergyStatistics.reduced | {
        "input_EHH": "sum",
        "hidden_F": "sum",
        "input_max2_EH": "max",
    }
    input_EHH: torch.Tensor
    hidden_F: torch.Tensor
    input_max2_EH: torch.Tensor
    kept_PH: torch.Tensor
    kept_E: torch.Tensor

    def hidden(self, expert: int) -> torch.Tensor:
        """The Hessian [W, W] of the inputs of one expert's down."""
        squares = [width**2 for width in self.widths]
        width, start = self.widths[expert], sum(squares[:expert])
        return self.hidden_F[start : start + width**2].view(width, width)

    def kept(self, expert: int) -> torch.Tensor:
        """The inputs x_NH kept of one expert."""
        return self.kept_PH.split(self.kept_E.tolist())[expert]

    def channel_energy(self, alpha: float) -> torch.Tensor:
        """[(1 - alpha) |X_c|_2^2 + alpha |X_c|_inf^2] of every input channel, fp64 [E, H], on the
        CPU."""
        sum2_EH = self.input_EHH.diagonal(0, 1, 2).cpu().double()
        return (1 - alpha) * sum2_EH + alpha * self.input_max2_EH.double()

    def stored(self) -> EnergyStatistics:
        """The energies alone: Hessians are as large as the layer and serve only once."""
        names = (f.name for f in fields(EnergyStatistics))
        return EnergyStatistics(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class HessianSpec(ObserverSpec):
    """Energies and Hessians; `weighted` and `keep` are `HessianObserver`'s."""

    statistics: ClassVar[type[HessianStatistics]] = HessianStatistics

    weighted: bool = False
    keep: int = 0

    def nbytes(self, layer: LayerShape) -> int:
        """4 sum(H^2 + W^2), and on a CPU the inputs that are kept."""
        hessians = 4 * sum(layer.hidden**2 + width**2 for width in layer.pool.widths)
        return hessians + (self.host_bytes(layer) if layer.card is None else 0)

    def host_bytes(self, layer: LayerShape) -> int:
        """The inputs that are kept: by expert, and put together."""
        widths, routed = layer.pool.widths, len(layer.routed_widths)
        shown = layer.tokens * (len(widths) - routed + min(layer.top_k, routed))
        kept = min(len(widths) * self.keep, shown)
        return 2 * kept * layer.hidden * layer.itemsize

    def single_process(self) -> str | None:
        if not self.keep:
            return None
        return (
            "true_sequential runs experts again on inputs that one process keeps (set "
            "true_sequential=false)"
        )

    def build(self, index: int, ffn: FeedForward) -> HessianObserver:
        return HessianObserver(ffn, weighted=self.weighted, keep=self.keep)


class HessianObserver(LayerObserver):
    """Gathers a layer's energies and Hessians.

    `weighted` counts a token by its squared routing weight (its share in the layer's squared output
    error), else every token that reached the expert counts 1, as in GPTQ. `keep` inputs of each
    expert are kept, in the model's precision, for an expert that is run again. Memory:
    4 E (H^2 + W^2) bytes, on the layer's device until `result`.
    """

    def __init__(self, ffn: FeedForward, *, weighted: bool = False, keep: int = 0):
        self._energy, self._index = EnergyObserver(ffn), PoolIndex(ffn)
        self._weighted, self._keep = weighted, keep
        down = ffn.groups[0].down(0)
        hidden, device = down.shape[0], down.device
        experts, squares = self._index.experts, [width**2 for width in ffn.widths]
        self._hidden_F = torch.zeros(sum(squares), device=device)
        parts = zip(self._hidden_F.split(squares), ffn.widths, strict=True)
        self._hidden = [H_WW.view(width, width) for H_WW, width in parts]
        self._input_EHH = torch.zeros(experts, hidden, hidden, device=device)
        self._max2_EH = torch.zeros(experts, hidden, device=device)
        self._kept: list[list[torch.Tensor]] = [[] for _ in range(experts)]
        self._kept_count = [0] * experts
        self._dtype = down.dtype

    def __call__(self, call: ExpertCall) -> None:
        self._energy(call)
        e, x_NH, h_NW, a_N = (
            self._index.expert(call.group.path, call.expert),
            call.x_NH,
            call.h_NW,
            call.a_N,
        )
        left = self._keep - self._kept_count[e]
        if left > 0:
            self._kept[e].append(x_NH[:left].to("cpu", copy=True))  # no view of all inputs
            self._kept_count[e] += len(self._kept[e][-1])
        x_NH, h_NW = x_NH.float(), h_NW.float()
        self._max2_EH[e] = torch.maximum(self._max2_EH[e], x_NH.square().amax(0))
        if self._weighted and a_N is not None:
            x_NH, h_NW = x_NH * a_N[:, None], h_NW * a_N[:, None]
        self._input_EHH[e].addmm_(x_NH.T, x_NH)
        self._hidden[e].addmm_(h_NW.T, h_NW)

    def result(self) -> HessianStatistics:
        """The statistics gathered so far; Hessians stay where the layer is."""
        energy = self._energy.result()
        kept = [x_NH for parts in self._kept for x_NH in parts]
        empty = torch.zeros(0, self._input_EHH.shape[1], dtype=self._dtype)
        return HessianStatistics(
            groups=energy.groups,
            **energy.tensors(),
            input_EHH=self._input_EHH,
            hidden_F=self._hidden_F,
            input_max2_EH=self._max2_EH.cpu(),
            kept_PH=torch.cat(kept) if kept else empty,
            kept_E=torch.tensor(self._kept_count, dtype=torch.int64),
        )
