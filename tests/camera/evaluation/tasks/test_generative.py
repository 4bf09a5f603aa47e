"""Tasks whose answers a model writes: scores by lm-eval's rules, refusals before anything runs."""

import gzip
import json
import os

import pytest
import torch

from camera.checkpoint.loading import load_model, load_tokenizer
from camera.evaluation.tasks.generative import CONSENT, check_generative, evaluate_generative
from camera.runtime.errors import CameraError
from experiments.runs.run import run
from experiments.runs.summary import check_objective, numbers_of, score_tables
from experiments.tables.pages import paper_page
from experiments.tables.rows import read_runs
from tests.helpers.runs.composing import settings_of, tiny

TASK = """\
task: echo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
{more}
"""
QUESTIONS = ["the river runs", "a small town", "many people live", "it was built"]


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("qwen2_moe")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, "cpu"), load_tokenizer(folder)


@pytest.fixture(scope="module")
def written(loaded):
    """What the model writes after each question: greedy decoding, without a cache."""
    model, tokenizer = loaded
    found = []
    for question in QUESTIONS:
        ids = tokenizer(question, return_tensors="pt").input_ids
        start = ids.shape[1]
        for _ in range(4):
            with torch.no_grad():
                following = model.eval()(ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, following[None, None]], 1)
        found.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    return found


@pytest.fixture
def task(tmp_path, written):
    """task(right, more): the path of a YAML whose first answers are what the model writes."""

    def make(right=3, more=""):
        answers = [*written[:right], *["something else"] * (len(QUESTIONS) - right)]
        rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yaml = TASK.format(rows=tmp_path / "rows.jsonl", more=more)
        (tmp_path / "echo.yaml").write_text(yaml)
        return str(tmp_path / "echo.yaml")

    return make


@pytest.mark.parametrize(("batch_size", "limit"), [(1, None), (3, 2)])
def test_the_score_is_the_share_of_answers_that_greedy_decoding_gives(
    loaded, task, batch_size, limit
):
    options = dict(data="hub", batch_size=batch_size, limit=limit, progress=False)
    found = evaluate_generative(*loaded, [task()], **options)["echo"]
    assert found["metric"] == "exact_match" and found["n"] == (limit or 4)
    assert found["score"] == (1 if limit else 0.75)
    assert found["metrics"]["exact_match"]["value"] == found["score"]
    assert not loaded[0].training


def test_a_chat_template_changes_the_prompt(loaded, task, monkeypatch):
    model, tokenizer = loaded
    with pytest.raises(CameraError, match="tokenizer has no chat template"):
        evaluate_generative(model, tokenizer, [task()], data="hub", chat_template=True)
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    read, forward = [], type(model).forward

    def spied(self, input_ids=None, **kwargs):
        read.append(tokenizer.decode(input_ids[0]))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", spied)
    options = dict(data="hub", chat_template=True, limit=1, batch_size=1, progress=False)
    evaluate_generative(model, tokenizer, [task()], **options)
    assert read[0].replace(" ", "") == f"[{QUESTIONS[0]}]".replace(" ", "")


def test_code_runs_with_consent_only(loaded, task, monkeypatch):
    monkeypatch.delenv(CONSENT, raising=False)
    path = task(more="unsafe_code: true")
    with pytest.raises(CameraError, match=r"echo\.yaml runs the code .*run_code=true"):
        evaluate_generative(*loaded, [path], data="hub", progress=False)
    found = evaluate_generative(*loaded, [path], data="hub", run_code=True, progress=False)
    assert found["echo"]["score"] == 0.75 and CONSENT not in os.environ


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_the_code_tasks_of_lm_eval_ask_for_consent_before_their_code_is_imported(name, tmp_path):
    with pytest.raises(CameraError, match=f"{name} runs the code that the model writes"):
        check_generative([name], data=tmp_path, run_code=False)


def test_what_is_no_such_task_is_refused(task, tmp_path):
    def refused(match, *tasks, data="hub"):
        with pytest.raises(CameraError, match=match):
            check_generative(tasks, data=data, run_code=False)

    refused("give a list of one task")
    refused(r"there is no file .*absent\.yaml", str(tmp_path / "absent.yaml"))
    choice = tmp_path / "choice.yaml"
    choice.write_text("task: choice\noutput_type: multiple_choice\n")
    refused("has no written answers", str(choice))
    refused(r"tasks/gsm8k\.jsonl\.gz is missing", "gsm8k", data=tmp_path)
    path = task()
    (tmp_path / "rows.jsonl").unlink()
    refused("could not be loaded", path)


def test_rows_and_examples_of_lm_evals_task_come_from_a_folder(loaded, tmp_path):
    rows = [{"question": f"How many is {n}?", "answer": f"so #### {n}"} for n in range(6)]
    (tmp_path / "tasks").mkdir()

    def write(name):
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / "tasks" / name).write_bytes(gzip.compress(content))

    write("gsm8k.jsonl.gz")
    with pytest.raises(CameraError, match=r"tasks/gsm8k\.fewshot\.jsonl\.gz is missing"):
        check_generative(["gsm8k"], data=tmp_path, run_code=False)
    write("gsm8k.fewshot.jsonl.gz")
    options = dict(data=tmp_path, limit=1, progress=False)
    found = evaluate_generative(*loaded, ["gsm8k"], max_new_tokens=3, **options)["gsm8k"]
    assert found["metric"] == "exact_match/strict-match" and found["score"] == 0
    assert set(found["metrics"]) == {"exact_match/strict-match", "exact_match/flexible-extract"}
    with pytest.raises(CameraError, match=r"set evaluation\.generative\.max_new_tokens lower"):
        evaluate_generative(*loaded, ["gsm8k"], max_new_tokens=10**6, **options)


def test_a_run_measures_and_tells_them(folder, data_folder, task, tmp_path):
    output = tmp_path / "out"
    asked = [*tiny(folder, data_folder, output), "evaluation=generative"]
    asked = [part for part in asked if part != "evaluation=perplexity"]
    asked += [f"evaluation.generative.tasks=[{task()}]", "method=dense"]
    done = run(settings_of(*asked))
    metrics = json.loads((done / "metrics.json").read_text())
    assert metrics["generative"]["echo"]["score"] == 0.75
    assert numbers_of(metrics)["generative/echo"] == 75
    assert list(score_tables(metrics)["generative"]["score"]) == [75]
    tables = paper_page(read_runs([done])).tables
    (table,) = [table for table in tables if table.title.endswith("written answers")]
    assert [cell.text for cell in table.groups[0][0].cells][-1] == "75.0"
    check_objective(settings_of(*asked, "objective=generative/echo"))
    assert run(settings_of(*asked)) == done
    changed = task(more="metadata: {version: 2}")
    assert changed in asked[-2] and run(settings_of(*asked)) != done
    with pytest.raises(CameraError, match="read layer by layer can't write answers"):
        run(settings_of(*asked, "evaluation.generative.limit=1", "evaluation.stream=always"))
