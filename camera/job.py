"""One compression under way: measure, plan, slice, write, layer after layer."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from filelock import FileLock

from camera.budget import count
from camera.calibration import CalibrationTokens
from camera.card import model_card
from camera.checkpoint import CameraConfig
from camera.energy import Energies, EnergyObserver, LayerEnergy
from camera.errors import CameraError
from camera.experts import RaggedExperts
from camera.method import Method
from camera.progress import PeakMemory, each_layer, free_memory
from camera.result import CompressionResult, unquantised_bits, versions
from camera.shards import ShardWriter
from camera.slicer import Kept, kept_rows, slice_layer
from camera.source import content_key, copy_companions, fingerprint, write_json
from camera.stream import Batch, Streamer

log = logging.getLogger("camera")
BATCH_TOKENS = 8192
PHI_SHARE = 0.25  # of the free memory that phi of one layer may take
REPORT = "camera.json"
ENERGIES = "energies.safetensors"


class Job:
    """What `compress` drives, and what it has found so far."""

    def __init__(
        self,
        model: str,
        streamer: Streamer,
        method: Method,
        out: Path,
        *,
        phi: str = "auto",
        show_progress: bool = True,
    ):
        self.model, self.streamer, self.method, self.out = model, streamer, method, out
        self.phi, self.show_progress = phi, show_progress
        self.tokens: CalibrationTokens | None = None
        self.memory = PeakMemory(streamer.device)
        self.energies: Energies | None = None
        self.seconds = {"calibrate": 0.0, "compress": 0.0}
        self.widths: dict[str, list[int]] = {}
        self.full_widths: dict[str, int] = {}
        self.partial = out.with_name(f".{out.name}.partial")
        self.writer = ShardWriter(self.partial, len(streamer.layers) + 1)

    def measure_once(self, folder: Path | None) -> None:
        """Energies of the original model: read from `folder` if measured before, else measured."""
        if folder is None:
            self.energies = self._measure_dense()
            return
        about = {
            "weights": fingerprint(self.streamer.folder),
            "tokens": self.tokens.hash,
            "dtype": str(self.streamer.dtype),
            "version": version("camera-moe"),
        }
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.streamer.config.model_type}-{content_key(about)}.safetensors"
        path = folder / name
        with FileLock(f"{path}.lock"):  # parallel jobs of a sweep measure once
            if not path.exists():
                found, partial = self._measure_dense(), folder / f".{name}.partial"
                found.save(partial)
                os.replace(partial, path)
        self.energies = Energies.load(path)

    def compress_layers(self, measure: bool) -> None:
        """Slice and write every layer; with `measure`, on what the compressed layers put out."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        streamer, batches = self.streamer, []
        if measure:
            self.energies = Energies({}, self._about("compressed"))
            with self._timed("calibrate"):
                batches = self._embed()
        for i in self._each_layer("compress"):
            in_pool, kept = i in streamer.budget.layers, None
            with self._timed("compress"):
                streamer.load_layer(i)
            if measure:
                with self._timed("calibrate"):
                    streamer.attend(i, batches)
                    if in_pool:
                        self.energies.layers[i] = self._observe(i, batches, trace=self.keep_phi(i))
            with self._timed("compress"):
                if in_pool:
                    kept = self._slice(i)
                self._write(i)
            if measure:
                with self._timed("calibrate"):
                    streamer.propagate(i, batches, kept)
            streamer.free(streamer.layers[i])

    def keep_phi(self, index: int) -> bool:
        """Whether a layer's phi is kept between measuring and propagating, or computed again."""
        if self.phi != "auto":
            return self.phi == "keep"
        ffn = self.streamer.feed_forward(index)
        per_token = sum(
            width if not group.routed else width * self._top_k() / len(group.widths)
            for group in ffn.groups
            for width in group.widths
        )
        needed = per_token * self.tokens.ids_NL.numel() * self.streamer.dtype.itemsize
        return needed < PHI_SHARE * free_memory(self.streamer.device)

    def _top_k(self) -> int:
        return getattr(self.streamer.config, "num_experts_per_tok", 1)

    def finish(self) -> CompressionResult:
        """Write what is outside the layers, config and reports; then show the folder, complete."""
        with self._timed("compress"):
            self._write_rest()
            stored = self._write_config()
            copy_companions(self.streamer.folder, self.partial)
            if self.energies is not None:
                self.energies.save(self.partial / ENERGIES)
        result = self._result(stored)
        self._warn_of_unreached(result.coverage.get("unreached", []))
        (self.partial / "README.md").write_text(model_card(result))
        write_json(self.partial / REPORT, result.to_dict())
        os.replace(self.partial, self.out)
        return result

    def _measure_dense(self) -> Energies:
        energies, streamer = Energies({}, self._about("dense")), self.streamer
        with self._timed("calibrate"):
            batches = self._embed()
            for i in self._each_layer("measure"):
                streamer.load_layer(i)
                streamer.attend(i, batches)
                energies.layers[i] = self._observe(i, batches, propagate=True)
                streamer.free(streamer.layers[i])
        return energies

    def _embed(self) -> list[Batch]:
        ids_NL = self.tokens.ids_NL
        size = max(1, BATCH_TOKENS // ids_NL.shape[1])
        return self.streamer.embed({"input_ids": ids_BL} for ids_BL in ids_NL.split(size))

    def _observe(self, index: int, batches: list[Batch], **options: bool) -> LayerEnergy:
        observer = EnergyObserver(self.streamer.feed_forward(index))
        self.streamer.observe(index, batches, observer, **options)
        return observer.result()

    @torch.no_grad()
    def _slice(self, index: int) -> Kept:
        ffn = self.streamer.feed_forward(index)
        energy = self.energies.layers[index] if self.energies else None
        if energy is not None and energy.widths != ffn.widths:
            raise CameraError(f"energies of layer {index} belong to a model of other widths.")
        keep_N = self.method.plan(index, ffn, energy, self.streamer.budget)
        kept = kept_rows(ffn, keep_N)
        self.full_widths |= {group.path: max(group.widths) for group in ffn.groups}
        self.widths |= {path: [len(rows) for rows in experts] for path, experts in kept.items()}
        slice_layer(ffn, kept)
        return kept

    def _write(self, index: int) -> None:
        prefix = f"{self.streamer.root}.{index}."
        state = self.streamer.layers[index].state_dict()
        self.writer.add({prefix + name: tensor for name, tensor in state.items()})

    def _write_rest(self) -> None:
        self.streamer.load_rest()
        model, root = self.streamer.model, self.streamer.root
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        state = model.state_dict().items()
        self.writer.add({n: t for n, t in state if not n.startswith(f"{root}.") and n not in tied})
        self.writer.close()

    def _write_config(self) -> CameraConfig:
        model, config = self.streamer.model, self.streamer.config
        ragged, mlps = {}, {}
        for path, widths in self.widths.items():
            if isinstance(model.get_submodule(path), RaggedExperts):
                ragged[path] = widths
            else:
                mlps[path] = widths[0]
        made_by = {"method": self.method.name, **self.method.settings()}
        config.quantization_config = CameraConfig(ragged, mlps, made_by)
        config.architectures = [type(model).__name__]
        config.dtype = self.streamer.dtype
        config.save_pretrained(self.partial)
        return config.quantization_config

    def _result(self, stored: CameraConfig) -> CompressionResult:
        streamer, dense = self.streamer, self.streamer.budget.dense
        routed = {path: path in stored.experts for path in self.widths}
        compressed = count(self.writer.sizes, routed)
        shards = {self.partial / name for name in self.writer.weight_map.values()}
        return CompressionResult(
            method=self.method.name,
            model=self.model,
            settings=self.method.settings(),
            sparsity={
                "asked": getattr(self.method, "sparsity", None),
                "of": getattr(self.method, "sparsity_of", None),
                **dense.sparsity(compressed),
            },
            bits=unquantised_bits(compressed),
            bytes={
                "dense": streamer.reader.bytes,
                "compressed": sum(path.stat().st_size for path in shards),
            },
            seconds={name: round(spent, 3) for name, spent in self.seconds.items()},
            peak_memory_bytes=self.memory.bytes,
            coverage=self._coverage(),
            widths=self.widths,
            full_widths=self.full_widths,
            calibration=self.tokens.describe() if self.tokens else None,
            energies=ENERGIES if self.energies else None,
            versions=versions(),
            checkpoint=str(self.out),
        )

    def _coverage(self) -> dict[str, Any]:
        pools = [width for pool in self.streamer.budget.layers.values() for width in pool.widths]
        planned = sum(self.full_widths[path] * len(kept) for path, kept in self.widths.items())
        report = {"experts": len(pools), "parameters_covered": planned / max(sum(pools), 1)}
        if self.energies is not None:
            unreached = [
                [index, path, expert]
                for index, layer in self.energies
                for path, expert in layer.unreached()
            ]
            report |= {"reached": len(pools) - len(unreached), "unreached": unreached}
        return report

    def _warn_of_unreached(self, unreached: list[list[Any]]) -> None:
        layers: dict[int, list[int]] = {}
        for index, _, expert in unreached:
            layers.setdefault(index, []).append(expert)
        for index, experts in layers.items():
            log.warning(
                "layer %d: no calibration token reached expert %s, so their energy is zero: raise "
                "calibration.samples to reach more",
                index,
                ", ".join(map(str, experts)),
            )

    def _about(self, propagate: str) -> dict[str, Any]:
        return {
            "model": self.model,
            "propagate": propagate,
            "calibration": self.tokens.describe(),
            "versions": versions(),
        }

    def _each_layer(self, title: str) -> Iterator[int]:
        return each_layer(len(self.streamer.layers), title, self.memory, self.show_progress)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[part] += perf_counter() - start
