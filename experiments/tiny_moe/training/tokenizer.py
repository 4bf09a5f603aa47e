"""A byte-level BPE of the world's words: the same merges for the same text."""

from __future__ import annotations

from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from experiments.tiny_moe.corpus import training_document
from experiments.tiny_moe.world import World

VOCABULARY = 2048
SAMPLE_DOCUMENTS = 15_000
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"


def build_tokenizer(
    world: World, context: int, vocabulary: int = VOCABULARY, documents: int = SAMPLE_DOCUMENTS
):
    """A fast tokenizer trained on documents of the training stream; it adds no token by itself."""
    rng = Random("tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((training_document(world, rng) for _ in range(documents)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
