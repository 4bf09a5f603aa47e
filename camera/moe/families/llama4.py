"""Blocks of Llama 4 whose experts are called as those of every other family.

transformers computes all experts on all tokens, each token scaled by its router's weight for that
expert and by 0 where it wasn't chosen. These compute the chosen ones. The weight is inside the
expert, act(gate a x) * (up a x), so experts see a x as their input and 1 as their routing weight.

Shapes: T tokens, H hidden, E experts, K = 1 experts per token.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama4.modeling_llama4 import (
    Llama4Router,
    Llama4TextExperts,
    Llama4TextMoe,
)

from camera.moe.grouped.slots import routed_slots
from camera.runtime.errors import CameraError


class Experts(Llama4TextExperts):
    """The experts, called with tokens and their routing."""

    has_gate, has_bias, has_post_expert_norm = True, False, False
    is_transposed, is_concatenated = True, True

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        y_TH = torch.zeros_like(hidden_states)
        for expert, tokens_N in routed_slots(top_k_index, len(self.gate_up_proj)):
            h_NW = self._apply_gate(hidden_states[tokens_N] @ self.gate_up_proj[expert])
            y_TH[tokens_N] = h_NW @ self.down_proj[expert] * top_k_weights[tokens_N]
        return y_TH


class Router(Llama4Router):
    """The router, telling which expert it chose."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits_TE = F.linear(hidden_states, self.weight)
        top_TK, index_TK = logits_TE.topk(self.top_k, dim=1)
        return logits_TE, torch.sigmoid(top_TK.float()).to(top_TK.dtype), index_TK


class Block(Llama4TextMoe):
    """The block, of these experts and this router."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_TH = hidden_states.reshape(-1, self.hidden_dim)
        logits_TE, weight_T1, index_T1 = self.router(x_TH)
        y_TH = self.experts(x_TH * weight_T1, index_T1, torch.ones_like(weight_T1))
        return self.shared_expert(x_TH) + y_TH, logits_TE


_CLASSES = {Llama4TextMoe: Block, Llama4Router: Router, Llama4TextExperts: Experts}


def adapt(model: nn.Module) -> None:
    """Give a freshly built model these blocks; CameraError for more than one expert per token."""
    for name, module in model.named_modules():
        if type(module) is Llama4TextMoe and module.top_k != 1:
            raise CameraError(
                f"'{name}' has num_experts_per_tok={module.top_k}: Llama 4 is supported with 1 "
                "alone, as its published models have."
            )
        module.__class__ = _CLASSES.get(type(module), type(module))
