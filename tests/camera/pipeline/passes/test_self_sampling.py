"""Text that a model writes itself, balanced over its experts."""

import pytest
import torch

import camera
from camera.pipeline.passes import self_sampling
from camera.pipeline.passes.self_sampling import BEAMS, TAU, balanced_text
from camera.runtime.errors import CameraError
from tests.helpers.models import build_model
from tests.helpers.oracles import capture

SPECIAL, VOCABULARY = [0, 1, 2], 40


def beams_one_by_one(model, first, length):
    """The same search without cache or batches: every beam is run anew from its first token."""
    beams = [(0.0, [first])]
    while len(beams[0][1]) < length:
        found = []
        for logp, ids in beams:
            given = torch.tensor([ids])
            with torch.no_grad():
                next_V = model(given).logits[0, -1].double().log_softmax(-1)
            spread = 0.0
            for layer in range(len(model.model.layers)):
                index_TK = capture(model, layer, given)[1][0]
                share_E = torch.bincount(index_TK.flatten(), minlength=8) / index_TK.numel()
                spread += share_E.std().item() / len(model.model.layers)
            for token in set(range(VOCABULARY)) - {*SPECIAL}:
                total = logp + next_V[token].item()
                found.append((-total / (len(ids) + 1) + spread / TAU, total, [*ids, token]))
        beams = [(total, ids) for _, total, ids in sorted(found)[:BEAMS]]
    return beams[0][1]


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3_moe")


def test_the_search_keeps_the_likeliest_and_most_balanced_beams(model):
    ids_NL = balanced_text(model, 3, 9, 5, VOCABULARY, SPECIAL)
    for ids in ids_NL.tolist():
        assert ids == beams_one_by_one(model, ids[0], 9)
    assert not {*ids_NL.flatten().tolist()} & {*SPECIAL} and ids_NL.max() < VOCABULARY


def test_a_seed_gives_its_text_however_many_are_written_at_once(model, monkeypatch):
    one = balanced_text(model, 5, 12, 5, VOCABULARY, SPECIAL)
    monkeypatch.setattr(self_sampling, "TOGETHER", 2)
    assert torch.equal(balanced_text(model, 5, 12, 5, VOCABULARY, SPECIAL), one)
    other = balanced_text(model, 5, 12, 6, VOCABULARY, SPECIAL)
    assert not torch.equal(other, one)
    assert not any(len(layer.mlp.experts._forward_pre_hooks) for layer in model.model.layers)


def options(data_folder, source="ebss", **more):
    asked = camera.Calibration(source, 4, 16, **more)
    return dict(calibration=asked, data=str(data_folder), device="cpu", progress=False)


def test_it_is_a_source_alone_and_in_mixtures_and_written_once(
    checkpoints, data_folder, tmp_path, monkeypatch
):
    source, folder = checkpoints("qwen3_moe"), tmp_path / "statistics"
    asked = options(data_folder) | dict(sparsity=0.3, statistics=folder)
    first = camera.compress(source, "camera_p", tmp_path / "out", **asked)
    assert first.calibration["source"] == "ebss" and first.calibration["samples"] == 4
    with monkeypatch.context() as patch:
        patch.setattr(self_sampling, "load_model", None)  # it isn't written again
        again = camera.compress(source, "camera_p", tmp_path / "again", **asked)
    assert again.calibration["hash"] == first.calibration["hash"]
    mixed = options(data_folder, "mix", sources={"ebss": 0.5, "c4": 0.5})
    done = camera.compress(source, "camera_p", tmp_path / "mixed", sparsity=0.3, **mixed)
    assert sorted(done.coverage["sources"]) == ["c4", "ebss"]


def test_what_can_t_write_is_refused(checkpoints, data_folder, tmp_path, monkeypatch):
    asked = options(data_folder) | dict(sparsity=0.3)
    with pytest.raises(CameraError, match="balances routed experts, and this model has none"):
        camera.compress(checkpoints("llama"), "camera_p", tmp_path / "out", **asked)
    monkeypatch.setattr(self_sampling, "free_memory", lambda device: 1000)
    with pytest.raises(CameraError, match="streamed layer by layer use another source"):
        camera.compress(checkpoints("qwen3_moe"), "camera_p", tmp_path / "out", **asked)
