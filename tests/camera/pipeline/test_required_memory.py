"""Memory is refused before it is spent, by its largest part and the setting that saves it."""

import json
import shutil
from dataclasses import replace

import psutil
import pytest
import torch

import camera
from camera.calibration.settings import Calibration
from camera.pipeline.memory import refusal
from camera.pipeline.memory.device import DeviceMemory
from camera.pipeline.memory.estimate import MemoryEstimate
from camera.pipeline.memory.host import HostMemory
from camera.pipeline.memory.refusal import require_memory
from camera.runtime.errors import CameraError
from camera.streaming.settings import MemoryChoices
from camera.streaming.skeleton import MetaModel

TOKENS = 4096
PRUNED = camera.CameraP(sparsity=0.3)
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def estimate(checkpoints):
    model = MetaModel(checkpoints("qwen2_moe"))
    choices = MemoryChoices(hidden="ram")
    return MemoryEstimate.of(model, PRUNED, PRUNED.passes(model.budget, "dense"), choices, TOKENS)


@pytest.fixture
def free(monkeypatch):
    """free(system, accelerator): so much is free there."""

    def set_to(system, accelerator=0):
        sizes = {"cpu": system, "cuda": accelerator}
        monkeypatch.setattr(refusal, "free_memory", lambda device: sizes[device.type])

    return set_to


def refused(estimate, device, method=PRUNED):
    with pytest.raises(CameraError) as error:
        require_memory(estimate, method, device, TOKENS, 32)
    return str(error.value)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"hidden": 10**9}, "goes to the hidden states: set memory.hidden=disk, or lower cal"),
        ({"phi": 10**9}, "goes to a layer's activations: set memory.phi=recompute."),
        ({"layer": 10**9, "experts": 10**8}, "goes to the layers: set memory.experts=disk."),
        ({"layer": 10**9, "experts": 0}, "goes to the layers: it takes a machine with more"),
        ({"method": 10**9}, "goes to method camera_p: choose another method"),
        ({"outside": 10**9}, "goes to embeddings and head: it takes a machine with more"),
    ],
)
def test_the_largest_part_is_named_with_what_saves_it(part, told, estimate, free):
    free(4 * 10**8)
    require_memory(estimate, PRUNED, CPU, TOKENS, 32)
    assert told in refused(replace(estimate, **part), CPU)


def test_a_refit_is_told_to_take_fewer_samples(estimate, free):
    free(4 * 10**8)
    refit = replace(PRUNED, compensate="layer")
    said = refused(replace(estimate, phi=10**9), CPU, refit)
    assert "goes to a layer's activations: lower calibration.samples." in said


def test_what_is_counted_is_the_peak(estimate, free):
    free(estimate.peak + refusal.TOKEN_BYTES * TOKENS + refusal.SAMPLE_BYTES * 32)
    require_memory(estimate, PRUNED, CPU, TOKENS, 32)
    free(estimate.peak - 1)
    assert "of memory, where" in refused(estimate, CPU)


DEVICE = DeviceMemory(*[10**6] * 11)
HOST = HostMemory(*[10**6] * 9)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("layers", "goes to the layers: set memory.experts=disk."),
        ("hidden", "goes to the hidden states: set memory.hidden=ram."),
        ("phi", "goes to a layer's activations: set memory.phi=recompute."),
        ("attention", "goes to a batch: it takes a machine with more memory."),
        ("observing", "goes to method camera_p: choose another method"),
        ("applying", "goes to method camera_p: choose another method"),
        ("finishing", "goes to a batch"),
        ("backward", "goes to a batch"),
        ("trials", "goes to the hidden states"),
        ("outside", "goes to embeddings and head"),
        ("logits", "goes to logits"),
    ],
)
def test_what_has_no_room_on_a_device_is_named(part, told, estimate, free):
    free(4 * 10**9, 4 * 10**8)
    require_memory(replace(estimate, device=DEVICE, host=HOST), PRUNED, GPU, TOKENS, 32)
    large = replace(estimate, device=replace(DEVICE, **{part: 10**9}), host=HOST)
    said = refused(large, GPU)
    assert "of the memory of cuda:0, where" in said and told in said


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("staged", "goes to buffers of layers: it takes a machine with more memory."),
        ("ranking", "goes to method camera_p: choose another method"),
        ("hidden", "goes to the hidden states: set memory.hidden=disk, or lower cal"),
        ("routing", "goes to tokens of experts on disk: set memory.experts=ram, or lower cal"),
        ("kept", "goes to method camera_p: choose another method"),
        ("sample", "goes to a batch"),
        ("gradients", "goes to the gradients of all tokens: lower calibration.samples."),
        ("batch", "goes to the gradients of all tokens"),
        ("trials", "goes to the hidden states: set memory.hidden=disk"),
    ],
)
def test_what_has_no_room_beside_a_device_is_named(part, told, estimate, free):
    large = replace(estimate, device=DEVICE, host=replace(HOST, **{part: 10**9}))
    free(2 * 10**9, 4 * 10**8)
    require_memory(large, PRUNED, GPU, TOKENS, 32)  # the device's sum has none of it
    free(4 * 10**8, 4 * 10**9)
    said = refused(large, GPU)
    assert "of the system's memory, where" in said and told in said


def test_calibration_is_weighed_before_it_is_drawn(checkpoints, data_folder, tmp_path, monkeypatch):
    def drawn(*_, **__):
        raise AssertionError("calibration text was read")

    monkeypatch.setattr("camera.calibration.tokens.calibration_tokens", drawn)
    machine = psutil.virtual_memory()._replace(available=2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    with pytest.raises(CameraError, match=r"GB of memory, where .*lower calibration\.samples"):
        camera.compress(
            checkpoints("qwen3_moe"),
            "camera_p",
            tmp_path / "out",
            sparsity=0.25,
            calibration=Calibration(samples=4_000_000, length=48),
            data=str(data_folder),
            device="cpu",
            progress=False,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "mixtral", "deepseek_v3"])
def test_a_wrong_number_in_the_config_is_refused_before_a_model_is_built(
    family, checkpoints, tmp_path
):
    shutil.copytree(checkpoints(family), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    right = json.loads(file.read_text())
    keys = {"num_experts", "num_local_experts", "n_routed_experts"} & set(right)
    assert keys
    for key in (*keys, "num_hidden_layers"):
        file.write_text(json.dumps(right | {key: 10**9}))
        with pytest.raises(CameraError, match=r"config.json says \w+=1000000000, and the"):
            MetaModel(tmp_path / "model")
