"""FLOPs and bytes of compressing a model, and the time on a device: computed, not measured."""

import argparse
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig

from camera.compensation.settings import CompensationSettings
from camera.runtime.errors import CameraError
from experiments.bench.support.architectures import ARCHITECTURES
from experiments.bench.support.costs import Device, fit_flops, run_cost
from experiments.bench.support.timing import matmul_peak, take_turns
from experiments.config.location import CONF, EMBEDDED_MODEL

# FLOP/s in 16 bit, bytes/s, FLOP/s in fp32 (without TF32)
SHEETS = {"a100_40gb": (312e12, 1555e9, 19.5e12), "h100": (989e12, 3350e9, 67e12)}
COPIED = 2**28  # bytes


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m experiments.bench roofline`."""
    parser.add_argument("--model", default="qwen2_57b_a14b")
    parser.add_argument("--device", nargs="+", default=["a100_40gb", "h100", "cpu"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, default=0.2, help="share of the pool removed")
    parser.add_argument("--efficiency", type=float, default=0.4)
    parser.add_argument("--link", type=float, default=3.0)
    parser.add_argument("--recompute-phi", action="store_true")
    parser.add_argument("--sweeps", type=int, default=3, help="of compensation, for each ridge")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (0: as they are)")


def run(args: argparse.Namespace) -> dict:
    """Totals of the run, and minutes on each device.

    `--model` is a name of conf/model, a folder or a config.json. The counts are those of a one-pass
    run of the pipeline; `dense_way` is the paper's released code: every expert on every token for
    the energies, and two forward passes of each layer. Devices: a100_40gb and h100 by their data
    sheets (dense bf16), cpu as measured (one square product, one copy). `--efficiency` is the share
    of the peak that is reached, `--link` GB/s of the disk that weights are read from and written
    to. `compensation` is compensate=layer with target=dense, all ridges tried, on top of the run.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    tokens = args.samples * args.length
    config = config_of(args.model)
    here = torch.float32 if args.device == ["cpu"] else torch.bfloat16
    options = {"sparsity": args.sparsity, "keep_phi": not args.recompute_phi, "dtype": here}
    cost = run_cost(config, tokens, args.length, **options)
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
    devices = {name: device_of(name, args.link * 1e9) for name in args.device}
    return {
        "model": args.model,
        "parameters_b": round(cost.parameters / 1e9, 2),
        "tokens": tokens,
        "sparsity": args.sparsity,
        "tflops": {
            part: round(cost.total(part) / 1e12, 3)
            for part in ("flops", "attention", "router", "gate_up", "down")
        },
        "dense_way_tflops": round(dense / 1e12, 3),
        "compensation_tflops": round(fit / 1e12, 3),
        "times_fewer": round(dense / cost.total("flops"), 2),
        "gigabytes": {
            "read": round((cost.total("bytes_read") + cost.bytes_rest) / 1e9, 2),
            "written": round((cost.total("bytes_written") + cost.bytes_rest) / 1e9, 2),
            "moved": round(cost.total("bytes_moved") / 1e9, 1),
        },
        "efficiency": args.efficiency,
        "link_gb_s": args.link,
        "devices": {
            name: {
                "minutes": round(cost.seconds(device, args.efficiency) / 60, 2),
                "compute_minutes": round(
                    cost.total("flops") / (device.flops * args.efficiency) / 60, 2
                ),
                "dense_way_compute_minutes": round(
                    dense / (device.flops * args.efficiency) / 60, 2
                ),
                "compensation_minutes": round(fit / (device.fp32 * args.efficiency) / 60, 2),
                "peak_tflops": round(device.flops / 1e12, 3),
                "memory_gb_s": round(device.memory / 1e9, 1),
            }
            for name, device in devices.items()
        },
    }


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
    if not (CONF / "model" / f"{name}.yaml").exists():
        known = ", ".join(sorted(file.stem for file in (CONF / "model").glob("*.yaml")))
        raise CameraError(f"--model {name} is neither a folder nor one of {known}.")
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


def device_of(name: str, link: float) -> Device:
    """A device by its data sheet, or this CPU as measured; CameraError for another name."""
    if name in SHEETS:
        flops, memory, fp32 = SHEETS[name]
        return Device(flops, memory, link, fp32)
    if name != "cpu":
        raise CameraError(f"--device {name} is none of {', '.join([*SHEETS, 'cpu'])}.")
    product, flops = matmul_peak("cpu")
    source = torch.empty(COPIED, dtype=torch.uint8)
    copy = torch.empty_like(source)
    took = take_turns({"product": product, "copy": lambda: copy.copy_(source)}, 5)
    peak = flops / took["product"]
    return Device(peak, 2 * COPIED / took["copy"], link, peak)
