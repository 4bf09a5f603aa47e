"""A bit plan applied to a layer: orders, quantises and packs the matrices of every expert.

Shapes: E experts of a batch, R rows, C columns, G scale groups of a row, H hidden, W width of one
expert, M micro-experts of it that stay, N tokens.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from camera.calibration.hessians import HessianStatistics
from camera.checkpoint.formats.packed.experts import PackedExperts
from camera.checkpoint.formats.packed.mlp import PackedMlp
from camera.checkpoint.formats.packed.segments import BitSegments, QuantizedMatrix
from camera.checkpoint.formats.packed.spec import experts_spec, mlp_spec
from camera.compensation.expert_regression import ExpertRegression
from camera.compensation.least_squares import FitReport, fit_report, refit
from camera.compensation.settings import CompensationSettings
from camera.moe.experts.group import ExpertGroup, MlpExpert
from camera.moe.feed_forward import FeedForward
from camera.quantization.batch import QuantizationReport, quantize_batch
from camera.quantization.ordered_expert import OrderedExpert
from camera.quantization.plans.layer_bits import ExpertBits, falling
from camera.quantization.quantizers.quantizer import Quantizer
from camera.runtime.device.accelerator import has_own_memory, total_memory

# Of Hessians, factors and weights that are solved as one batch: of the system's memory, and the
# share of an accelerator's own, whose columns take as long to ask for as for one expert's.
SOLVE_BYTES, SOLVE_SHARE = 4 * 2**30, 0.25


def solve_limit(card: int | None) -> int:
    """Bytes that are solved together; by the size of a card (None: in the system's memory), not by
    what is free, so that the same experts always are."""
    return SOLVE_BYTES if card is None else int(SOLVE_SHARE * card)


def solving_bytes(hidden: int, width: int, *, hessians: bool = True) -> int:
    """What solving one expert takes: Hessians and their factors, and weights, in fp32."""
    return 4 * (6 * (hidden**2 + width**2) * hessians + 12 * hidden * width)


def batch_bytes(
    hidden: int, widths: list[int], *, card: int | None = None, hessians: bool = True
) -> int:
    """What solving a module's experts takes, those that fit `solve_limit` (or one) at a time."""
    widest = max(widths)
    fit = solve_limit(card) // max(1, solving_bytes(hidden, widest))
    together = min(len(widths), max(1, fit))
    return together * solving_bytes(hidden, widest, hessians=hessians)


def quantize_layer(
    ffn: FeedForward,
    plan: list[ExpertBits],
    quantizer: Quantizer,
    seen: HessianStatistics | None = None,
    *,
    true_sequential: bool = False,
    compensation: CompensationSettings | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Replace the experts of a layer's pool by packed ones, by a plan in pool order.

    Without `seen` weights are rounded to nearest. `true_sequential`: the Hessian of down is that of
    the inputs which the quantised gate and up give, from the inputs kept in `seen`; with
    `compensation` down is first refitted to these, which compensates the errors of gate and up
    and of pruned micro-experts. Returns specs and reports by path.
    """
    forms, report, start = {}, {}, 0
    for group in ffn.groups:
        pool = list(range(start, start + len(group.widths)))
        start += len(group.widths)
        experts = [
            OrderedExpert(group, e, plan[p].order(), plan[p].folded()) for e, p in enumerate(pool)
        ]
        module = _empty(group, experts, quantizer)
        work = LayerQuantizer(group, experts, quantizer, seen, pool, true_sequential, compensation)
        for expert, gate_up, down in work.solved():
            where = () if isinstance(group, MlpExpert) else (expert,)
            module.store(*where, gate_up=gate_up, down=down)
        ffn.replace(group, module)
        forms[group.path], report[group.path] = module.spec(), work.report()
    return forms, report


def _empty(
    group: ExpertGroup, experts: list[OrderedExpert], quantizer: Quantizer
) -> PackedExperts | PackedMlp:
    """The packed module that the solved matrices go into."""
    axis, bits = experts[0].bits.axis, [expert.bits for expert in experts]
    moved = any((part[1:] > part[:-1]).any() for b in bits for part in (b.gate, b.up))
    scattered = ("columns",) * quantizer.scattered  # a group's columns aren't neighbours
    kept = tuple(dict.fromkeys(((axis,) if moved else ()) + scattered))
    gate_up = BitSegments.of(axis, [b.gate for b in bits], kept)
    down = BitSegments.of("columns", [b.down for b in bits], scattered)
    old, widths = group.down(0), [len(expert.order_M) for expert in experts]
    cuts = (gate_up, down, quantizer.group_size, quantizer.sym)
    if isinstance(group, MlpExpert):
        spec = mlp_spec(old.shape[0], widths[0], *cuts)
        return PackedMlp(spec, group.act_fn, experts[0].biases(), old.device, old.dtype)
    spec = experts_spec(old.shape[0], widths, *cuts)
    module = PackedExperts(spec, group.act_fn, old.device, old.dtype, group.layout)
    for expert in experts if group.layout.biased else []:
        module.gate_up_bias(expert.number).copy_(expert.gate_up_bias())
        module.down_bias(expert.number).copy_(group.down_bias(expert.number))
    return module


class LayerQuantizer:
    """Quantises the experts of one module in batches and collects the report."""

    def __init__(self, group, experts, quantizer, seen, pool, true_sequential, compensation):
        self.group, self.experts, self.seen, self.pool = group, experts, seen, pool
        self.true_sequential, self.compensation = true_sequential, compensation
        self.fits: list[FitReport] = []
        # the mean Hessian makes sense for inputs that all experts share, which down's are not
        self.mean = quantizer.fallback == "mean_hessian"
        self.quantizer = replace(quantizer, fallback="rtn") if self.mean else quantizer
        self.reports = {
            "gate_up": QuantizationReport(len(experts)),
            "down": QuantizationReport(len(experts)),
        }

    def report(self) -> dict[str, Any]:
        """Errors, damping and fallbacks of gate and up, and of down; what compensation did."""
        found = {name: part.report() for name, part in self.reports.items()}
        return found | (fit_report(self.fits) if self.fits else {})

    def solved(self) -> Iterator[tuple[int, list[QuantizedMatrix], QuantizedMatrix]]:
        """(expert, [gate, up], down) of every expert."""
        for batch in self._batches():
            experts = [self.experts[e] for e in batch]
            gate_ups, weights = self._gate_up(batch, experts)
            H_EMM, tokens_E, before = None, None, [expert.down() for expert in experts]
            if self.seen is not None:
                H_EMM, tokens_E = self._hidden(batch, experts, weights, before), self._tokens(batch)
            del weights
            downs, _ = quantize_batch(
                self.quantizer,
                before,
                [expert.bits.down for expert in experts],
                "columns",
                H_EMM,
                tokens_E,
                (self.reports["down"], batch),
            )
            yield from zip(batch, gate_ups, downs, strict=True)

    def _batches(self) -> Iterator[list[int]]:
        """Experts that fit into memory together, those of similar widths side by side."""
        like_HW = self.group.down(0)
        hidden, device = len(like_HW), like_HW.device
        limit = solve_limit(total_memory(device) if has_own_memory(device) else None)
        order = sorted(range(len(self.experts)), key=lambda e: len(self.experts[e].order_M))
        batch: list[int] = []
        for e in reversed(order):
            width = len(self.experts[e].order_M)
            widest = len(self.experts[batch[0]].order_M) if batch else width
            each = solving_bytes(hidden, widest)
            uneven = self.quantizer.scattered and width != widest
            if batch and (uneven or (len(batch) + 1) * each > limit):
                yield batch
                batch = []
            batch.append(e)
        if batch:
            yield batch

    def _tokens(self, batch: list[int]) -> torch.Tensor:
        return self.seen.tokens_E[[self.pool[e] for e in batch]]

    def _gate_up(self, batch: list[int], experts: list[OrderedExpert]) -> tuple[list, list]:
        """Solved [gate, up] of every expert, and both dequantised in their own order, [M, H]."""
        H_EHH, tokens_E, fallback = self._inputs(batch)
        pairs = [expert.gate_up() for expert in experts]
        bits = [(expert.bits.gate, expert.bits.up) for expert in experts]
        orders = [[falling(part) for part in both] for both in bits]
        known = tokens_E, (self.reports["gate_up"], batch), fallback
        by_rows = experts[0].bits.axis == "rows"
        return (self._by_rows if by_rows else self._by_columns)(pairs, bits, orders, H_EHH, known)

    def _by_rows(self, pairs, bits, orders, H_EHH, known) -> tuple[list, list]:
        """Gate above up, one matrix of every expert: rows are solved independently."""
        stacked = [
            torch.cat([w[n.to(w.device)] for w, n in zip(pair, order, strict=True)])
            for pair, order in zip(pairs, orders, strict=True)
        ]
        rows = [
            torch.cat([b[n] for b, n in zip(both, order, strict=True)])
            for both, order in zip(bits, orders, strict=True)
        ]
        solved, weights = quantize_batch(self.quantizer, stacked, rows, "rows", H_EHH, *known)
        gate_ups = [
            [replace(half, rows=n) for half, n in zip(both.chunk(2), order, strict=True)]
            for both, order in zip(solved, orders, strict=True)
        ]
        backs = [
            [w[n.argsort().to(w.device)] for w, n in zip(both.chunk(2), order, strict=True)]
            for both, order in zip(weights, orders, strict=True)
        ]
        return gate_ups, backs

    def _by_columns(self, pairs, bits, orders, H_EHH, known) -> tuple[list, list]:
        """Gate and up apart: each has its own order of input channels, hence its own factor."""
        gate_ups, backs = [[] for _ in pairs], [[] for _ in pairs]
        for part in range(2):
            moves = [order[part].to(pairs[0][0].device) for order in orders]
            H_ECC = None
            if H_EHH is not None:
                H_ECC = [H[n][:, n] for H, n in zip(H_EHH, moves, strict=True)]
            matrices = [pair[part][:, n] for pair, n in zip(pairs, moves, strict=True)]
            columns = [both[part][order[part]] for both, order in zip(bits, orders, strict=True)]
            args = (matrices, columns, "columns", H_ECC, *known)
            for e, (one, weight) in enumerate(
                zip(*quantize_batch(self.quantizer, *args), strict=True)
            ):
                gate_ups[e].append(replace(one, columns=moves[e]))
                backs[e].append(weight[:, moves[e].argsort()])
        return gate_ups, backs

    def _inputs(self, batch: list[int]):
        """Hessians of the experts' inputs, their tokens, and what stands in where there are few."""
        if self.seen is None:
            return None, None, None
        tokens_E, least = self._tokens(batch), self.quantizer.min_tokens
        H_EHH = self.seen.input_EHH[[self.pool[e] for e in batch]]
        everyone = torch.tensor(self.pool)
        reached = everyone[self.seen.tokens_E[everyone] >= max(least, 1)]
        few_E = tokens_E < max(least, 1)
        if not self.mean or not len(reached) or not few_E.any():
            return H_EHH, tokens_E, None
        mean_HH = sum(self.seen.input_EHH[p] for p in reached.tolist()) / len(reached)
        H_EHH[few_E.to(H_EHH.device)] = mean_HH
        fallback = ["mean_hessian" if few else None for few in few_E.tolist()]
        return H_EHH, tokens_E.clamp(min=max(least, 1)), fallback

    def _hidden(self, batch, experts, weights, downs) -> list[torch.Tensor]:
        """Hessians [M, M] of down's inputs; with compensation the `downs` are replaced."""
        if not self.true_sequential:
            return [
                expert.hidden(self.seen.hidden(self.pool[e]))
                for e, expert in zip(batch, experts, strict=True)
            ]
        found = []
        for i, (e, expert, pair) in enumerate(zip(batch, experts, weights, strict=True)):
            x_NH = self.seen.kept(self.pool[e]).to(pair[0].device)
            h_NM = expert.activations(x_NH.float(), *pair)
            if self.compensation is not None:
                downs[i] = self._refitted(expert, x_NH, h_NM, downs[i])
            found.append(h_NM.T @ h_NM)
        return found

    def _refitted(
        self, expert: OrderedExpert, x_NH: torch.Tensor, h_NM: torch.Tensor, down_HM: torch.Tensor
    ) -> torch.Tensor:
        """down_HM that makes of h what the expert was before."""
        h_NW = self.group.activations(expert.number, x_NH)
        whole_HW = self.group.down(expert.number).float()
        lost_NH = h_NW @ whole_HW.T - h_NM @ down_HM.float().T
        block = ExpertRegression(None, h_NM, down_HM.T)
        fitted = len(x_NH) - round(len(x_NH) * self.compensation.held_out)
        where, how = self.group.path, self.compensation
        self.fits.append(refit([block], lost_NH, fitted, how, where))
        return block.weight_WH.T.to(down_HM.dtype)
