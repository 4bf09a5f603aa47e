"""Decoding in llama.cpp: a model pruned to one width, against the dense one, both as GGUF."""

import argparse
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import camera
from camera.runtime.errors import CameraError

HIDDEN, WIDTH, EXPERTS, TOP_K, VOCABULARY = 2048, 768, 32, 8, 97  # of Qwen3-30B-A3B, E of 128


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m experiments.bench llama_cpp`."""
    parser.add_argument("--scale", type=int, default=2, help="divides hidden size and width")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=1 / 3)
    parser.add_argument("--width-multiple", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="decoded a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)


def run(args: argparse.Namespace) -> dict:
    """Tokens per second of both sides, and their ratio.

    The model is random, of Qwen3-30B-A3B's shapes divided by --scale with 32 experts, so that the
    experts dominate; its weights are F16. Both sides take turns, the best turn of each counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = _random_model(Path(folder) / "source", args)
        small = Path(folder) / "small"
        options = {"expert_widths": "uniform", "width_multiple": args.width_multiple}
        camera.compress(
            source, "magnitude", small, sparsity=args.sparsity, progress=False, **options
        )
        files = {
            "dense": camera.export(source, Path(folder) / "dense.gguf"),
            "uniform": camera.export(small, Path(folder) / "uniform.gguf"),
        }
        servers = {side: _server(path, args) for side, path in files.items()}
        rates = {side: 0.0 for side in files}
        for _ in range(args.repeats):
            for side, server in servers.items():
                rates[side] = max(rates[side], _tokens_per_second(server, args.tokens))
        megabytes = {side: round(path.stat().st_size / 1e6, 1) for side, path in files.items()}
        widths = AutoConfig.from_pretrained(small).moe_intermediate_size
    return {
        "hidden": HIDDEN // args.scale,
        "width": {"dense": WIDTH // args.scale, "uniform": widths},
        "experts": EXPERTS,
        "layers": args.layers,
        "threads": args.threads,
        "repeats": args.repeats,
        "megabytes": megabytes,
        "tokens_per_second": {side: round(rate, 2) for side, rate in rates.items()},
        "ratio": round(rates["uniform"] / rates["dense"], 3),
    }


def _random_model(folder: Path, args: argparse.Namespace) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN // args.scale,
        moe_intermediate_size=WIDTH // args.scale,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        norm_topk_prob=True,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 1]
    vocabulary = {"<s>": 0} | {char: 1 + index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return folder


def _server(path: Path, args: argparse.Namespace):
    try:
        import xllamacpp
    except ImportError as error:
        raise CameraError("this benchmark runs llama.cpp: pip install xllamacpp.") from error
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    return xllamacpp.Server(params)


def _tokens_per_second(server, tokens: int) -> float:
    asked = {"prompt": [1, 2, 3, 4], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = server.handle_completions(asked | {"cache_prompt": False})
    return answer["timings"]["predicted_per_second"]
