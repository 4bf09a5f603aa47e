"""From a model and a method to a smaller checkpoint: the driver of every method."""

import os
import shutil
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from camera.budget import Count, count
from camera.calibration import Calibration, CalibrationTokens, calibration_tokens
from camera.card import model_card
from camera.checkpoint import CameraConfig, load_tokenizer, resolve_device
from camera.energy import Energies, EnergyObserver, LayerEnergy
from camera.errors import CameraError
from camera.method import METHODS, Method
from camera.progress import PeakMemory, each_layer
from camera.shards import ShardWriter
from camera.slicer import slice_layer
from camera.source import (
    content_key,
    copy_companions,
    fingerprint,
    require_space,
    resolve_model,
    write_json,
)
from camera.stream import Batch, Streamer

PROPAGATE = ("compressed", "dense")
BATCH_TOKENS = 8192
REPORT = "camera.json"
ENERGIES = "energies.safetensors"


@dataclass
class CompressionResult:
    """What compressing did; `camera.json` in the checkpoint holds the same."""

    method: str
    model: str
    settings: dict[str, Any]
    sparsity: dict[str, Any]  # asked, of, and realised: moe, model, routed
    bits: dict[str, float]  # of a weight: raw, stored with metadata, average of the whole model
    bytes: dict[str, int]  # weight files: dense, compressed
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    coverage: dict[str, Any] = field(default_factory=dict)
    widths: dict[str, list[int]] = field(default_factory=dict)
    full_widths: dict[str, int] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    energies: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    checkpoint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dict(vars(self))


def compress(
    model: str | Path,
    method: Method | str,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    propagate: str = "compressed",
    data: str = "hub",
    seed: int = 1234,
    device: str = "auto",
    dtype: str = "auto",
    energies: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    **settings: Any,
) -> CompressionResult:
    """Compress a model, one layer in memory at a time, into the folder `out`.

    `method` is a method or the name of one, which then takes `settings` (`sparsity=0.4`, ...).
    With `propagate="compressed"` each layer is measured on what the compressed layers before it
    put out; with `"dense"` on the original model's activations, in one pass that is kept in the
    folder `energies` and serves every other alpha and sparsity. Raises CameraError for what a user
    can mend; `out` appears only when it is complete.
    """
    method = _as_method(method, settings)
    if propagate not in PROPAGATE:
        raise CameraError(f"propagate={propagate} is none of {', '.join(PROPAGATE)}.")
    out = Path(out)
    if out.exists():
        raise CameraError(f"{out} exists already: delete it or choose another folder.")
    if not method.compresses:
        raise CameraError(
            f"method {method.name} leaves the model as it is: there is nothing to do."
        )
    folder = resolve_model(str(model))
    streamer = Streamer(folder, resolve_device(device), dtype, trust_remote_code)
    method.check(streamer.budget)
    require_space(out.parent, streamer.budget.dense.bytes)

    job = _Job(str(model), streamer, method, out, progress)
    if method.calibrates:
        tokenizer = load_tokenizer(folder, trust_remote_code)
        limit = getattr(streamer.config, "max_position_embeddings", None)
        job.tokens = calibration_tokens(
            tokenizer, calibration or Calibration(), data=data, seed=seed, max_length=limit
        )
    with PeakMemory(streamer.device) as job.memory:
        if method.calibrates and propagate == "dense":
            job.energies = job.cached_energies(Path(energies) if energies else None)
        job.compress_layers(measure=method.calibrates and propagate == "compressed")
    return job.finish()


def describe(model: str | Path, trust_remote_code: bool = False) -> CompressionResult:
    """What `compress` would report of the original model: its counts, with nothing removed."""
    streamer = Streamer(resolve_model(str(model)), "cpu", "auto", trust_remote_code)
    dense = streamer.budget.dense
    bits = _bits(dense, dense)
    sparsity = {"asked": 0.0, "of": None, **dense.sparsity(dense)}
    size = streamer.reader.bytes
    return CompressionResult(
        method="dense",
        model=str(model),
        settings={},
        sparsity=sparsity,
        bits=bits,
        bytes={"dense": size, "compressed": size},
        seconds={"calibrate": 0.0, "compress": 0.0},
        versions=versions(),
    )


