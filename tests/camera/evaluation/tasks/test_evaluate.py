"""The nine tasks through lm-eval, with no network: scores, hashes, refusals."""

import gzip
import json
import os
import socket
from pathlib import Path

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from camera.calibration.corpora import rows_hash
from camera.evaluation.tasks.evaluate import check_tasks, evaluate_tasks, right_answers
from camera.evaluation.tasks.names import NINE_TASKS, average, headline
from camera.runtime.errors import CameraError
from tests.helpers.models import build_byte_tokenizer

SHARED = Path(__file__).parents[5] / "shared/data"
CHOICES = {"text": ["a dog", "an owl", "rain", "the old stone"], "label": ["A", "B", "C", "D"]}
ROWS = {
    "boolq": [
        {"passage": f"Water is wet {i}.", "question": "is it", "label": i % 2} for i in range(4)
    ],
    "openbookqa": [
        {"question_stem": f"What barks {i}", "choices": CHOICES, "answerKey": "ABCD"[i]}
        for i in range(4)
    ],
    "rte": [{"sentence1": "It rains.", "sentence2": f"It {i}.", "label": i % 2} for i in range(4)],
    "arc_easy": [
        {"id": str(i), "question": f"Who hoots {i}?", "choices": CHOICES, "answerKey": "BADC"[i]}
        for i in range(4)
    ],
    "winogrande": [
        {"sentence": f"Ann met Eve as _ sang {i}.", "option1": "Ann", "option2": "Eve", "answer": a}
        for i, a in enumerate("1221")
    ],
    "hellaswag": [
        {
            "ind": i,
            "activity_label": "Roof",
            "ctx_a": "A man sits.",
            "ctx_b": "he",
            "ctx": "A man sits. he",
            "endings": ["jumps.", "sings a [title] song.", "sleeps on.", "x."],
            "label": str(i % 4),
        }
        for i in range(4)
    ],
    "arc_challenge": [
        {"id": str(i), "question": f"What falls {i}?", "choices": CHOICES, "answerKey": "DCBA"[i]}
        for i in range(4)
    ],
    "piqa": [
        {"goal": f"Open {i}", "sol1": "pull it", "sol2": "eat it", "label": i % 2} for i in range(4)
    ],
    "mathqa": [
        {"Problem": f"{i} + 1?", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": c}
        for i, c in enumerate("abce")
    ],
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def tokenizer():
    return build_byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def data(tmp_path):
    for task, rows in ROWS.items():
        write(tmp_path, task, rows)
    return tmp_path


def write(folder, task, rows):
    path = folder / f"tasks/{task}.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


@torch.no_grad()
def log_likelihood(model, tokenizer, context, answer):
    ids = torch.tensor([tokenizer(context + answer)["input_ids"]])
    length = len(tokenizer(answer)["input_ids"])
    logp = model(ids).logits[0, :-1].double().log_softmax(-1)
    return logp.gather(1, ids[0, 1:, None])[-length:].sum().item()


def test_all_nine_run_in_order_with_their_metrics(model, tokenizer, data):
    results = evaluate_tasks(model, tokenizer, data=data, batch_size=4)
    assert tuple(results) == NINE_TASKS
    with_norm = {task for task, result in results.items() if result["acc_norm"] is not None}
    assert with_norm == {
        "openbookqa",
        "arc_easy",
        "hellaswag",
        "arc_challenge",
        "piqa",
        "mathqa",
    }
    for task, result in results.items():
        assert result["n"] == 4 and 0 <= result["acc"] <= 1 and result["acc_stderr"] is not None
        assert result["right"].count("1") == 4 * headline(result) and len(result["right"]) == 4
        assert result["data_hash"] == rows_hash(ROWS[task])
        assert result["provenance"].startswith(f"folder: tasks/{task}.jsonl.gz")
    assert results["boolq"]["version"] == 2.0
    expected = [results[t]["acc_norm" if t in with_norm else "acc"] for t in NINE_TASKS]
    assert average(results) == pytest.approx(100 * sum(expected) / 9)
    json.dumps(results)


def test_scores_are_those_of_a_plain_computation(model, tokenizer, data):
    result = evaluate_tasks(model, tokenizer, ["arc_easy"], data=data)["arc_easy"]
    right, right_norm = 0, []
    for row in ROWS["arc_easy"]:
        context, texts = f"Question: {row['question']}\nAnswer:", row["choices"]["text"]
        scores = [log_likelihood(model, tokenizer, context, f" {text}") for text in texts]
        per_letter = [score / len(text) for score, text in zip(scores, texts, strict=True)]
        gold = row["choices"]["label"].index(row["answerKey"])
        right += scores.index(max(scores)) == gold
        right_norm.append(per_letter.index(max(per_letter)) == gold)
    assert result["acc"] == right / 4 and result["acc_norm"] == sum(right_norm) / 4
    assert result["right"] == "".join("1" if is_right else "0" for is_right in right_norm)


def test_answers_that_are_right_in_part_are_no_row_of_ones_and_zeros():
    scores = {1: 1.0, 0: 0.0, 2: True}
    samples = [{"doc_id": n, "acc": score, "filter": "none"} for n, score in scores.items()]
    samples.append({"doc_id": 0, "acc": 1.0, "filter": "first-letter"})
    assert right_answers(samples, "acc") == "011"
    assert right_answers([*samples, samples[0] | {"doc_id": 3, "acc": 0.5}], "acc") is None


def test_the_limit_takes_the_first_rows(model, tokenizer, data, tmp_path):
    for task in ("hellaswag", "arc_easy", "boolq"):
        limited = evaluate_tasks(model, tokenizer, [task], data=data, limit=3)[task]
        write(data, task, ROWS[task][:3])
        short = evaluate_tasks(model, tokenizer, [task], data=data)[task]
        assert limited["n"] == short["n"] == 3
        assert limited["acc"] == short["acc"] and limited["acc_norm"] == short["acc_norm"]
        assert limited["data_hash"] == rows_hash(ROWS[task]) != short["data_hash"]


def test_a_single_row_has_no_error(model, tokenizer, data):
    result = evaluate_tasks(model, tokenizer, ["boolq"], data=data, limit=1)["boolq"]
    assert result["n"] == 1 and result["acc_stderr"] is None


def test_a_changed_file_is_never_served_from_a_cache(model, tokenizer, data):
    path = data / "tasks/boolq.jsonl.gz"
    before = path.stat()
    first = evaluate_tasks(model, tokenizer, ["boolq"], data=data)["boolq"]
    write(data, "boolq", [{**row, "label": 1 - row["label"]} for row in ROWS["boolq"]])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = evaluate_tasks(model, tokenizer, ["boolq"], data=data)["boolq"]
    assert second["acc"] == pytest.approx(1 - first["acc"])
    assert second["data_hash"] != first["data_hash"]


def test_hub_and_folder_score_and_hash_alike(model, tokenizer, data, monkeypatch):
    def load_dataset(path, name=None, **_):
        assert (path, name) == ("aps/super_glue", "boolq")
        rows = datasets.Dataset.from_list(ROWS["boolq"])
        return datasets.DatasetDict(train=rows, validation=rows)

    folder = evaluate_tasks(model, tokenizer, ["boolq"], data=data)["boolq"]
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = evaluate_tasks(model, tokenizer, ["boolq"], data="hub")["boolq"]
    assert (hub["acc"], hub["data_hash"]) == (folder["acc"], folder["data_hash"])
    assert hub["provenance"] == "hub: aps/super_glue/boolq (validation)"


def test_provenance_counts_what_the_rows_say(model, tokenizer, data):
    kinds = ["original", "rebuilt", "rebuilt", "rebuilt"]
    rows = [{**r, "provenance": k} for r, k in zip(ROWS["hellaswag"], kinds, strict=True)]
    write(data, "hellaswag", rows)
    result = evaluate_tasks(model, tokenizer, ["hellaswag"], data=data)["hellaswag"]
    assert result["provenance"].endswith("(validation, 1 original, 3 rebuilt)")


def test_a_long_context_loses_its_left_end(model, tokenizer, data):
    long = [{**row, "passage": "word " * 200 + row["passage"]} for row in ROWS["boolq"]]
    write(data, "boolq", long)
    result = evaluate_tasks(model, tokenizer, ["boolq"], data=data, max_length=64)["boolq"]
    assert result["n"] == 4


def test_batch_size_changes_nothing(model, tokenizer, data):
    one, many = (
        evaluate_tasks(model, tokenizer, ["hellaswag"], data=data, batch_size=size)["hellaswag"]
        for size in (1, 16)
    )
    assert (one["acc"], one["acc_norm"]) == (many["acc"], many["acc_norm"])


def test_nothing_is_printed_and_nothing_left_changed(model, tokenizer, data, capfd):
    model.train()
    evaluate_tasks(model, tokenizer, ["boolq", "hellaswag"], data=data)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert model.training and tokenizer.pad_token is None
    model.eval()


def test_log_probabilities_that_are_nan_are_refused(tokenizer, data, model):
    broken = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with pytest.raises(CameraError, match="boolq gives log-probabilities that are NaN"):
        evaluate_tasks(broken, tokenizer, ["boolq"], data=data)


def test_rows_that_do_not_fit_are_named(model, tokenizer, data):
    write(data, "piqa", [{"goal": "g"}])
    with pytest.raises(CameraError, match=r"piqa.jsonl.gz does not hold rows that lm-eval's piqa"):
        evaluate_tasks(model, tokenizer, ["piqa"], data=data)


def test_what_cannot_be_is_refused_before_the_first_task(model, tokenizer, data, tmp_path):
    with pytest.raises(CameraError, match=r"evaluation.limit=0"):
        evaluate_tasks(model, tokenizer, data=data, limit=0)
    for tasks in ([], "boolq"):
        with pytest.raises(CameraError, match="give a list of one task or more"):
            check_tasks(tasks, data=data)
    with pytest.raises(CameraError, match="no such folder"):
        check_tasks(["boolq"], data=tmp_path / "nowhere")
    (data / "tasks/piqa.jsonl.gz").unlink()
    with pytest.raises(CameraError, match=r"tasks/piqa.jsonl.gz is missing"):
        evaluate_tasks(model, tokenizer, data=data)


def test_unknown_and_unsuitable_tasks_are_refused(data, monkeypatch):
    # lm-eval's whole index takes a quarter of a minute to read; the nine's stands in for it.
    from camera.evaluation.tasks import definitions

    nine = definitions.task_manager(True)
    monkeypatch.setattr(definitions, "task_manager", lambda only_nine: nine)
    with pytest.raises(CameraError, match="boolqq is no task of lm-eval; did you mean boolq"):
        check_tasks(["boolqq"], data=data)
    with pytest.raises(CameraError, match="ai2_arc is a group of lm-eval, not a task"):
        check_tasks(["ai2_arc"], data=data)
    with pytest.raises(CameraError, match="does not measure accuracy"):
        check_tasks(["boolq-seq2seq"], data=data) or check_tasks(["arc_challenge_chat"], data=data)


def test_a_hub_out_of_reach_names_the_way_out(model, tokenizer, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(CameraError, match=r"nyu-mll/glue .*no route.*data=DIR"):
        evaluate_tasks(model, tokenizer, ["rte"], data="hub")


def test_headline_and_average():
    both = {"acc": 0.4, "acc_norm": 0.5}
    only = {"acc": 0.3, "acc_norm": None}
    assert headline(both) == 0.5 and headline(only) == 0.3
    assert average({"a": both, "b": only}) == pytest.approx(40)
    with pytest.raises(CameraError, match="no task result"):
        average({})


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data: ../shared/data is absent")
def test_the_nine_on_real_rows(model, tokenizer):
    results = evaluate_tasks(model, tokenizer, data=SHARED, limit=3)
    assert tuple(results) == NINE_TASKS
    assert all(result["n"] == 3 for result in results.values())
    assert "rebuilt" in results["hellaswag"]["provenance"]
