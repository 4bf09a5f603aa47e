"""A device that runs out of memory in the middle: half the batch, and the same result."""

import pytest
import torch

import camera
from camera.runtime.errors import CameraError
from camera.streaming.streamer import LayerStreamer
from tests.helpers.checkpoints import tensors_of
from tests.helpers.methods import method_of


@pytest.fixture
def compress(checkpoints, data_folder, calibration, tmp_path):
    def go(name: str, case: str):
        return camera.compress(
            checkpoints("qwen2_moe"),
            method_of(case),
            tmp_path / name,
            calibration=calibration,  # 6 samples of 48 tokens
            data=str(data_folder),
            device="cpu",
            progress=False,
        )

    return go


@pytest.fixture
def room(monkeypatch):
    """room(samples): a layer after the first one takes so many samples at a time."""
    ran = []

    def set_to(samples: int) -> list[tuple[int, int]]:
        original = LayerStreamer.attend

        def attend(self, index, batches):
            sizes = [len(batch.hidden_BLH) for batch in batches]
            if index and max(sizes) > samples:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            ran.append((index, max(sizes)))
            return original(self, index, batches)

        monkeypatch.setattr(LayerStreamer, "attend", attend)
        for place in ("passes.dense", "compression"):
            monkeypatch.setattr(f"camera.pipeline.{place}.BATCH_TOKENS", 6 * 48)
        monkeypatch.setattr("camera.pipeline.passes.backward.BACKWARD_TOKENS", 6 * 48)
        return ran

    return set_to


@pytest.mark.parametrize("case", ["camera_p", "camera_p global", "heapr"])
def test_half_the_batch_goes_on_where_memory_ended(case, compress, room, tmp_path, caplog):
    compress("whole", case)
    ran = room(2)
    compress("halved", case)
    assert "out of memory: going on with batches of 144 tokens" in caplog.text
    assert "going on with batches of 72 tokens" in caplog.text
    assert [index for index, _ in ran].count(0) == 1  # what was done is not done again
    assert max(size for index, size in ran if index) <= 2
    whole, halved = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "halved")
    assert whole.keys() == halved.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(halved[name], tensor)


def test_one_sample_that_has_no_room_is_an_error_of_one_sentence(compress, room, tmp_path):
    room(0)
    with pytest.raises(CameraError, match=r"batches can't be smaller: set memory\.hidden=ram"):
        compress("out", "camera_p")
    assert not (tmp_path / "out").exists()
