"""The dense model's predictions of passages: made once, kept in a folder, read by every run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from camera import MATHEMATICS
from camera.calibration.windows import ids_hash
from camera.checkpoint.loading import load_config
from camera.checkpoint.source import fingerprint
from camera.evaluation.divergence.meter import TopRecorder, TopTokens
from camera.evaluation.passages import Passage
from camera.evaluation.streamed import StreamedEvaluation
from camera.runtime.device.accelerator import resolve_device
from camera.runtime.errors import CameraError
from camera.runtime.files import content_key, partial_of, replace_durably, usual_mode
from camera.streaming.skeleton import MetaModel

log = logging.getLogger("camera")
KEY = "evaluation.divergence"


@dataclass(frozen=True)
class DenseReference:
    """The dense model that others are compared with, and the `folder` that keeps its predictions.

    They are made layer by layer, so that a model that fits no memory has them too, in one pass for
    all passages that lack them. A file is named by all that it depends on: weights, tokens, blocks,
    `top`, dtype, device and versions. Without a folder nothing is kept.
    """

    model: Path
    folder: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    hidden: Path | None = None  # folder of hidden states that exceed the memory
    progress: bool = True

    def of(self, passages: Sequence[Passage], top: int) -> list[TopTokens]:
        """For each passage the `top` likeliest tokens at each scored token."""
        if self.folder is None:
            return self._made(passages, top)
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [self._path(passage, top) for passage in passages]
        with ExitStack() as locked:
            for path in sorted(set(paths)):  # one order, so that no two runs wait for each other
                locked.enter_context(FileLock(f"{path}.lock"))
            found = {path: _read(path) for path in paths}
            lacking = [n for n, path in enumerate(paths) if found[path] is None]
            made = self._made([passages[n] for n in lacking], top) if lacking else []
            for n, tokens in zip(lacking, made, strict=True):
                _write(paths[n], tokens)
                found[paths[n]] = tokens
        return [found[path] for path in paths]

    def _path(self, passage: Passage, top: int) -> Path:
        about = self._about() | {
            "tokens": ids_hash(passage.ids_S[: passage.blocks[-1].end]),
            "blocks": [list(block) for block in passage.blocks],
            "top": top,
        }
        kind = load_config(self.model, self.trust_remote_code).model_type
        name = f"{kind}-predictions-{passage.corpus}-{content_key(about)}"
        return self.folder / f"{name}.safetensors"

    def _about(self) -> dict[str, Any]:
        return {
            "mathematics": MATHEMATICS,
            "weights": fingerprint(self.model),
            "dtype": self.dtype,
            "device": torch.device(resolve_device(self.device)).type,
            "matmul_precision": torch.get_float32_matmul_precision(),
            "versions": [version(package) for package in ("torch", "transformers")],
        }

    def _made(self, passages: Sequence[Passage], top: int) -> list[TopTokens]:
        log.info("the dense model's predictions of %s", ", ".join(p.corpus for p in passages))
        device = resolve_device(self.device)
        meta = MetaModel(self.model, device, self.dtype, self.trust_remote_code)
        evaluation = StreamedEvaluation(meta, folder=self.hidden)
        vocabulary = meta.model.get_input_embeddings().num_embeddings
        recorders = [TopRecorder(passage, top, vocabulary) for passage in passages]
        numbers = [
            evaluation.add(passage.requests(), observer=recorder)
            for passage, recorder in zip(passages, recorders, strict=True)
        ]
        evaluation.run(progress=self.progress)
        for passage, asked in zip(passages, numbers, strict=True):
            for number, block in zip(asked, passage.blocks, strict=True):
                passage.finite(evaluation.answers[number][0], block)
        return [recorder.found for recorder in recorders]


def require_reference(reference: DenseReference | None) -> DenseReference:
    """CameraError where there is nothing to compare with."""
    if reference is None:
        raise CameraError(f"{KEY} compares with the dense model: say which one it is (dense=...).")
    return reference


def _read(path: Path) -> TopTokens | None:
    """What was kept; None where nothing was, or where the file is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in ("ids", "log", "rest")]
            return TopTokens(*tensors, int(file.metadata()["vocabulary"]))
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        log.warning("%s can't be read (%s): made anew.", path, error)
        return None


def _write(path: Path, tokens: TopTokens) -> None:
    partial = partial_of(path)
    tensors = {"ids": tokens.ids_TK, "log": tokens.log_TK, "rest": tokens.rest_T}
    with usual_mode(partial):
        save_file(tensors, partial, {"vocabulary": str(tokens.vocabulary)})
    replace_durably(partial, path)
