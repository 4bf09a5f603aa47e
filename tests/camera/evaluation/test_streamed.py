"""A model evaluated layer by layer scores what the same model scores in memory."""

import gc

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

import camera
from camera.checkpoint.loading import load_model, load_tokenizer
from camera.evaluation.perplexity import perplexity
from camera.evaluation.streamed import StreamedEvaluation
from camera.evaluation.suite import EvaluationRequest, EvaluationSuite, evaluate_streamed
from camera.evaluation.tasks.definitions import quiet
from camera.evaluation.tasks.evaluate import evaluate_tasks, read_tasks
from camera.evaluation.tasks.streamed_model import StreamedLM
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.camera.evaluation.tasks.test_evaluate import ROWS, write
from tests.camera.evaluation.tasks.test_hf_model import requests
from tests.helpers.models import build_tokenizer, write_layout

STREAMED = ("qwen2_moe", "deepseek", "deepseek_v3", "granitemoe", "phimoe", "llama")
TASKS = ["arc_easy", "boolq", "winogrande"]
LONG = [(("", ""), list(range(3, 143)), [5, 6]), (("", ""), [9], list(range(3, 40)))]


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_the_collectors_way():
    gc.freeze()  # every freed layer is a collection, and each would walk all imported modules
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder_of(checkpoints, tmp_path_factory):
    """folder_of(family, compressed): a checkpoint as it is, or cut to ragged experts."""
    made = {}

    def folder(family, compressed):
        if not compressed:
            return checkpoints(family)
        if family not in made:
            made[family] = tmp_path_factory.mktemp("ragged") / family
            settings = dict(method="random", sparsity=0.4, progress=False)
            camera.compress(checkpoints(family), out=made[family], **settings)
        return made[family]

    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_layout(tmp_path_factory.mktemp("texts") / "data")
    for task in TASKS:
        write(folder, task, ROWS[task])
    return folder


def whole(folder, asked, **options):
    """lm-eval's own answers, by the whole model."""
    wrap = dict(tokenizer=build_tokenizer(), softmax_dtype="float32", batch_size=4, **options)
    lm = HFLM(pretrained=load_model(folder, "cpu"), **wrap)
    return lm._loglikelihood_tokens(asked, disable_tqdm=True)


def streamed(checkpoint, asked, longest=128, **options):
    evaluation = StreamedEvaluation(MetaModel(checkpoint), **options)
    evaluation.add([(context, answer) for _, context, answer in asked], longest)
    evaluation.run(progress=False)
    return evaluation.answers


def assert_same(got, expected):
    for (score, greedy), (expected_score, expected_greedy) in zip(got, expected, strict=True):
        assert score == pytest.approx(expected_score, abs=1e-4)
        assert greedy == expected_greedy


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("family", STREAMED)
def test_likelihoods_are_lm_evals_of_the_whole_model(folder_of, family, compressed):
    folder, asked = folder_of(family, compressed), requests() + LONG
    expected = whole(folder, asked, max_length=100)
    assert_same(streamed(folder, asked, longest=100), expected)


def test_greedy_answers_are_told_apart(folder_of):
    folder, context = folder_of("llama", False), list(range(3, 20))
    model, likely = load_model(folder, "cpu"), list(range(3, 20))
    with torch.no_grad():
        for _ in range(3):
            likely.append(model(torch.tensor([likely])).logits[0, -1].argmax().item())
    answer = likely[-3:]
    wrong = [*answer[:2], (answer[2] + 1) % 256]
    asked = [(("", ""), context, answer), (("", ""), context, wrong)]
    assert [greedy for _, greedy in streamed(folder, asked)] == [True, False]


def test_batches_and_the_disk_change_nothing(folder_of, tmp_path):
    folder, asked = folder_of("qwen2_moe", False), requests(seed=3) + LONG
    expected = streamed(folder, asked)
    assert_same(streamed(folder, asked, batch_tokens=1), expected)
    assert streamed(folder, asked, ram=0, folder=tmp_path / "hidden") == expected
    assert list((tmp_path / "hidden").iterdir()) == []


def test_attention_that_looks_back_only_so_far_is_left_its_limit(checkpoints):
    folder = checkpoints("mixtral", sliding_window=8)
    asked = requests()
    expected = whole(folder, asked)
    unlimited = whole(checkpoints("mixtral"), asked)
    assert max(abs(a - b) for (a, _), (b, _) in zip(expected, unlimited, strict=True)) > 1e-2
    assert_same(streamed(folder, asked), expected)


def test_a_context_is_read_once_and_a_single_layer_is_in_memory(folder_of, monkeypatch):
    most, loads, load = [0], [], MetaModel.load_layer

    def count(model, index):
        loads.append(index)
        load(model, index)
        held = [layer for layer in model.layers if not next(layer.parameters()).is_meta]
        most.append(len(held))
        assert model.base.embed_tokens.weight.is_meta

    monkeypatch.setattr(MetaModel, "load_layer", count)
    context = list(range(3, 63))
    evaluation = StreamedEvaluation(MetaModel(folder_of("llama", False)))
    evaluation.add([(context, [7 + i, 8, 9]) for i in range(4)])
    evaluation.run(progress=False)
    assert evaluation.tokens == 60 + 4 * 2
    assert loads == [0, 1, 2] and max(most) == 1
    assert all(parameter.is_meta for parameter in evaluation.model.model.parameters())


