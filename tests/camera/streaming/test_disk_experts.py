"""Experts read one by one from disk are observed and pruned as those of a layer in memory."""

import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import camera
from camera.calibration.statistics import Statistics
from camera.checkpoint.places import read_places
from camera.checkpoint.shards import ShardReader
from camera.method import Applied
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.pipeline.memory.estimate import MemoryEstimate
from camera.runtime.errors import CameraError
from camera.streaming.disk_experts import DiskExperts, single_expert_places
from camera.streaming.settings import MemoryChoices
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer, Placement
from tests.helpers.checkpoints import tensors_of
from tests.helpers.models import MOE_FAMILIES, build_tokenizer
from tests.helpers.quantization.damage import damage

LAYOUTS = ("as published", "fused")
NAMES = family_of("qwen3_moe").checkpoint_names


@pytest.fixture(scope="module")
def source(checkpoints, tmp_path_factory):
    """source(family, layout): a checkpoint of two layers, experts apart or all in one tensor."""
    made = {}

    def folder(family, layout):
        published = checkpoints(family, num_hidden_layers=2)
        if layout == "as published":
            return published
        if family not in made:
            made[family] = tmp_path_factory.mktemp("fused") / family
            model = AutoModelForCausalLM.from_pretrained(published)
            model.save_pretrained(made[family], save_original_format=False)
            build_tokenizer().save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture(scope="module")
def cut(source, data_folder, tmp_path_factory):
    """cut(family, layout, experts, propagate): folder and report of a compressed model."""
    made = {}

    def go(family, layout, experts, propagate="compressed", method="camera_p", **settings):
        key = (family, layout, experts, propagate, method)
        if key not in made:
            out = tmp_path_factory.mktemp("cut") / "out"
            settings = settings or {"sparsity": 0.3}
            result = camera.compress(
                source(family, layout),
                method,
                out,
                calibration=camera.Calibration(samples=4, length=32),
                propagate=propagate,
                memory=MemoryChoices(experts=experts, phi="recompute"),
                data=str(data_folder),
                device="cpu",
                progress=False,
                **settings,
            )
            made[key] = out, result
        return made[key]

    return go


def assert_same(on_disk, whole):
    (folder, result), (other, expected) = on_disk, whole
    assert result.widths == expected.widths
    mine, theirs = tensors_of(folder), tensors_of(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("layout", "propagate"), [("as published", "compressed"), ("fused", "dense")]
)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_on_disk_lose_what_they_lose_in_memory(family, layout, propagate, cut):
    on_disk = cut(family, layout, "disk", propagate)
    whole = cut(family, "as published", "ram", propagate)
    assert_same(on_disk, whole)
    mine, theirs = (
        Statistics.load(folder / "statistics.safetensors") for folder, _ in (on_disk, whole)
    )
    for (_, seen), (_, expected) in zip(mine, theirs, strict=True):
        assert torch.equal(seen.tokens_E, expected.tokens_E)
        torch.testing.assert_close(seen.energy(0.9), expected.energy(0.9), rtol=1e-4, atol=1e-9)


def test_the_tokens_of_an_expert_on_disk_count_as_much(cut):
    options = dict(
        method="camera_plus", score="hidden_share", rank_scope="layer", compensate="none"
    )
    options["sparsity"] = 0.3
    on_disk = cut("qwen2_moe", "fused", "disk", "compressed", **options)
    assert_same(on_disk, cut("qwen2_moe", "as published", "ram", "compressed", **options))


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
@pytest.mark.parametrize("method", ["camera_q", "gptq"])
def test_quantisers_read_experts_from_disk_too(method, propagate, cut, source):
    options = dict(propagate=propagate, method=method, bits=3.0)
    on_disk = cut("qwen2_moe", "as published", "disk", **options)
    whole = cut("qwen2_moe", "as published", "ram", **options)
    mine, theirs = tensors_of(on_disk[0]), tensors_of(whole[0])
    assert mine.keys() == theirs.keys()
    assert all(mine[name].shape == theirs[name].shape for name in mine)
    dense = source("qwen2_moe", "as published")
    lost, expected = damage(on_disk[0], dense), damage(whole[0], dense)
    assert lost == pytest.approx(expected, rel=0.1)  # codes may differ: see damage.py
    # the inputs of this layer are the same, so that its codes hang on its own sums alone; with the
    # Hessians of other tokens two thirds of its bytes are others
    first = [name for name in mine if name.startswith("model.layers.0.") and "expert" in name]
    same = sum((mine[name] == theirs[name]).sum().item() for name in first)
    assert same > 0.9 * sum(mine[name].numel() for name in first)


