"""A sweep of six runs of which one fails and one is killed: what all engines are asked to bear."""

import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from experiments.config.location import CONF
from tests.cluster.fated import FOLDER

RATIOS = ("0.1", "0.15", "0.2", "0.25", "0.3", "0.35")
FAILS, DIES = "0.15", "0.25"
MINUTES = 8


@dataclass(frozen=True)
class Ended:
    """A command that ended: what it said, and what its output folder says of each ratio."""

    code: int
    seconds: float
    said: str
    statuses: dict[str, str]
    tries: Counter[str]


class SixRuns:
    """The same command as often as asked for, on one output folder."""

    def __init__(self, name: str, arguments: list[str], folder: Path, model: Path, data: Path):
        self.name, self.folder, self.output = name, folder, folder / "outputs"
        self.command = [sys.executable]
        self.arguments = [
            *("main.py", "-m", f"model.path={model}", f"data={data}", f"output={self.output}"),
            *("tracker=none", "evaluation=none", "calibration.samples=4", "calibration.length=48"),
            *("method=camera_p", "method._target_=tests.cluster.fated.Fated", "retry=failed"),
            f"sparsity={','.join(RATIOS)}",
            *arguments,
        ]
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", FOLDER: str(folder)}
        self.spell({})

    def spell(self, fates: dict[str, str]) -> None:
        """Write down what is to happen to which ratio from now on."""
        (self.folder / "fates.json").write_text(json.dumps(fates))

    def run(self) -> Ended:
        """Run the command, and print what it took."""
        tries = self.folder / "tries.txt"
        tries.unlink(missing_ok=True)
        began = time.monotonic()
        done = subprocess.run(
            [*self.command, *self.arguments],
            cwd=CONF.parent,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * MINUTES,
        )
        seconds = time.monotonic() - began
        lines = tries.read_text().splitlines() if tries.exists() else []
        first = Counter(line.split()[0] for line in lines if line.split()[2] == "0")
        ended = Ended(done.returncode, seconds, done.stdout, self._statuses(), first)
        (self.folder / f"said-{time.time():.0f}.txt").write_text(done.stdout)
        tried = ", ".join(f"{ratio}: {first[ratio]}" for ratio in RATIOS if first[ratio])
        print(f"\n{self.name}: {seconds:.0f} s, exit {done.returncode}, tries {tried}")
        return ended

    def _statuses(self) -> dict[str, str]:
        """The newest sweep's table: the status of each ratio."""
        newest = max(self.output.glob("sweeps/*"), default=self.output)
        table = newest / "table.csv"
        if not table.exists():
            return {}
        with table.open() as file:
            rows = list(csv.DictReader(file))
        return {f"{float(row['sparsity']) / 100:g}": row["status"] for row in rows}


def check_first(ended: Ended) -> None:
    """Four are done; the table and the last lines name the two that are not; exit code 1."""
    assert ended.code == 1, ended.said
    done = {ratio for ratio, status in ended.statuses.items() if status == "done"}
    assert done == {*RATIOS} - {FAILS, DIES}, ended.said
    assert "its fate was to fail" in ended.statuses[FAILS]
    assert ended.statuses[DIES] != "done"
    assert "4 of 6 jobs done" in ended.said
    named = [line for line in ended.said.splitlines() if line.startswith("failed: ")]
    assert sorted("killed: " in line for line in named) == [False, True], ended.said


def check_second(ended: Ended) -> None:
    """The two that were left are done, and nothing else was done again."""
    assert ended.code == 0, ended.said
    assert set(ended.statuses.values()) == {"done"} and len(ended.statuses) == len(RATIOS)
    assert ended.tries == Counter([FAILS, DIES]), ended.said
    assert "6 of 6 jobs done" in ended.said


def bear(runs: SixRuns, fates: dict[str, str]) -> Ended:
    """Both commands; what the first one said."""
    runs.spell(fates)
    first = runs.run()
    check_first(first)
    runs.spell({})
    check_second(runs.run())
    return first
