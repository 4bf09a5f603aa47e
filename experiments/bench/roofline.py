"""FLOPs and bytes of compressing a model, and the time on a device: computed, not measured."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig

from camera.compensation.settings import CompensationSettings
from camera.pipeline.memory.config_model import ConfigModel
from camera.pipeline.time.cards import CARDS, Card
from camera.pipeline.time.costs import DISK, EFFICIENCY, RunCost, run_cost, ways_on
from camera.runtime.errors import CameraError
from experiments.bench.support.architectures import ARCHITECTURES
from experiments.bench.support.refit import fit_flops
from experiments.bench.support.timing import matmul_peak, take_turns
from experiments.config.location import CONF, EMBEDDED_MODEL

COPIED = 2**28  # bytes


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m experiments.bench roofline`."""
    parser.add_argument("--model", default="qwen2_57b_a14b")
    parser.add_argument("--device", nargs="+", default=list(CARDS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, default=0.2, help="share of the pool removed")
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY)
    parser.add_argument("--host", type=float, default=256.0, help="GB of the system that are free")
    parser.add_argument("--disk", type=float, default=DISK / 1e9, help="GB/s, read and written")
    parser.add_argument("--phi", default="auto", choices=("auto", "keep", "routed", "recompute"))
    parser.add_argument("--eager", action="store_true", help="as without a compiler for kernels")
    parser.add_argument("--sweeps", type=int, default=3, help="of compensation, for each ridge")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (0: as they are)")


def run(args: argparse.Namespace) -> dict:
    """What a run does on each device, and the seconds that it takes.

    `--model` is a name of conf/model, a folder or a config.json. The counts are those of a one-pass
    run of Camera-P; on each device phi is kept and hidden states stay there where the run's own
    estimate of memory says so. `dense_way` is the paper's released code: every expert on every
    token for the energies, and two forward passes of each layer. Devices: by their data sheets
    (dense bf16), or cpu as measured (one square product, one copy). `--efficiency` is the share of
    the peak that products reach. `seconds` is without the disk, whose reading and writing goes on
    beside the computing: what takes longer decides. `compensation` is compensate=layer with
    target=dense, all ridges tried, on top of the run.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    tokens, config = args.samples * args.length, config_of(args.model)
    dense = dense_way(config, tokens, args.length)
    fit = fit_flops(
        config,
        tokens,
        sparsity=args.sparsity,
        ridges=len(CompensationSettings.ridges),
        sweeps=args.sweeps,
        held_out=CompensationSettings.held_out,
        attention=True,
    )
    return {
        "model": args.model,
        "tokens": tokens,
        "sparsity": args.sparsity,
        "efficiency": args.efficiency,
        "disk_gb_s": args.disk,
        "dense_way_tflops": round(dense / 1e12, 3),
        "compensation_tflops": round(fit / 1e12, 3),
        "devices": {
            name: _on_device(args, config, device_of(name), dense, fit) for name in args.device
        },
    }


def _on_device(
    args: argparse.Namespace, config: Any, card: Card, dense: int, fit: int
) -> dict[str, Any]:
    tokens = args.samples * args.length
    dtype = torch.bfloat16 if card.bytes else torch.float32
    sizes = (config, tokens, args.length)
    model, host = ConfigModel(config, dtype), int(args.host * 1e9)
    said = model.memory(*sizes[1:], args.sparsity, card.bytes or None, host)
    asked = {"auto": said.phi_kept, "keep": "all", "routed": "routed", "recompute": "none"}
    ways = replace(ways_on(card, said), phi=asked[args.phi])
    ways = replace(ways, compiled=ways.compiled and not args.eager)
    cost = run_cost(*sizes, sparsity=args.sparsity, ways=ways, dtype=dtype)
    spent = cost.seconds(card, args.efficiency, args.disk * 1e9)
    rate, flops = args.efficiency * card.flops, cost.total("flops")
    return {
        "parameters_b": round(cost.parameters / 1e9, 2),
        "phi": {"all": "keep", "routed": "routed", "none": "recompute"}[ways.phi],
        "hidden": said.hidden_place,
        "experts": "disk" if said.experts_on_disk else "ram",
        "memory_gb": round(said.peak / 1e9, 1),
        "host_memory_gb": round(said.host_peak / 1e9, 1),
        "tflops": {
            part: round(cost.total(part) / 1e12, 3)
            for part in ("flops", "attention", "router", "gate_up", "down")
        },
        "times_fewer": round(dense / flops, 2),
        "gigabytes": _gigabytes(cost),
        "launches": cost.moved("launches"),
        "waits": cost.moved("waits"),
        "seconds": round(spent.total, 1),
        "parts": {part: round(took, 1) for part, took in spent._asdict().items()},
        "dense_way_seconds": round(dense / rate, 1),
        "compensation_seconds": round(fit / (card.fp32 * args.efficiency), 1),
        "peak_tflops": round(card.flops / 1e12, 3),
    }


def _gigabytes(cost: RunCost) -> dict[str, float]:
    """Read, written (progress apart), moved by elementwise kernels, copied beside the weights."""
    found = {
        "read": cost.total("bytes_read") + cost.bytes_rest,
        "written": cost.total("bytes_written") + cost.bytes_rest,
        "progress": cost.total("bytes_resume"),
        "elementwise": cost.moved("elementwise"),
        "to_device": cost.moved("up"),
        "from_device": cost.moved("down"),
    }
    return {part: round(size / 1e9, 2) for part, size in found.items()}


def dense_way(config: Any, tokens: int, length: int) -> int:
    """FLOPs of gate and up of all experts on all tokens, and of two forward passes of each layer.

    A forward pass is the one-pass run with nothing removed.
    """
    forward = run_cost(config, tokens, length, sparsity=0.0)
    return forward.total("everywhere") + 2 * forward.total("flops")


def config_of(name: str) -> Any:
    """The config of a model of conf/model (read if it can be, else as published), or of a path."""
    path = Path(name)
    if path.exists():
        path = path.parent if path.is_file() else path
        return AutoConfig.from_pretrained(path)
    if not (CONF / "model" / f"{name}.yaml").exists() and name not in ARCHITECTURES:
        known = ", ".join(sorted(file.stem for file in (CONF / "model").glob("*.yaml")))
        raise CameraError(f"--model {name} is neither a folder nor one of {known}.")
    if (CONF / "model" / f"{name}.yaml").exists():
        where = OmegaConf.load(CONF / "model" / f"{name}.yaml").path
        if where == "embedded":
            return AutoConfig.from_pretrained(EMBEDDED_MODEL)
        try:
            return AutoConfig.from_pretrained(where, local_files_only=True)
        except (OSError, ValueError) as error:
            if name not in ARCHITECTURES:
                raise CameraError(
                    f"--model {name}: the config.json of {where} is not on this machine; give its "
                    "folder."
                ) from error
    known = dict(ARCHITECTURES[name])
    return AutoConfig.for_model(known.pop("model_type"), **known)


def device_of(name: str) -> Card:
    """A device by its data sheet, or this CPU as measured; CameraError for another name."""
    if name in CARDS:
        return CARDS[name]
    if name != "cpu":
        raise CameraError(f"--device {name} is none of {', '.join([*CARDS, 'cpu'])}.")
    product, flops = matmul_peak("cpu")
    source = torch.empty(COPIED, dtype=torch.uint8)
    copy = torch.empty_like(source)
    took = take_turns({"product": product, "copy": lambda: copy.copy_(source)}, 5)
    peak, bandwidth = flops / took["product"], 2 * COPIED / took["copy"]
    return Card(peak, peak, bandwidth, link=bandwidth, bytes=0)
