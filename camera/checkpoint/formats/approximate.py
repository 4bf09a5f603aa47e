"""Experts of which some are replaced by a constant each.

Shapes: T tokens, K experts per token, H hidden, E experts, R of them replaced.
"""

from collections.abc import Sequence

import torch
from torch import nn

from camera.checkpoint.formats.ragged import RaggedExperts
from camera.checkpoint.formats.ragged_tables import fill
from camera.moe.experts.activation import Activation
from camera.moe.experts.group import RoutedExperts
from camera.moe.experts.layout import ExpertLayout


class ApproximateExperts(RaggedExperts):
    """`RaggedExperts` in which an expert of width 0 adds its routing weight times a constant.

    y = sum over the top-k experts e of weight_e * (f_e(x), or c_e where e is replaced): vLLM's
    `approximate_experts`, the novices of MoNE (arXiv 2507.00390). `approx_value` [R, H] holds the
    constants in the order of the replaced experts.
    """

    name = "approximate"
    holds_constants = True

    def __init__(
        self,
        hidden: int,
        widths: list[int],
        act_fn: Activation,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layout: ExpertLayout = ExpertLayout(),  # noqa: B008 (frozen)
    ):
        super().__init__(hidden, widths, act_fn, device, dtype, layout)
        self.replaced = [expert for expert, width in enumerate(widths) if not width]
        constants_RH = torch.empty(len(self.replaced), hidden, device=device, dtype=dtype)
        self.approx_value = nn.Parameter(constants_RH)
        self._slots: dict[torch.device, torch.Tensor] = {}

    @classmethod
    def of(
        cls, group: RoutedExperts, keep: Sequence[bool], constants_RH: torch.Tensor
    ) -> "ApproximateExperts":
        """The experts of a layer as they are, and constants in the place of those not kept."""
        like = group.down(0)
        rows = [
            torch.arange(width if stays else 0)
            for width, stays in zip(group.widths, keep, strict=True)
        ]
        widths = [len(kept) for kept in rows]
        shape = like.shape[0], widths, group.act_fn
        module = cls(*shape, like.device, like.dtype, group.layout)
        fill(module, group, rows)
        if module.layout.biased:
            for expert in module.replaced:  # its bias is in the constant
                module.down_bias(expert).zero_()
        module.approx_value.copy_(constants_RH)
        return module

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map x_TH, index_TK, weight_TK to y_TH."""
        y_TH = super().forward(hidden_states, top_k_index, top_k_weights)
        return self.add_constants(y_TH, top_k_index, top_k_weights)

    def add_constants(
        self, y_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """y_TH of the experts that stay, and the constants of those that don't, in fp32."""
        slot_TK, number = self._slot_E(y_TH.device)[index_TK], len(self.replaced)
        weight_TR = y_TH.new_zeros(len(y_TH), number + 1, dtype=torch.float32)
        weight_TR = weight_TR.scatter_add(1, slot_TK, weight_TK.float())[:, :number]
        return y_TH + (weight_TR @ self.approx_value.float()).to(y_TH.dtype)

    def _slot_E(self, device: torch.device) -> torch.Tensor:
        """The place of each expert's constant, R for those that stay; no buffer, which would stay
        on meta when a checkpoint is loaded."""
        if device not in self._slots:
            slots = [len(self.replaced)] * self.num_experts
            for place, expert in enumerate(self.replaced):
                slots[expert] = place
            self._slots[device] = torch.tensor(slots, device=device)
        return self._slots[device]

    def select(self, rows: Sequence[torch.Tensor]) -> RaggedExperts:
        raise NotImplementedError(f"the format {self.name} can't be pruned")

    def to_native(self, width: int) -> dict[str, torch.Tensor]:
        raise NotImplementedError(f"the format {self.name} has no native form")
