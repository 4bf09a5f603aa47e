"""NAEE's search on cached expert outputs, against running the experts per candidate."""

import argparse
from collections.abc import Callable

import torch
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from baselines.experts.naee import OutputObserver
from baselines.experts.rerouting import Rerouter
from baselines.experts.subset_search import OutputError, search
from camera.moe.families import Family
from camera.moe.feed_forward import FeedForward
from experiments.bench.support.timing import clock, now

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 1408, 64, 6


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m experiments.bench naee`."""
    parser.add_argument("--scale", type=int, default=4, help="divides hidden size and width")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--drop", type=int, nargs="+", default=[13, 38])
    parser.add_argument("--candidates", type=int, default=4, help="evaluated by running experts")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (0: as they are)")
    parser.add_argument("--device", default="cpu")


@torch.no_grad()
def run(args: argparse.Namespace) -> dict:
    """Seconds per candidate of both sides, their ratio, and seconds of whole searches.

    The shape is a layer of DeepSeek-MoE-16B (64 experts, top-6, hidden 2048, width 1408), hidden
    and width divided by --scale. Both sides evaluate J of the same candidates with the same
    routing: `cached` from inner products of the outputs cached for a sample of tokens, `running` by
    transformers' own forward of the experts. They take turns, the best turn of each counts. `ratio`
    is per candidate. `search` is a whole greedy search of one layer with its cache, beside the time
    of as many candidates by running experts. The ratio grows with the widths: the size of the inner
    products doesn't depend on them.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ffn = _layer(args.scale, args.device)
    x_TH = torch.randn(args.tokens, HIDDEN // args.scale, device=args.device)
    observer = OutputObserver(ffn, args.tokens, seed=0)
    observer.ffn_input(0, x_TH, None, None)
    cache_s, seen = _timed(observer.result, args.device)
    route = Rerouter(ffn, seen.x_TH)
    error = OutputError(seen.gram_TEE, route)
    z_TH = _output(ffn, x_TH, error.gates_T1E[:, 0])

    def by_running(keep_CE: torch.Tensor) -> torch.Tensor:
        each = (_output(ffn, x_TH, route(keep_E[None])[:, 0]) for keep_E in keep_CE)
        return torch.stack([(z_TH - z).double().norm() for z in each]).cpu()

    # as many on the cached side as a step of the greedy search has, and of the same kind
    keep_CE = torch.rand(EXPERTS, EXPERTS).argsort(1) >= args.drop[0]
    few_CE = keep_CE[: args.candidates]
    cached, ran = [], []
    for _ in range(args.repeats):
        took, J_C = _timed(lambda: error(keep_CE), args.device)
        cached.append(took / len(keep_CE))
        took, few_C = _timed(lambda: by_running(few_CE), args.device)
        ran.append(took / len(few_CE))
    per_cached, per_run = min(cached), min(ran)
    return {
        "experts": EXPERTS,
        "top_k": TOP_K,
        "hidden": HIDDEN // args.scale,
        "width": WIDTH // args.scale,
        "tokens": args.tokens,
        "threads": torch.get_num_threads(),
        "clock": clock(args.device).__name__,
        "device": args.device,
        "cache_s": round(cache_s, 4),
        "cached_s": round(per_cached, 6),
        "running_s": round(per_run, 6),
        "ratio": round(per_run / per_cached, 1),
        "largest_difference": float(((J_C[: len(few_C)] - few_C) / few_C).abs().max()),
        "search": [_search(error, drop, cache_s, per_run, args.device) for drop in args.drop],
    }


def _search(error: OutputError, drop: int, cache_s: float, per_run: float, device: str) -> dict:
    took, found = _timed(lambda: search(error, EXPERTS, drop, how="greedy"), device)
    running_s = found.evaluations * per_run
    return {
        "drop": drop,
        "evaluations": found.evaluations,
        "search_s": round(took, 3),
        "running_s": round(running_s, 3),
        "ratio_with_cache": round(running_s / (took + cache_s), 1),
    }


def _layer(scale: int, device: str) -> FeedForward:
    config = OlmoeConfig(
        hidden_size=HIDDEN // scale,
        intermediate_size=WIDTH // scale,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        experts_implementation="grouped_mm",
    )
    layer = nn.Module()
    layer.mlp = OlmoeSparseMoeBlock(config).to(device).eval()
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * (2 if "gate." in name else 1))
    return FeedForward(layer, Family(), "layer")


def _output(ffn: FeedForward, x_TH: torch.Tensor, gates_TE: torch.Tensor) -> torch.Tensor:
    weight_TK, index_TK = gates_TE.topk(TOP_K)
    return ffn.module.experts(x_TH, index_TK, weight_TK)


def _timed(function: Callable, device: str) -> tuple[float, object]:
    start = now(device)
    found = function()
    return now(device) - start, found
