"""Energies from routed tokens, against every expert on every token."""

import argparse
from functools import partial

import torch

from camera.calibration.scores.energy import EnergyObserver
from camera.moe.capture import run_ffn
from experiments.bench.support.layers import SHAPES, feed_forward, random_model
from experiments.bench.support.timing import clock, matmul_peak, take_turns


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m experiments.bench energy`."""
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--scale", type=int, default=4, help="divides both widths of the experts")
    parser.add_argument("--tokens", type=int, default=8192, help="as a run takes at once")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (0: as they are)")
    parser.add_argument("--device", default="cpu")


@torch.no_grad()
def run(args: argparse.Namespace) -> dict:
    """Seconds of the sides for each shape, their ratios, and the share of the machine's peak.

    The shapes are those of DeepSeek-MoE-16B, Qwen2-57B-A14B and Qwen3-30B-A3B divided by --scale;
    the router is the model's own with random weights. `routed` runs the FFN with the observer of
    energies. `dense` computes all experts on all tokens and multiplies by a routing weight that is
    mostly zero, as the paper's released code does. `together` computes all experts at once, as an
    accelerator does, `one_by_one` each alone. They take turns, the best turn of each counts.
    `goal` is E/k, the ratio of the operations. `of_peak` is the routed side's FLOP/s against a
    square matrix product of the same run. `same` compares the results.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    return {
        "tokens": args.tokens,
        "scale": args.scale,
        "threads": torch.get_num_threads(),
        "clock": clock(args.device).__name__,
        "device": args.device,
        "shapes": {shape: _shape(shape, args) for shape in args.shapes},
    }


def _shape(shape: str, args: argparse.Namespace) -> dict:
    model = random_model(shape, args.scale).to(args.device)
    ffn, config = feed_forward(model), model.config
    hidden, width = config.hidden_size, config.moe_intermediate_size
    experts, top_k = config.num_experts, config.num_experts_per_tok
    x_TH = torch.randn(args.tokens, hidden, device=args.device)
    found: dict[str, torch.Tensor] = {}

    def routed(name: str, together: bool | None) -> None:
        observer = EnergyObserver(ffn)
        run_ffn(ffn, x_TH[None], observer, together=together)
        seen = observer.result()
        found[name] = torch.cat((seen.sum2_N, seen.max2_N.double()))

    def dense() -> None:
        found["dense"] = every_expert(ffn, x_TH)

    product, product_flops = matmul_peak(args.device)
    ways = {"routed": None, "together": True, "one_by_one": False}
    sides = {name: partial(routed, name, together) for name, together in ways.items()}
    took = take_turns(sides | {"dense": dense, "peak": product}, args.repeats, args.device)
    flops = args.tokens * top_k * 2 * (2 * width * hidden)
    peak = product_flops / took["peak"]
    return {
        "widths": [hidden, width],
        "routed_s": round(took["routed"], 4),
        "dense_s": round(took["dense"], 4),
        "ratio": round(took["dense"] / took["routed"], 2),
        "goal": round(experts / top_k, 2),
        "routed_gflops": round(flops / took["routed"] / 1e9, 1),
        "peak_gflops": round(peak / 1e9, 1),
        "of_peak": round(flops / took["routed"] / peak, 3),
        "together_ratio": round(took["one_by_one"] / took["together"], 2),
        "same": all(
            torch.allclose(found[name], found["dense"], rtol=1e-4, atol=1e-12) for name in ways
        ),
    }


def every_expert(ffn, x_TH: torch.Tensor) -> torch.Tensor:
    """Sum and maximum of phi^2 of each micro-expert, from all experts on all tokens."""
    experts = ffn.groups[0]
    _, weight_TK, index_TK = ffn.module.gate(x_TH)
    weight_TE = x_TH.new_zeros(len(x_TH), len(experts.widths))
    weight_TE.scatter_(1, index_TK, weight_TK.to(x_TH.dtype))
    sums, peaks = [], []
    for e in range(len(experts.widths)):
        phi2_TW = (experts.activations(e, x_TH) * weight_TE[:, e, None]).square()
        sums.append(phi2_TW.sum(0))
        peaks.append(phi2_TW.amax(0))
    return torch.cat(sums + peaks).cpu().double()
