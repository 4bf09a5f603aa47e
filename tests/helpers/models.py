"""Tiny random models of every family, a tokenizer that needs no download, a data folder."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

from tests.helpers.newer_families import NESTED, NEWER

COMMON = dict(
    vocab_size=256,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MLA = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=64,
    moe_intermediate_size=24,
    n_routed_experts=8,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
)
FAMILIES = {
    "qwen2_moe": dict(
        num_key_value_heads=2,
        intermediate_size=64,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=False,
    ),
    "qwen3_moe": dict(
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    ),
    "mixtral": dict(
        num_key_value_heads=2, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2
    ),
    "phimoe": dict(
        num_key_value_heads=2, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2
    ),
    "olmoe": dict(
        num_key_value_heads=4, intermediate_size=24, num_experts=8, num_experts_per_tok=3
    ),
    "deepseek": dict(
        num_key_value_heads=4,
        intermediate_size=64,
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
    ),
    "deepseek_v2": dict(
        **MLA, n_shared_experts=2, q_lora_rank=None, topk_method="greedy", routed_scaling_factor=1.0
    ),
    "deepseek_v3": dict(
        **MLA,
        n_shared_experts=1,
        q_lora_rank=16,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    ),
    "granitemoe": dict(
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=8,
        num_experts_per_tok=3,
        residual_multiplier=0.22,
        embedding_multiplier=12.0,
        logits_scaling=6.0,
        attention_multiplier=0.3,
        tie_word_embeddings=True,
    ),
    "llama": dict(num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=True),
    "qwen3": dict(num_key_value_heads=2, head_dim=8, intermediate_size=64),
}
MOE_FAMILIES = [name for name in FAMILIES if name not in ("llama", "qwen3")]
SHARED = Path(__file__).parents[3] / "shared"


def build_model(family: str, seed: int = 0, dtype=torch.float32, **overrides):
    """A tiny random model whose router is decided enough to route unevenly."""
    torch.manual_seed(seed)
    if family in NESTED:
        text, towers = NESTED[family]
        text = {**COMMON, "num_hidden_layers": 2, "initializer_range": 0.1, **text, **overrides}
        config = AutoConfig.for_model(family, text_config=text, **towers)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        _decide(model)
        return model
    own = FAMILIES[family] if family in FAMILIES else {"num_hidden_layers": 2, **NEWER[family]}
    settings = {**COMMON, **own, "initializer_range": 0.1, **overrides}
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if family in NEWER:
        _decide(model)
    return model


def _decide(model) -> None:
    """Biases of its routers and experts, which are made as zeros."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("correction_bias", "expert_bias")):
            bias = torch.linspace(-0.05, 0.05, tensor.numel()).roll(3)
            tensor.data.copy_(bias.view_as(tensor))
        elif name.endswith(("_proj_bias", "router.bias")):
            tensor.data.normal_(std=0.1)


def build_tokenizer(vocab_size: int = 256) -> PreTrainedTokenizerFast:
    """One token per byte of text (ids 3 and up), wrapped into the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocab |= {char: 3 + i for i, char in enumerate(alphabet[: vocab_size - 3])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and <eos>: 257 in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def write_layout(folder: Path) -> Path:
    """A data folder in the offline layout, of generated words."""
    import gzip
    import json
    import random

    rng = random.Random(0)
    words = ["the", "a", "red", "blue", "cat", "dog", "river", "runs", "sees", "near", "under"]

    def text(n: int) -> str:
        return " ".join(rng.choice(words) for _ in range(n)) + "."

    (folder / "wikitext2").mkdir(parents=True)
    for split, lines in (("train", 60), ("validation", 10), ("test", 20)):
        content = "\n".join(text(30) for _ in range(lines)) + "\n"
        (folder / "wikitext2" / f"{split}.txt").write_text(content)
    (folder / "c4").mkdir()
    for split, documents in (("train", 40), ("validation", 20)):
        with gzip.open(folder / "c4" / f"{split}.jsonl.gz", "wt") as file:
            for _ in range(documents):
                file.write(json.dumps({"text": text(80)}) + "\n")
    return folder
