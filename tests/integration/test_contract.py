"""What every method keeps to: settings alone, plans that say all, honest sizes, sums that add up.

Shapes: B samples of a batch, L tokens of a sample, T = B * L tokens, H hidden, N micro-experts of a
layer's pool.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import camera
from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.method import METHODS, Method, Plan
from camera.moe.feed_forward import FeedForward
from camera.moe.gradients import backpropagate
from camera.moe.pool import LayerShape
from camera.pipeline.compression import refuse_unshared
from camera.quantization.base import Quantization
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer
from tests.helpers.checkpoints import shards_of
from tests.helpers.methods import CASES, method_of

FAMILIES = {"a": "qwen2_moe", "b": "mixtral"}
SLACK = 8  # vectors of a number per micro-expert


def shipped() -> Iterator[type[Method]]:
    return (cls for cls in METHODS.values() if cls.__module__.startswith(("camera.", "baselines.")))


def test_every_shipped_method_is_tried():
    wanted = {cls.name for cls in shipped() if cls.compresses}
    assert {name for name, _ in CASES.values()} == wanted


@pytest.fixture(scope="module")
def sources(checkpoints) -> dict[str, Path]:
    """Two models of other sizes."""
    return {name: checkpoints(family, num_hidden_layers=2) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def options(data_folder) -> dict[str, Any]:
    calibration = camera.Calibration(source="wikitext2", samples=4, length=32)
    return dict(calibration=calibration, data=str(data_folder), device="cpu", progress=False)


@pytest.fixture(scope="module")
def fresh(sources, options, tmp_path_factory):
    """fresh(case): the checkpoint of the first model that an instance of its own makes."""
    made: dict[str, Path] = {}

    def go(case: str) -> Path:
        if case not in made:
            out = tmp_path_factory.mktemp("fresh") / "out"
            camera.compress(sources["a"], method_of(case), out, **options)
            made[case] = out
        return made[case]

    return go


# --- a method is its settings ---


@pytest.mark.parametrize("case", CASES)
def test_an_instance_keeps_nothing_from_one_model_to_the_next(
    case, fresh, sources, options, tmp_path
):
    method = method_of(case)
    before = vars(method).copy()
    for model in "ba":
        camera.compress(sources[model], method, tmp_path / model, **options)
    assert shards_of(tmp_path / "a") == shards_of(fresh(case))
    assert vars(method) == before


@pytest.mark.parametrize("name", [cls.name for cls in shipped()])
def test_settings_of_a_method_are_frozen(name):
    settings = next((s for method, s in CASES.values() if method == name), {})
    method = METHODS[name](**settings)
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, getattr(method, field.name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.something_else = 1


# --- a plan says all that was decided ---


@pytest.mark.parametrize("case", CASES)
def test_the_plan_beside_a_checkpoint_makes_it_again(
    case, fresh, sources, options, tmp_path, monkeypatch
):
    made, method, source = fresh(case), method_of(case), sources["a"]
    plan, budget = Plan.load(made), MetaModel(source).budget
    assert (plan.method, set(plan.layers)) == (method.name, set(budget.layers))
    quantised = isinstance(method, Quantization) and method.calibrates
    needs_text = quantised or method.compensation is not None
    passes = method.passes_of_plan(budget, "compressed")
    assert [step.reads_text for step in passes] == [needs_text]
    if not needs_text:
        options = {**options, "data": "no such folder"}
        monkeypatch.setattr("camera.calibration.tokens.calibration_tokens", None)
    out = tmp_path / "out"
    camera.apply(source, plan, out, **options)
    assert shards_of(out) == shards_of(made)
    assert (out / "plan.safetensors").read_bytes() == (made / "plan.safetensors").read_bytes()


# --- observers say what they hold ---


def declared(model: MetaModel, case: str) -> dict[str, ObserverSpec]:
    """All specs that a method declares for a model, by what they look like."""
    passes = [
        step
        for propagate in ("compressed", "dense")
        for step in method_of(case).passes(model.budget, propagate)
    ]
    return {repr(step.observer): step.observer for step in passes if step.observer is not None}


def batches(number: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(7)
    ids_NL = torch.randint(3, 250, (2 * number, 48), generator=draw)
    return [{"input_ids": ids_BL} for ids_BL in ids_NL.split(2)]


@torch.no_grad()
def shown(
    spec: ObserverSpec, streamer: LayerStreamer, inputs: list[dict[str, torch.Tensor]]
) -> tuple[LayerObserver, FeedForward]:
    """An observer that saw the first layer run on these batches."""
    states = streamer.embed(inputs)
    layer, ffn = streamer.load_layer(0), streamer.model.feed_forward(0)
    observer = spec.build(0, ffn)
    if spec.reads == "activations":
        streamer.observe(0, streamer.attend(0, states), observer)
    elif spec.reads == "gradients":
        for number, (state, batch) in enumerate(zip(states, inputs, strict=True)):
            draw = torch.Generator().manual_seed(int(batch["input_ids"][0, 0]))
            gradient = torch.randn(state.hidden_BLH.shape, generator=draw)
            run = (layer, ffn, state.hidden_BLH, state.arguments.kwargs[0], gradient)
            backpropagate(*run, observer, batch=number)
    return observer, ffn


def storages(found: Any, apart: set[int], seen: set[int]) -> Iterator[torch.UntypedStorage]:
    """Storages of all tensors that a value holds; modules and those `apart` aside."""
    if id(found) in seen or isinstance(found, nn.Module):
        return
    seen.add(id(found))
    if isinstance(found, torch.Tensor):
        storage = found.untyped_storage()
        if storage.data_ptr() not in apart:
            apart.add(storage.data_ptr())
            yield storage
    elif isinstance(found, dict):
        for value in found.values():
            yield from storages(value, apart, seen)
    elif isinstance(found, list | tuple | set):
        for value in found:
            yield from storages(value, apart, seen)
    elif hasattr(found, "__dict__"):
        yield from storages(vars(found), apart, seen)


def held(layer: nn.Module, *values: Any) -> int:
    """Bytes of all tensors that these values hold beside the layer's own."""
    tensors = [*layer.parameters(), *layer.buffers()]
    apart = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages(list(values), apart, set()))


