"""Damaged checkpoints: the right result or one sentence, before any layer is read.

What is right, transformers says: the logits of the model that it reads from the same damaged
folder, without the micro-experts that the plan removes.
"""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import camera
from camera.checkpoint.loading import load_model
from camera.checkpoint.shards import INDEX
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers import mutations
from tests.helpers.models import FAMILIES
from tests.helpers.mutations import DROPPED, TENSORS, TEXTS, VALUES, edited, keyed, told
from tests.helpers.oracles import ffn_of, shared_of

FAMILY = "qwen2_moe"
ONE_LAYER = dict(num_hidden_layers=1)
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
OTHERS = ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight"]
IDS_BL = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
CONFIG = "config.json"
KEYS = ["dtype", "model_type", "quantization_config", "head_dim"]
KEYS += sorted(AutoConfig.for_model(FAMILY).to_dict().keys() - PretrainedConfig().to_dict().keys())
DRAWN = 24  # damages of other families, drawn


def drawn() -> list[tuple[str, int]]:
    draw = random.Random(0)
    return [(draw.choice(sorted(FAMILIES)), draw.randrange(10**6)) for _ in range(DRAWN)]


FILES = dict(mutations.of_the_index(OTHERS[1])) | dict(mutations.of_the_shards(OTHERS[1]))
FILES |= {f"{CONFIG} {content!r}": mutations.text(CONFIG, content) for content in TEXTS}
FILES |= {
    f"generation_config.json {content!r}": mutations.text("generation_config.json", content)
    for content in ("null", "{")
}
FILES |= {
    f"attn_implementation {value!r}": keyed(CONFIG, "attn_implementation", value=value)
    for value in ([], 3, "x")  # this machine's matter, not the model's
}
FILES |= {
    f"{key} {kind}": mutations.tensor(key, kind) for key in (EXPERT, *OTHERS) for kind in TENSORS
}


@pytest.fixture
def damaged(tmp_path):
    """damaged(checkpoint, change): a copy of a folder, changed."""

    def go(checkpoint: Path, change: mutations.Change) -> Path:
        shutil.copytree(checkpoint, tmp_path / "damaged")
        change(tmp_path / "damaged")
        return tmp_path / "damaged"

    return go


@pytest.fixture
def layers_read(monkeypatch) -> list[int]:
    read, load_layer = [], MetaModel.load_layer
    monkeypatch.setattr(
        MetaModel,
        "load_layer",
        lambda self, index, *more: (read.append(index), load_layer(self, index, *more))[1],
    )
    return read


