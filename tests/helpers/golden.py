"""Golden vectors: cases by name, and expected values by what the index says there is."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.models import SHARED


def golden_folder(config: pytest.Config) -> Path:
    """Folder of golden vectors: `--golden DIR`, else the whole set, else the small one here."""
    asked = config.getoption("--golden")
    if asked:
        return Path(asked)
    return (
        SHARED / "golden" if (SHARED / "golden").exists() else Path(__file__).parents[1] / "golden"
    )


def golden_cases(folder: Path, method: str | None = None) -> list[dict]:
    """What the index says of the cases of a method, or of all."""
    index = folder / "index.json"
    cases = json.loads(index.read_text())["cases"] if index.exists() else []
    return [case for case in cases if method in (None, case["method"])]


def golden_case(folder: Path, name: str):
    """What the index says of a case, and its tensors; the test skips where it is absent."""
    found = next((case for case in golden_cases(folder) if case["case"] == name), None)
    if found is None:
        pytest.skip(f"{folder} has no golden case {name}: pass --golden DIR")
    return found, load_file(folder / found["file"])


@dataclass(frozen=True)
class GoldenValue:
    """An expected value of a case; `parts` are what its name says, by the pattern it was found by.

    Tests marked `golden(method, pattern)` get each of them in turn as `expected`.
    """

    path: Path
    case: dict
    name: str
    parts: tuple[str, ...]

    @property
    def hyper(self) -> dict:
        return self.case["hyper"]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the case."""
        return dict(_loaded(self.path))

    def names(self, pattern: str) -> list[re.Match[str]]:
        """Names of other expected values of the case."""
        return [found for name in self.case["expected"] if (found := re.fullmatch(pattern, name))]

    def compare(self, got: torch.Tensor, name: str | None = None) -> None:
        """By the tolerance that the index states; `name` is another value of the case."""
        compare(got, self.case, self.tensors, name or self.name)

    def __str__(self) -> str:
        return f"{self.case['case']}-{self.name}"


def golden_values(folder: Path, method: str, pattern: str) -> list[GoldenValue]:
    """Every expected value of a method's cases whose whole name matches the pattern."""
    return [
        GoldenValue(folder / case["file"], case, name, found.groups())
        for case in golden_cases(folder, method)
        for name in case["expected"]
        if (found := re.fullmatch(pattern, name))
    ]


def compare(got: torch.Tensor, case: dict, tensors: dict[str, torch.Tensor], name: str) -> None:
    """A value against the expected one of this name, by the tolerance that the index states."""
    rule = case["expected"][name]["compare"]
    got, want = got.double(), tensors[name].double()
    if rule["kind"] == "rel_fro":
        assert (got - want).norm() <= rule["tol"] * want.norm()
    elif rule["kind"] == "rel_max":
        assert (got - want).abs().max() <= rule["tol"] * want.abs().max()
    elif rule["kind"] == "exact":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=rule["rtol"], atol=rule["atol"])


@cache
def _loaded(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)