SHAPES = {
    "a shared expert": ("qwen2_moe", {}),
    "routed experts alone": ("mixtral", {}),
    "many experts": ("qwen2_moe", dict(num_experts=32)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_observers_hold_what_they_say(shape, checkpoints):
    """Each once, however many methods declare it."""
    family, overrides = SHAPES[shape]
    model = MetaModel(checkpoints(family, num_hidden_layers=2, **overrides))
    streamer, inputs = LayerStreamer(model), batches(1)
    layer = LayerShape(
        model.budget.layers[0],
        model.budget.hidden,
        model.family.top_k(model.config),
        inputs[0]["input_ids"].numel(),
        model.dtype.itemsize,
    )
    vectors = SLACK * 8 * layer.pool.micro_experts
    specs = {name: spec for case in CASES for name, spec in declared(model, case).items()}
    for name, spec in specs.items():
        observer, ffn = shown(spec, streamer, inputs)
        result = observer.result()
        holds = held(ffn.layer, observer, result, spec.finish(result, ffn))
        assert holds <= spec.nbytes(layer) + spec.result_bytes(layer) + vectors, name
        assert spec.nbytes(layer) <= 3 * holds, name


# --- what several processes see ---


def additive(spec: ObserverSpec, streamer: LayerStreamer, monkeypatch) -> None:
    """Statistics of two processes, a batch each, are those of one that sees both batches."""
    one, other = batches(2)
    whole, mine, theirs = (
        shown(spec, streamer, seen)[0].result() for seen in ([one, other], [one], [other])
    )
    there = {id(tensor): theirs.tensors()[name] for name, tensor in mine.tensors().items()}

    def combined(tensor: torch.Tensor, how: str) -> torch.Tensor:
        return {"sum": torch.add, "max": torch.maximum}[how](tensor, there[id(tensor)])

    monkeypatch.setattr("camera.runtime.distributed.all_combined", combined)
    together: LayerStatistics = mine.all_reduced()
    for name, expected in whole.tensors().items():
        torch.testing.assert_close(
            together.tensors()[name], expected, rtol=1e-3, atol=1e-5, msg=f"{spec}: {name}"
        )


REFUSED = ("naee", "camera_q sequential", "gptq sequential")  # in several processes


def test_what_processes_see_adds_up_or_is_refused(sources, monkeypatch):
    """Each observer once, however many methods declare it."""
    model, added_up = MetaModel(sources["a"]), set()
    for case in CASES:
        method = method_of(case)
        passes = method.passes(model.budget, "compressed")
        specs = [step.observer for step in passes if step.observer is not None]
        assert any(spec.single_process() for spec in specs) == (case in REFUSED), case
        refuse_unshared(passes, method)  # a process of its own takes everything
        with monkeypatch.context() as patch:
            patch.setattr("camera.runtime.distributed.world", lambda: 2)
            if case in REFUSED:
                with pytest.raises(CameraError, match="start it without torchrun"):
                    refuse_unshared(passes, method)
                continue
            refuse_unshared(passes, method)
            for spec in specs:
                if repr(spec) not in added_up:
                    additive(spec, LayerStreamer(model), patch)
                added_up.add(repr(spec))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_in_several_processes_reads_nothing(
    case, sources, options, tmp_path, monkeypatch
):
    def read(*_):
        raise AssertionError("weights are read")

    method = method_of(case)
    monkeypatch.setattr("camera.runtime.distributed.world", lambda: 2)
    for name in ("load_layer", "load_rest"):
        monkeypatch.setattr(MetaModel, name, read)
    with pytest.raises(CameraError, match=f"method {method.name}: .*start it without torchrun"):
        camera.compress(sources["a"], method, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
