"""A layer pruned in one pass, against dense energies, two layer forwards and zeroing."""

import argparse
import copy

import torch
from torch import nn

from camera.calibration.scores.energy import EnergyObserver
from camera.moe.capture import ModuleStub, replaced_submodule, run_ffn
from camera.moe.grouped.sinks import OutputSum, PhiProjection, PhiRecord
from camera.moe.pool import rows_of_mask
from camera.pruning.ranking import keep_highest
from camera.pruning.slicing import slice_layer
from experiments.bench.energy import every_expert
from experiments.bench.support.layers import SHAPES, feed_forward, random_model
from experiments.bench.support.timing import clock, take_turns

ALPHA = 0.9


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m experiments.bench layer`."""
    parser.add_argument("--shape", default="qwen3_30b_a3b", choices=list(SHAPES))
    parser.add_argument("--scale", type=int, default=4, help="divides every width of the layer")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sparsity", type=float, default=0.2, help="share of the experts removed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (0: as they are)")
    parser.add_argument("--device", default="cpu")


@torch.no_grad()
def run(args: argparse.Namespace) -> dict:
    """Seconds of both sides, their ratio, and whether they leave the same hidden states.

    The shape is a model's that the paper measures, divided by --scale. `one_pass` is a run of the
    pipeline on a layer: attention and router once, gate and up once per routed token, energies from
    phi, the removal, `down_proj` of the kept columns. `reference` is the paper's released code: a
    forward of the layer, every expert on every token for the energies, the pruned micro-experts set
    to zero one by one, a second forward by transformers' own fastest experts. Both prune the same
    micro-experts. They take turns, the best turn of each counts.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    model = random_model(args.shape, args.scale).to(args.device)
    hidden = model.config.hidden_size
    x_BLH = torch.randn(args.samples, args.length, hidden, device=args.device)
    positions = torch.arange(args.length, device=args.device)[None]
    rotary = {"position_embeddings": model.model.rotary_emb(x_BLH, positions)}
    found, copies = {}, {}

    def fresh() -> None:
        # each turn prunes a layer of its own; copying it is not timed
        for name in ("one_pass", "reference"):
            copies[name] = copy.deepcopy(model)

    sides = {
        "fresh": fresh,
        "one_pass": lambda: found.update(one=_one_pass(copies["one_pass"], x_BLH, rotary, args)),
        "reference": lambda: found.update(
            two=_reference(copies["reference"], x_BLH, rotary, args.sparsity)
        ),
    }
    took = take_turns(sides, args.repeats, args.device)
    return {
        "shape": args.shape,
        "scale": args.scale,
        "tokens": args.samples * args.length,
        "sparsity": args.sparsity,
        "threads": torch.get_num_threads(),
        "clock": clock(args.device).__name__,
        "device": args.device,
        "one_pass_s": round(took["one_pass"], 4),
        "reference_s": round(took["reference"], 4),
        "ratio": round(took["reference"] / took["one_pass"], 2),
        "goal": 4,
        "same": torch.allclose(found["one"], found["two"], rtol=1e-3, atol=1e-4),
    }


def _one_pass(model: nn.Module, x_BLH: torch.Tensor, rotary: dict, args) -> torch.Tensor:
    layer, ffn = model.model.layers[0], feed_forward(model)
    seen: list[torch.Tensor] = []

    def record(ffn_input_BLH: torch.Tensor) -> torch.Tensor:
        seen.append(ffn_input_BLH)
        return torch.zeros_like(ffn_input_BLH)

    with replaced_submodule(layer, ffn.family.ffn, ModuleStub(record)):
        residual_BLH = layer(x_BLH, **rotary)
    observer, phi = EnergyObserver(ffn), PhiRecord()
    run_ffn(ffn, seen[0], observer, sink=phi)
    kept = rows_of_mask(ffn, _plan(observer.result().energy(ALPHA), ffn.widths, args.sparsity))
    slice_layer(ffn, kept)
    output, projection = OutputSum(seen[0]), PhiProjection(feed_forward(model), kept)
    for call in phi.calls:
        projection.add(call, output)
    return residual_BLH + output.y_TH.view_as(x_BLH)


def _reference(
    model: nn.Module, x_BLH: torch.Tensor, rotary: dict, sparsity: float
) -> torch.Tensor:
    layer, ffn = model.model.layers[0], feed_forward(model)
    seen: list[torch.Tensor] = []
    hook = ffn.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(x_BLH, **rotary)
    hook.remove()
    sum2_N, max2_N = every_expert(ffn, seen[0].flatten(0, 1)).chunk(2)
    basis_N = ffn.module.experts.down_proj.square().sum(1).flatten().double().cpu()
    keep_N = _plan(((1 - ALPHA) * sum2_N + ALPHA * max2_N) * basis_N, ffn.widths, sparsity)
    experts, width = ffn.module.experts, ffn.widths[0]
    for row in (~keep_N).nonzero().flatten().tolist():
        e, i = divmod(row, width)
        experts.gate_up_proj[e, i] = 0
        experts.gate_up_proj[e, width + i] = 0
        experts.down_proj[e, :, i] = 0
    return layer(x_BLH, **rotary)


def _plan(energy_N: torch.Tensor, widths: list[int], sparsity: float) -> torch.Tensor:
    return keep_highest(energy_N, widths, int(sparsity * sum(widths)))
