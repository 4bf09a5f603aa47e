"""GPTQ of a layer's experts as one batch, against the same solver expert by expert."""

import argparse

import torch

from camera.quantization.quantizers.gptq import GPTQ
from camera.quantization.quantizers.hessian import Factor
from experiments.bench.support.timing import clock, now

HIDDEN, WIDTH = 2048, 768


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m experiments.bench gptq`."""
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--scale", type=int, default=8, help="divides both widths of the expert")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (0: as they are)")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> dict:
    """Seconds of both sides, their ratio, and whether they agree on every code.

    The shape is an expert of Qwen3-30B-A3B (hidden 2048, width 768) divided by --scale. Both sides
    solve gate and up together, on one Hessian, and down on its own. They take turns, the best turn
    of each counts. `ratio` is of the whole work, `ratio_solve` of the solving without damping and
    factorising the Hessians: arithmetic that both sides share and that dominates on a CPU at full
    widths. One thread is the default: more threads don't speed up matrices this small.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    hidden, width = HIDDEN // args.scale, WIDTH // args.scale
    solver = GPTQ(group_size=args.group_size)
    torch.manual_seed(0)
    shapes = {"gate_up": (2 * width, hidden), "down": (hidden, width)}
    work = [_layer(args.experts, *shape, args.device) for shape in shapes.values()]

    sides = {"batched": 1, "one_by_one": args.experts}
    spent = {side: {"factor": [], "solve": []} for side in sides}
    codes = {}
    _once(solver, [(W_ERC[:2], H_ECC[:2]) for W_ERC, H_ECC in work], 1, args.bits)  # warm up
    for _ in range(args.repeats):
        for side, parts in sides.items():
            codes[side], seconds = _once(solver, work, parts, args.bits)
            for step, took in seconds.items():
                spent[side][step].append(took)
    fast, slow = ({s: min(t) for s, t in spent[side].items()} for side in sides)
    return {
        "experts": args.experts,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "bits": args.bits,
        "group_size": args.group_size,
        "block_size": solver.block_size,
        "threads": torch.get_num_threads(),
        "clock": clock(args.device).__name__,
        "device": args.device,
        "repeats": args.repeats,
        "batched_s": {step: round(took, 4) for step, took in fast.items()},
        "one_by_one_s": {step: round(took, 4) for step, took in slow.items()},
        "ratio": round(sum(slow.values()) / sum(fast.values()), 2),
        "ratio_solve": round(slow["solve"] / fast["solve"], 2),
        "ratio_factor": round(slow["factor"] / fast["factor"], 2),
        "same_codes": all(map(torch.equal, codes["batched"], codes["one_by_one"])),
    }


def _layer(experts: int, rows: int, columns: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights, and Hessians of correlated inputs."""
    W_ERC = torch.randn(experts, rows, columns, device=device)
    mix_CC = torch.eye(columns, device=device) + 0.3 * torch.randn(columns, columns, device=device)
    x_ENC = torch.randn(experts, 2 * columns, columns, device=device) @ mix_CC
    return W_ERC, x_ENC.transpose(1, 2) @ x_ENC


def _once(
    solver: GPTQ, work: list[tuple[torch.Tensor, torch.Tensor]], parts: int, bits: int
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Solve all matrices in so many parts; their codes, and the seconds of both steps."""
    codes, seconds = [], {}
    device = str(work[0][0].device)
    start = now(device)
    factors: list[list[Factor]] = [
        [solver.factor(H) for H in H_ECC.chunk(parts)] for _, H_ECC in work
    ]
    middle = now(device)
    for (W_ERC, _), some in zip(work, factors, strict=True):
        pairs = zip(W_ERC.chunk(parts), some, strict=True)
        codes.append(torch.cat([solver.solve(W, f, bits=bits).codes_ERC for W, f in pairs]))
    seconds["factor"], seconds["solve"] = middle - start, now(device) - middle
    return codes, seconds
