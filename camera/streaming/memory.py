"""Sizes of layers and batches."""

from torch import nn

from camera.moe.families.family import latent_attention_width
from camera.streaming.skeleton import MetaModel

HIDDEN_SHARE = 0.3  # of the memory that is free: more than that of hidden states goes to disk
HIDDEN_HELD = 3  # the layer's inputs, its FFN's inputs, and those the last layer is recorded with
BATCH_TOKENS = 8192  # that go through a layer together
BACKWARD_TOKENS = 4096  # that go back through a layer together


def parameters_of(module: nn.Module) -> int:
    """Numbers that a module holds."""
    return sum(parameter.numel() for parameter in module.parameters())


def attention_numbers(skeleton: MetaModel) -> int:
    """Numbers of a token that attention holds at a time.

    Three of its layer, and of each head query, key, value and output; where these are made of
    latent ones, most of them once more.
    """
    config, family = skeleton.text_config, skeleton.family
    copies = 3 if family.attention_width is latent_attention_width else 2
    heads = config.num_attention_heads * family.attention_width(config)
    return 3 * config.hidden_size + copies * heads


def active_width(skeleton: MetaModel, *, of_routed: bool = False) -> float:
    """Micro-experts that a token reaches, in the widest layer; or its routed ones alone."""
    top_k = skeleton.family.top_k(skeleton.text_config)
    widest = 0.0
    for pool in skeleton.budget.layers.values():
        routed = sum(pool.routed)
        active = sum(
            width * top_k / routed if is_routed else width * (not of_routed)
            for width, is_routed in zip(pool.widths, pool.routed, strict=True)
        )
        widest = max(widest, active)
    return widest
