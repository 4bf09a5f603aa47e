"""Routed experts loaded from disk one at a time.

Shapes: W width of one expert, H hidden, T tokens of a batch, K experts per token, N tokens of one
expert.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from camera.checkpoint.places import AnyPlace
from camera.moe.capture import RoutedCall, run_expert
from camera.moe.experts.group import RoutedExperts
from camera.moe.experts.module import ExpertModule
from camera.moe.families.family import ExpertNames
from camera.moe.grouped.sinks import OutputSum, Sink
from camera.moe.grouped.slots import routed_slots
from camera.moe.observer import Observer
from camera.runtime.mapped import release_pages


class DiskExperts(nn.Module, ExpertModule):
    """Stands in for a layer's native experts, which are read from disk; the last one is kept.

    `read(expert)` gives one expert: a native module of its own.
    """

    holds_native = True

    def __init__(
        self,
        experts: RoutedExperts,
        read: Callable[[int], RoutedExperts],
    ):
        super().__init__()
        self._native = [experts.module]  # in a list, so that it is no part of the model
        self.widths, self.act_fn, self.layout = experts.widths, experts.act_fn, experts.layout
        self._read = read
        self._last: tuple[int, RoutedExperts] | None = None

    def gate_up(self, expert: int) -> torch.Tensor:
        one = self._load(expert)
        if one.layout.interleaved:
            return torch.cat(one.gate_up(0))
        return one.layout.fused(one.module, 0)

    def down(self, expert: int) -> torch.Tensor:
        return self._load(expert).down(0)

    def gate_up_bias(self, expert: int) -> torch.Tensor | None:
        return self._load(expert).gate_up_bias(0)

    def down_bias(self, expert: int) -> torch.Tensor | None:
        return self._load(expert).down_bias(0)

    @property
    def native(self) -> nn.Module:
        """The native module, without weights."""
        return self._native[0]

    def materialize(self, experts: Sequence[int]) -> nn.Module:
        """The native module with these experts alone, in memory."""
        native = self.native
        for name, one in list(self._load(experts[0]).module.named_parameters()):
            table = one.new_empty(len(experts), *one.shape[1:])
            setattr(native, name, nn.Parameter(table, requires_grad=False))
        for place, expert in enumerate(experts):
            for name, one in self._load(expert).module.named_parameters():
                getattr(native, name)[place] = one[0]
        return native

    def _load(self, expert: int) -> RoutedExperts:
        if self._last is None or self._last[0] != expert:
            self._last = None  # before the next one is read
            self._last = expert, self._read(expert)
        return self._last[1]


class DiskExpertsPass:
    """Deferred evaluation of experts: each expert runs once, on its tokens of all batches.

    `recording` stands in for the experts while a batch runs; `run` then evaluates them.
    """

    def __init__(self, group: RoutedExperts):
        self._group = group
        self._batches: list[_RecordedBatch] = []

    def recording(self, batch: int, mask_T: torch.Tensor | None, sink: Sink | None) -> RoutedCall:
        """What is called in the experts' place: keeps a batch's routing, on the CPU."""

        def record(
            x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
        ) -> torch.Tensor:
            slots = dict(routed_slots(index_TK.cpu(), len(self._group.widths)))
            shown_T = None if mask_T is None else mask_T.cpu()
            routing = (x_TH.cpu(), slots, weight_TK.cpu(), shown_T)
            self._batches.append(_RecordedBatch(batch, *routing, sink))
            return torch.zeros_like(x_TH)

        return record

    def run(self, observer: Observer | None, device: torch.device) -> None:
        """Load each expert and pass its tokens to the observer and the batches' sinks."""
        for expert in range(len(self._group.widths)):
            for part in self._batches:
                if expert not in part.slots:
                    continue
                tokens_N = part.slots[expert] // part.weight_TK.shape[-1]
                shown_N = None if part.mask_T is None else part.mask_T[tokens_N].to(device)
                x_NH = part.x_TH[tokens_N].to(device)
                a_N = part.weight_TK.reshape(-1)[part.slots[expert]].to(device)
                if part.sink is None and shown_N is not None:
                    tokens_N = tokens_N[shown_N.to(tokens_N.device)]
                    x_NH, a_N, shown_N = x_NH[shown_N], a_N[shown_N], None
                run_expert(
                    self._group,
                    expert,
                    observer,
                    part.sink,
                    part.batch,
                    tokens_N,
                    x_NH,
                    a_N,
                    shown_N,
                )
                release_pages(part.x_TH)
                if isinstance(part.sink, OutputSum):
                    release_pages(part.sink.y_TH)


@dataclass(frozen=True)
class _RecordedBatch:
    """A batch's routing: its inputs, slots by expert, routing weights, padding, and its sink."""

    batch: int
    x_TH: torch.Tensor
    slots: dict[int, torch.Tensor]
    weight_TK: torch.Tensor
    mask_T: torch.Tensor | None
    sink: Sink | None


def single_expert_places(
    places: dict[str, AnyPlace], expert: int, names: ExpertNames
) -> dict[str, AnyPlace]:
    """Where one of a layer's experts lies, under the names of a layer that has only this one."""
    found = {}
    for key, place in places.items():
        number = names.number(key)
        if number == expert:
            found[names.as_first(key)] = place
        elif number is None:
            found[key] = place.rows(expert, 1)
    return found


def single_expert_module(experts: nn.Module) -> nn.Module:
    """A layer's native experts module, on meta, with room for one."""
    one = copy.deepcopy(experts)
    for name, parameter in list(one.named_parameters(recurse=False)):
        shape = (1, *parameter.shape[1:])
        setattr(one, name, nn.Parameter(parameter.new_empty(shape), requires_grad=False))
    return one
