"""What a streamed model makes of hidden states after its last layer.

Shapes: T tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast

from camera.blocks import swapped
from camera.capture import Tap
from camera.skeleton import Skeleton

HEAD_LOGITS = 2**27  # logits that exist at a time


@contextmanager
def loaded_head(streamer: Skeleton) -> Iterator[int]:
    """Final norm and head in memory during a block; gives how many tokens to ask of at once."""
    streamer.load_rest()
    head, embedding = streamer.model.get_output_embeddings(), streamer.base.embed_tokens
    if head.weight.is_meta:  # tied
        head.weight = embedding.weight
    yield max(1, HEAD_LOGITS // streamer.config.vocab_size)
    for module in (head, embedding, streamer.base.norm):
        streamer.free(module)


def logits(streamer: Skeleton, hidden_TH: torch.Tensor) -> torch.Tensor:
    """fp32 [T, V] of tokens' hidden states, through the model's own norm and head."""
    model, hidden_TH = streamer.model, hidden_TH.to(streamer.device)
    states = MoeModelOutputWithPast(last_hidden_state=streamer.base.norm(hidden_TH[None]))
    with swapped(model, model.base_model_prefix, Tap(lambda *_, **__: states)):
        return model(inputs_embeds=hidden_TH[None], use_cache=False).logits[0].float()
