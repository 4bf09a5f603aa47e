"""Every setting is explained where it is declared, on docs/settings.md and in `--help`."""

import dataclasses

import pytest
import yaml
from omegaconf import OmegaConf

from experiments.__main__ import command
from experiments.config import reference
from experiments.config.constructor import typed_settings
from experiments.config.location import CONF
from experiments.config.schema import Config, Evaluation
from tests.helpers.runs.composing import config_of

SECTIONS = ("method", "calibration", "evaluation", "tracker", "hydra/launcher")
CHOICES = [(group, name) for group in SECTIONS for name in reference.choices(group)]


def test_the_page_is_current():
    written = (CONF.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == reference.page(), "python -m experiments.config.reference docs/settings.md"


def test_the_settings_of_a_run_are_all_explained():
    told = {setting.key: setting.meaning for setting in reference.main_settings()}
    groups = {"model", "method", "calibration", "evaluation", "tracker", "memory"}
    plain = {field.name for field in dataclasses.fields(Config)} - groups
    assert told.keys() == plain | {"memory.phi", "memory.hidden", "memory.experts"}
    assert all(told.values())


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_the_settings_of_a_choice_are_all_explained(group, name):
    settings = reference.settings_of(group, name)
    assert [setting.key for setting in settings if not setting.meaning] == []
    target = OmegaConf.load(CONF / group / f"{name}.yaml").get("_target_")
    if group != "hydra/launcher" and (target or group == "evaluation"):
        typed = typed_settings(target) if target else Evaluation
        known = {field.name for field in dataclasses.fields(typed)} - {"_target_"}
        assert {setting.key.split(".")[1] for setting in settings} == known


@pytest.mark.parametrize("group", reference.GROUPS)
def test_a_choice_has_a_sentence(group):
    found = reference.choices(group).values()
    assert found and all(choice.sentence.endswith(".") for choice in found)


@pytest.mark.parametrize("name", ["camera_plus", "rtn", "heapr"])
def test_a_default_that_is_told_is_the_one_that_is_composed(name):
    composed = OmegaConf.to_container(config_of(f"method={name}"), enum_to_str=True)["method"]
    for setting in reference.settings_of("method", name):
        default = setting.default
        expected = default if "${" in default else yaml.safe_load(default)
        assert composed[setting.key.removeprefix("method.")] == expected


def test_help_explains_the_settings_of_the_method_that_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["main.py", "--help", "method=mc"])
    assert command() is None
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "method.shared_bits=4" in line]
    assert line.endswith("bits of shared experts")
    assert "method.rank_scope" not in printed and "usage" not in printed


def test_help_names_the_command_that_was_typed():
    assert "camera sweep method=camera_p,heapr" in reference.help_text(program="camera run")
    assert "python main.py -m method=" in reference.help_text()


@pytest.mark.parametrize("program", ["camera run", "python main.py", "python -m experiments"])
def test_an_example_stands_apart_from_its_meaning(program):
    lines = reference.help_text(program=program).splitlines()
    examples = [line for line in lines[:7] if line.startswith("  ")]
    assert len(examples) == 4
    assert len({len(line) - len(line.split("  ")[-1].lstrip()) for line in examples}) == 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_help_fits_the_terminal(width):
    lines = reference.help_text(width=width).splitlines()
    examples = [line for line in lines if "python main.py" in line]
    names = [line for line in lines if line.startswith("  ") and "  " not in line.strip()]
    assert max(len(line) for line in lines if line not in (*examples, *names)) <= width
