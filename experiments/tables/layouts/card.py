"""What a run measured, on the model card of its checkpoint, where the hub's pages read it, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard

from camera.evaluation.tasks.names import headline_metric
from experiments.records.files import lock_of, write_text
from experiments.tables.names.datasets import WRITTEN, dataset_key, dataset_label

HEADING = "## Measured"


class _Score(NamedTuple):
    """One number of the report; `value` and `error` are in percent but for a perplexity."""

    name: str  # of the text or task, as tables know it
    metric: str
    value: float
    error: float | None
    bounds: dict[str, int]  # what of the text or task was measured, where not all
    beside: str = ""  # what else the section says of it


def enter_scores(checkpoint: Path, metrics: Mapping[str, Any]) -> None:
    """Write what a run's report says of quality to the card, in the place of an earlier run's."""
    file, scores, data = checkpoint / "README.md", list(_scores(metrics)), metrics["data"]
    with lock_of(checkpoint):
        if not scores or not file.exists():
            return
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        card.data.model_name = checkpoint.name
        card.data.eval_results = [_result(score, data) for score in scores]
        before = card.text.partition(f"\n{HEADING}\n")[0].strip()
        section = f"{HEADING}\n\n{_section(scores, metrics)}"
        write_text(file, f"---\n{card.data.to_yaml()}\n---\n\n{before}\n\n{section}")


def _scores(metrics: Mapping[str, Any]) -> Iterator[_Score]:
    asked = metrics["settings"]["evaluation"]
    of_texts = {key: asked[key] for key in ("length", "stride", "blocks")}
    of_written = {"limit": (asked.get("generative") or {}).get("limit")}
    texts, tasks, written = map(_known, (of_texts, {"limit": asked["limit"]}, of_written))
    for text, perplexity in metrics["perplexity"].items():
        beside = _divergence(metrics["divergence"].get(text))
        yield _Score(text, "perplexity", perplexity, None, texts, beside)
    for task, found in metrics["tasks"].items():
        metric = headline_metric(found)
        error = _percent(found[f"{metric}_stderr"])
        yield _Score(task, metric, 100 * found[metric], error, tasks)
    for task, found in metrics["generative"].items():
        score, error = 100 * found["score"], _percent(found["stderr"])
        yield _Score(f"{WRITTEN}{task}", found["metric"], score, error, written)


def _known(bounds: dict[str, int | None]) -> dict[str, int]:
    return {key: bound for key, bound in bounds.items() if bound is not None}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _divergence(found: Mapping[str, float] | None) -> str:
    if not found:
        return ""
    same = f"the same likeliest token {100 * found['agreement']:.1f} %"
    return f"; from the base model: KL {found['kl']:.4f} nats a token, {same}"


def _result(score: _Score, data: str) -> EvalResult:
    """In the hub's form (model-index), what bounds it as `args`."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_key(score.name, data),
        dataset_name=dataset_label(score.name, data),
        dataset_args=score.bounds or None,
        metric_type=score.metric,
        metric_value=round(score.value, 4),
    )


def _section(scores: list[_Score], metrics: Mapping[str, Any]) -> str:
    rows = [(dataset_label(score.name, metrics["data"]), _said(score)) for score in scores]
    if metrics["average"] is not None:  # of tasks with choices, which stand before written ones
        written = len(metrics["generative"])
        rows.insert(len(rows) - written, ("average of the tasks", f"{metrics['average']:.1f} %"))
    table = "\n".join(f"| {label} | {said} |" for label, said in rows)
    asked = metrics["settings"]["evaluation"]
    blocks, limit = (
        "all" if asked[key] is None else f"the first {asked[key]}" for key in ("blocks", "limit")
    )
    length = asked["length"] or "as many as the model reads"
    return (
        f"| | |\n|---|---|\n{table}\n\nTexts: {blocks} blocks, tokens in each: {length}. Questions "
        f"of each task: {limit}. Seed {metrics['seed']}.\n"
    )


def _said(score: _Score) -> str:
    if score.metric == "perplexity":
        return f"perplexity {score.value:.2f}{score.beside}"
    error = f" ± {score.error:.1f}" if score.error else ""
    return f"{score.metric} {score.value:.1f}{error} %"
