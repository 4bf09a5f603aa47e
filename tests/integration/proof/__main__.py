"""Records every case, and prints where it differs from an earlier record."""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import camera
from tests.integration.proof.cases import CASES, cases
from tests.integration.proof.records import ROOT, Record, about, record_source, sweep
from tests.integration.proof.workshop import Workshop, attempt, in_processes, work_in_a_process


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Every place where two records differ, with what stands there."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            inside = f"{place}.{key}" if place else str(key)
            if key not in before:
                yield f"{inside}: only there now"
            elif key not in after:
                yield f"{inside}: gone"
            else:
                yield from differences(before[key], after[key], inside)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{place}[{number}]")
    elif before != after:
        yield f"{place}: {str(before)[:300]} -> {str(after)[:300]}"


def compare(before: Record, after: Record, only: str | None) -> int:
    """Print every difference; how many cases differ."""
    for line in differences(before["about"], after["about"]):
        print(f"note: about.{line}")
    wanted = [name for name in before if only is None or only in name]
    names = sorted({*wanted, *after} - {"about"})
    differing = 0
    for name in names:
        if name not in before or name not in after:
            lines = ["only there now" if name in after else "gone"]
        else:
            lines = list(differences(before[name], after[name]))
        differing += bool(lines)
        for line in lines:
            print(f"{name}: {line}")
    print(f"{len(names) - differing} of {len(names)} cases are equal")
    return differing


def everything(only: str | None) -> Record:
    """The records of all cases whose key contains `only`."""

    def asked(key: str) -> bool:
        return only is None or only in key

    found: Record = {"about": about()}
    started = time.perf_counter()

    def keep(key: str, said: Record) -> None:
        found[key] = said
        told = said.get("error", "")[:150]
        print(f"{time.perf_counter() - started:6.1f} s  {key}  {told}", flush=True)

    with tempfile.TemporaryDirectory() as root:
        workshop = Workshop(Path(root))
        together: dict[int, list[tuple[str, str]]] = {}
        for family, case in cases():
            key = f"{family}/{case}"
            if f"{family}/source" not in found and asked(f"{family}/source"):
                keep(f"{family}/source", record_source(workshop.source(family)))
            if not asked(key):
                continue
            number = CASES[case][2].get("processes", 1)
            if number > 1:
                workshop.source(family)
                together.setdefault(number, []).append((family, case))
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "out")
                said = attempt(workshop, family, case, out)
            keep(key, said)
        for number, wanted in together.items():
            said = in_processes(workshop, wanted, number)
            for (family, case), one in zip(wanted, said, strict=True):
                keep(f"{family}/{case}", one)
    if asked("sweep"):
        keep("sweep", sweep())
    return found


def main() -> int:
    """Parse the command line and do what it says; the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--only", help="only cases whose FAMILY/NAME contains this")
    parser.add_argument("--against", type=Path, help="the JSON file of an earlier run")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("camera").setLevel(logging.ERROR)
    assert Path(camera.__file__).is_relative_to(ROOT), f"{camera.__file__} is not in {ROOT}"
    if arguments.worker:
        workshop, wanted = arguments.worker
        work_in_a_process(arguments.out, Workshop(Path(workshop)), json.loads(wanted))
        return 0
    before = json.loads(arguments.against.read_text()) if arguments.against else None
    found = everything(arguments.only)
    arguments.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    found = json.loads(arguments.out.read_text())
    refused = sum("error" in said for said in found.values())
    print(f"{len(found) - 1} cases, {refused} of them refused: {arguments.out}")
    return int(before is not None and compare(before, found, arguments.only) > 0)


if __name__ == "__main__":
    sys.exit(main())
