"""Perplexity and tasks of a model, whole or layer by layer where it doesn't fit."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from camera.checkpoint.loading import load_model, load_tokenizer
from camera.checkpoint.source import resolve_model
from camera.evaluation import perplexity as perplexities
from camera.evaluation.divergence.reference import DenseReference
from camera.evaluation.passages import at_least_one
from camera.evaluation.placement import should_stream
from camera.evaluation.suite import EvaluationRequest, evaluate_streamed
from camera.evaluation.tasks.evaluate import evaluate_tasks
from camera.evaluation.tasks.names import average
from camera.runtime.errors import CameraError
from camera.runtime.values import refuse_unknown


def evaluate(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    perplexity: Sequence[str] = ("wikitext2", "c4"),
    tasks: Sequence[str] = (),
    data: str | Path = "hub",
    length: int | None = None,
    stride: int | None = None,
    blocks: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 1234,
    device: str = "auto",
    dtype: str = "auto",
    stream: str = "auto",
    dense: str | Path | None = None,
    divergence: int = 64,
    statistics: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    **unknown: Any,
) -> dict[str, Any]:
    """Perplexity on corpora and accuracy of lm-eval tasks.

    `model` is a folder or hub id, compressed or not, or a loaded model with its `tokenizer`.
    `length`, `stride` and `blocks` are of the perplexities, `limit` and `batch_size` of the tasks;
    of a folder `stream` says whether it is read layer by layer (`auto`: where it doesn't fit).
    With `dense`, the model that this one was made of, each perplexity has the comparison with it
    (`divergence`: KL, agreement, acceptance, by so many of its likeliest tokens); its predictions
    are made once where a folder `statistics` keeps them.
    Returns {"perplexity": {corpus: ...}, "tasks": {task: ...}, "average": percent or None}, each
    as `camera.evaluation.perplexity` and `camera.evaluation.tasks` describe it. Raises CameraError
    for what a user can mend.
    """
    refuse_unknown("evaluate", unknown, [*inspect.signature(evaluate).parameters][:-1])
    if not [*perplexity, *tasks]:
        raise CameraError("evaluate has nothing to measure: give perplexity or tasks.")
    read = dict(data=data, progress=progress)
    found: dict[str, Any] = {"perplexity": {}, "tasks": {}}
    at_least_one("divergence", divergence)
    placed = dict(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    reference, top = None, None
    if dense is not None:
        kept = None if statistics is None else Path(statistics).expanduser()
        original = resolve_model(str(dense))
        reference, top = DenseReference(original, kept, **placed, progress=progress), divergence
    if isinstance(model, str | Path):
        folder = resolve_model(str(model))
        if should_stream(folder, device, dtype, stream):
            sizes = dict(length=length, stride=stride, blocks=blocks, limit=limit, seed=seed)
            sizes |= dict(divergence=top)
            measures = EvaluationRequest(data, tuple(perplexity), tuple(tasks), **sizes)
            options = dict(reference=reference, progress=progress)
            found |= evaluate_streamed(folder, measures, **options, **placed)
            return found | {"average": average(found["tasks"]) if tasks else None}
        model = load_model(folder, **placed)
        tokenizer = tokenizer or load_tokenizer(folder, trust_remote_code)
    elif tokenizer is None:
        raise CameraError("evaluate needs the tokenizer of a loaded model: give it, or a folder.")
    sizes = dict(length=length, stride=stride, limit=blocks, reference=reference, top=top)
    for corpus in perplexity:
        found["perplexity"][corpus] = perplexities.perplexity(
            model, tokenizer, corpus=corpus, **read, **sizes
        )
    if tasks:
        sizes = dict(limit=limit, batch_size=batch_size, seed=seed)
        found["tasks"] = evaluate_tasks(model, tokenizer, tasks, **read, **sizes)
    return found | {"average": average(found["tasks"]) if tasks else None}
