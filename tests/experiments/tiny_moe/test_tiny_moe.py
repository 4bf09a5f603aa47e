"""The tiny world is honest and the tiny model is what it says."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch

from experiments.tiny_moe import layout
from experiments.tiny_moe.corpus import training_document
from experiments.tiny_moe.held_out import held_out_rows, prompt_and_answer
from experiments.tiny_moe.tasks import TASKS
from experiments.tiny_moe.world import build_world

MODEL = Path(layout.__file__).with_name("model")
CHOICES = {name: choices for name, (_, choices) in TASKS.items()}
COLUMNS = {  # what lm-eval's own task reads
    "boolq": {"passage", "question", "label"},
    "rte": {"sentence1", "sentence2", "label"},
    "arc_easy": {"question", "choices", "answerKey"},
    "arc_challenge": {"question", "choices", "answerKey"},
    "openbookqa": {"question_stem", "choices", "answerKey"},
    "winogrande": {"sentence", "option1", "option2", "answer"},
    "hellaswag": {"activity_label", "ctx_a", "ctx_b", "endings", "label"},
    "piqa": {"goal", "sol1", "sol2", "label"},
    "mathqa": {"Problem", "options", "correct"},
}

TEMPLATES = {  # where lm-eval keeps a task that is not in task/task.yaml
    "boolq": "super_glue/boolq/default.yaml",
    "rte": "glue/rte/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "winogrande": "winogrande/default.yaml",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return layout.ensure_world(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def rows(data: Path, task: str) -> list[dict]:
    with gzip.open(data / "tasks" / f"{task}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def pages(data: Path, split: str) -> list[str]:
    with gzip.open(data / "c4" / f"{split}.jsonl.gz", "rt") as file:
        return [json.loads(line)["text"] for line in file]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_layout_is_complete_and_the_same_bytes_each_time(data, tmp_path):
    expected = {f"wikitext2/{split}.txt" for split in ("train", "validation", "test")}
    expected |= {f"c4/{split}.jsonl.gz" for split in ("train", "validation")}
    expected |= {f"tasks/{task}.jsonl.gz" for task in COLUMNS}
    first = files(data)
    assert set(first) == expected
    assert files(layout.ensure_world(tmp_path)) == first


def test_text_and_rows_stay_the_same_on_every_machine():
    """A change of the generator changes what the committed model was trained on: train it anew."""
    world = build_world()
    text = "".join(training_document(world, Random(n)) for n in range(200))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "554f429a53a6c49d"


def test_two_processes_may_write_the_layout_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(layout.ensure_world, [tmp_path, tmp_path])
    assert first == second
    assert [p.name for p in tmp_path.iterdir()] == [first.name]


@pytest.mark.parametrize("task", COLUMNS)
def test_rows_have_the_columns_and_balanced_labels(data, task):
    found = rows(data, task)
    assert len(found) == layout.ROWS
    assert all(set(row) >= COLUMNS[task] for row in found)
    labels = Counter(
        str(row[next(c for c in ("label", "answerKey", "answer", "correct") if c in row)])
        for row in found
    )
    assert len(labels) == CHOICES[task]
    assert max(labels.values()) - min(labels.values()) == 0
    for row in found:
        texts = row.get("endings") or row.get("choices", {}).get("text") or []
        assert len(set(texts)) == len(texts)


def test_no_test_prompt_with_its_answer_is_in_the_training_text(data):
    world = build_world()
    rng = Random("leak")
    training = "\n\n".join(
        [
            *(data / "wikitext2" / "train.txt").read_text().splitlines(),
            *pages(data, "train"),
            *(training_document(world, rng) for _ in range(6000)),
        ]
    )
    for task in TASKS:
        leaked = [
            text
            for row in rows(data, task)
            if (text := " ".join(prompt_and_answer(task, row))) in training
        ]
        assert not leaked, (task, leaked[:3])


def test_prompts_are_those_of_lm_eval(data, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.tasks.__file__).parent
    for task in TASKS:
        config = load_yaml(folder / TEMPLATES.get(task, f"{task}/{task}.yaml"))
        config |= {"task": task, "dataset_path": "json", "dataset_name": None}
        config["dataset_kwargs"] = {
            "data_files": {"test": str(data / "tasks" / f"{task}.jsonl.gz")}
        }
        config |= {"training_split": None, "validation_split": None, "test_split": "test"}
        built = ConfigurableTask(config=config)
        docs = list(built.eval_docs)
        for row, doc in zip(rows(data, task)[:20], docs, strict=False):
            prompt, answer = prompt_and_answer(task, row)
            choices = built.doc_to_choice(doc)
            target = built.doc_to_target(doc)
            if task == "winogrande":
                assert (prompt, answer) == (choices[built.doc_to_text(doc)], target)
            else:
                index_ = target if isinstance(target, int) else choices.index(target)
                assert (prompt, answer) == (built.doc_to_text(doc), choices[index_])


def test_held_out_rows_are_different(data):
    world = build_world()
    for task in TASKS:
        made = held_out_rows(world, task, 30, Random(1))
        assert len({json.dumps({**row, "idx": 0}) for row in made}) == 30


def test_model_is_small_and_sparse_in_every_layer(model):
    assert sum(p.stat().st_size for p in MODEL.iterdir()) <= 20e6
    assert not [p for p in MODEL.iterdir() if p.suffix in {".bin", ".pt", ".pkl"}]
    config = model.config
    assert config.model_type == "qwen2_moe"
    assert config.num_hidden_layers >= 3
    assert config.num_experts >= 6
    assert config.num_experts_per_tok >= 2
    assert min(config.moe_intermediate_size, config.shared_expert_intermediate_size) >= 128
    assert config.max_position_embeddings >= 512
    assert not config.mlp_only_layers
    experts = sum(p.numel() for n, p in model.named_parameters() if "expert" in n)
    assert experts >= 0.6 * sum(p.numel() for p in model.parameters())


def test_every_routed_expert_gets_tokens_of_the_world(model, tokenizer, data):
    text = "\n\n".join((data / "wikitext2" / "train.txt").read_text().splitlines()[:3000])
    ids = torch.tensor(tokenizer.encode(text)[: 16 * 512]).view(16, 512)
    counts = [torch.zeros(model.config.num_experts) for _ in model.model.layers]

    def watch(n: int):
        def hook(_module, _inputs, outputs) -> None:
            counts[n] += torch.bincount(outputs[2].flatten(), minlength=len(counts[n]))

        return model.model.layers[n].mlp.gate.register_forward_hook(hook)

    hooks = [watch(n) for n in range(len(counts))]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    assert all(c.min() > 0 for c in counts)


def test_training_begins_as_the_committed_model_did(tmp_path):
    from experiments.tiny_moe.training.train import train

    told = json.loads((MODEL / "training.json").read_text())
    settings = told["settings"]
    options = {name: settings[name] for name in settings if name not in ("steps", "sizes")}
    again = train(tmp_path, settings["steps"], settings["sizes"], **options | {"until": 50})
    assert again["curve"][0]["loss"] == pytest.approx(told["curve"][0]["loss"], abs=0.02)


def test_a_resumed_training_ends_in_the_same_weights(tmp_path):
    from safetensors.torch import load_file

    from experiments.tiny_moe.training.train import train

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    sizes |= {"max_position_embeddings": 32}
    options = {"rows": 2, "warmup": 1, "report": 2, "tokenizer_documents": 300}
    train(tmp_path / "whole", 4, sizes, **options)
    train(tmp_path / "parts", 4, sizes, **options, until=2)
    train(tmp_path / "parts", 4, sizes, **options)
    whole, parts = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
