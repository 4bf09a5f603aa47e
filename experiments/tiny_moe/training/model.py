"""The tiny model: a Qwen2-MoE with every layer sparse, and what only its training needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "max_position_embeddings": 512,
}


def build_model(tokenizer, seed: int, **sizes: int) -> Qwen2MoeForCausalLM:
    """A freshly initialised model; `sizes` replaces entries of `SIZES`."""
    sizes = SIZES | sizes
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        intermediate_size=4 * sizes["hidden_size"],
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_sliding_window=False,
        **sizes,
    )
    torch.manual_seed(seed)
    model = Qwen2MoeForCausalLM(config)
    for (
        layer
    ) in model.model.layers:  # wider than the default, so that experts differ from the first step
        nn.init.normal_(layer.mlp.gate.weight, std=config.hidden_size**-0.5)
    return model


def sorted_experts(self: nn.Module, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Experts over their own tokens in one sorted pass: trained on a CPU, faster than eager."""
    top_k = index_TK.shape[1]
    flat = index_TK.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=self.num_experts).tolist()
    tokens = x_TH.index_select(0, order // top_k).split(counts)
    gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
    gate, up = torch.cat([x @ w.t() for x, w in zip(tokens, gate_up, strict=True)]).chunk(2, dim=-1)
    inner = (self.act_fn(gate) * up * weight_TK.reshape(-1)[order, None]).split(counts)
    outputs = torch.cat([a @ w.t() for a, w in zip(inner, down, strict=True)])
    return torch.zeros_like(x_TH).index_add(0, order // top_k, outputs)


ALL_EXPERTS_FUNCTIONS.register("tiny_moe_sorted", sorted_experts)


class RouterWatch:
    """Collects each router's logits; transformers' own loss balances only the sum over layers."""

    def __init__(self, model: Qwen2MoeForCausalLM) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(
                lambda _m, _x, out: self.seen.append((out[0], out[2]))
            )

    def balance_loss(self) -> Tensor:
        """The Switch loss averaged over layers, 1 if experts are used alike; forgets the pass."""
        losses = []
        for logits_TE, index_TK in self.seen:
            experts = logits_TE.shape[-1]
            share_E = torch.bincount(index_TK.reshape(-1), minlength=experts) / index_TK.numel()
            losses.append(
                experts
                * (
                    share_E * functional.softmax(logits_TE, dim=-1, dtype=torch.float32).mean(0)
                ).sum()
            )
        self.seen.clear()
        return torch.stack(losses).mean()
