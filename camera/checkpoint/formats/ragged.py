"""Experts of unequal width: what they compute, by the fastest way for the tokens at hand.

Shapes: T tokens, K experts per token, H hidden, E experts, W kept width of one expert, S = sum of
the kept widths, N tokens of one expert.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import groupby, pairwise

import torch
from torch import nn
from torch.nn import functional as F

from camera.checkpoint.formats.format import Format, Spec
from camera.checkpoint.formats.ragged_tables import RaggedTables, fill
from camera.moe.experts.activation import ClampedGate, gated
from camera.moe.experts.group import RoutedExperts
from camera.moe.experts.layout import ExpertLayout
from camera.moe.experts.module import ExpertModule
from camera.moe.families.family import Family
from camera.moe.grouped.products import KERNEL_DTYPES, grouped_products, ragged_products
from camera.moe.grouped.slots import counts_of, sorted_slots
from camera.runtime.device.accelerator import has_grouped_products

# A CPU without instructions for half precision multiplies such matrices many times slower.
SLOW_HALF = "AVX512" not in torch.backends.cpu.get_cpu_capability()
# Multiplications that take as long as one more expert in a loop (a third of that by width), and
# the tokens below which reading a matrix, not multiplying by it, takes the time: on one core.
LOOP_STEP, READING_TOKENS = 2_000_000, 16
FEW = 4  # experts of a width, on average, from which a CPU runs them by width


class RaggedExperts(RaggedTables, Format):
    """Drop-in for any native experts module whose experts kept different numbers of micro-experts.

    y = sum over the top-k experts e of weight_e * down_e(act(gate_e x) * (up_e x)); an expert of
    width 0 keeps its routing slot and adds nothing.

    The parameters have the native fused names with one dimension less: a reader that doesn't know
    this format stops at a shape mismatch and never loads random experts.
    """

    name = "ragged"

    def spec(self) -> Spec:
        return {"form": self.name, "widths": self.widths}

    @classmethod
    def from_spec(cls, native: nn.Module, spec: Spec) -> "RaggedExperts":
        layout, dtype = ExpertLayout.of(native), native.down_proj.dtype
        hidden = layout.hidden(native)
        return cls(hidden, spec["widths"], native.act_fn, "meta", dtype, layout)

    @classmethod
    def width_key(cls, family: Family, path: str) -> str:
        return family.keys.width

    @classmethod
    def widest(cls, spec: Spec) -> int:
        return max(spec["widths"])

    def select(self, rows: Sequence[torch.Tensor]) -> "RaggedExperts":
        return ragged_of(self, rows)

    @cached_property
    def few_widths(self) -> bool:
        """Whether many experts share a width."""
        return len(set(self.widths)) * FEW <= len(self.widths)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gated(self.act_fn, *gate_up.chunk(2, dim=-1))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map x_TH, index_TK, weight_TK to y_TH, by the fastest implementation for T tokens.

        All are equal up to the order of summation. On a CPU one token reads its K experts, and
        layers that are too small for a loop run in one product; the others run by width where few
        differ, else by expert. On an accelerator few tokens gather their experts' rows; many run
        by width where few differ, else together where it has a compiler, by width where grouped
        products are one kernel, or by expert.
        """
        tokens, top_k = top_k_index.shape
        routing = top_k_index, top_k_weights
        if not tokens or not self.micro_experts:
            return self._with_biases(torch.zeros_like(hidden_states), *routing)
        run = self.by_expert
        if hidden_states.device.type != "cpu":
            if tokens * top_k <= self.num_experts:
                run = self.gathered
            elif not self.few_widths and self._goes_together(hidden_states):
                run = self.together
            elif self.few_widths or has_grouped_products(hidden_states.device, hidden_states.dtype):
                run = self.by_width
        elif hidden_states.dtype == torch.float32:
            if tokens == 1 and not torch.is_grad_enabled():
                run = self.one_token
            elif self._is_small(tokens, top_k):
                run = self.all_at_once
            elif self.few_widths and hasattr(F, "grouped_mm"):
                run = self.by_width
        return self._with_biases(run(hidden_states, *routing), *routing)

    def one_token(
        self, x_1H: torch.Tensor, index_1K: torch.Tensor, weight_1K: torch.Tensor
    ) -> torch.Tensor:
        """Reads the K experts that were hit and nothing else; for a CPU, without gradients."""
        # Each call counts here: a small layer takes less time to compute than to ask for.
        gate_up, basis, bias = self.gate_up_proj, self.down_proj, self.gate_up_proj_bias
        act_fn, clamped = self.act_fn, isinstance(self.act_fn, ClampedGate)
        y_1H = torch.zeros_like(x_1H)
        for expert, weight in zip(*index_1K.tolist(), *weight_1K.tolist(), strict=True):
            width, start = self.widths[expert], self.starts[expert]
            if width:
                rows = slice(2 * start, 2 * (start + width))
                out_1N = F.linear(x_1H, gate_up[rows], None if bias is None else bias[rows])
                gate_1W, up_1W = out_1N.split(width, 1)
                h_1W = act_fn(gate_1W, up_1W) if clamped else act_fn(gate_1W).mul_(up_1W)
                y_1H.addmm_(h_1W, basis[start : start + width], alpha=weight)
        return y_1H

    def all_at_once(
        self, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """Every expert on every token, the weight of those not routed to being 0."""
        gate_S, up_S, owner_S = self._rows.columns(x_TH.device)
        out_TN = F.linear(x_TH, self.gate_up_proj, self.gate_up_proj_bias)
        act_TS = gated(self.act_fn, out_TN.index_select(1, gate_S), out_TN.index_select(1, up_S))
        weight_TE = weight_TK.new_zeros(len(x_TH), self.num_experts)
        weight_TE = weight_TE.scatter_add(1, index_TK, weight_TK)
        return (act_TS * weight_TE.index_select(1, owner_S)).to(x_TH.dtype) @ self.down_proj

    def by_expert(
        self, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """Sorted by expert: two products for every expert that was hit."""
        order, end_E = sorted_slots(index_TK.reshape(-1), self.num_experts)
        counts = counts_of(end_E)
        x_sorted = _wide(x_TH).index_select(0, order // index_TK.shape[1])
        outs = [
            self._expert(expert, x_NH)
            for expert, x_NH in enumerate(x_sorted.split(counts))
            if counts[expert]
        ]
        return self._add_up(torch.cat(outs), order, weight_TK, x_TH.dtype)

    def by_width(
        self, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """Sorted by expert in the tables' order: two grouped products for every width, or batched
        ones where that is no kernel.

        Waits for the device once. Widths whose rows are no multiple of 16 bytes, and those that
        only one expert has, take plain products: prune with `width_multiple` to have few.
        """
        rank_S = self._rows.ranks(x_TH.device)[index_TK.reshape(-1)]
        order, ends_E = sorted_slots(rank_S, self.num_experts)
        bounds = [0, *ends_E.tolist()]
        x_sorted = x_TH.index_select(0, order // index_TK.shape[1])
        outs, first = [], 0
        for width, experts in groupby(self.order, self.widths.__getitem__):
            run = list(experts)
            last = first + len(run)
            if len(run) == 1 or not width or width * x_TH.element_size() % 16:
                pieces = zip(run, bounds[first:last], bounds[first + 1 : last + 1], strict=True)
                outs += [self._expert(e, x_sorted[a:b]) for e, a, b in pieces if b > a]
            elif bounds[last] > bounds[first]:
                rows = slice(self.starts[run[0]], self.starts[run[0]] + width * len(run))
                gate_up = self.gate_up_proj[2 * rows.start : 2 * rows.stop]
                gate_up = gate_up.view(len(run), 2 * width, self.hidden_dim).transpose(1, 2)
                basis = self.down_proj[rows].view(len(run), width, self.hidden_dim)
                start, x_NH = bounds[first], x_sorted[bounds[first] : bounds[last]]
                if x_NH.device.type == "cpu" or has_grouped_products(x_NH.device, x_NH.dtype):
                    offsets = (ends_E[first:last] - start).to(torch.int32)
                    product = partial(F.grouped_mm, offs=offsets)
                else:
                    ends = [end - start for end in bounds[first : last + 1]]
                    product = partial(grouped_products, bounds=list(pairwise(ends)))
                out_N2W = product(x_NH, gate_up)
                if self.gate_up_proj_bias is not None:
                    bias = self.gate_up_proj_bias[2 * rows.start : 2 * rows.stop]
                    rank_N = rank_S[order[bounds[first] : bounds[last]]] - first
                    out_N2W = out_N2W + bias.view(len(run), -1)[rank_N]
                outs.append(product(self._apply_gate(out_N2W), basis))
            first = last
        return self._add_up(torch.cat(outs), order, weight_TK, x_TH.dtype)

    def together(
        self, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """Sorted by expert: three products, each of all experts at their own widths; without
        gradients."""
        index_S = index_TK.reshape(-1)
        order, end_E = sorted_slots(index_S, self.num_experts)
        bounds = list(pairwise([0, *end_E.tolist()]))
        x_sorted = x_TH.index_select(0, order // index_TK.shape[1])
        gates = [2 * start for start in self.starts]
        ups = [start + width for start, width in zip(gates, self.widths, strict=True)]
        gate_NW, up_NW = (
            ragged_products(x_sorted, self.gate_up_proj, starts, self.widths, bounds, "out")
            for starts in (gates, ups)
        )
        if self.gate_up_proj_bias is not None:
            bias = self.gate_up_proj_bias[self._rows.padded(x_TH.device)[0]]
            expert_N, missing = index_S.index_select(0, order), gate_NW.shape[1] - max(self.widths)
            gate_bias, up_bias = (F.pad(part, (0, missing)) for part in bias.chunk(2, 1))
            gate_NW = gate_NW + gate_bias.index_select(0, expert_N)
            up_NW = up_NW + up_bias.index_select(0, expert_N)
        act_NW = gated(self.act_fn, gate_NW, up_NW)
        out_NH = ragged_products(act_NW, self.down_proj, self.starts, self.widths, bounds, "in")
        return self._add_up(out_NH, order, weight_TK, x_TH.dtype)

    def gathered(
        self, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """Copies the rows of each routed expert, as many as the widest has; never waits."""
        tokens, top_k = index_TK.shape
        padded = self._rows.padded(x_TH.device)
        gate_up_rows, basis_rows, real = (table[index_TK.reshape(-1)] for table in padded)
        slots, widest = real.shape
        x_N1H = x_TH.repeat_interleave(top_k, dim=0).unsqueeze(1)
        gate_up = self.gate_up_proj.index_select(0, gate_up_rows.reshape(-1))
        gate_up = gate_up.view(slots, 2 * widest, self.hidden_dim)
        out_N1W = torch.bmm(x_N1H, gate_up.transpose(1, 2))
        if self.gate_up_proj_bias is not None:
            out_N1W = out_N1W + self.gate_up_proj_bias[gate_up_rows].view(slots, 1, -1)
        act_N1W = self._apply_gate(out_N1W)
        act_N1W = act_N1W.masked_fill(~real.unsqueeze(1), 0)
        basis = self.down_proj.index_select(0, basis_rows.reshape(-1))
        out_N1H = torch.bmm(act_N1W, basis.view(slots, widest, self.hidden_dim))
        out_TKH = out_N1H.view(tokens, top_k, self.hidden_dim)
        return (out_TKH * weight_TK.unsqueeze(2)).sum(1).to(x_TH.dtype)

    def _expert(self, expert: int, x_NH: torch.Tensor) -> torch.Tensor:
        start, end = self.starts[expert], self.starts[expert] + self.widths[expert]
        gate_up = self.gate_up_proj[2 * start : 2 * end].to(x_NH.dtype)
        bias, basis = self.gate_up_bias(expert), self.down_proj[start:end].to(x_NH.dtype)
        bias = None if bias is None else bias.to(x_NH.dtype)
        return torch.mm(self._apply_gate(F.linear(x_NH, gate_up, bias)), basis)

    def _goes_together(self, x_TH: torch.Tensor) -> bool:
        known = x_TH.dtype == self.down_proj.dtype and x_TH.dtype in KERNEL_DTYPES
        return known and not torch.is_grad_enabled() and ragged_products.compiles(x_TH)

    @staticmethod
    def _add_up(
        out_NH: torch.Tensor, order_N: torch.Tensor, weight_TK: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """y_TH = sum over k of weight * out, summed in fp32; order_N is the slot of each row."""
        wide = torch.promote_types(out_NH.dtype, torch.float32)
        row_N = torch.empty_like(order_N)
        row_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        return F.embedding_bag(
            row_N.view(weight_TK.shape),
            out_NH.to(wide),
            per_sample_weights=weight_TK.to(wide),
            mode="sum",
        ).to(dtype)

    def _is_small(self, tokens: int, top_k: int) -> bool:
        """Whether all products together take less time than a loop over the experts hit."""
        steps = min(self.num_experts, tokens * top_k) / (3 if self.few_widths else 1)
        work = max(tokens, READING_TOKENS) * 3 * self.micro_experts * self.hidden_dim
        return work <= LOOP_STEP * steps


def ragged_of(
    experts: ExpertModule | RoutedExperts, rows: Sequence[torch.Tensor] | None = None
) -> RaggedExperts:
    """Plain weights of routed experts, in their own dtype; `rows`: these micro-experts only."""
    like = experts.down(0)
    widths = experts.widths if rows is None else [len(kept) for kept in rows]
    shape = like.shape[0], widths, experts.act_fn
    plain = RaggedExperts(*shape, like.device, like.dtype, experts.layout)
    fill(plain, experts, rows)
    return plain


def _wide(x_TH: torch.Tensor) -> torch.Tensor:
    """x in the precision to compute in: fp32 where half precision is slow."""
    slow = SLOW_HALF and x_TH.device.type == "cpu" and x_TH.element_size() < 4
    return x_TH.float() if slow else x_TH
