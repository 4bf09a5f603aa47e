"""Tiny random models of every family, and a tokenizer that needs no download."""

import os
from pathlib import Path

import pytest
import torch

if (
    not torch.accelerator.is_available()
):  # else kernels are compiled; said before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import camera
from tests import fake_device
from tests.helpers.golden import golden_folder, golden_values
from tests.helpers.machine import interpreter
from tests.helpers.machine.gpu_report import MARK, GpuReport, about_card, real_card
from tests.helpers.models import build_model, build_tokenizer, write_layout
from tests.helpers.quantization import gptq_problem

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.pop("COLUMNS", None)  # as wide as a line is, whatever terminal the tests run in


# Tiny matrices: more threads only wait for each other. They also sum in another order, which the
# tests must bear: CAMERA_TEST_THREADS=8 shows whether they do.
THREADS = os.environ.get("CAMERA_TEST_THREADS", "1")
torch.set_num_threads(int(THREADS))
os.environ.setdefault("OMP_NUM_THREADS", THREADS)  # of processes and kernels that tests start, too


# What takes longest, in this order: a worker that begins one of these last leaves the others idle.
LONGEST = (
    "integration/test_device.py",
    "docs/test_notebooks.py",
    "experiments/sweeps/test_ranks.py",
    "experiments/sweeps/test_sweep.py",
    "experiments/runs/test_runs.py",
    "integration/test_newer_families.py",
    "camera/pipeline/test_estimate.py",
    "integration/test_contract.py",
    "camera/pipeline/test_processes.py",
    "integration/test_checkpoint_fuzz.py",
    "experiments/config/test_config.py",
    "experiments/config/test_presets.py",
    "experiments/sweeps/test_endings.py",
    "experiments/commands/test_offline.py",
    "docs/test_readme.py",
    "integration/test_light_imports.py",
    "integration/test_kills.py",
    "experiments/runs/test_damage.py",
    "experiments/figures/test_figures.py",
    "docs/test_docs_examples.py",
    "docs/test_examples.py",
    "experiments/sweeps/test_search.py",
    "experiments/sweeps/test_two_sweeps.py",
    "experiments/sweeps/test_launchers.py",
    "docs/test_extending.py",
    "docs/test_site.py",
    "experiments/runs/test_tracker.py",
)

_no_fake = f"none is asked for (--accelerator, or {fake_device.ASKED}): cuda, or another name"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--accelerator",
        default=None,
        help="a fake device that all tests, and the processes they start, have: cuda, or another "
        "name; cuda:2 is two cards",
    )
    parser.addoption(
        "--golden", default=None, help="folder of golden vectors (default: ../shared/golden)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("accelerator"):
        os.environ[fake_device.ASKED] = config.getoption("accelerator")
    _give_fake_device()
    config.addinivalue_line(
        "markers",
        "golden(method, pattern): run with `expected`, each golden value of that method and name",
    )
    if config.option.markexpr == MARK:
        card = real_card()
        about = None if card is None else about_card(card)
        config.pluginmanager.register(GpuReport(config.rootpath, about), "gpu report")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if config.option.markexpr == MARK:  # one process has the card for itself
        config.option.numprocesses = 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest first; `--no-loadscope-reorder` keeps xdist from sorting files by their tests."""
    rank = {Path(__file__).parent / file: number for number, file in enumerate(LONGEST)}
    assert all(file.exists() for file in rank), "LONGEST in tests/conftest.py names a missing file"
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def _give_fake_device() -> None:
    global _no_fake
    asked = fake_device.asked()
    if asked is None:
        return
    try:
        fake_device.activate(**asked)
    except fake_device.CannotBuildError as error:
        _no_fake = str(error)
        del os.environ[fake_device.ASKED]  # processes that tests start need not try
        return
    _no_fake = ""
    os.environ.update(fake_device.environment(os.environ[fake_device.ASKED]))


def pytest_report_header() -> str:
    return f"fake device: {_no_fake or os.environ[fake_device.ASKED]}"


@pytest.fixture(scope="session")
def fake() -> str:
    """The name of the fake device; skips where there is none."""
    if _no_fake:
        pytest.skip(f"no fake device: {_no_fake}")
    return fake_device.name()


@pytest.fixture(scope="session")
def accelerator(request) -> str:
    """The name of the accelerator, a real one or a fake; skips where there is none."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    return request.getfixturevalue("fake")


@pytest.fixture
def interpreted(monkeypatch) -> interpreter.Interpreted:
    """Grouped products by the kernel that a card has, interpreted; skips without Triton."""
    if reason := interpreter.missing():
        pytest.skip(reason)
    return interpreter.Interpreted(monkeypatch)


@pytest.fixture
def no_accelerator(monkeypatch) -> None:
    """`auto` is the CPU, whatever this machine has."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


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
