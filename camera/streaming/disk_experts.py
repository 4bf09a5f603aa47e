"""Routed experts that stay on disk and are read one by one, where a layer of them fits no memory.

Shapes: W width of one expert, H hidden, T tokens of a batch, K experts per token, N tokens of one
expert.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from camera.checkpoint.shards import Place
from camera.moe.capture import Observer, Output, Sink, one_expert
from camera.moe.expert_module import ExpertModule
from camera.moe.families import ExpertNames
from camera.moe.feed_forward import RoutedExperts
from camera.moe.routing import routed_slots
from camera.runtime.mapped import let_go


class VisitedExperts(nn.Module, ExpertModule):
    """Stands for a layer's native experts; `gate_up` and `down` read from disk, the last one kept.

    `read(expert)` gives gate_up [2W, H] and down [H, W] of one expert.
    """

    holds_native = True

    def __init__(
        self,
        native: nn.Module,
        widths: list[int],
        read: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    ):
        super().__init__()
        self.native = [native]  # in a list, so that it is no part of the model
        self.widths, self.act_fn, self._read = widths, native.act_fn, read
        self._last: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def gate_up(self, expert: int) -> torch.Tensor:
        return self._visit(expert)[1]

    def down(self, expert: int) -> torch.Tensor:
        return self._visit(expert)[2]

    def materialize(self, experts: Sequence[int]) -> nn.Module:
        """The native module with these experts alone, in memory."""
        native = self.native[0]
        shapes = {"gate_up_proj": native.gate_up_proj.shape, "down_proj": native.down_proj.shape}
        like = self.down(experts[0])
        for name, (_, *shape) in shapes.items():
            table = like.new_empty(len(experts), *shape)
            setattr(native, name, nn.Parameter(table, requires_grad=False))
        for place, expert in enumerate(experts):
            native.gate_up_proj[place] = self.gate_up(expert)
            native.down_proj[place] = self.down(expert)
        return native

    def _visit(self, expert: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        if self._last is None or self._last[0] != expert:
            self._last = None  # before the next one is read
            self._last = expert, *self._read(expert)
        return self._last


class Visit:
    """Routed experts one after the other, each on its tokens of all batches: for experts on disk.

    `record` stands for the experts while a batch runs; `look` then shows what it would have seen.
    """

    def __init__(self, group: RoutedExperts):
        self._group = group
        self._batches: list[tuple] = []

    def record(
        self,
        mask_T: torch.Tensor | None,
        counts_T: torch.Tensor | None,
        sink: Sink | None,
        x_TH: torch.Tensor,
        index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> torch.Tensor:
        """Keep a batch's routing, on the CPU."""
        shown, counts = (None if t is None else t.cpu() for t in (mask_T, counts_T))
        slots = dict(routed_slots(index_TK.cpu(), len(self._group.widths)))
        self._batches.append((x_TH.cpu(), slots, weight_TK.cpu(), shown, counts, sink))
        return torch.zeros_like(x_TH)

    def look(self, observer: Observer, device: torch.device) -> None:
        """Visit every expert once."""
        for expert in range(len(self._group.widths)):
            for x_TH, slots, weight_TK, mask_T, counts_T, sink in self._batches:
                if expert not in slots:
                    continue
                tokens_N = slots[expert] // weight_TK.shape[-1]
                shown_N, counts_N = (
                    None if t is None else t[tokens_N].to(device) for t in (mask_T, counts_T)
                )
                x_NH = x_TH[tokens_N].to(device)
                a_N = weight_TK.reshape(-1)[slots[expert]].to(device)
                if sink is None and shown_N is not None:
                    x_NH, a_N = x_NH[shown_N], a_N[shown_N]
                    counts_N = None if counts_N is None else counts_N[shown_N]
                    shown_N = None
                one_expert(
                    self._group, expert, observer, shown_N, counts_N, sink, tokens_N, x_NH, a_N
                )
                let_go(x_TH)
                if isinstance(sink, Output):
                    let_go(sink.y_TH)


def places_of(places: dict[str, Place], expert: int, names: ExpertNames) -> dict[str, Place]:
    """Places of one of a layer's experts, by the names in a layer that has only this one."""
    found = {}
    for key, place in places.items():
        number = names.number(key)
        if number == expert:
            found[names.as_first(key)] = place
        elif number is None:
            size = place.bytes // place.shape[0]
            start = place.start + expert * size
            found[key] = replace(place, start=start, bytes=size, shape=(1, *place.shape[1:]))
    return found


def only_one(experts: nn.Module) -> nn.Module:
    """A layer's native experts module, on meta, with room for one."""
    one = copy.deepcopy(experts)
    for name, parameter in list(one.named_parameters(recurse=False)):
        shape = (1, *parameter.shape[1:])
        setattr(one, name, nn.Parameter(parameter.new_empty(shape), requires_grad=False))
    return one
