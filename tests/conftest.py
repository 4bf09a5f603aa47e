"""Tiny random models of every family, and a tokenizer that needs no download."""

import os
from pathlib import Path

import pytest
import torch

import camera
from tests.helpers import gptq_problem
from tests.helpers.golden import golden_folder, golden_values
from tests.helpers.models import build_model, build_tokenizer, write_layout

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("WANDB_MODE", "offline")


# Tiny matrices: more threads only wait for each other. They also sum in another order, which the
# tests must bear: CAMERA_TEST_THREADS=8 shows whether they do.
torch.set_num_threads(int(os.environ.get("CAMERA_TEST_THREADS", "1")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", default=None, help="folder of golden vectors (default: ../shared/golden)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "golden(method, pattern): run with `expected`, each golden value of that method and name",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for mark in metafunc.definition.iter_markers("golden"):
        values = golden_values(golden_folder(metafunc.config), *mark.args)
        metafunc.parametrize("expected", values, ids=str)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    return write_layout(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """checkpoint(family): folder of a tiny random model with tokenizer, in several shards."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def checkpoint(family: str, **overrides) -> Path:
        key = (family, *sorted(overrides.items()))
        if key not in made:
            folder = root / f"{family}-{len(made)}"
            build_model(family, **overrides).save_pretrained(folder, max_shard_size="60KB")
            build_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return checkpoint


@pytest.fixture
def calibration() -> camera.Calibration:
    return camera.Calibration(source="wikitext2", samples=6, length=48)


@pytest.fixture(scope="session")
def golden(request) -> Path:
    return golden_folder(request.config)


@pytest.fixture
def W_ERC() -> torch.Tensor:
    """Weights of the experts that the tests of GPTQ's solver quantise."""
    torch.manual_seed(0)
    return torch.randn(gptq_problem.E, gptq_problem.R, gptq_problem.C) * 0.05


@pytest.fixture
def H_ECC() -> torch.Tensor:
    """Hessians of the inputs of these experts."""
    x_ENC = gptq_problem.inputs()
    return x_ENC.transpose(1, 2) @ x_ENC
