"""The code that stands in docs/ runs, and what docs/ tell of a run's files and log is there."""

import importlib.util
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

import baselines
import camera
from camera.calibration.statistics import KINDS
from camera.method import METHODS
from camera.moe.families import FAMILIES
from experiments.config.constructor import typed_settings
from experiments.records.files import read_json
from experiments.runs import run
from experiments.runs.metrics import SCORES
from experiments.runs.tracker import NullTracker
from tests.helpers.composing import command, tiny
from tests.helpers.documents import blocks, page
from tests.helpers.models import COMMON, build_tokenizer


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The method of extending.md, put where it says: its module and a folder for its YAML."""
    folder = tmp_path_factory.mktemp("extending")
    source, yaml = (blocks(page("extending.md"), kind)[0] for kind in ("python", "yaml"))
    target = OmegaConf.create(yaml)["_target_"]
    module, _, name = target.rpartition(".")
    place = folder / f"{module.rpartition('.')[2]}.py"
    place.write_text(source, encoding="utf-8")
    (folder / "method").mkdir()
    (folder / "method" / f"{place.stem}.yaml").write_text(yaml, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(module, place)
    loaded = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(METHODS), mock.patch.dict(KINDS):
        patch.setitem(sys.modules, module, loaded)
        spec.loader.exec_module(loaded)
        patch.setattr(baselines, place.stem, loaded, raising=False)
        types = typed_settings(target)
        ConfigStore.instance().store(group="hydra/types/method", name=place.stem, node=types)
        yield getattr(loaded, name), folder


@pytest.fixture(scope="module")
def sweep(example, checkpoints, data_folder, tmp_path_factory):
    """The output folder of a sweep over it, and the names that the tracker was told."""
    output, told = tmp_path_factory.mktemp("docs") / "outputs", set()
    heard = {
        "log": lambda self, values: told.update(values),
        "log_figures": lambda self, files: told.update(f"figures/{file.stem}" for file in files),
        "log_histograms": lambda self, histograms: told.update(
            f"energy/{kind}_{layer:02d}" for layer in histograms for kind in ("layer", "zeros")
        ),
    }
    arguments = tiny(checkpoints("qwen2_moe"), data_folder, output)
    methods = f"method={example[0].name},camera_p,dense"
    places = f"hydra.searchpath=[file://{example[1]}]"
    with mock.patch.multiple(NullTracker, **heard):
        assert command("-m", *arguments, methods, "sparsity=0.4", places, "propagate=dense") == 0
        assert command(*arguments, "method=camera_q", "bits=2.9", "method.group_size=16") == 0
    return output, told


def the_run(output: Path, method: str) -> Path:
    (folder,) = (output / "runs").glob(f"*-{method}-*")
    return folder


def test_the_example_method_runs_as_any_other(example, sweep):
    name = example[0].name
    metrics = read_json(the_run(sweep[0], name) / "metrics.json")
    assert metrics["method"] == name
    assert metrics["sparsity"]["moe"] == pytest.approx(0.4, abs=0.02)
    assert f" {name} " in (sweep[0] / "table.md").read_text()


def test_the_example_method_ranks_by_its_formula(
    example, checkpoints, data_folder, tmp_path, calibration
):
    """Against a plain loop over tokens, with the hidden states that the model itself hands on."""
    source = checkpoints("llama")
    result = camera.compress(
        source, example[0].name, tmp_path / "o", sparsity=0.5, calibration=calibration,
        data=data_folder, device="cpu", propagate="dense", progress=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(source)
    ffn, inputs = model.model.layers[0].mlp, []
    ffn.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    tokens = camera.calibration.tokens.calibration_tokens(
        build_tokenizer(), calibration, data=data_folder, seed=1234, max_length=128
    )
    with torch.no_grad():
        model(tokens.ids_NL)
        phi = ffn.act_fn(ffn.gate_proj(inputs[0])) * ffn.up_proj(inputs[0])
        score = phi.abs().sum((0, 1)) * ffn.down_proj.weight.norm(dim=0)
    kept = score.argsort(descending=True)[: result.widths["model.layers.0.mlp"][0]].sort().values
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "o").model.layers[0].mlp
    assert torch.equal(cut.up_proj.weight, ffn.up_proj.weight[kept])


def test_the_example_family_is_compressed(data_folder, tmp_path, calibration):
    (code,) = blocks(page("extending.md"), "python")[1:]
    small = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    small |= {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3}
    known = set(FAMILIES)
    with mock.patch.dict(FAMILIES):
        exec(compile(code, "extending.md", "exec"), {})
        (kind,) = set(FAMILIES) - known
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**COMMON, **small, "initializer_range": 0.1})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
        build_tokenizer().save_pretrained(tmp_path / "m")
        result = camera.compress(
            tmp_path / "m", "camera_p", tmp_path / "o", sparsity=0.4, calibration=calibration,
            data=data_folder, device="cpu", progress=False,
        )  # fmt: skip
        assert result.sparsity["moe"] == pytest.approx(0.4, abs=0.02)
        camera.export(tmp_path / "o", tmp_path / "plain")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        cut, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("o", "plain"))
        torch.testing.assert_close(cut(ids).logits, plain(ids).logits)


def test_the_python_of_your_model_runs(sweep, checkpoints, data_folder, tmp_path, capsys):
    compressed = read_json(the_run(sweep[0], "camera_p") / "compress.json")["checkpoint"]
    places = {
        "outputs/checkpoints/NAME": compressed,
        "FOLDER_OR_HUB_ID": checkpoints("qwen2_moe"),
        "smaller": tmp_path / "smaller",
        "DATA": data_folder,
    }
    for code in blocks(page("your-model.md"), "python"):
        for name, place in places.items():
            code = code.replace(f'"{name}"', repr(str(place)))
        code = code.replace("samples=128, length=2048", "samples=4, length=48")
        exec(compile(code, "your-model.md", "exec"), {})
    assert (tmp_path / "smaller" / "camera.json").exists()
    assert "compressed" in capsys.readouterr().out


def test_a_checkpoint_is_measured_again_as_a_model(sweep, data_folder, tmp_path):
    folder = the_run(sweep[0], "camera_p")
    compressed = read_json(folder / "compress.json")["checkpoint"]
    assert command(*tiny(compressed, data_folder, tmp_path), "method=dense") == 0
    again = read_json(the_run(tmp_path, "dense") / "metrics.json")
    assert again["perplexity"] == pytest.approx(read_json(folder / "metrics.json")["perplexity"])


def test_names_that_wandb_shows_are_logged(sweep):
    _, told = sweep
    rows = re.findall(r"^\| (`[^|]*/[^|]*`[^|]*) \|", page("wandb.md"), re.MULTILINE)
    asked = {name for row in rows for name in re.findall(r"`([^`]+/[^`]+)`", row)}
    tables = {"tables/perplexity", "tables/tasks"}  # tests/experiments/runs/test_tracker.py
    tasks = {f"task-boolq/{score}" for score in SCORES}  # this data has none
    assert run._numbers("task-boolq", dict.fromkeys(SCORES, 0.5)).keys() == tasks
    assert len(asked) > 15 and asked - tables - tasks <= told


def test_tensors_are_named_as_the_format_says(sweep):
    told = page("checkpoint-format.md")
    for method, form in (("camera_p", "ragged"), ("camera_q", "packed")):
        folder = Path(read_json(the_run(sweep[0], method) / "compress.json")["checkpoint"])
        stored = read_json(folder / "config.json")["quantization_config"]
        assert stored.keys() == {"quant_method", "format", "made_by", "modules"}
        assert f"version **{stored['format']}**" in told
        (row,) = re.findall(rf"^\| `{form}` \|.*$", told, re.MULTILINE)
        found = {path: spec for path, spec in stored["modules"].items() if spec["form"] == form}
        assert found
        for path, spec in found.items():
            names = {
                re.sub("_(scales|zeros|rows|columns)$", "", name) for name in own(folder, path)
            }
            assert names and all(f"`{name}`" in row for name in names | spec.keys() - {"form"})


def own(folder: Path, path: str) -> list[str]:
    """Names below a module's path of its tensors on disk."""
    index = read_json(folder / "model.safetensors.index.json")["weight_map"]
    return [name.removeprefix(f"{path}.") for name in index if name.startswith(f"{path}.")]
