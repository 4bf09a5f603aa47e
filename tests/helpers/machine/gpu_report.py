"""What `pytest -m gpu` measured on a card: gpu-report.json, and tables for docs/performance.md."""

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.runtime.device.accelerator import device_name, total_memory
from tests import fake_device

MARK = "gpu"
PROPERTY = "measured"
JSON, MARKDOWN = "gpu-report.json", "gpu-report.md"
NO_CARD = "this machine has no accelerator of its own"


@dataclass(frozen=True)
class Measured:
    """One number: of what, under which title, and what it is held against ("" for nothing)."""

    title: str
    what: str
    value: float
    unit: str
    goal: str = ""


def real_card() -> str | None:
    """The accelerator of this machine, such as cuda:0; None where there is none, or a fake."""
    if fake_device.asked() is not None or not torch.accelerator.is_available():
        return None
    return f"{torch.accelerator.current_accelerator().type}:0"


def about_card(card: str) -> dict[str, Any]:
    """What numbers of a card depend on."""
    device = torch.device(card)
    return {
        "card": device_name(device),
        "memory_gb": round(total_memory(device) / 1e9, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


class GpuReport:
    """Gathers outcomes and measurements while tests run, and writes them when all are done."""

    def __init__(self, folder: Path, about: dict[str, Any] | None):
        self._folder, self._about, self._began = folder, about, time.time()
        self._outcomes, self._failed = Counter[str](), list[str]()
        self._measured: list[Measured] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: when it ran, or where it never came to that."""
        if report.when != "call" and report.passed:
            return
        self._outcomes[report.outcome] += 1
        if report.failed:
            self._failed.append(report.nodeid)
        self._measured += [row for key, row in report.user_properties if key == PROPERTY]

    def pytest_sessionfinish(self) -> None:
        """Write both files; nothing without a card."""
        if self._about is None:
            return
        content = self.content()
        (self._folder / JSON).write_text(json.dumps(content, indent=2) + "\n")
        (self._folder / MARKDOWN).write_text(markdown(content))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say where the report is, or why there is none."""
        told = f"{self._folder / JSON} and {MARKDOWN} are written."
        if self._about is None:
            told = f"no {JSON}: {NO_CARD}."
        terminalreporter.write_line(told)

    def content(self) -> dict[str, Any]:
        """All of it, as it stands in the JSON file."""
        return {
            **(self._about or {}),
            "seconds": round(time.time() - self._began, 1),
            "outcomes": dict(self._outcomes),
            "failed": self._failed,
            "measured": [asdict(row) for row in self._measured],
        }


def markdown(content: dict[str, Any]) -> str:
    """A table per title, under what they were measured on."""
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(content["outcomes"].items()))
    lines = [
        f"**Measured** on {content['card']} ({content['memory_gb']} GB), torch {content['torch']}, "
        f"CUDA {content['cuda']}; {outcomes} in {content['seconds'] / 60:.1f} minutes."
    ]
    for title in dict.fromkeys(row["title"] for row in content["measured"]):
        rows = [row for row in content["measured"] if row["title"] == title]
        lines += ["", f"| {title} | | | goal |", "|---|---:|---|---:|"]
        lines += [
            f"| {row['what']} | {row['value']:.4g} | {row['unit']} | {row['goal']} |"
            for row in rows
        ]
    return "\n".join(lines) + "\n"