@pytest.mark.parametrize(("family", "compressed"), [("qwen2_moe", True), ("granitemoe", False)])
def test_texts_and_tasks_of_one_pass_score_as_in_memory(
    folder_of, data, family, compressed, monkeypatch
):
    folder, loads, load = folder_of(family, compressed), [], MetaModel.load_layer
    monkeypatch.setattr(MetaModel, "load_layer", lambda s, i: (loads.append(i), load(s, i)))
    measures = EvaluationRequest(
        data, corpora=["wikitext2", "c4"], tasks=TASKS, length=64, stride=40, blocks=12, limit=3
    )
    got = evaluate_streamed(folder, measures, device="cpu", progress=False)
    assert loads == [0, 1, 2]

    model, tokenizer = load_model(folder, "cpu"), load_tokenizer(folder)
    options = dict(data=data, length=64, stride=40, limit=12, progress=False)
    for corpus in ("wikitext2", "c4"):
        expected = perplexity(model, tokenizer, corpus=corpus, **options)
        assert_parts_equal(got["perplexity"][corpus], expected)
    expected = evaluate_tasks(model, tokenizer, TASKS, data=data, limit=3, progress=False)
    assert list(got["tasks"]) == TASKS
    for task in TASKS:
        assert_parts_equal(got["tasks"][task], expected[task])


def assert_parts_equal(got, expected):
    assert got.pop("peak_memory_bytes") > 0 and got["seconds"] > 0
    assert got.keys() == expected.keys()
    for key in got.keys() - {"seconds"}:
        if isinstance(expected[key], float | list):
            assert got[key] == pytest.approx(expected[key], rel=1e-5), key
        else:
            assert got[key] == expected[key], key


def test_the_wrapper_alone_answers_lm_eval_in_one_pass(folder_of, data, monkeypatch):
    folder, runs, run = folder_of("llama", False), [], StreamedEvaluation.run
    monkeypatch.setattr(StreamedEvaluation, "run", lambda s, **k: (runs.append(1), run(s, **k)))
    tokenizer = load_tokenizer(folder)
    with quiet():
        (task,) = read_tasks(["arc_easy"], data=data)
        lm = StreamedLM(StreamedEvaluation(MetaModel(folder)), tokenizer, progress=False)
        got = task.score(lm)
        with pytest.raises(CameraError, match="only tasks of multiple choice"):
            lm.generate_until([])
    expected = evaluate_tasks(load_model(folder, "cpu"), tokenizer, ["arc_easy"], data=data)
    assert got["acc"] == expected["arc_easy"]["acc"] and len(runs) == 1
    assert got["acc_norm"] == expected["arc_easy"]["acc_norm"]


def test_layers_are_evaluated_as_they_are_when_another_pass_changes_them(checkpoints, data):
    folder = checkpoints("llama")
    meta, tokenizer = MetaModel(folder), load_tokenizer(folder)
    evaluation = StreamedEvaluation(meta)
    suite = EvaluationSuite(
        evaluation, tokenizer, EvaluationRequest(data, corpora=["wikitext2"], tasks=TASKS)
    )
    evaluation.begin()
    for index in range(len(meta.layers)):
        halve(meta.load_layer(index))
        evaluation.layer(index)
        meta.free_layer(index)
    evaluation.finish()
    got = suite.results()

    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        halve(layer)
    expected = perplexity(model, tokenizer, corpus="wikitext2", data=data, progress=False)
    assert got["perplexity"]["wikitext2"]["nll_per_token"] == pytest.approx(
        expected["nll_per_token"], rel=1e-5
    )
    for key in ("nll_per_block", "nll_stderr"):
        assert got["perplexity"]["wikitext2"][key] == pytest.approx(expected[key], rel=1e-3)
    tasks = evaluate_tasks(model, tokenizer, TASKS, data=data, progress=False)
    assert [got["tasks"][t]["acc"] for t in TASKS] == [tasks[t]["acc"] for t in TASKS]


@torch.no_grad()
def halve(layer):
    layer.mlp.down_proj.weight.mul_(0.5)


def test_an_evaluation_leaves_the_streamed_model_as_it_was(checkpoints):
    meta = MetaModel(checkpoints("granitemoe"))
    evaluation = StreamedEvaluation(meta)
    evaluation.add([([5, 6, 7], [8, 9])])
    evaluation.run(progress=False)
    first = evaluation.answers[0]
    evaluation.add([([5, 6, 7], [8, 9])])
    evaluation.run(progress=False)
    assert evaluation.answers == [first, first]
    meta.load_rest()
    tied = "lm_head.weight"
    expected = AutoModelForCausalLM.from_pretrained(meta.folder).state_dict()
    for name, tensor in meta.model.state_dict().items():
        if ".layers." not in name and name != tied:
            assert torch.equal(tensor, expected[name])


def test_numbers_that_are_not_finite_are_refused(checkpoints, data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoints("qwen2_moe"))
    with torch.no_grad():
        model.lm_head.weight.fill_(1e38)
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CameraError, match="block at token 0 are not finite"):
        evaluate_streamed(
            tmp_path, EvaluationRequest(data, corpora=["wikitext2"], blocks=1), progress=False
        )
    with pytest.raises(CameraError, match="boolq gives log-probabilities that are NaN"):
        evaluate_streamed(tmp_path, EvaluationRequest(data, tasks=["boolq"]), progress=False)


def test_requests_without_context_or_answer_are_refused(folder_of):
    evaluation = StreamedEvaluation(MetaModel(folder_of("llama", False)))
    for context, answer, longest in (([], [3], None), ([3], [], None), ([3], [3] * 9, 4)):
        with pytest.raises(CameraError, match="it takes a context and an answer"):
            evaluation.add([(context, answer)], longest)
