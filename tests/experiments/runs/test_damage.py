"""Files of a run that a power cut or a copy damaged are made again, with the same result."""

import pytest

from experiments.records.files import read_json
from experiments.records.folders import Folders
from experiments.runs.run import run
from tests.helpers.composing import settings_of, tiny


@pytest.fixture
def settings(checkpoints, data_folder, tmp_path):
    overrides = [*tiny(checkpoints("qwen2_moe"), data_folder, tmp_path), "method=magnitude"]
    return settings_of(*overrides, "evaluation.perplexity=[wikitext2]")


def perplexity(folder):
    return read_json(folder / "metrics.json")["perplexity"]


@pytest.mark.parametrize("damage", ["empty", "zeros"])
@pytest.mark.parametrize("name", ["compress", "perplexity-wikitext2", "metrics"])
def test_a_damaged_part_is_done_again(name, damage, settings):
    folder = run(settings)
    before = perplexity(folder)
    file = folder / f"{name}.json"
    file.write_bytes(b"" if damage == "empty" else bytes(file.stat().st_size))
    (folder / "metrics.json").unlink(missing_ok=name != "metrics")
    assert not Folders.of(settings).files.is_done  # DONE alone doesn't say so
    assert perplexity(run(settings)) == before


@pytest.mark.parametrize("name", ["camera.json", "model.safetensors.index.json"])
def test_a_damaged_checkpoint_is_made_again(name, settings, caplog):
    folder = run(settings)
    before, checkpoint = perplexity(folder), Folders.of(settings).checkpoint
    (checkpoint / name).write_text("")
    for file in folder.glob("*.json"):
        file.unlink()
    assert perplexity(run(settings)) == before
    assert f"{checkpoint} is damaged" in caplog.text


def test_a_checkpoint_that_lacks_weights_is_made_again(settings, caplog):
    folder = run(settings)
    checkpoint = Folders.of(settings).checkpoint
    next(checkpoint.glob("model-*.safetensors")).unlink()
    for file in folder.glob("*.json"):
        file.unlink()
    run(settings)
    assert f"{checkpoint} is damaged" in caplog.text and Folders.of(settings).is_compressed


def test_names_longer_than_a_file_system_takes(checkpoints, data_folder, tmp_path):
    for name in ("m" * 300, "模" * 100):
        overrides = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path)
        more = ("method=magnitude", "evaluation=none", f"model.name={name!r}")
        folder = run(settings_of(*overrides, *more))
        assert folder.name.startswith(name[:60])
        assert read_json(folder / "metrics.json")["model"] == name
