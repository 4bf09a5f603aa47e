"""What a run measured, on the model card of its checkpoint, where the hub's pages read it, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from experiments.records.files import lock_of, write_text
from experiments.tables.names.datasets import WRITTEN, dataset_key, dataset_label

HEADING = "## Measured"


def enter_scores(checkpoint: Path, metrics: Mapping[str, Any]) -> None:
    """Write what a run's report says of quality to the card, in the place of an earlier run's."""
    file, results = checkpoint / "README.md", list(_results(metrics))
    with lock_of(checkpoint):
        if not results or not file.exists():
            return
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        card.data.model_name, card.data.eval_results = checkpoint.name, results
        before = card.text.partition(f"\n{HEADING}\n")[0].strip()
        section = f"{HEADING}\n\n{_section(metrics)}"
        write_text(file, f"---\n{card.data.to_yaml()}\n---\n\n{before}\n\n{section}")


def _results(metrics: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Perplexities and the headline accuracies, in percent, in the hub's form (model-index).

    What bounds them (blocks, their length, questions of a task) stands there as `args`.
    """
    data, asked = metrics["data"], metrics["settings"]["evaluation"]
    texts = {key: asked[key] for key in ("length", "stride", "blocks") if asked[key] is not None}
    tasks = {} if asked["limit"] is None else {"limit": asked["limit"]}
    limit = (asked.get("generative") or {}).get("limit")
    written = {} if limit is None else {"limit": limit}

    def result(name: str, metric: str, value: float, bounds: dict[str, int]) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            dataset_type=dataset_key(name, data),
            dataset_name=dataset_label(name, data),
            dataset_args=bounds or None,
            metric_type=metric,
            metric_value=round(value, 4),
        )

    for text, perplexity in metrics["perplexity"].items():
        yield result(text, "perplexity", perplexity, texts)
    for task, scores in metrics["tasks"].items():
        metric = "acc" if scores["acc_norm"] is None else "acc_norm"
        yield result(task, metric, 100 * scores[metric], tasks)
    for task, found in metrics["generative"].items():
        yield result(f"{WRITTEN}{task}", found["metric"], 100 * found["score"], written)


def _section(metrics: Mapping[str, Any]) -> str:
    data, asked = metrics["data"], metrics["settings"]["evaluation"]
    rows = []
    for text, perplexity in metrics["perplexity"].items():
        said = f"perplexity {perplexity:.2f}"
        if found := metrics["divergence"].get(text):
            said += f"; from the base model: KL {found['kl']:.4f} nats a token, the same likeliest "
            said += f"token {100 * found['agreement']:.1f} %"
        rows.append((dataset_label(text, data), said))
    for task, scores in metrics["tasks"].items():
        metric = "acc" if scores["acc_norm"] is None else "acc_norm"
        rows.append((dataset_label(task, data), _percent(metric, scores, metric)))
    if metrics["average"] is not None:
        rows.append(("average of the tasks", f"{metrics['average']:.1f} %"))
    for task, found in metrics["generative"].items():
        label = dataset_label(f"{WRITTEN}{task}", data)
        rows.append((label, _percent(found["metric"], found, "score")))
    table = "\n".join(f"| {label} | {said} |" for label, said in rows)
    blocks = "all" if asked["blocks"] is None else f"the first {asked['blocks']}"
    limit = "all" if asked["limit"] is None else f"the first {asked['limit']}"
    length = asked["length"] or "as many as the model reads"
    return (
        f"| | |\n|---|---|\n{table}\n\nTexts: {blocks} blocks, tokens in each: {length}. Questions "
        f"of each task: {limit}. Seed {metrics['seed']}.\n"
    )


def _percent(metric: str, scores: Mapping[str, Any], key: str) -> str:
    error = scores.get(f"{key}_stderr", scores.get("stderr"))
    return f"{metric} {100 * scores[key]:.1f}" + (f" ± {100 * error:.1f}" if error else "") + " %"
