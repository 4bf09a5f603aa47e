"""Reading ahead and writing behind: one layer each, in the order of one after the other."""

import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import camera
from camera.checkpoint.shards import ShardReader, ShardWriter, write_tensors
from camera.pipeline.resume import PassProgress
from camera.runtime.errors import CameraError
from camera.runtime.overlap import BackgroundWriter, LayerPrefetcher
from camera.streaming.settings import MemoryChoices
from camera.streaming.skeleton import MetaModel
from tests.helpers.checkpoints import shards_of

LAYERS = 5
CPU = torch.device("cpu")


@pytest.fixture
def source(checkpoints):
    return checkpoints("qwen3_moe", num_hidden_layers=LAYERS)


@pytest.fixture
def run(source, data_folder, calibration, tmp_path):
    def go(name="out", model=source, **options):
        settings = dict(sparsity=0.3, calibration=calibration, data=str(data_folder))
        settings |= dict(device="cpu", progress=False, **options)
        return camera.compress(model, "camera_p", tmp_path / name, **settings)

    return go


def layer_of(wanted):
    """The layer whose keys are asked for; None for what is outside the layers."""
    keys = {i: f"model.layers.{i}.input_layernorm.weight" for i in range(LAYERS)}
    return next((i for i, key in keys.items() if wanted(key)), None)


@pytest.fixture
def events(monkeypatch):
    """(what, layer) in the order it happened; reading and writing are made to take long."""
    found, lock = [], threading.Lock()

    def told(target, name, number, before=0.0):
        original = getattr(target, name)

        def telling(self, *args, **kwargs):
            index = number(self, *args)
            with lock:
                found.append((f"begin {name}", index))
            time.sleep(before)
            result = original(self, *args, **kwargs)
            with lock:
                found.append((f"end {name}", index))
            return result

        monkeypatch.setattr(target, name, telling)

    told(ShardReader, "read", lambda _, wanted, *where: layer_of(wanted), 0.03)
    told(MetaModel, "load_layer", lambda _, index, *__: index)
    told(ShardWriter, "add", lambda _, index, *__: index, 0.03)
    told(PassProgress, "commit", lambda _, done, *__: done - 1)
    told(camera.CameraP, "plan_layer", lambda _, index, *__: index)
    return found


def place(events, what, index):
    return events.index((what, index))


def test_never_more_than_one_layer_ahead_and_one_behind(run, events):
    run()
    for i in range(LAYERS):
        if i:  # begun once the layer before it was there, and not earlier
            begun = place(events, "begin read", i)
            assert begun > place(events, "end read", i - 1)
            assert begun > place(events, "begin load_layer", i - 1)
            assert begun < place(events, "begin load_layer", i), "it was not read ahead"
        if i > 1:  # the one before last is written before this one is cut
            assert place(events, "end commit", i - 2) < place(events, "begin plan_layer", i - 1)
            assert place(events, "end commit", i - 2) < place(events, "begin add", i - 1)
    overlapped = [
        place(events, "end commit", i) > place(events, "begin load_layer", i + 1)
        for i in range(LAYERS - 1)
    ]
    assert any(overlapped), "nothing was written behind"


def test_overlap_changes_no_byte(run, tmp_path, monkeypatch):
    run("overlapped")
    monkeypatch.setattr(LayerPrefetcher, "start_next", lambda self: None)
    monkeypatch.setattr(BackgroundWriter, "submit", lambda self, work: work())
    run("in turn")
    assert shards_of(tmp_path / "overlapped") == shards_of(tmp_path / "in turn")


def test_no_thread_is_left_behind(run):
    before = threading.active_count()
    for name in "abc":
        run(name)
    assert threading.active_count() == before


def test_what_is_damaged_in_a_later_layer_stops_the_run_with_its_name(run, source, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    name = "model.layers.3.self_attn.q_proj.weight"
    for shard in broken.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][0, 0] = float("inf")
            save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CameraError, match=r"layers\.3\.self_attn\.q_proj\.weight.*NaN or inf"):
        run(model=broken)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_vanishes_while_it_runs_is_a_refusal(run, source, tmp_path, monkeypatch):
    original = ShardReader.read

    def vanish(self, wanted, *where):
        if layer_of(wanted) == 2:
            raise CameraError("shard 2 ends early: download it again.")
        return original(self, wanted, *where)

    monkeypatch.setattr(ShardReader, "read", vanish)
    with pytest.raises(CameraError, match="shard 2 ends early"):
        run()
    assert not (tmp_path / "out").exists()
    # what was finished before is there to go on from
    monkeypatch.setattr(ShardReader, "read", original)
    loaded = []
    load = MetaModel.load_layer
    monkeypatch.setattr(
        MetaModel, "load_layer", lambda s, i, *more: loaded.append(i) or load(s, i, *more)
    )
    run()
    assert loaded == [2, 3, 4]


