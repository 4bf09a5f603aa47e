"""Shards on disk: what is written is what safetensors reads, and what is read is what it wrote."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import camera.checkpoint.places
from camera.checkpoint.places import DTYPES, read_places
from camera.checkpoint.shards import (
    INDEX,
    SINGLE,
    ShardReader,
    ShardWriter,
    sizes_of,
    write_tensors,
)
from camera.runtime.errors import CameraError


def some(dtype, *shape):
    """Any bits will do but those of NaN."""
    if dtype is torch.bool:
        return torch.rand(*shape) > 0.5
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 100, (size,), dtype=torch.uint8).view(dtype).view(shape)


@pytest.fixture
def tensors():
    """Every dtype, and shapes that are easily forgotten."""
    found = {f"of.{name}": some(dtype, 3, 5) for name, dtype in DTYPES.items()}
    return found | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 7),
        "turned": torch.randn(6, 4).T,
        "strided": torch.randn(4, 6)[:, ::2],
        "a part": torch.randn(9, 3)[2:5],
        "repeated": torch.randn(1, 4).expand(3, 4),
        "learned": torch.nn.Parameter(torch.randn(3)),
    }


def same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor.detach(), theirs[name].detach()), name


def test_what_is_written_safetensors_reads(tensors, tmp_path):
    write_tensors(tensors, tmp_path / "a.safetensors")
    same(load_file(tmp_path / "a.safetensors"), tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without


def test_what_safetensors_writes_is_read(tensors, tmp_path):
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(whole, tmp_path / SINGLE)
    same(ShardReader(tmp_path).read(lambda _: True), tensors)


def test_the_same_tensors_are_the_same_bytes_in_any_order(tensors, tmp_path):
    write_tensors(tensors, tmp_path / "a")
    write_tensors(dict(reversed(tensors.items())), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_lie_aligned(tensors, tmp_path):
    write_tensors(tensors, tmp_path / SINGLE)
    for place in ShardReader(tmp_path).places.values():
        assert place.start % place.dtype.itemsize == 0


def test_writing_copies_no_more_than_a_tensor(tmp_path, monkeypatch):
    tensor = torch.randn(1000)
    written = []
    monkeypatch.setattr("pathlib.Path.open", lambda *_, **__: Sink(written))
    write_tensors({"x": tensor}, tmp_path / "x")
    assert np.frombuffer(written[-1]).__array_interface__["data"][0] == tensor.data_ptr()


class Sink:
    def __init__(self, written):
        self.written = written

    def write(self, data):
        self.written.append(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_only_what_is_wanted_is_read(tmp_path, monkeypatch):
    for name in "ab":
        save_file({f"{name}.{i}": torch.full((4,), float(i)) for i in range(3)}, tmp_path / name)
    index = {"weight_map": {f"{name}.{i}": name for name in "ab" for i in range(3)}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    reader, read = ShardReader(tmp_path), []
    original = camera.checkpoint.places._read
    monkeypatch.setattr(
        camera.checkpoint.places,
        "_read",
        lambda file, place, *through: read.append(place) or original(file, place, *through),
    )
    found = reader.read(lambda key: key in ("b.2", "a.1"))
    assert {key: tensor[0].item() for key, tensor in found.items()} == {"a.1": 1, "b.2": 2}
    assert sum(place.bytes for place in read) == 2 * 16
    assert reader.bytes == sum((tmp_path / name).stat().st_size for name in "ab")


def test_what_was_read_lives_on_its_own(tmp_path):
    write_tensors({"x": torch.ones(5), "y": torch.zeros(3)}, tmp_path / SINGLE)
    found = ShardReader(tmp_path).read(lambda _: True)
    write_tensors({"x": torch.zeros(5), "y": torch.ones(3)}, tmp_path / SINGLE)
    found["x"] += 1  # memory of its own: writable, and no mapping of the file
    assert found["x"].tolist() == [2] * 5 and found["y"].tolist() == [0] * 3


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    write_tensors({"x": torch.ones(500)}, tmp_path / SINGLE)
    reader = ShardReader(tmp_path)
    with (tmp_path / SINGLE).open("r+b") as file:
        file.truncate(300)
    with pytest.raises(CameraError, match=r"model\.safetensors ends early: download it again"):
        reader.read(lambda _: True)


def test_a_type_that_is_not_read_is_refused_by_tensor(tmp_path):
    save_file({"layers.0.w": torch.zeros(4, dtype=torch.uint16)}, tmp_path / SINGLE)
    with pytest.raises(CameraError, match=r"'layers\.0\.w' in .*type U16.*F64, F32"):
        ShardReader(tmp_path)


def test_reading_in_pieces_is_reading(tmp_path, monkeypatch):
    """A read call may give less than was asked for."""
    tensor = torch.arange(1000.0)
    write_tensors({"x": tensor}, tmp_path / SINGLE)
    place = ShardReader(tmp_path).places["x"]
    with place.file.open("rb", buffering=0) as file:
        assert torch.equal(camera.checkpoint.places._read(Piecewise(file), place), tensor)


class Piecewise:
    def __init__(self, file):
        self.file, self.seek = file, file.seek

    def readinto(self, view):
        return self.file.readinto(view[:701])


def written(folder, shards=2):
    writer = ShardWriter(folder, shards)
    for i in range(shards):
        writer.add(i, {f"layer.{i}.w": torch.full((3, i + 1), float(i))})
    return writer


def test_a_written_checkpoint_is_a_checkpoint(tmp_path):
    written(tmp_path).close()
    reader = ShardReader(tmp_path)
    assert sorted(reader.places) == ["layer.0.w", "layer.1.w"]
    assert reader.read(lambda key: "1" in key)["layer.1.w"].shape == (3, 2)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * (3 + 6)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_sizes_count_what_is_in_memory_and_names_what_is_on_disk(tmp_path):
    writer = ShardWriter(tmp_path, 1)
    fused = sizes_of({"experts": torch.zeros(2, 3)})
    writer.add(0, {"expert.0": torch.zeros(3), "expert.1": torch.zeros(3)}, fused)
    assert writer.sizes == {"experts": (6, 24)}
    assert set(writer.weight_map) == {"expert.0", "expert.1"}


def test_an_unfinished_checkpoint_has_no_index(tmp_path):
    writer = ShardWriter(tmp_path, 2)
    writer.add(0, {"w": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="1 of 2 shards"):
        writer.close()
    assert not (tmp_path / INDEX).exists()


def test_another_writer_goes_on(tmp_path):
    first = ShardWriter(tmp_path, 2)
    first.add(0, {"layer.0.w": torch.zeros(3)})
    state = json.loads(json.dumps(first.state()))  # it travels as JSON
    second = ShardWriter(tmp_path, 2)
    assert second.restore(state) and second.sizes == first.sizes
    second.add(1, {"layer.1.w": torch.zeros(3)})
    second.close()
    assert sorted(ShardReader(tmp_path).places) == ["layer.0.w", "layer.1.w"]


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_another_writer_refuses_a_file_that_changed(damage, tmp_path, caplog):
    state = written(tmp_path).state()
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-1])
    assert not ShardWriter(tmp_path, 2).restore(state)
    assert "model-00002-of-00002.safetensors is not as it was written" in caplog.text


@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_a_shard_appears_whole_or_not_at_all(where, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    writer = ShardWriter(tmp_path, 1)
    target = {"open": "camera.checkpoint.shards.write_tensors"}.get(
        where, f"camera.runtime.files.os.{where}"
    )
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(CameraError, match=r"model-00001.*No space left on device.*free space"):
            writer.add(0, {"w": torch.zeros(2)})
    assert not list(tmp_path.iterdir()) and not writer.files
    writer.add(0, {"w": torch.zeros(2)})
    writer.close()
    assert read_places(ShardReader(tmp_path).places)["w"].shape == (2,)