@torch.no_grad()
def logits(folder: Path, plan: Path | None = None) -> torch.Tensor | None:
    """What transformers computes of a folder, all of whose tensors it finds; None if it can't."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:
            return None
        if plan is not None:
            silence(model, plan)
        return model.eval()(IDS_BL).logits
    except Exception:  # whatever it is: there is no right result
        return None


def silence(model, plan: Path) -> None:
    """Zero the output weights of the micro-experts that a plan removes."""
    with safe_open(plan, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (a file is no dict)
            index, name = key.split(".")
            assert name == "keep_N"
            ffn, keep_N = ffn_of(model.model.layers[int(index)]), file.get_tensor(key)
            mlp = shared_of(ffn) if hasattr(ffn, "experts") else ffn
            first = 0 if mlp is None else mlp.down_proj.weight.shape[1]
            if mlp is not None:
                mlp.down_proj.weight *= keep_N[:first]
            if hasattr(ffn, "experts"):
                experts, _, width = ffn.experts.down_proj.shape
                ffn.experts.down_proj *= keep_N[first:].view(experts, 1, width)


def is_told(error: pytest.ExceptionInfo, folder: Path) -> None:
    """One sentence, and nothing left of the run."""
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence
    assert not re.search(r"Traceback|<class|object at 0x", sentence), sentence
    assert not folder.exists() or not list(folder.iterdir())


def ends_well(source: Path, out: Path, layers_read: list[int], otherwise: Path | None) -> None:
    """Compress; `otherwise` is read where transformers can't read what Camera can."""
    try:
        camera.compress(source, "random", out, sparsity=0.4, device="cpu", progress=False)
    except CameraError:
        is_told(pytest.ExceptionInfo.from_current(), out.parent)
        assert not layers_read
        return
    want = logits(source, out / "plan.safetensors")
    if want is None and otherwise is not None:
        want = logits(otherwise, out / "plan.safetensors")
    assert want is not None, "published what can't be computed"
    got = logits(out)
    assert got is not None, "published what can't be read"
    assert_close(got, want, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("value", VALUES, ids=told)
@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_the_config(key, value, checkpoints, damaged, layers_read, tmp_path):
    source = damaged(checkpoints(FAMILY, **ONE_LAYER), keyed(CONFIG, key, value=value))
    ends_well(source, tmp_path / "runs/out", layers_read, None)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_source(name, checkpoints, damaged, layers_read, tmp_path):
    checkpoint = checkpoints(FAMILY, **ONE_LAYER)
    source = damaged(checkpoint, FILES[name])
    ends_well(source, tmp_path / "runs/out", layers_read, checkpoint)


@pytest.mark.parametrize(("family", "seed"), drawn())
def test_two_values_of_the_config_of_any_family(
    family, seed, checkpoints, damaged, layers_read, tmp_path
):
    draw = random.Random(seed)

    def change(said: dict) -> None:
        for key in draw.sample(sorted(said), 2):
            if (value := draw.choice(VALUES)) is DROPPED:
                del said[key]
            else:
                said[key] = value

    source = damaged(checkpoints(family, num_hidden_layers=2), edited(CONFIG, change))
    ends_well(source, tmp_path / "runs/out", layers_read, None)


@pytest.mark.parametrize("name", ["no metadata", "not listed", "doubled", f"{EXPERT} half"])
def test_what_is_harmless_is_not_refused(name, checkpoints, damaged, tmp_path):
    source = damaged(checkpoints(FAMILY, **ONE_LAYER), FILES[name])
    camera.compress(source, "random", tmp_path / "out", sparsity=0.4, device="cpu", progress=False)


# ---- compressed checkpoints ----

FORMS = {"ragged": ("random", dict(sparsity=0.4)), "packed": ("rtn", dict(bits=5.15))}
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def compressed(checkpoints, tmp_path_factory):
    """compressed(form): a checkpoint of this form, and its logits."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def go(form: str) -> tuple[Path, torch.Tensor]:
        if form not in made:
            out = tmp_path_factory.mktemp("compressed") / form
            method, settings = FORMS[form]
            source = checkpoints(FAMILY, **ONE_LAYER)
            camera.compress(source, method, out, device="cpu", progress=False, **settings)
            made[form] = out, logits(out)
        return made[form]

    return go


def spec_changes(form: str) -> dict[str, mutations.Change]:
    """What may be wrong with quantization_config, in a folder whose index knows no better."""
    where = ("quantization_config", "modules", EXPERTS)
    fields = {"ragged": ["form", "widths"]}
    fields["packed"] = ["form", "hidden", "widths", "group_size", "sym", "gate_up", "down"]
    found = {
        f"{field} {told(value)}": keyed(CONFIG, *where, field, value=value)
        for field in fields[form]
        for value in (None, [], "x", 0, -1, 3, [1, 2], DROPPED)
    }
    found |= {
        f"{'.'.join(path)} {told(value)}": keyed(CONFIG, *path, value=value)
        for path in (where[:1], where[:2], where, (*where[:1], "format"), (*where[:1], "made_by"))
        for value in (None, [], "x", 1, 99, DROPPED)
    }
    ninth = EXPERTS.replace("0", "9")
    found["layer 9"] = edited(
        CONFIG,
        lambda said: said[where[0]]["modules"].update({ninth: said[where[0]]["modules"][EXPERTS]}),
    )
    return {
        name: lambda folder, change=change: (
            change(folder),
            keyed(INDEX, "metadata", "camera_modules", value=DROPPED)(folder),
        )
        for name, change in found.items()
    }


def tensor_changes() -> dict[str, mutations.Change]:
    keys = (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj", OTHERS[1])
    found = {f"{key} {kind}": mutations.tensor(key, kind) for key in keys for kind in TENSORS}
    return found | dict(mutations.of_the_shards(keys[0]))


CASES = [(form, name) for form in FORMS for name in (*spec_changes(form), *tensor_changes())]
CASES += [(form, name) for form in FORMS for name in ("camera.json", "plan.safetensors")]


def damage_of(form: str, name: str) -> mutations.Change:
    if name in ("camera.json", "plan.safetensors"):
        return lambda folder: (folder / name).write_text("{")
    return (spec_changes(form) | tensor_changes())[name]


@torch.no_grad()
def whole(folder: Path) -> torch.Tensor:
    return load_model(folder, device="cpu")(IDS_BL).logits


@torch.no_grad()
def streamed(folder: Path) -> torch.Tensor:
    meta = MetaModel(folder)
    for index in range(len(meta.layers)):
        meta.load_layer(index)
    meta.load_rest()
    meta.model.tie_weights()
    return meta.model(IDS_BL).logits


@pytest.mark.parametrize(("form", "name"), CASES)
def test_a_compressed_checkpoint(form, name, compressed, damaged, tmp_path):
    checkpoint, want = compressed(form)
    folder = damaged(checkpoint, damage_of(form, name))
    for read in (whole, streamed):
        try:
            got = read(folder)
        except CameraError:
            is_told(pytest.ExceptionInfo.from_current(), tmp_path / "runs")
        else:
            assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_specs_of_another_run_are_refused(compressed, damaged):
    """Their tensors have the same shapes: widths in another order give other experts."""

    def change(said: dict) -> None:
        said["quantization_config"]["modules"][EXPERTS]["widths"].reverse()

    checkpoint, _ = compressed("ragged")
    widths = json.loads((checkpoint / CONFIG).read_text())["quantization_config"]["modules"]
    assert widths[EXPERTS]["widths"] != widths[EXPERTS]["widths"][::-1]
    folder = damaged(checkpoint, edited(CONFIG, change))
    for read in (whole, streamed):
        with pytest.raises(CameraError, match="isn't the one that its weights were written with"):
            read(folder)
