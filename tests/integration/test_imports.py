"""Who may import whom: the contracts of pyproject.toml, and folders that a reader can take in."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = [contract["id"] for contract in PYPROJECT["tool"]["importlinter"]["contracts"]]
MOST_CHILDREN = 10
LARGER = {"camera", "experiments"}  # rooms, and what a user or a method's author types


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_contract_is_kept(contract, tmp_path):
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    arguments = ["--contract", contract, "--cache-dir", str(tmp_path), "--no-logo"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_folder_has_few_children():
    packages = ("camera", "baselines", "experiments")
    folders = {file.parent for package in packages for file in (ROOT / package).rglob("*.py")}
    counts = {str(folder.relative_to(ROOT)): len(_children(folder)) for folder in folders}
    large = {name: count for name, count in counts.items() if count > MOST_CHILDREN}
    assert set(large) <= LARGER, large


def _children(folder: Path) -> list[Path]:
    """Modules, and folders that have some."""
    modules = [file for file in folder.glob("*.py") if not file.stem.startswith("__")]
    return modules + [child for child in folder.iterdir() if any(child.glob("*.py"))]