class _Job:
    """One compression under way."""

    def __init__(self, model: str, streamer: Streamer, method: Method, out: Path, progress: bool):
        self.model, self.streamer, self.method, self.out = model, streamer, method, out
        self.progress = progress
        self.tokens: CalibrationTokens | None = None
        self.energies: Energies | None = None
        self.memory: PeakMemory | None = None
        self.seconds = {"calibrate": 0.0, "compress": 0.0}
        self.widths: dict[str, list[int]] = {}
        self.full_widths: dict[str, int] = {}
        self.partial = out.with_name(f".{out.name}.partial")
        self.writer: ShardWriter | None = None

    def batches(self) -> list[Batch]:
        """Calibration tokens, embedded, in batches of about BATCH_TOKENS tokens."""
        ids_NL = self.tokens.ids_NL
        size = max(1, BATCH_TOKENS // ids_NL.shape[1])
        return self.streamer.embed({"input_ids": ids_BL} for ids_BL in ids_NL.split(size))

    def cached_energies(self, folder: Path | None) -> Energies:
        """Energies of the original model: read if measured before, else measured and kept."""
        if folder is None:
            return self.measure_dense()
        streamer = self.streamer
        about = {
            "weights": fingerprint(streamer.folder),
            "tokens": self.tokens.hash,
            "dtype": str(streamer.dtype),
            "version": version("camera-moe"),
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{streamer.config.model_type}-{content_key(about)}.safetensors"
        with FileLock(f"{path}.lock"):  # parallel jobs of a sweep measure once
            if not path.exists():
                found = self.measure_dense()
                partial = path.with_suffix(".partial")
                found.save(partial)
                os.replace(partial, path)
        return Energies.load(path)

    def measure_dense(self) -> Energies:
        """One pass over the original model."""
        start, streamer = time.perf_counter(), self.streamer
        batches, layers = self.batches(), {}
        for i in each_layer(len(streamer.layers), "measure", self.memory, self.progress):
            streamer.load_layer(i)
            streamer.attend(i, batches)
            observer = EnergyObserver(streamer.feed_forward(i))
            streamer.observe(i, batches, observer, propagate=True)
            layers[i] = observer.result()
            streamer.free(streamer.layers[i])
        self.seconds["calibrate"] = time.perf_counter() - start
        return Energies(layers, {"propagate": "dense", "calibration": self.tokens.describe()})

    def compress_layers(self, measure: bool) -> None:
        """Load, measure (on compressed activations), plan, slice, write and free every layer."""
        start, streamer = time.perf_counter(), self.streamer
        spent = self.seconds["calibrate"]
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self.writer = ShardWriter(self.partial, len(streamer.layers) + 1)
        batches = self.batches() if measure else []
        measured: dict[int, LayerEnergy] = {}
        for i in each_layer(len(streamer.layers), "compress", self.memory, self.progress):
            streamer.load_layer(i)
            in_pool = i in streamer.budget.layers
            if measure:
                began = time.perf_counter()
                streamer.attend(i, batches)
                observer = EnergyObserver(streamer.feed_forward(i))
                if in_pool:
                    streamer.observe(i, batches, observer)
                    measured[i] = observer.result()
                self.seconds["calibrate"] += time.perf_counter() - began
            if in_pool:
                energies = measured if measure else self.energies.layers if self.energies else {}
                self.slice(i, energies.get(i))
            self.write_layer(i)
            if measure:
                began = time.perf_counter()
                streamer.propagate(i, batches)
                self.seconds["calibrate"] += time.perf_counter() - began
            streamer.free(streamer.layers[i])
        if measure:
            about = {"propagate": "compressed", "calibration": self.tokens.describe()}
            self.energies = Energies(measured, about)
        self.seconds["compress"] = time.perf_counter() - start - (self.seconds["calibrate"] - spent)

    @torch.no_grad()
    def slice(self, index: int, energy: LayerEnergy | None) -> None:
        """Plan one layer and cut it down to the plan."""
        streamer = self.streamer
        ffn = streamer.feed_forward(index)
        if energy is not None and energy.widths != ffn.widths:
            raise CameraError(f"energies of layer {index} belong to a model of other widths.")
        keep_N = self.method.plan(index, ffn, energy, streamer.budget)
        self.full_widths |= {group.path: max(group.widths) for group in ffn.groups}
        self.widths |= slice_layer(ffn, keep_N, streamer.layers[index])

    def write_layer(self, index: int) -> None:
        """Write a layer as its own shard, under the names it has in memory."""
        prefix = f"{self.streamer.root}.{index}."
        state = self.streamer.layers[index].state_dict()
        self.writer.add({prefix + name: tensor for name, tensor in state.items()})

    def finish(self) -> CompressionResult:
        """Write what is outside the layers, the config and the reports; then show the folder."""
        streamer, partial = self.streamer, self.partial
        streamer.load_rest()
        model = streamer.model
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        rest = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith(streamer.root) and name not in tied
        }
        self.writer.add(rest)
        self.writer.close()
        made_by = {"method": self.method.name, **self.method.settings()}
        config = self.write_config(made_by)
        copy_companions(streamer.folder, partial)
        if self.energies is not None:
            self.energies.save(partial / ENERGIES)
        result = self.result(config)
        (partial / "README.md").write_text(model_card(result))
        write_json(partial / REPORT, result.to_dict())
        os.replace(partial, self.out)
        return result

    def write_config(self, made_by: dict[str, Any]) -> CameraConfig:
        """Write config.json with the kept widths in it."""
        paths = {name: type(m).__name__ for name, m in self.streamer.model.named_modules()}
        ragged = {p: w for p, w in self.widths.items() if paths[p] == "RaggedExperts"}
        mlps = {p: w[0] for p, w in self.widths.items() if p not in ragged}
        stored = CameraConfig(ragged, mlps, made_by)
        config = self.streamer.config
        config.quantization_config = stored
        config.architectures = [type(self.streamer.model).__name__]
        config.dtype = self.streamer.dtype
        config.save_pretrained(self.partial)
        return stored

    def result(self, config: CameraConfig) -> CompressionResult:
        """Count the tensors that were written and put the facts of the run together."""
        streamer, dense = self.streamer, self.streamer.budget.dense
        parts = {path: path in config.experts for path in self.widths}
        compressed = count(self.writer.sizes, parts)
        size = sum(
            p.stat().st_size for p in self.partial.glob("*.safetensors") if p.name != ENERGIES
        )
        return CompressionResult(
            method=self.method.name,
            model=self.model,
            settings=self.method.settings(),
            sparsity={
                "asked": getattr(self.method, "sparsity", None),
                "of": getattr(self.method, "sparsity_of", None),
                **dense.sparsity(compressed),
            },
            bits=_bits(dense, compressed),
            bytes={"dense": streamer.reader.bytes, "compressed": size},
            seconds=self.seconds,
            peak_memory_bytes=self.memory.bytes,
            coverage=self.coverage(),
            widths=self.widths,
            full_widths=self.full_widths,
            calibration=self.tokens.describe() if self.tokens else None,
            energies=ENERGIES if self.energies else None,
            versions=versions(),
            checkpoint=str(self.out),
        )

    def coverage(self) -> dict[str, Any]:
        """How much of the pool was compressed, and which routed experts saw no calibration token."""
        budget = self.streamer.budget
        pools = [w for pool in budget.layers.values() for w in pool.widths]
        sliced = sum(self.full_widths[p] * len(w) for p, w in self.widths.items())
        report = {"experts": len(pools), "parameters_covered": sliced / max(sum(pools), 1)}
        if self.energies is not None:
            unreached = [
                [i, path, expert]
                for i, layer in self.energies
                for path, expert in layer.unreached()
            ]
            report |= {"reached": len(pools) - len(unreached), "unreached": unreached}
        return report


def _as_method(method: Method | str, settings: dict[str, Any]) -> Method:
    if isinstance(method, Method):
        if settings:
            raise CameraError(
                f"settings {', '.join(settings)} belong to the method itself when it is not given "
                "by name."
            )
        return method
    if method not in METHODS:
        raise CameraError(f"method={method} is none of {', '.join(sorted(METHODS))}.")
    try:
        return METHODS[method](**settings)
    except TypeError as error:
        raise CameraError(f"method {method}: {error}.") from error


def _bits(dense: Count, compressed: Count) -> dict[str, float]:
    """Bits of a stored weight; pruning leaves them as they were."""
    stored = 8 * compressed.bytes / compressed.model
    return {"raw": stored, "stored": stored, "model": stored}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("camera-moe", "torch", "transformers", "safetensors")}
