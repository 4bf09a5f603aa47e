"""Perplexity and tasks of a streamed model in one pass."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from camera.checkpoint.loading import load_tokenizer
from camera.checkpoint.source import resolve_model
from camera.evaluation.divergence.meter import DivergenceMeter
from camera.evaluation.divergence.reference import DenseReference, require_reference
from camera.evaluation.passages import Passage, read_passage
from camera.evaluation.streamed import StreamedEvaluation
from camera.evaluation.tasks.definitions import quiet
from camera.evaluation.tasks.evaluate import Task, read_tasks
from camera.runtime.device.accelerator import resolve_device
from camera.streaming.skeleton import MetaModel


@dataclass(frozen=True)
class EvaluationRequest:
    """A request for measurements: corpora for perplexity, lm-eval tasks, and how much of each.

    The fields mean what the arguments of `perplexity` and `evaluate_tasks` do; `blocks` is the
    limit of the first, `limit` of the second, `divergence` the `top` of the first.
    """

    data: str | Path
    corpora: Sequence[str] = ()
    tasks: Sequence[str] = ()
    length: int | None = None
    stride: int | None = None
    blocks: int | None = None
    limit: int | None = None
    seed: int = 0
    max_length: int | None = None
    divergence: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        found = asdict(self) | {"data": str(self.data)}
        if self.divergence is None:
            del found["divergence"]  # what was measured before there was one is still the same
        return found | {"corpora": list(self.corpora), "tasks": list(self.tasks)}


def passages_of(model, tokenizer, measures: EvaluationRequest) -> list[Passage]:
    """The passages of a request, one for each corpus."""
    sizes = dict(length=measures.length, stride=measures.stride, limit=measures.blocks)
    return [
        read_passage(model, tokenizer, corpus=corpus, data=measures.data, **sizes)
        for corpus in measures.corpora
    ]


class EvaluationSuite:
    """The parts of an evaluation: asked when made, and told when the evaluation is through.

    Raises CameraError for what `perplexity` and `evaluate_tasks` refuse.
    """

    def __init__(
        self,
        evaluation: StreamedEvaluation,
        tokenizer,
        measures: EvaluationRequest,
        reference: DenseReference | None = None,
    ):
        self.evaluation, model = evaluation, evaluation.model.model
        self._tasks: list[Task] = []
        passages = passages_of(model, tokenizer, measures)
        self._meters: list[DivergenceMeter | None] = [None] * len(passages)
        if measures.divergence is not None and passages:
            dense = require_reference(reference).of(passages, measures.divergence)
            self._meters = [DivergenceMeter(*pair) for pair in zip(passages, dense, strict=True)]
        self._passages = [
            (passage, evaluation.add(passage.requests(), observer=meter))
            for passage, meter in zip(passages, self._meters, strict=True)
        ]
        if measures.tasks:
            from camera.evaluation.tasks.streamed_model import (
                StreamedLM,  # lm-eval takes seconds to import
            )

            options = dict(data=measures.data, limit=measures.limit, seed=measures.seed)
            with quiet():
                self._tasks = list(read_tasks(measures.tasks, **options))
                self._lm = StreamedLM(evaluation, tokenizer, max_length=measures.max_length)
                self._lm.ask([request for task in self._tasks for request in task.requests()])

    def results(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{"perplexity": {corpus: ...}, "tasks": {task: ...}} as `perplexity` and `evaluate_tasks`
        return them; `seconds` holds the part's share of the pass, by the tokens it asked about."""
        found: dict[str, dict[str, dict[str, Any]]] = {"perplexity": {}, "tasks": {}}
        for (passage, numbers), meter in zip(self._passages, self._meters, strict=True):
            nlls = [-self.evaluation.answers[number][0] for number in numbers]
            for nll, block in zip(nlls, passage.blocks, strict=True):
                passage.finite(nll, block)
            part = passage.result(nlls, self._share(numbers))
            part |= {} if meter is None else {"divergence": meter.result()}
            found["perplexity"][passage.corpus] = part
        for task in self._tasks:
            with quiet():
                share = self._share(self._lm.number(r) for r in task.built.instances)
                found["tasks"][task.name] = result = task.score(self._lm)
                result["seconds"] += share
        return found

    def _share(self, numbers: Iterable[int]) -> float:
        sizes = self.evaluation.sizes
        return self.evaluation.seconds * sum(sizes[n] for n in numbers) / sum(sizes)


class EvaluationDuringCompression:
    """Evaluation during compression: each compressed layer is evaluated while it is loaded.

    It sees each layer as it is once compressed, in the precision it is computed in.
    """

    def __init__(
        self,
        model: MetaModel,
        tokenizer,
        measures: EvaluationRequest,
        reference: DenseReference | None = None,
    ):
        self.measures, self._evaluation = measures, StreamedEvaluation(model)
        self._parts = EvaluationSuite(self._evaluation, tokenizer, measures, reference)

    def begin(self) -> None:
        """Embed the evaluation tokens."""
        self._evaluation.begin()

    def layer(self, index: int) -> None:
        """Run a compressed layer that is in memory."""
        self._evaluation.layer(index)

    def results(self, peak_memory_bytes: int) -> dict[str, Any]:
        """After the last layer: what was asked and, as `EvaluationSuite.results`, what came out."""
        self._evaluation.finish()
        found = self._parts.results()
        for part in (*found["perplexity"].values(), *found["tasks"].values()):
            part["peak_memory_bytes"] = peak_memory_bytes
        return {"measures": self.measures.to_dict(), **found}


def evaluate_streamed(
    model: str | Path,
    measures: EvaluationRequest,
    *,
    reference: DenseReference | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
    **options: Any,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure a model, compressed or not, in one read of its weights, a layer in memory at a time.

    `reference` is what a divergence is measured against. Returns what `EvaluationSuite.results`
    does, with `peak_memory_bytes` in each part; `options` are StreamedEvaluation's.
    Raises CameraError for what a user can fix.
    """
    folder = resolve_model(str(model))
    meta = MetaModel(folder, resolve_device(device), dtype, trust_remote_code)
    evaluation = StreamedEvaluation(meta, **options)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    parts = EvaluationSuite(evaluation, tokenizer, measures, reference)
    evaluation.run(progress=progress)
    found = parts.results()
    for part in (*found["perplexity"].values(), *found["tasks"].values()):
        part["peak_memory_bytes"] = evaluation.memory.bytes
    return found
