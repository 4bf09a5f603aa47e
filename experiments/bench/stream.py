"""A checkpoint of real layer shapes, streamed: seconds a layer, bytes, memory, overlap."""

import argparse
import os
import tempfile
from pathlib import Path
from time import perf_counter

import psutil
import torch

import camera
from camera.runtime.buffers import trim_heap
from camera.runtime.device.accelerator import has_own_memory
from camera.streaming.settings import MemoryChoices
from experiments.bench.support.architectures import ARCHITECTURES
from experiments.bench.support.synthetic import write_model, write_text

PAPER_TOKENS = 128 * 2048


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m experiments.bench stream`."""
    parser.add_argument("--model", default="qwen3_30b_a3b", choices=sorted(ARCHITECTURES))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="divides all widths of the model")
    parser.add_argument("--routed", type=int, default=0, help="experts of a layer (0: the model's)")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--experts", default="ram", choices=("ram", "disk"))
    parser.add_argument("--hidden", default="ram", choices=("device", "ram", "disk"))
    parser.add_argument("--threads", type=int, default=1, help="torch threads (0: as they are)")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> dict:
    """Seconds a layer, bytes read and written, peak memory, overlap, the whole model's minutes.

    Some layers of a published model (default: three of Qwen3-30B-A3B, 1.2 GB each in bf16; --scale
    divides all widths) are written to disk with random weights, dropped from the page cache, then
    pruned by Camera-P. `overlapped` is the share of reading and writing that computing hid.
    `whole_model_minutes` follows from a layer's time with as few calibration tokens as here, and
    with the 128 x 2048 of the paper, whose computing is extrapolated. The vocabulary is small: what
    is outside the layers is read and written once.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="camera-stream-") as folder:
        source = Path(folder) / "model"
        sizes = dict(layers=args.layers, scale=args.scale, length=args.length, routed=args.routed)
        write_model(source, args.model, **sizes)
        _forget(source)
        trim_heap()
        return _streamed(args, source, Path(folder))


def _streamed(args: argparse.Namespace, source: Path, folder: Path) -> dict:
    text = write_text(folder / "text.txt", args.samples * args.length)
    disk, before, start = _disk(), psutil.Process().memory_info().rss, perf_counter()
    result = camera.compress(
        source,
        "camera_p",
        folder / "compressed",
        sparsity=args.sparsity,
        calibration=camera.Calibration(str(text), args.samples, args.length),
        memory=MemoryChoices(hidden=args.hidden, experts=args.experts),
        device=args.device,
        progress=False,
    )
    took, seconds = perf_counter() - start, result.seconds
    moved = [now - then for now, then in zip(_disk(), disk, strict=True)]
    total = ARCHITECTURES[args.model]["num_hidden_layers"]
    tokens, on_gpu = args.samples * args.length, has_own_memory(torch.device(args.device))
    more = seconds["calibrate"] * (PAPER_TOKENS / tokens - 1)
    held = 0 if on_gpu else before
    return {
        "model": args.model,
        "scale": args.scale,
        "layers": args.layers,
        "routed": args.routed,
        "layer_gb": round(result.bytes["dense"] / args.layers / 1e9, 3),
        "tokens": tokens,
        "experts": args.experts,
        "hidden": args.hidden,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "seconds_per_layer": round(took / args.layers, 2),
        "calibrate_s_per_layer": round(seconds["calibrate"] / args.layers, 2),
        "read_gb": round(result.bytes["dense"] / 1e9, 3),
        "written_gb": round(result.bytes["compressed"] / 1e9, 3),
        "from_disk_gb": round(moved[0] / 1e9, 3),
        "to_disk_gb": round(moved[1] / 1e9, 3),
        "disk_s": round(seconds["disk"], 2),
        "waited_s": round(seconds["waited_for_disk"], 2),
        "overlapped": round(max(1 - seconds["waited_for_disk"] / seconds["disk"], 0.0), 3),
        "peak_gb": round((result.peak_memory_bytes - held) / 1e9, 3),
        "expected_peak_gb": round((result.expected_memory_bytes - held) / 1e9, 3),
        "whole_model_minutes": round(total * took / args.layers / 60, 1),
        "whole_model_minutes_paper_tokens": round(total * (took + more) / args.layers / 60, 1),
    }


def _forget(folder: Path) -> None:
    """Have the system read these files from disk again."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk() -> tuple[int, int]:
    """Bytes that this process had read from disks and written to them so far."""
    counters = psutil.Process().io_counters()
    return counters.read_bytes, counters.write_bytes
