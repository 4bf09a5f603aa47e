"""What surrounds a compression: evaluations, exports, resumed runs, on an accelerator."""

import json

import pytest
import torch

import camera
from camera.checkpoint.loading import load_model, load_tokenizer
from camera.evaluation.perplexity import perplexity
from camera.evaluation.speed import measure_speed
from camera.evaluation.suite import EvaluationRequest, evaluate_streamed
from camera.evaluation.tasks.evaluate import evaluate_tasks
from camera.pipeline import resume
from camera.runtime.device.accelerator import device_name
from camera.streaming.streamer import LayerStreamer
from experiments.runs.metrics import environment
from tests.camera.evaluation.tasks.test_evaluate import ROWS, write
from tests.helpers.checkpoints import shards_of, tensors_of
from tests.helpers.methods import method_of
from tests.helpers.models import build_tokenizer


@pytest.mark.parametrize("case", ["camera_p", "camera_q"])
def test_perplexity_is_that_of_the_cpu_whole_and_streamed(case, compressed, data_folder, device):
    folder = compressed(case, "cpu")
    asked = dict(length=32, limit=2)
    whole = [
        perplexity(
            load_model(folder, where, "float32"),
            load_tokenizer(folder),
            corpus="wikitext2",
            data=data_folder,
            progress=False,
            **asked,
        )["perplexity"]
        for where in ("cpu", device)
    ]
    request = EvaluationRequest(data_folder, corpora=["wikitext2"], length=32, blocks=2)
    streamed = evaluate_streamed(folder, request, device=device, dtype="float32", progress=False)
    part = streamed["perplexity"]["wikitext2"]
    assert whole[1] == pytest.approx(whole[0], rel=1e-5)
    assert part["perplexity"] == pytest.approx(whole[0], rel=1e-5)
    assert 0 < part["peak_memory_bytes"] < 50e6  # the card's, not this process's


def test_tasks_are_answered_as_on_the_cpu(compressed, tmp_path, device):
    write(tmp_path, "boolq", ROWS["boolq"])
    write(tmp_path, "openbookqa", ROWS["openbookqa"])
    folder = compressed("camera_p", "cpu")
    mine, theirs = (
        evaluate_tasks(
            load_model(folder, where, "float32"),
            build_tokenizer(),
            ["boolq", "openbookqa"],
            data=tmp_path,
            batch_size=3,
        )
        for where in (device, "cpu")
    )
    for task, expected in theirs.items():
        assert mine[task]["acc"] == expected["acc"], task


def test_an_export_is_that_of_the_cpu(compressed, device, tmp_path):
    for where in (device, "cpu"):
        camera.export(compressed("camera_p", where), tmp_path / where)
    assert shards_of(tmp_path / device) == shards_of(tmp_path / "cpu")


@pytest.mark.parametrize("case", ["camera_p", "heapr", "camera_q"])
def test_a_run_that_broke_ends_in_the_same_bytes(
    case, compressed, checkpoints, data_folder, device, tmp_path, monkeypatch
):
    out, write = tmp_path / "out", resume.write_json

    def killed(*args):
        write(*args)
        raise KeyboardInterrupt

    def compress():
        camera.compress(
            checkpoints("qwen2_moe", num_hidden_layers=2),
            method_of(case),
            out,
            device=device,
            data=str(data_folder),
            calibration=camera.Calibration(source="wikitext2", samples=4, length=24),
            progress=False,
        )

    with monkeypatch.context() as patch:
        patch.setattr(resume, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            compress()
    loaded, load = [], LayerStreamer.load_layer
    monkeypatch.setattr(LayerStreamer, "load_layer", lambda s, i: loaded.append(i) or load(s, i))
    compress()
    assert loaded[0] == 1  # where it broke
    assert shards_of(out) == shards_of(compressed(case, device))


def test_speed_waits_for_the_card_that_the_models_are_on(compressed, device, monkeypatch):
    waited, wait = set(), torch.accelerator.synchronize
    monkeypatch.setattr(
        torch.accelerator,
        "synchronize",
        lambda where=None: (waited.add(str(where)), wait(where)),
    )
    dense, pruned = (load_model(compressed(case, "cpu"), device) for case in ("reap", "camera_p"))
    found = measure_speed(
        dense, pruned, torch.arange(3, 200), [1], prompt_length=8, new_tokens=2, repeats=1
    )
    assert waited == {device}
    assert found["settings"]["device"] == torch.device(device).type


def test_a_run_is_filed_under_its_own_card(device):
    assert environment("cpu")["accelerator"] is None
    assert environment(device)["accelerator"] == device_name(torch.device(device))


def test_a_run_reports_the_peaks_of_the_card_and_of_the_process(compressed, device):
    there, here = (
        json.loads((compressed("camera_p", where) / "camera.json").read_text())
        for where in (device, "cpu")
    )
    assert 0 < there["peak_memory_bytes"] < 50e6 < there["peak_host_memory_bytes"]
    assert here["peak_memory_bytes"] == here["peak_host_memory_bytes"] > 50e6


def test_tensors_are_on_the_card_that_was_asked_for(compressed, device):
    model = load_model(compressed("camera_q", device), device)
    assert {str(tensor.device) for tensor in model.state_dict().values()} == {device}
    assert all(t.device.type == "cpu" for t in tensors_of(compressed("camera_q", device)).values())
