"""An importance matrix for llama-quantize: how large the inputs of every weight are.

Shapes: E experts, N tokens, C input columns of a matrix, W width of one expert.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from camera.calibration.settings import Calibration, check_calibration
from camera.calibration.tokens import CalibrationTokens, calibration_tokens
from camera.checkpoint.loading import load_tokenizer, require_finite
from camera.checkpoint.source import resolve_model
from camera.engines.gguf.architectures import architecture_of
from camera.engines.gguf.file import require_gguf
from camera.engines.gguf.tensors import TensorNames
from camera.moe.observer import Observer
from camera.runtime.device.accelerator import make_current, resolve_device
from camera.runtime.device.peak_memory import PeakMemory
from camera.runtime.errors import CameraError
from camera.runtime.files import published, refuse_existing
from camera.runtime.progress import each_layer
from camera.streaming.memory import BATCH_TOKENS
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer

if TYPE_CHECKING:
    from camera.moe.experts.group import ExpertGroup
    from camera.moe.feed_forward import FeedForward
    from camera.moe.observer import ExpertCall

log = logging.getLogger("camera")
# llama.cpp multiplies these by other inputs than the model does, in the order it has chosen
_SPLIT = "kv_b_proj"

Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By GGUF's name of a weight: sum of x^2 of each input column [E, C], and its tokens [E, 1]."""


def imatrix(
    model: str | Path,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    data: str = "hub",
    seed: int = 1234,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Path:
    """Write the importance matrix of a model, for `llama-quantize --imatrix`; returns `out`.

    Of every weight of attention and FFN: sum over the calibration tokens of x^2, by input column;
    of experts over the tokens that the router sends to each, down's input being its activations.
    Left out are embedding and head, as by llama-imatrix, and DeepSeek's kv_b_proj, whose halves
    llama.cpp applies elsewhere. One layer is in memory at a time. Raises CameraError for a model
    that GGUF can't hold, and for a compressed checkpoint, whose native export is to be measured.
    """
    require_gguf()
    out, calibration = Path(out).expanduser(), calibration or Calibration()
    refuse_existing(out)
    folder = resolve_model(str(model))
    meta = MetaModel(folder, resolve_device(device), dtype, trust_remote_code)
    make_current(meta.device)
    if meta.compressed is not None:
        raise CameraError(
            f"{folder} is a compressed checkpoint: export it as native, or take the original, and "
            "measure that."
        )
    architecture_of(meta.config)  # refuses what can't be written
    check_calibration(calibration, data=data)
    require_finite(meta.reader)
    tokens = calibration_tokens(
        load_tokenizer(folder, trust_remote_code),
        calibration,
        data=data,
        seed=seed,
        max_length=getattr(meta.config, "max_position_embeddings", None),
        vocabulary=meta.model.get_input_embeddings().num_embeddings,
    )
    _write(out, _measured(meta, tokens.ids_NL, progress), tokens)
    log.info("%s: importance matrix, %.1f MB.", out, out.stat().st_size / 1e6)
    return out


def _measured(model: MetaModel, ids_NL: torch.Tensor, progress: bool) -> Sums:
    """The sums of all layers, which are read one after the other."""
    names = TensorNames(architecture_of(model.config), model.config.num_hidden_layers)
    streamer, found = LayerStreamer(model), {}
    size = max(1, BATCH_TOKENS // ids_NL.shape[1])
    batches = streamer.embed({"input_ids": ids} for ids in ids_NL.split(size))
    with PeakMemory(model.device) as peak:
        for index in each_layer(0, len(model.layers), "importance", peak, progress):
            layer = streamer.load_layer(index)
            ffn = model.feed_forward(index)
            with _attention_sums(layer, ffn, f"{model.root}.{index}", names) as sums:
                inputs = streamer.attend(index, batches)
            found |= sums
            observer = _ExpertSums(ffn)
            batches = streamer.forward(index, inputs, observer)
            found |= observer.sums(index, names)
            model.free_layer(index)
    return found


@contextmanager
def _attention_sums(
    layer: nn.Module, ffn: FeedForward, path: str, names: TensorNames
) -> Iterator[Sums]:
    """Sums of a layer's linear modules outside its FFN, complete at the end of the block."""
    of_ffn, found, hooks = set(ffn.module.modules()), {}, []
    for name, module in layer.named_modules():
        if not isinstance(module, nn.Linear) or module in of_ffn or name.endswith(_SPLIT):
            continue
        sum2_1C = torch.zeros(1, module.in_features, dtype=torch.float64)
        tokens_11 = torch.zeros(1, 1, dtype=torch.float64)
        found[names.of(f"{path}.{name}.weight")] = sum2_1C, tokens_11

        def add(
            _: nn.Module,
            inputs: tuple[torch.Tensor, ...],
            sum2_1C: torch.Tensor = sum2_1C,
            tokens_11: torch.Tensor = tokens_11,
        ) -> None:
            x_NC = inputs[0].flatten(0, -2)
            sum2_1C += x_NC.float().square().sum(0).cpu()
            tokens_11 += len(x_NC)

        hooks.append(module.register_forward_pre_hook(add))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class _ExpertSums(Observer):
    """Sums of an FFN's experts: of the inputs of gate and up, and of those of down."""

    def __init__(self, ffn: FeedForward):
        self._groups = {group.path: group for group in ffn.groups}
        hidden = ffn.groups[0].down(0).shape[0]

        def zeros(group: ExpertGroup, columns: int) -> torch.Tensor:
            return torch.zeros(len(group.widths), columns, dtype=torch.float64)

        groups = self._groups.items()
        self._input = {path: zeros(group, hidden) for path, group in groups}
        self._hidden = {path: zeros(group, max(group.widths)) for path, group in groups}
        self._tokens = {path: zeros(group, 1) for path, group in groups}

    def __call__(self, call: ExpertCall) -> None:
        path, e = call.group.path, call.expert
        self._input[path][e] += call.x_NH.float().square().sum(0).cpu()
        self._hidden[path][e] += call.h_NW.float().square().sum(0).cpu()
        self._tokens[path][e] += len(call.x_NH)

    def sums(self, index: int, names: TensorNames) -> Sums:
        """By GGUF's names of the layer's tensors."""
        found = {}
        for path, group in self._groups.items():
            for part in ("gate", "up", "down"):
                name = f"blk.{index}.ffn_{part}_exps.weight"
                if not group.routed:
                    name = names.of(f"{path}.{part}_proj.weight")
                sums = self._hidden if part == "down" else self._input
                found[name] = sums[path], self._tokens[path]
        return found


def _write(out: Path, sums: Sums, tokens: CalibrationTokens) -> None:
    """The file, in the form that llama-imatrix writes."""
    gguf = require_gguf()
    samples, length = tokens.ids_NL.shape
    with published(out) as partial:
        writer = gguf.GGUFWriter(partial, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [Path(tokens.describe()["source"]).name])
        writer.add_uint32("imatrix.chunk_count", samples)
        writer.add_uint32("imatrix.chunk_size", length)
        for name, (sum2_EC, tokens_E1) in sums.items():
            writer.add_tensor(f"{name}.in_sum2", sum2_EC.float().numpy())
            writer.add_tensor(f"{name}.counts", tokens_E1.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
