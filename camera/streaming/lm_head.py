"""What a streamed model makes of hidden states after its last layer.

Shapes: T tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from camera.moe.capture import Tap, swapped
from camera.streaming.skeleton import Skeleton

HEAD_LOGITS = 2**27  # logits that exist at a time
HEAD_TABLES = 8  # of them at most, of the same tokens: what is asked, and what its answer takes


@contextmanager
def loaded_head(streamer: Skeleton) -> Iterator[int]:
    """Final norm and head in memory for the length of a block; gives the size of the vocabulary."""
    model = streamer.model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    streamer.load_rest("norm")
    if f"{name}.weight" in (getattr(model, "all_tied_weights_keys", None) or {}):
        streamer.load_rest("embed_tokens")
        head.weight = embedding.weight
    else:
        streamer.load_rest(name)
    yield len(head.weight)
    streamer.free(nn.ModuleList([streamer.base.norm, embedding, head]))


def tokens_at_once(vocabulary: int, tables: int = HEAD_TABLES) -> int:
    """How many tokens to ask of at a time where so many tables of logits exist together."""
    return max(1, HEAD_LOGITS // (tables * vocabulary))


def logits(streamer: Skeleton, hidden_TH: torch.Tensor) -> torch.Tensor:
    """fp32 [T, V] of tokens' hidden states, through the model's own norm and head."""
    model, hidden_TH = streamer.model, hidden_TH.to(streamer.device)
    states = MoeModelOutputWithPast(last_hidden_state=streamer.base.norm(hidden_TH[None]))
    with swapped(model, model.base_model_prefix, Tap(lambda *_, **__: states)):
        return model(inputs_embeds=hidden_TH[None], use_cache=False).logits[0].float()
