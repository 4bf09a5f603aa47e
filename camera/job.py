"""One compression under way: measure, plan, slice, write, layer after layer."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from camera.card import model_card
from camera.checkpoint import CameraConfig
from camera.energy import Energies
from camera.errors import CameraError
from camera.measure import Measurement, code_and_device
from camera.method import Method
from camera.progress import PeakMemory, each_layer
from camera.report import ENERGIES, report
from camera.result import CompressionResult
from camera.resume import Progress
from camera.shards import ShardWriter
from camera.slicer import Kept, kept_rows, slice_layer
from camera.source import copy_companions, fingerprint, write_json
from camera.stream import Streamer

REPORT = "camera.json"


class Job:
    """What `compress` drives, and what it has found so far."""

    def __init__(
        self, model: str, streamer: Streamer, method: Method, out: Path, *, show_progress: bool
    ):
        self.model, self.streamer, self.method, self.out = model, streamer, method, out
        self.show_progress = show_progress
        self.calibration: Measurement | None = None
        self.memory = PeakMemory(streamer.device)
        self.energies: Energies | None = None
        self.seconds = {"calibrate": 0.0, "compress": 0.0}
        self.widths: dict[str, list[int]] = {}
        self.full_widths: dict[str, int] = {}
        self.routed: set[str] = set()
        self.partial = out.with_name(f".{out.name}.partial")
        self.writer = ShardWriter(self.partial, len(streamer.layers) + 1)

    def bytes_to_come(self) -> int:
        """What this job may still write: the dense size, less what a killed run wrote already, and
        the hidden states of two layers."""
        written = sum(path.stat().st_size for path in self.partial.glob("*.safetensors"))
        hidden = 0
        if self.calibration is not None:
            tokens = self.calibration.tokens.ids_NL.numel()
            hidden = tokens * self.streamer.config.hidden_size * self.streamer.dtype.itemsize
        return max(self.streamer.budget.dense.bytes - written, 0) + 2 * hidden

    def measure_once(self, folder: Path | None) -> None:
        """Energies of the original model, kept in `folder` for whoever asks for them next."""
        with self._timed("calibrate"):
            if folder is not None:
                self.energies = self.calibration.dense_energies(folder)
                return
            with TemporaryDirectory() as nowhere:
                self.energies = self.calibration.dense_energies(Path(nowhere))

    def compress_layers(self, phi: str | None) -> None:
        """Slice and write every layer, going on where a killed run stopped.

        With `phi` (keep, recompute or auto) each layer is measured on what the compressed layers
        before it put out; without, by the energies measured before, if the method wants any.
        """
        streamer, calibration = self.streamer, self.calibration if phi else None
        progress = self.progress = self._progress(phi)
        self._restore(progress)
        trace = False
        if calibration is not None:
            self.energies = Energies(progress.energies(), calibration.about("compressed"))
            trace = calibration.keeps_phi(phi)
            with self._timed("calibrate"):
                calibration.start(progress)
        for i in self.each_layer("compress", progress.done):
            in_pool, energy, kept = i in streamer.budget.layers, None, None
            with self._timed("compress"):
                streamer.load_layer(i)
            if calibration is not None:
                with self._timed("calibrate"):
                    calibration.attend(i)
                    if in_pool:
                        energy = self.energies.layers[i] = calibration.measure(i, trace=trace)
            with self._timed("compress"):
                if in_pool:
                    kept = self._slice(i)
                self._write(i)
            if calibration is not None:
                with self._timed("calibrate"):
                    calibration.propagate(i, kept)
            streamer.free(streamer.layers[i])
            hidden = calibration.hidden() if calibration is not None else []
            progress.commit(i + 1, self._state(), hidden, energy)

    def finish(self) -> CompressionResult:
        """Write what is outside the layers, config and reports; then show the folder, complete."""
        with self._timed("compress"):
            self._write_rest()
            self._write_config()
            copy_companions(self.streamer.folder, self.partial)
            if self.energies is not None:
                self.energies.save(self.partial / ENERGIES)
        result = report(self)
        (self.partial / "README.md").write_text(model_card(result))
        write_json(self.partial / REPORT, result.to_dict())
        self.progress.finish()
        os.replace(self.partial, self.out)
        return result

    def each_layer(self, title: str, start: int) -> Iterator[int]:
        """The layers from `start` on, behind a progress bar."""
        count = len(self.streamer.layers)
        return each_layer(start, count, title, self.memory, self.show_progress)

    def _progress(self, phi: str | None) -> Progress:
        settings = {
            "weights": fingerprint(self.streamer.folder),
            "method": self.method.name,
            **self.method.settings(),
            "calibration": self.calibration.tokens.hash if self.calibration else None,
            "propagate": "compressed" if phi else "dense",
            "phi": phi,
            "dtype": str(self.streamer.dtype),
            "stored dtype": str(self.streamer.stored_dtype),
        }
        return Progress(self.partial / "progress", settings | code_and_device(self.streamer))

    def _restore(self, progress: Progress) -> None:
        if progress.restore() and not self.writer.restore(progress.state["shards"]):
            progress.clear()  # a shard is not what was written: start anew
        if not progress.done:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            return
        for name in ("widths", "full_widths", "seconds"):
            setattr(self, name, progress.state[name])
        self.routed = set(progress.state["routed"])

    def _state(self) -> dict[str, Any]:
        return {
            "shards": self.writer.state(),
            "widths": self.widths,
            "full_widths": self.full_widths,
            "routed": sorted(self.routed),
            "seconds": self.seconds,
        }

    @torch.no_grad()
    def _slice(self, index: int) -> Kept:
        ffn = self.streamer.feed_forward(index)
        energy = self.energies.layers[index] if self.energies else None
        if energy is not None and energy.widths != ffn.widths:
            raise CameraError(f"energies of layer {index} belong to a model of other widths.")
        kept = kept_rows(ffn, self.method.plan(index, ffn, energy, self.streamer.budget))
        self.full_widths |= {group.path: max(group.widths) for group in ffn.groups}
        self.widths |= {path: [len(rows) for rows in experts] for path, experts in kept.items()}
        self.routed |= {group.path for group in ffn.groups if group.routed}
        slice_layer(ffn, kept)
        return kept

    def _write(self, index: int) -> None:
        prefix = f"{self.streamer.root}.{index}."
        state = self.streamer.layers[index].state_dict()
        named = {prefix + name: tensor for name, tensor in state.items()}
        self.writer.add(self.streamer.as_stored(named))

    def _write_rest(self) -> None:
        self.streamer.load_rest()
        model, root = self.streamer.model, self.streamer.root
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        state = model.state_dict().items()
        rest = {n: t for n, t in state if not n.startswith(f"{root}.") and n not in tied}
        self.writer.add(self.streamer.as_stored(rest))
        self.writer.close()

    def _write_config(self) -> None:
        config = self.streamer.config
        made_by: dict[str, Any] = {"method": self.method.name, **self.method.settings()}
        config.quantization_config = CameraConfig(
            experts={path: widths for path, widths in self.widths.items() if path in self.routed},
            mlps={p: widths[0] for p, widths in self.widths.items() if p not in self.routed},
            made_by=made_by,
        )
        config.architectures = [type(self.streamer.model).__name__]
        config.dtype = self.streamer.stored_dtype
        if type(self.streamer.model).__module__.startswith(("transformers.", "camera.")):
            vars(config).pop("auto_map", None)  # no code of the source's is needed any more
        config.save_pretrained(self.partial)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[part] += perf_counter() - start
