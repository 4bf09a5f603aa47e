"""Logits of a streamed model.

Shapes: T tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from camera.moe.capture import ModuleStub, replaced_submodule
from camera.streaming.meta_build import tied_names
from camera.streaming.skeleton import MetaModel

HEAD_LOGITS = 2**27  # logits that exist at a time
HEAD_TABLES = 8  # of them at most, of the same tokens: what is asked, and what its answer takes


@contextmanager
def lm_head_loaded(skeleton: MetaModel) -> Iterator[int]:
    """Final norm and head in memory for the length of a block; gives the size of the vocabulary."""
    model = skeleton.model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    skeleton.load_rest(skeleton.family.final_norm)
    if f"{name}.weight" in tied_names(model):
        skeleton.load_rest("embed_tokens")
        head.weight = embedding.weight
    else:
        skeleton.load_rest(name)
    yield len(head.weight)
    skeleton.free(nn.ModuleList([_final_norm(skeleton), embedding, head]))


def tokens_per_chunk(vocabulary: int, tables: int = HEAD_TABLES) -> int:
    """Tokens per chunk such that `tables` logit tensors fit HEAD_LOGITS."""
    return max(1, HEAD_LOGITS // (tables * vocabulary))


def logits(skeleton: MetaModel, hidden_TH: torch.Tensor) -> torch.Tensor:
    """fp32 [T, V] of tokens' hidden states, through the model's own norm and head."""
    model, hidden_TH = skeleton.model, hidden_TH.to(skeleton.device)
    if skeleton.family.tower:  # what its forward asks for beside is of images
        return model.get_output_embeddings()(_final_norm(skeleton)(hidden_TH)).float()
    states = MoeModelOutputWithPast(last_hidden_state=_final_norm(skeleton)(hidden_TH[None]))
    with replaced_submodule(model, model.base_model_prefix, ModuleStub(lambda *_, **__: states)):
        return model(inputs_embeds=hidden_TH[None], use_cache=False).logits[0].float()


def _final_norm(skeleton: MetaModel) -> nn.Module:
    return getattr(skeleton.base, skeleton.family.final_norm)
