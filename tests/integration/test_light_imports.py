"""What starts at once: no entry below loads torch, transformers or another heavy package."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import experiments
from experiments.config.location import CONF
from tests.helpers.runs.run_folders import add

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "scipy", "matplotlib", "lm_eval", "datasets", "wandb")
ROOMS = ("config", "records", "sweeps", "tables", "report")
LIBRARY = (
    "camera",
    "camera.method",
    "camera.runtime.errors",
    "camera.runtime.files",
    "camera.runtime.values",
    "camera.moe.families",
    "camera.calibration.corpora",
    "camera.calibration.settings",
    "camera.compensation.settings",
    "camera.streaming.settings",
    "camera.evaluation.tasks.names",
)
OTHERS = (
    "experiments.commands.status",
    "experiments.commands.clean",
    "experiments.commands.mirror",
    "hydra_plugins.camera_sweeper",
    "main",
)
FOUND = "print('loaded', *sorted(set(sys.modules) & set(json.loads(sys.argv.pop(1)))))"
PROGRAM = f"""
import json, runpy, sys
heavy = sys.argv.pop(1)
try:
    {{}}
except SystemExit as end:
    assert not end.code, end.code
sys.argv.insert(1, heavy)
{FOUND}
"""

# Each piece of code in a process of its own, forked from one that has what is light and not ours.
EACH = f"""
import json, os, runpy, sys, traceback
import hydra, omegaconf, pandas
heavy = sys.argv[1]
for code in json.loads(sys.argv.pop()):
    sys.argv[1:] = [heavy]
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            exec(code, {{}})
            {FOUND}
            sys.stdout.flush()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, code
"""


def modules():
    """The modules of the light rooms, and the classes that conf/ names."""
    for room in ROOMS:
        folder = Path(experiments.__file__).parent / room
        for found in pkgutil.iter_modules([str(folder)]):
            if found.name != "__main__":
                yield f"experiments.{room}.{found.name}"
    targets = {OmegaConf.load(file).get("_target_") for file in CONF.glob("*/*.yaml")}
    yield from sorted({target.rpartition(".")[0] for target in targets if target})


def loaded(code, *arguments):
    """The heavy modules that a fresh process has after running this code."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(code), json.dumps(HEAVY), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def loaded_by_each(codes):
    """{code: the heavy modules that a process has after running it}, where it has any."""
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(HEAVY), json.dumps(codes)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("loaded")]
    return {code: heavy for code, heavy in zip(codes, lines, strict=True) if heavy}


def test_imports_are_light():
    codes = [f"import {name}" for name in dict.fromkeys([*LIBRARY, *modules(), *OTHERS])]
    assert len(codes) > 50
    assert loaded_by_each(codes) == {}


def test_the_public_names_are_listed_lightly():
    assert loaded("import camera; dir(camera); camera.CameraError") == []


def test_help_is_light():
    assert loaded("runpy.run_path('main.py', run_name='__main__')", "--help") == []


def test_composing_is_light():
    codes = [
        "from hydra import compose, initialize_config_dir; "
        "from experiments.config.schema import CONF; "
        "initialize_config_dir(str(CONF), version_base='1.3').__enter__(); "
        f"compose('config', ['experiment={file.stem}'])"
        for file in (CONF / "experiment").glob("*.yaml")
    ]
    assert loaded_by_each(codes) == {}


@pytest.mark.parametrize("command", ["tables", "commands.status"])
def test_a_command_over_finished_runs_is_light(command, tmp_path):
    run = add(tmp_path, "a", "camera_p", 0.2)
    sweep = tmp_path / "sweeps" / "1"
    sweep.mkdir(parents=True)
    job = {"overrides": ["method=camera_p"], "grids": [], "run": run.name, "refused": None}
    plan = {
        "output": "../..",
        "started": 0.0,
        "jobs": [job | {"like": ["tiny_moe", "camera_p", ""]}],
    }
    (sweep / "plan.json").write_text(json.dumps(plan))
    code = f"runpy.run_module('experiments.{command}', run_name='__main__', alter_sys=True)"
    assert loaded(code, tmp_path) == []