@pytest.mark.parametrize("layer", [1, LAYERS - 1])
def test_a_full_disk_behind_the_run_stops_it(layer, run, tmp_path, monkeypatch):
    original = write_tensors

    def full(tensors, path):
        if f"-{layer + 1:05d}-of" in path.name:
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr("camera.checkpoint.shards.write_tensors", full)
    with pytest.raises(CameraError, match=r"No space left on device.*free space"):
        run()
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.partial").glob(".model*"))


def test_a_full_disk_for_hidden_states_is_a_refusal(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("camera.runtime.mapped.os.posix_fallocate", full)
    with pytest.raises(CameraError, match=r"no room for .* of hidden states"):
        run(memory=MemoryChoices(hidden="disk"))
    assert not (tmp_path / "out").exists()


def read(index, without_experts=False):
    return {"x": torch.full((2,), float(index))}


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1], [1, 1, 3]])
def test_layers_are_what_was_asked_for_in_any_order(order):
    ahead = LayerPrefetcher(read, 4, CPU)
    for index in order:
        assert ahead.get(index)["x"].tolist() == [index, index]
        ahead.start_next()


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_the_next_layer_is_read_while_this_one_is_worked_on(order):
    asked, there = [], {index: threading.Event() for index in order}

    def slow(index, _):
        asked.append(index)
        time.sleep(0.05)
        there[index].set()
        return read(index)

    ahead = LayerPrefetcher(slow, 4, CPU)
    hidden = order[1:] if order[0] == 0 else order[2:]  # going down is seen at the second layer
    for index, coming in zip(order, [*order[1:], None], strict=True):
        ahead.get(index)
        ahead.start_next()
        ahead.start_next()  # a second call begins nothing
        assert coming not in hidden or there[coming].wait(60)  # it comes unasked
    assert asked == order
    assert ahead.seconds_read >= 4 * 0.05
    # where nothing is hidden, all that is read is waited for
    assert ahead.seconds_waited < ahead.seconds_read


def test_a_layer_is_read_with_or_without_its_experts_as_it_is_asked_for():
    asked = []

    def read_parts(index, without_experts):
        asked.append((index, without_experts))
        return {"x": torch.tensor(float(without_experts))}

    ahead = LayerPrefetcher(read_parts, 4, CPU)
    assert ahead.get(0, True)["x"] == 1
    ahead.start_next()  # the next one in the same way
    assert ahead.get(1, True)["x"] == 1
    ahead.start_next()
    assert ahead.get(2, False)["x"] == 0, "what was read ahead is not what was asked for"
    assert asked == [(0, True), (1, True), (2, True), (2, False)]


def test_the_error_of_a_layer_surfaces_where_it_is_taken_and_nowhere_else():
    def broken(index, _):
        if index == 1:
            raise CameraError("layer 1 is broken")
        return read(index)

    ahead = LayerPrefetcher(broken, 4, CPU)
    ahead.get(0), ahead.start_next()
    assert ahead.get(2)["x"][0] == 2  # nobody wanted layer 1
    ahead.get(0), ahead.start_next()
    with pytest.raises(CameraError, match="layer 1 is broken"):
        ahead.get(1)
    assert ahead.get(3)["x"][0] == 3


def test_one_piece_of_work_at_a_time_and_errors_at_the_next_call():
    running, most, done = [], [], []

    def work(number):
        def go():
            running.append(number)
            most.append(len(running))
            time.sleep(0.02)
            running.remove(number)
            done.append(number)

        return go

    with BackgroundWriter() as behind:
        for number in range(3):
            behind.submit(work(number))
    assert done == [0, 1, 2] and set(most) == {1}
    assert behind.seconds_worked >= 3 * 0.02 and behind.seconds_waited > 0

    for call in ("wait", "submit", "exit"):
        with pytest.raises(CameraError, match="disk"), BackgroundWriter() as behind:
            behind.submit(fail)
            if call == "wait":
                behind.wait()
            if call == "submit":
                behind.submit(work(9))
    assert 9 not in done


def fail():
    raise CameraError("the disk is full")
