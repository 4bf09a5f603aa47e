"""An evaluation that rides along with compression scores what the finished checkpoint does."""

import json

import pytest

import camera
from camera.evaluation.suite import EvaluationRequest, evaluate_streamed
from experiments.runs.run import run
from tests.helpers.composing import settings_of, tiny


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "llama"])
def test_it_scores_what_the_finished_checkpoint_does(
    family, checkpoints, data_folder, calibration, tmp_path
):
    measures = EvaluationRequest(data_folder, corpora=["wikitext2", "c4"], blocks=2)
    camera.compress(
        checkpoints(family),
        "camera_p",
        tmp_path / "out",
        sparsity=0.4,
        data=str(data_folder),
        calibration=calibration,
        measures=measures,
        device="cpu",
        progress=False,
    )
    rode = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    after = evaluate_streamed(tmp_path / "out", measures, device="cpu", progress=False)
    assert rode["measures"] == measures.to_dict()
    for corpus in measures.corpora:
        got, want = rode["perplexity"][corpus], after["perplexity"][corpus]
        assert got["perplexity"] == pytest.approx(want["perplexity"], rel=1e-5)
        assert got["data_hash"] == want["data_hash"]


def test_a_run_that_streams_reads_the_weights_once(checkpoints, data_folder, tmp_path, monkeypatch):
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path)
    asked = [*overrides, "method=camera_p", "evaluation=perplexity", "evaluation.blocks=1"]
    whole = json.loads((run(settings_of(*asked)) / "metrics.json").read_text())
    loaded = []
    load = camera.streaming.streamer.Streamer.load_layer
    monkeypatch.setattr(
        camera.streaming.streamer.Streamer,
        "load_layer",
        lambda self, i: loaded.append(i) or load(self, i),
    )
    monkeypatch.setattr("experiments.runs.measurements.load_model", None)
    streamed = settings_of(*asked, "evaluation.stream=always", f"output={tmp_path / 'streamed'}")
    metrics = json.loads((run(streamed) / "metrics.json").read_text())
    assert loaded == sorted(set(loaded))
    for corpus, value in whole["perplexity"].items():
        assert metrics["perplexity"][corpus] == pytest.approx(value, rel=1e-4)
