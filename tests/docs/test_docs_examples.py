"""The code that stands in docs/ runs, and what docs/ tell of a run's files and log is there."""

import re
from pathlib import Path
from unittest import mock

import pytest

from experiments.records.files import read_json
from experiments.runs.summary import scores_of
from experiments.runs.tracker import NullTracker
from tests.helpers.runs.composing import command, tiny
from tests.helpers.runs.documents import blocks, page


@pytest.fixture(scope="module")
def sweep(checkpoints, data_folder, tmp_path_factory):
    """The output folder of a sweep, and the names that the tracker was told."""
    output, told = tmp_path_factory.mktemp("docs") / "outputs", set()
    heard = {
        "log": lambda self, values: told.update(values),
        "log_figures": lambda self, files: told.update(f"figures/{file.stem}" for file in files),
        "log_layer": lambda self, layer, found: told.update(f"layer/{name}" for name in found),
        "log_histograms": lambda self, histograms: told.add("energy/histogram"),
        "log_tables": lambda self, tables: told.update(f"tables/{name}" for name in tables),
    }
    arguments = tiny(checkpoints("qwen2_moe"), data_folder, output)
    pruning = ("method=camera_p,dense", "sparsity=0.4", "propagate=dense")
    with mock.patch.multiple(NullTracker, **heard):
        assert command("-m", *arguments, *pruning) == 0
        assert command(*arguments, "method=camera_q", "bits=2.9", "method.group_size=16") == 0
    return output, told


def the_run(output: Path, method: str) -> Path:
    (folder,) = (output / "runs").glob(f"*-{method}-*")
    return folder


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
    _, _, text = page("wandb.md").partition("## What is logged")
    rows, _, _ = text.partition("A sweep ends")
    asked = set(re.findall(r"`(\w+/\w+)`", rows))
    # tasks, divergence, speed and a refit, of which the runs here have none
    others = {"tables/tasks", "layer/refit_missing", "speed/prefill_1", "speed/decode_1"}
    others |= scores_of("task-boolq", {"acc": 0.5, "acc_norm": None}).keys()
    found = {"kl": 0.1, "agreement": 0.9, "acceptance": 0.9}
    others |= (
        scores_of("perplexity-wikitext2", {"perplexity": 2, "divergence": found}).keys() - told
    )
    others |= {"tables/generative", *scores_of("generative-gsm8k", {"score": 0.5})}
    assert len(asked) > 25 and asked - told == others


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
