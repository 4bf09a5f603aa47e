"""The console script `camera`."""

import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from experiments.commands import subcommands
from experiments.commands.subcommands import SUBCOMMANDS, Subcommand, main
from tests.helpers.runs.run_folders import add

ROOT = Path(__file__).resolve().parents[3]


def test_the_installed_script_is_this_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["camera"].partition(":")
    assert getattr(import_module(module), name) is main


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_subcommand(arguments, capsys):
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in SUBCOMMANDS)


def test_an_unknown_subcommand_is_answered_with_the_known_ones(capsys):
    assert main(["tabels"]) == 2
    said = capsys.readouterr().err
    assert "camera tabels is no command; did you mean tables?" in said
    assert all(f"\n  {name} " in said for name in SUBCOMMANDS)


@pytest.mark.parametrize("name", [name for name in SUBCOMMANDS if name not in ("run", "sweep")])
def test_every_subcommand_has_help_of_its_own(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["camera", name])
    try:
        code = main([name, "--help"])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr().out
    assert not code
    if name not in ("lm-eval", "bench"):  # lm-eval's own help; bench is for developers
        assert printed.startswith(f"usage: camera {name} ") and "python -m" not in printed


def test_hydra_gets_the_overrides_and_a_sweep_its_flag(monkeypatch):
    seen = []
    entry = import_module("experiments.__main__")
    monkeypatch.setattr(entry, "command", lambda: seen.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["camera"])
    main(["run", "sparsity=0.2"])
    main(["sweep", "sparsity=0.2,0.4"])
    main(["evaluate", "some/model", "evaluation=none"])
    assert seen == [
        ["camera run", "sparsity=0.2"],
        ["camera sweep", "-m", "sparsity=0.2,0.4"],
        ["camera evaluate", "model.path=some/model", "method=dense", "evaluation=none"],
    ]


def test_tables_of_an_output_folder(tmp_path, capsys):
    add(tmp_path, "a", "camera_p", 0.2)
    assert main(["tables", str(tmp_path)]) == 0
    assert "Camera-P" in capsys.readouterr().out


def test_a_refusal_is_one_sentence_and_exit_code_1(capsys):
    assert main(["describe", "no/such/folder/at/all"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said


def test_a_missing_extra_is_named(monkeypatch, capsys):
    def missing(program, arguments):
        raise ModuleNotFoundError("No module named 'pandas'", name="pandas")

    monkeypatch.setitem(subcommands.SUBCOMMANDS, "tables", Subcommand("", missing))
    assert main(["tables"]) == 1
    assert "pip install 'camera-moe[experiments]'" in capsys.readouterr().err


def test_a_fault_of_a_subcommand_is_not_hidden(monkeypatch):
    def broken(program, arguments):
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing")

    monkeypatch.setitem(subcommands.SUBCOMMANDS, "tables", Subcommand("", broken))
    with pytest.raises(ModuleNotFoundError):
        main(["tables"])


def test_a_reader_that_has_enough_is_no_fault(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["--help"]) == 141


@pytest.mark.parametrize("arguments", [["evaluate"], ["evaluate", "evaluation=none"]])
def test_evaluate_without_a_model_shows_how_it_is_called(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: camera evaluate MODEL" in capsys.readouterr().out


QUICK = {
    "help": ["--help"],
    "a typo": ["run", "sparsty=0.2"],
    "TAB": ["completion", "answers"],
    "status": ["status", "OUTPUT"],
    "tables": ["tables", "OUTPUT"],
    "report": ["report", "OUTPUT"],
}


def test_what_computes_nothing_loads_neither_torch_nor_transformers(tmp_path):
    """These take seconds to load; all in one process, in which a command adds to what is there."""
    add(tmp_path, "a", "camera_p", 0.2)
    asked = {
        name: [str(tmp_path) if text == "OUTPUT" else text for text in arguments]
        for name, arguments in QUICK.items()
    }
    code = (
        "import json, sys\n"
        "from experiments.commands.subcommands import main\n"
        "for name, arguments in json.loads(sys.argv.pop()).items():\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as end:\n"
        "        print(end.code)\n"
        "    print('loaded', name, sorted({'torch', 'transformers'} & set(sys.modules)))\n"
        "    if name == 'help':\n"
        "        assert not {'hydra', 'pandas'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COMP_LINE": "camera run method=camera_p spar"},
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("loaded ")]
    assert said == [f"loaded {name} []" for name in QUICK]
    assert "did you mean sparsity" in done.stdout  # each did what was asked
    assert "sparsity=" in done.stdout and (tmp_path / "report.html").exists()
