"""Names on the command line: as they were typed, or refused with the argument to write."""

import shlex

import pytest

from camera.runtime.errors import CameraError
from experiments.config.arguments import as_typed
from experiments.config.settings import Settings
from tests.helpers.composing import command, config_of, tiny

NAMES = [
    "2026_11_28",
    "1e5",
    "007",
    "12",
    "1.50",
    "true",
    "null",
    "nan",
    "NaN",
    "inf",
    "a-b",
    "x/y",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["output", "model.path", "model.name", "data"])
def test_a_name_is_the_text_that_was_typed(key, name):
    config = config_of(*as_typed([f"{key}={name}"]))
    found = config[key] if "." not in key else config.model[key.partition(".")[2]]
    assert found == name


def test_names_of_a_group_and_in_lists_too():
    asked = ["tracker=wandb", "tracker.project=2024_11", "tracker.tags=[2024_11,study,1e3]"]
    config = config_of(*as_typed(asked))
    assert config.tracker.project == "2024_11"
    assert config.tracker.tags == ["2024_11", "study", "1e3"]


def test_what_is_no_name_stays_as_it_is():
    same = ["sparsity=1e-1", "seed=1_000", "tracker.entity=null", "output='a,b'", "method=dense"]
    same += ["output=a,b", "evaluation.tasks=[piqa]", "evaluation.tasks=${nine_tasks:}", "-m"]
    same += ["evaluation.speed.batch_sizes=[1,8]", "output=${model.name}", "~tracker.tags"]
    assert as_typed(same) == same


def test_names_of_a_sweep():
    assert as_typed(["model.path=2024_06,b,1e5"]) == ["model.path='2024_06',b,'1e5'"]


@pytest.mark.parametrize("name", ["模型", "a=b", "it's", "#1", "(x) [y]", "~/one", "[y]"])
def test_a_name_that_needs_quotes_is_refused_with_the_argument_to_write(name):
    with pytest.raises(CameraError, match="write ") as refusal:
        as_typed([f"model.path={name}"])
    (mended,) = shlex.split(str(refusal.value).partition("write ")[2])
    assert config_of(*as_typed([mended])).model.path == name


def test_of_a_sweep_only_what_needs_quotes_gets_them():
    with pytest.raises(CameraError) as refusal:
        as_typed(["model.path=模型,b"])
    assert "\"model.path='模型',b\"" in str(refusal.value)


@pytest.mark.parametrize("key", ["evaluation.tasks=piqa", "evaluation.perplexity=c4"])
def test_one_value_for_a_list_is_refused_with_the_argument_to_write(key):
    name, _, value = key.partition("=")
    with pytest.raises(CameraError, match="is a list") as refusal:
        as_typed([key])
    assert f'"{name}=[{value}]"' in str(refusal.value)


def test_the_command_says_so_in_one_sentence(capsys):
    assert "model.path='模型'" in command("model.path=模型")


def test_home_is_expanded_once(monkeypatch, tmp_path, checkpoints, data_folder):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    (home / "model").symlink_to(checkpoints("qwen2_moe"))
    (home / "data").symlink_to(data_folder)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    overrides = tiny("'~/model'", "'~/data'", "'~/out'")
    more = ["evaluation=none", "method=magnitude"]
    assert command(*overrides, *more) == 0
    assert command("-m", *overrides, *more, "sparsity=0.2,0.3") == 0
    assert {path.name for path in (home / "out").iterdir()} >= {"runs", "sweeps", "table.md"}
    assert not list(here.iterdir())


def test_the_texts_of_the_embedded_model_are_found_from_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("experiments.config.settings.ensure_world", lambda folder: folder)
    texts = Settings.of(config_of("output='~/emb'")).texts()
    assert texts == str(tmp_path / "emb" / "data")
