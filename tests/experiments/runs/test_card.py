"""The card of a checkpoint: what a run measured of it."""

import json

import pytest
from huggingface_hub import ModelCard

from experiments.records.folders import Folders
from experiments.runs import measurements
from experiments.runs.run import run
from tests.helpers.runs.composing import settings_of, tiny

SCORES = {
    "boolq": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": None, "acc_norm_stderr": None},
    "piqa": {"acc": 0.25, "acc_stderr": 0.1, "acc_norm": 0.75, "acc_norm_stderr": 0.05},
}


@pytest.fixture
def make(checkpoints, data_folder, tmp_path, monkeypatch):
    """make(*overrides): a finished run, its report, and the card of its checkpoint."""

    def evaluate(model, tokenizer, names, **options):
        return {name: {**SCORES[name], "data_hash": "0", "seconds": 0.0} for name in names}

    monkeypatch.setattr(measurements, "evaluate_tasks", evaluate)
    monkeypatch.setattr("camera.evaluation.tasks.evaluate.check_tasks", lambda *_, **__: None)

    def make(*overrides):
        settings = settings_of(*tiny(checkpoints("qwen2_moe"), data_folder, tmp_path), *overrides)
        metrics = json.loads((run(settings) / "metrics.json").read_text())
        card = Folders.of(settings).checkpoint / "README.md"
        return metrics, card.read_text() if card.exists() else None

    return make


def rows(card):
    section = card.partition("## Measured\n")[2]
    cells = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {first.removeprefix("| "): rest.removesuffix(" |") for first, rest in cells[1:]}


def test_the_card_has_what_the_run_reports(make, data_folder):
    metrics, text = make("evaluation.tasks=[boolq,piqa]", "evaluation.divergence=8")
    told = rows(text)
    for name, perplexity in metrics["perplexity"].items():
        found = metrics["divergence"][name]
        assert told[f"{data_folder.name}/{name}"] == (
            f"perplexity {perplexity:.2f}; from the base model: KL {found['kl']:.4f} nats a token, "
            f"the same likeliest token {100 * found['agreement']:.1f} %"
        )
    assert told[f"{data_folder.name}/boolq"] == "acc 50.0 ± 10.0 %"
    assert told[f"{data_folder.name}/piqa"] == "acc_norm 75.0 ± 5.0 %"
    assert told["average of the tasks"] == "62.5 %"


def test_the_hub_reads_the_same_numbers_from_its_head(make, data_folder):
    metrics, text = make("evaluation.tasks=[piqa]", "evaluation.limit=7", "evaluation.blocks=2")
    card = ModelCard(text)
    bounds = {r.metric_type: r.dataset_args for r in card.data.eval_results}
    assert bounds["acc_norm"] == {"limit": 7} and bounds["perplexity"]["blocks"] == 2
    found = {r.dataset_name: (r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert found.pop(f"{data_folder.name}/piqa") == ("acc_norm", 75.0)
    assert found == {
        f"{data_folder.name}/{name}": ("perplexity", round(perplexity, 4))
        for name, perplexity in metrics["perplexity"].items()
    }
    assert card.data.library_name == "transformers"


def test_another_evaluation_takes_the_place_of_the_scores_alone(make):
    before = make("evaluation=none")[1]
    assert "## Measured" not in before
    make("evaluation.tasks=[boolq]")
    metrics, text = make("evaluation.tasks=[]", "evaluation.blocks=1")
    assert text.count("## Measured") == 1 and "boolq" not in text
    assert len(rows(text)) == len(metrics["perplexity"]) == 2
    assert ModelCard(text).text.startswith(ModelCard(before).text.rstrip())


def test_a_run_without_scores_leaves_those_that_are_there(make):
    _, before = make("evaluation.tasks=[boolq]")
    assert make("evaluation=none", "seed=1234")[1] == before


@pytest.mark.parametrize("gone", [("keep_checkpoint=false",), ("method=dense",)])
def test_a_run_that_leaves_no_checkpoint_writes_no_card(make, gone):
    metrics, text = make(*gone)
    assert text is None and metrics["perplexity"]
