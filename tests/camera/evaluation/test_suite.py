"""An evaluation during compression scores what the finished checkpoint scores."""

import json

import pytest

import camera
from camera.evaluation.suite import EvaluationRequest, evaluate_streamed
from camera.streaming.skeleton import MetaModel
from tests.helpers.runs.composing import settings_of, tiny


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "llama"])
def test_evaluation_during_compression_equals_that_of_the_finished_checkpoint(
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
    during = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    after = evaluate_streamed(tmp_path / "out", measures, device="cpu", progress=False)
    assert during["measures"] == measures.to_dict()
    for corpus in measures.corpora:
        got, want = during["perplexity"][corpus], after["perplexity"][corpus]
        assert got["perplexity"] == pytest.approx(want["perplexity"], rel=1e-5)
        assert got["data_hash"] == want["data_hash"]


def test_a_run_that_streams_reads_the_weights_once(checkpoints, data_folder, tmp_path, monkeypatch):
    from experiments.runs.run import run

    overrides = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path)
    asked = [*overrides, "method=camera_p", "evaluation=perplexity", "evaluation.blocks=1"]
    whole = json.loads((run(settings_of(*asked)) / "metrics.json").read_text())
    loaded, load = [], MetaModel.load_layer

    def counted(self, index, *args):
        loaded.append(index)
        return load(self, index, *args)

    monkeypatch.setattr(MetaModel, "load_layer", counted)
    monkeypatch.setattr("experiments.runs.measurements.load_model", None)
    streamed = settings_of(*asked, "evaluation.stream=always", f"output={tmp_path / 'streamed'}")
    metrics = json.loads((run(streamed) / "metrics.json").read_text())
    assert loaded == [0, 1, 2]
    for corpus, value in whole["perplexity"].items():
        assert metrics["perplexity"][corpus] == pytest.approx(value, rel=1e-4)
