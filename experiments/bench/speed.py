"""Tokens per second of a compressed model against the original."""

import argparse
import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import camera
from camera.checkpoint.loading import load_model, load_tokenizer
from camera.evaluation.speed import measure_speed
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.pool import rows_of_mask
from camera.pruning.slicing import slice_layer
from experiments.bench.support.timing import clock
from experiments.config.location import EMBEDDED_MODEL
from experiments.tiny_moe.layout import ensure_world

WIDE = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 2,
    "eos_token_id": 0,
}
GOALS = {0.2: 1.05, 0.4: 1.25, 0.6: 1.6}  # decoding


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m experiments.bench speed`."""
    parser.add_argument("--model", default="tiny", choices=list(MODELS))
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(GOALS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt-length", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (0: as they are)")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> dict:
    """Speeds and ratios by sparsity and batch size, the goal of each, and the ceiling.

    `--model tiny` is the default model, pruned by Camera-P on its own text, which is also the
    prompt. `--model wide` is a random one of OLMoE's shape divided by two (hidden 1024, 64 experts
    of width 512, top-8), pruned at random, on random tokens: there kernels are bound by memory. The
    original runs in the fastest of transformers' own implementations. `ceiling` is the ratio of a
    model whose routed experts cost nothing, an upper bound for any implementation of the experts.
    On one CPU thread the clock is the process's own time.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder:
        dense, text, prune = MODELS[args.model](Path(folder), args.device)
        timer = clock(args.device)
        counts = (args.batch_sizes, args.prompt_length, args.new_tokens, args.repeats, timer)
        found = {}
        for sparsity in args.sparsity:
            measured = measure_speed(dense, prune(sparsity), text, *counts)
            found[str(sparsity)] = measured["batches"] | {"goal": GOALS.get(sparsity)}
        ceiling = measure_speed(dense, _free(dense), text, *counts)["batches"]
    return {
        "model": args.model,
        "sparsity": found,
        "ceiling": {
            size: {phase: row["ratio"] for phase, row in phases.items()}
            for size, phases in ceiling.items()
        },
        "settings": measured["settings"] | {"clock": timer.__name__},
    }


def _tiny(folder: Path, device: str):
    text = ensure_world(folder / "data")
    dense = load_model(EMBEDDED_MODEL, device)

    def prune(sparsity: float) -> PreTrainedModel:
        out = folder / str(sparsity)
        few = camera.Calibration(source="wikitext2", samples=16, length=256)
        options = {"calibration": few, "data": str(text), "device": device, "progress": False}
        camera.compress(EMBEDDED_MODEL, "camera_p", out, sparsity=sparsity, **options)
        return load_model(out, device)

    words = (text / "wikitext2" / "test.txt").read_text()[:20_000]
    return dense, load_tokenizer(EMBEDDED_MODEL)(words, return_tensors="pt").input_ids[0], prune


def _wide(folder: Path, device: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmoe", **WIDE)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense.requires_grad_(False).to(device)

    def prune(sparsity: float) -> PreTrainedModel:
        model, draw = _shell(dense), torch.Generator().manual_seed(1)
        for i, layer in enumerate(model.model.layers):
            ffn = FeedForward(layer, family_of("olmoe"), f"model.layers.{i}")
            # experts lose unequal shares, as they do by energy
            share_E = sparsity + 0.15 * torch.randn(len(ffn.widths), generator=draw)
            share_N = share_E.repeat_interleave(torch.tensor(ffn.widths))
            slice_layer(ffn, rows_of_mask(ffn, torch.rand(len(share_N), generator=draw) >= share_N))
        return model

    return dense, config.vocab_size, prune


MODELS = {"tiny": _tiny, "wide": _wide}


def _free(dense: PreTrainedModel) -> PreTrainedModel:
    """The original without what its routed experts cost."""
    model = _shell(dense)
    for layer in model.model.layers:
        layer.mlp.experts = _Nothing()
    return model


def _shell(dense: PreTrainedModel) -> PreTrainedModel:
    """A model of its own that shares its weights: experts are replaced, not changed."""
    shared = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
    return copy.deepcopy(dense, shared)


class _Nothing(nn.Module):
    def forward(self, x_TH: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return x_TH