@pytest.mark.parametrize("settings", [{}, dict(replaced_by="fitted")], ids=str)
def test_whole_experts_on_disk_are_removed_too(settings, cut):
    options = dict(method="reap", sparsity=0.25, **settings)
    on_disk = cut("qwen2_moe", "as published", "disk", **options)
    assert_same(on_disk, cut("qwen2_moe", "as published", "ram", **options))


def test_a_method_that_leaves_the_experts_on_disk_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr("baselines.micro_experts.random.Random.apply", lambda *_: Applied())
    asked = dict(sparsity=0.3, memory=MemoryChoices(experts="disk"), device="cpu", progress=False)
    with pytest.raises(CameraError, match=r"layer 0.*on disk: set memory\.experts=ram"):
        camera.compress(source("olmoe", "fused"), "random", tmp_path / "out", **asked)


def test_experts_on_disk_are_not_read_with_the_layer(source, monkeypatch):
    model = MetaModel(source("qwen3_moe", "as published"))
    read = []
    original = ShardReader.read
    monkeypatch.setattr(
        ShardReader,
        "read",
        lambda self, wanted, *where: original(
            self, lambda key: wanted(key) and not read.append(key), *where
        ),
    )
    layer = model.load_layer(0, experts_on_disk=True)
    assert read and not any(NAMES.holds(key) for key in read)
    assert isinstance(layer.mlp.experts, DiskExperts)
    assert not any("experts" in name for name, _ in layer.named_parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_an_expert_on_disk_has_its_own_weights(family, layout, source):
    folder = source(family, layout)
    streamer = LayerStreamer(MetaModel(folder), Placement(experts_on_disk=True))
    streamer.load_layer(1)
    lazy = streamer.model.feed_forward(1).groups[-1]
    layer = AutoModelForCausalLM.from_pretrained(folder).model.layers[1]
    whole = FeedForward(layer, streamer.model.family, "layer").groups[-1]
    for expert in (len(whole.widths) - 1, 0, 1):
        assert torch.equal(lazy.down(expert), whole.down(expert))
        for mine, theirs in zip(lazy.gate_up(expert), whole.gate_up(expert), strict=True):
            assert torch.equal(mine, theirs)


def test_only_one_expert_is_held(source):
    model = MetaModel(source("olmoe", "as published"))
    model.load_layer(0, experts_on_disk=True)
    group = model.feed_forward(0).groups[0]
    numbers, read = [], group.module._read
    group.module._read = lambda expert: numbers.append(expert) or read(expert)
    group.gate_up(0), group.down(0)
    assert numbers == [0]  # read once for gate, up and down
    first = weakref.ref(group.module._last[1])
    group.down(1)
    assert numbers == [0, 1] and first() is None


def test_an_expert_on_disk_with_nan_is_refused_by_name(source, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(source("qwen3_moe", "as published"), folder)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    for shard in folder.glob("*.safetensors"):
        found = load_file(shard)
        if name in found:
            found[name][0, 0] = float("nan")
            save_file(found, shard, metadata={"format": "pt"})
    model = MetaModel(folder)
    model.load_layer(1, experts_on_disk=True)
    group = model.feed_forward(1).groups[0]
    group.down(2)
    with pytest.raises(CameraError, match=r"layers\.1\.mlp\.experts.*NaN or inf"):
        group.down(3)


def test_places_of_an_expert_are_a_part_of_the_file(source):
    for layout in LAYOUTS:
        reader = ShardReader(source("qwen3_moe", layout))
        places = {
            key: place
            for key, place in reader.places.items()
            if ".layers.0." in key and NAMES.holds(key)
        }
        one = single_expert_places(places, 3, NAMES)
        assert sum(p.bytes for p in one.values()) == sum(p.bytes for p in places.values()) // 8
        got = read_places(one)
        whole = AutoModelForCausalLM.from_pretrained(source("qwen3_moe", layout))
        down = next(tensor for key, tensor in got.items() if "down_proj" in key)
        expected = whole.model.layers[0].mlp.experts.down_proj[3]
        assert torch.equal(down.view_as(expected), expected)


def test_compressed_and_dense_models_have_no_experts_to_leave_on_disk(checkpoints, cut):
    ragged, _ = cut("mixtral", "as published", "ram")
    method, asked = camera.CameraP(sparsity=0.3), MemoryChoices(experts="disk")
    for folder in (ragged, checkpoints("llama")):
        model = MetaModel(folder)
        passes = method.passes(model.budget, "compressed")
        estimate = MemoryEstimate.of(model, method, passes, asked, tokens=10)
        assert not estimate.experts_on_disk
