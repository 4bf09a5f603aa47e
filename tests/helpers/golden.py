"""A case of the golden vectors by its name."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.models import SHARED


def golden_case(folder, name: str):
    """What the index says of a case, and its tensors; the test skips where it is absent."""
    index = folder / "index.json"
    cases = json.loads(index.read_text())["cases"] if index.exists() else []
    found = next((case for case in cases if case["case"] == name), None)
    if found is None:
        pytest.skip(f"{folder} has no golden case {name}: pass --golden DIR")
    return found, load_file(folder / found["file"])


def golden_folder(config: pytest.Config) -> Path:
    """Folder of golden vectors: `--golden DIR`, else the whole set, else the small one here."""
    asked = config.getoption("--golden")
    if asked:
        return Path(asked)
    return (
        SHARED / "golden" if (SHARED / "golden").exists() else Path(__file__).parents[1] / "golden"
    )
