"""A model is evaluated whole where its weights fit the memory that is free, else streamed."""

import pytest
from transformers import AutoModelForCausalLM

from camera.evaluation import placement
from camera.evaluation.placement import free_memory, should_stream, weight_bytes
from camera.runtime.errors import CameraError


def test_a_model_is_streamed_if_it_does_not_fit(checkpoints, monkeypatch):
    folder = checkpoints("llama")
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert weight_bytes(folder, "cpu") == 4 * parameters
    assert weight_bytes(folder, "cpu", "bfloat16") == 2 * parameters
    assert free_memory("cpu") > 0
    for free, expected in ((4.9 * parameters, False), (4.7 * parameters, True)):
        monkeypatch.setattr(placement, "free_memory", lambda device, free=free: free)
        assert should_stream(folder, "cpu") is expected
        assert should_stream(folder, "cpu", mode="always")
        assert not should_stream(folder, "cpu", mode="never")
    with pytest.raises(
        CameraError, match=r"evaluation.stream=maybe is none of auto, always, never"
    ):
        should_stream(folder, mode="maybe")


def test_never_is_refused_where_the_weights_exceed_what_is_free(checkpoints, monkeypatch):
    monkeypatch.setattr(placement, "free_memory", lambda device: 1000)
    with pytest.raises(CameraError, match=r"stream=never: .* are free: set evaluation.stream=auto"):
        should_stream(checkpoints("llama"), "cpu", mode="never")
