"""One decoder layer of a model that the paper measures, every width divided by a scale, random.

The routed experts are Qwen3-MoE's code whatever the model: hidden width, expert width, number of
experts and experts per token are the model's, shared experts are left out.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward

FAMILY = "qwen3_moe"
SHAPES = {  # hidden, width of an expert, experts, experts per token, attention heads
    "deepseek_moe_16b": (2048, 1408, 64, 6, 16),
    "qwen2_57b_a14b": (3584, 2560, 64, 8, 28),
    "qwen3_30b_a3b": (2048, 768, 128, 8, 32),
}


def random_model(shape: str, scale: int, layers: int = 1) -> nn.Module:
    """A Qwen3-MoE whose layers have this shape; heads keep their width of 128, divided."""
    hidden, width, experts, top_k, heads = SHAPES[shape]
    config = AutoConfig.for_model(
        FAMILY,
        vocab_size=512,
        hidden_size=hidden // scale,
        intermediate_size=width // scale,
        moe_intermediate_size=width // scale,
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=128 // scale,
        num_hidden_layers=layers,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model.requires_grad_(False)


def feed_forward(model: nn.Module, index: int = 0) -> FeedForward:
    """What a method sees of one of its layers."""
    return FeedForward(model.model.layers[index], family_of(FAMILY), f"model.layers.{index}")
