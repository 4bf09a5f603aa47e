"""What is installed: conf/, the packages that are named one by one, and the data in them."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from experiments.config.location import CONF, EMBEDDED_MODEL
from tests.helpers.runs.documents import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAMESPACE = "hydra_plugins"  # shared with Hydra's own plugins, so it has no __init__.py
OWN = {"camera", "baselines", "experiments", NAMESPACE}
LAZY = {  # of an extra or a build of torch, where it is needed: tasks, GGUF, int4, kernels
    "camera": ["lm-eval", "gguf", "compressed-tensors", "triton"],
    "experiments": ["xllamacpp"],
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names of the files in a wheel of this checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("camera", "baselines", "experiments", NAMESPACE, "conf"):
        (source / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    program = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    pytest.importorskip("setuptools.build_meta")
    subprocess.run(
        [sys.executable, "-c", program, str(out)], cwd=source, check=True, stdout=subprocess.DEVNULL
    )
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


def test_the_places_are_there():
    assert (CONF / "config.yaml").is_file() and (EMBEDDED_MODEL / "config.json").is_file()


def test_every_folder_of_code_is_a_package_of_the_distribution():
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for package in ("camera", "baselines", "experiments")
        for file in (ROOT / package).rglob("__init__.py")
    }
    named = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(named) == sorted(found | {NAMESPACE, "experiments.conf"})


def test_a_wheel_has_the_configuration_and_the_data(wheel):
    asked = {f"experiments/conf/{file.relative_to(CONF)}" for file in CONF.rglob("*.yaml")}
    asked |= {f"experiments/tiny_moe/model/{file.name}" for file in EMBEDDED_MODEL.iterdir()}
    for folder in ("report/page", "tables/published"):
        files = (ROOT / "experiments" / folder).glob("*.*")
        asked |= {f"experiments/{folder}/{file.name}" for file in files}
    asked |= {f"hydra_plugins/{file.name}" for file in (ROOT / NAMESPACE).glob("*.py")}
    asked.add("experiments/__main__.py")
    assert asked <= wheel


@pytest.mark.parametrize(
    ("packages", "extras"),
    [
        (("camera", "baselines"), ()),
        (("experiments", NAMESPACE), ("eval", "experiments", "slurm", "ray")),
    ],
)
def test_what_is_imported_is_declared(packages, extras):
    """Each import that is of neither the standard library nor this project."""
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *LAZY[packages[0]]]
    lines += [line for extra in extras for line in project["optional-dependencies"][extra]]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}
    found = {_module(name) for package in packages for name in _imported(ROOT / package)}
    assert found - declared - OWN - set(sys.stdlib_module_names) == set()


def _module(name: str) -> str:
    """The distribution of a module, as Python spells it."""
    return {"PIL": "pillow", "yaml": "pyyaml", "hydra": "hydra_core"}.get(name, name)


def _imported(folder: Path) -> set[str]:
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in folder.rglob("*.py"))
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}
