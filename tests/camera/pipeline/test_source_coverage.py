"""Of a mixture the report says which experts each source reaches, by whatever pass it passes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import camera
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.loading import load_tokenizer
from tests.helpers.oracles import capture

MIX = camera.Calibration("mix", 5, 24, sources={"wikitext2": 0.6, "c4": 0.4})


def want_of(source, data):
    """Of each source and layer how often the dense model's router chooses each expert."""
    tokenizer = load_tokenizer(source, False)
    tokens = calibration_tokens(tokenizer, MIX, data=data, seed=1234, max_length=128)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    found = {}
    for number, name in enumerate(tokens.sources):
        ids = tokens.ids_NL[torch.tensor(tokens.dealt) == number]
        found[name] = [
            torch.bincount(capture(model, i, ids)[1][0].flatten(), minlength=8).tolist()
            for i in range(len(model.model.layers))
        ]
    return found


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("camera_p", dict(sparsity=0.3, propagate="dense")),
        ("reap", dict(sparsity=0.5, sparsity_of="routed", propagate="dense")),
        ("heapr", dict(sparsity=0.3)),
        ("naee", dict(sparsity=0.5, sparsity_of="routed", propagate="dense")),
    ],
)
def test_each_source_is_told_with_the_experts_it_reaches(
    method, options, checkpoints, data_folder, tmp_path
):
    source, data = checkpoints("qwen3_moe"), str(data_folder)
    options |= dict(calibration=MIX, data=data, device="cpu", progress=False)
    options |= dict(statistics=tmp_path / "statistics")
    done = camera.compress(source, method, tmp_path / "out", **options)
    again = camera.compress(source, method, tmp_path / "again", **options)  # of cached statistics
    assert done.coverage["sources"] == again.coverage["sources"]
    for name, layers in want_of(source, data).items():
        found = done.coverage["sources"][name]
        unreached = [[i, e] for i, row in enumerate(layers) for e, n in enumerate(row) if not n]
        assert found["unreached"] == unreached
        assert found["reached"] + len(unreached) == done.coverage["experts"]
        assert found["tokens"] == sum(map(sum, layers))


def test_a_single_source_is_not_told_apart(checkpoints, data_folder, calibration, tmp_path):
    options = dict(calibration=calibration, data=str(data_folder), device="cpu", progress=False)
    done = camera.compress(
        checkpoints("qwen3_moe"), "camera_p", tmp_path / "out", sparsity=0.3, **options
    )
    assert "sources" not in done.coverage
