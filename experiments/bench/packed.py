"""Packed experts of a layer, against the same experts dequantised."""

import argparse
from collections.abc import Callable

import torch

from camera.checkpoint.formats.packed.experts import PackedExperts
from camera.checkpoint.formats.packed.segments import BitSegments
from camera.checkpoint.formats.packed.spec import experts_spec, spec_bytes, spec_weights
from experiments.bench.support.timing import clock, take_turns

HIDDEN, WIDTH, TOP_K = 2048, 768, 8


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m experiments.bench packed`."""
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--scale", type=int, default=2, help="divides both widths of the expert")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512], help="per forward")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (0: as they are)")
    parser.add_argument("--device", default="cpu")


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict:
    """Seconds and ratios by dtype and number of tokens, and the seconds of dequantising alone.

    The shape is an expert of Qwen3-30B-A3B (hidden 2048, width 768, top-8) divided by --scale, with
    the segments of Camera-Q: 3, 2 and 1 bit in shares 1/8, 3/4, 1/8. Packed experts dequantise an
    expert whenever tokens reach it; plain ones hold their weights in the same dtype. All sides take
    turns, the best turn of each counts. `ratio` is packed seconds over plain seconds: above 1
    packing costs time. `memory` is packed bytes over plain bytes.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    hidden, width = HIDDEN // args.scale, WIDTH // args.scale
    packed = _random_experts(args.experts, hidden, width, args.group_size, args.device)
    spec = packed.spec()
    results = []
    for name in args.dtypes:
        dtype = getattr(torch, name)
        packed.to(dtype)
        plain = packed.dequantize()
        for tokens in args.tokens:
            call = _inputs(tokens, hidden, args.experts, dtype, args.device)
            hit = call[1].unique().tolist()
            sides: dict[str, Callable[[], object]] = {
                "packed": lambda c=call: packed(*c),
                "plain": lambda p=plain, c=call: p(*c),
                "dequantize": lambda h=hit: _dequantize(packed, h),
            }
            best = take_turns(sides, args.repeats, args.device)
            results.append(
                {
                    "dtype": name,
                    "tokens": tokens,
                    "experts_hit": len(hit),
                    **{f"{side}_ms": round(1e3 * took, 3) for side, took in best.items()},
                    "ratio": round(best["packed"] / best["plain"], 2),
                    "memory": round(spec_bytes(spec) / spec_weights(spec) / dtype.itemsize, 4),
                }
            )
    return {
        "experts": args.experts,
        "hidden": hidden,
        "width": width,
        "average_bits": round(8 * spec_bytes(spec) / spec_weights(spec), 4),
        "group_size": args.group_size,
        "threads": torch.get_num_threads(),
        "clock": clock(args.device).__name__,
        "device": args.device,
        "repeats": args.repeats,
        "results": results,
    }


def _random_experts(
    experts: int, hidden: int, width: int, group_size: int, device: str
) -> PackedExperts:
    """Any codes will do: the time doesn't depend on them."""
    few = width // 8
    bits = [[3] * few + [2] * (width - 2 * few) + [1] * few] * experts
    segments = BitSegments.of("rows", bits), BitSegments.of("columns", bits)
    spec = experts_spec(hidden, [width] * experts, *segments, group_size, False)
    packed = PackedExperts(spec, torch.nn.SiLU(), device)
    torch.manual_seed(0)
    for name, tensor in packed.named_buffers():
        if name.endswith(("_scales", "_zeros")):
            value = 0.02 if name.endswith("_scales") else 1.5
            tensor.copy_(torch.full(tensor.shape, value, dtype=torch.half).view(torch.int16))
        elif tensor.numel():
            tensor.random_(0, 256)
    return packed


def _inputs(tokens: int, hidden: int, experts: int, dtype: torch.dtype, device: str) -> tuple:
    """x_TH and a routing over all experts, the weights of a token summing to 1."""
    x_TH = torch.randn(tokens, hidden, device=device, dtype=dtype)
    scores_TE = torch.rand(tokens, experts, device=device)
    weight_TK, index_TK = scores_TE.softmax(-1).topk(min(TOP_K, experts))
    return x_TH, index_TK, (weight_TK / weight_TK.sum(-1, keepdim=True)).to(dtype)


def _dequantize(packed: PackedExperts, experts: list[int]) -> None:
    for expert in experts:
        packed.gate_up(expert)
        packed.down(expert)
