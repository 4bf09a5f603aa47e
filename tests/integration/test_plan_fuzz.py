"""Plans that are damaged or were made for another model: the same result or one sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import camera
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.checkpoints import shards_of

FAMILY, ONE_LAYER = "qwen2_moe", dict(num_hidden_layers=1)
METHODS = {"random": dict(sparsity=0.4), "rtn": dict(bits=5.15)}
OPTIONS = dict(device="cpu", progress=False)
LAYER = ("layers", "0")

Tensors = Callable[[torch.Tensor], torch.Tensor | None]
TENSORS: dict[str, Tensors] = {
    "gone": lambda t: None,
    "short": lambda t: t[:-1],
    "long": lambda t: torch.cat([t, t[:1]]),
    "empty": lambda t: t[:0],
    "in a table": lambda t: t[None],
    "NaN": lambda t: t.float() * torch.nan,
    "bits beyond": lambda t: t.long() + 9,
    "negative": lambda t: -1 - t.long(),
}
HEADERS = {
    "no method": (("method",), None),
    "another method": (("method",), "unheard_of"),
    "the other kind": ((*LAYER, "kind"), None),
    "an unknown kind": ((*LAYER, "kind"), "unheard_of"),
    "no facts": ((*LAYER, "facts"), {}),
    "facts in a list": ((*LAYER, "facts"), []),
    "an unknown setting": (("settings", "unheard_of"), 1),
    "settings in a list": (("settings",), [1]),
    "a setting of another type": (("settings",), {"sparsity": "much", "bits": "few"}),
    "no layers": (("layers",), {}),
    "layers in a list": (("layers",), [1]),
    "a layer by name": (("layers", "first"), {"kind": "micro_experts", "facts": {}}),
    "another family": (("model", "model_type"), "mixtral"),
    "another width": (("model", "hidden_size"), 64),
}


@pytest.fixture(scope="module")
def planned(checkpoints, tmp_path_factory):
    """planned(method): the source, and the checkpoint that a method made of it."""
    made: dict[str, Path] = {}

    def go(method: str) -> tuple[Path, Path]:
        source = checkpoints(FAMILY, **ONE_LAYER)
        if method not in made:
            made[method] = tmp_path_factory.mktemp("planned") / method
            camera.compress(source, method, made[method], **METHODS[method], **OPTIONS)
        return source, made[method]

    return go


def rewritten(plan: Path, to: Path, change: Callable[[dict, dict], None]) -> Path:
    with safe_open(plan, "pt") as file:
        header = json.loads(file.metadata()["camera"])
    tensors = load_file(plan)
    change(header, tensors)
    save_file(tensors, to, metadata={"camera": json.dumps(header)})
    return to


def change_of(kind: str) -> Callable[[dict, dict], None]:
    def tensors_change(header: dict, tensors: dict) -> None:
        name = min(tensors)
        damaged = TENSORS[kind](tensors.pop(name))
        if damaged is not None:
            tensors[name] = damaged

    def header_change(header: dict, tensors: dict) -> None:
        path, value = HEADERS[kind]
        for part in path[:-1]:
            header = header[part]
        other = {"micro_experts": "bits", "bits": "micro_experts"}
        header[path[-1]] = other[header["kind"]] if kind == "the other kind" else value

    return tensors_change if kind in TENSORS else header_change


def ends_well(source: Path, plan, want: Path, out: Path, monkeypatch) -> None:
    load_layer, read = MetaModel.load_layer, []
    monkeypatch.setattr(
        MetaModel,
        "load_layer",
        lambda self, index, *more: (read.append(index), load_layer(self, index, *more))[1],
    )
    try:
        camera.apply(source, plan, out, **OPTIONS)
    except CameraError as error:
        assert str(error).endswith((".", "?")) and "\n" not in str(error)
        assert not read and not (out.parent.exists() and list(out.parent.iterdir()))
    else:
        assert shards_of(out) == shards_of(want)


@pytest.mark.parametrize("kind", [*TENSORS, *HEADERS])
@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_plan(method, kind, planned, tmp_path, monkeypatch):
    source, made = planned(method)
    plan = rewritten(made / "plan.safetensors", tmp_path / "plan", change_of(kind))
    ends_well(source, plan, made, tmp_path / "runs/out", monkeypatch)


@pytest.mark.parametrize("length", [0, 8, 60, -1])
def test_a_plan_that_ends_early(length, planned, tmp_path, monkeypatch):
    source, made = planned("random")
    (tmp_path / "plan").write_bytes((made / "plan.safetensors").read_bytes()[:length])
    ends_well(source, tmp_path / "plan", made, tmp_path / "runs/out", monkeypatch)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (dict(hidden_size=64), "made for hidden_size=64, and the model has 32"),
        (dict(moe_intermediate_size=16), "layer 0, was made for experts of other widths"),
        (dict(num_experts=4), "layer 0, was made for experts of other widths"),
        (dict(num_hidden_layers=2), "speaks of layer 1"),
    ],
    ids=str,
)
def test_a_plan_of_another_model_is_refused(other, told, planned, checkpoints, tmp_path):
    source, _ = planned("random")
    foreign = checkpoints(FAMILY, **{**ONE_LAYER, **other})
    camera.compress(foreign, "random", tmp_path / "theirs", **METHODS["random"], **OPTIONS)
    with pytest.raises(CameraError, match=told):
        camera.apply(source, tmp_path / "theirs", tmp_path / "runs/out", **OPTIONS)


def test_a_plan_that_is_not_of_its_method_is_refused(planned, tmp_path):
    source, made = planned("random")
    bits = camera.Plan.load(planned("rtn")[1])
    mixed = replace(camera.Plan.load(made), layers=bits.layers)
    with pytest.raises(CameraError, match="layer 0, is of the kind bits, where the method makes"):
        camera.apply(source, mixed, tmp_path / "out", **OPTIONS)


def test_a_plan_of_before_is_applied(planned, tmp_path):
    source, made = planned("random")
    older = rewritten(made / "plan.safetensors", tmp_path / "plan", lambda h, _: h.pop("model"))
    camera.apply(source, older, tmp_path / "out", **OPTIONS)
    assert shards_of(tmp_path / "out") == shards_of(made)


def test_the_home_folder_is_found(planned, tmp_path, monkeypatch):
    source, made = planned("random")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "source").symlink_to(source)
    (tmp_path / "plan").symlink_to(made / "plan.safetensors")
    monkeypatch.chdir(tmp_path)
    keep = dict(statistics="~/kept", **METHODS["random"], **OPTIONS)
    camera.compress("~/source", "random", "~/one", **keep)
    camera.apply("~/source", "~/plan", "~/two", **OPTIONS)
    camera.export("~/one", "~/plain")
    for name in ("one", "two", "plain"):
        assert (tmp_path / name / "config.json").exists()
    assert not (tmp_path / "~").exists()
