"""Compresses a case: as a user would, killed on the way, or shared by several processes."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import baselines
import camera
from camera.evaluation.suite import EvaluationRequest
from camera.runtime.distributed import process_group
from camera.streaming.settings import MemoryChoices
from tests.helpers.models import build_model, build_tokenizer, write_layout
from tests.integration.proof.cases import CALIBRATION, CASES, OVERRIDES
from tests.integration.proof.records import ROOT, Record, record

for module in pkgutil.walk_packages(baselines.__path__, "baselines."):
    importlib.import_module(module.name)  # its methods are known by name from here on


class Killed(BaseException):
    """As good as kill -9: nothing of the library handles it."""


class Workshop:
    """A folder with the original models, in several shards, and a data folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = folder / "data"
        if not self.data.exists():
            write_layout(self.data)

    def source(self, family: str) -> Path:
        """The tiny model of a family."""
        folder = self.folder / family
        if not folder.exists():
            model = build_model(family, **OVERRIDES.get(family, {}))
            model.save_pretrained(folder, max_shard_size="60KB")
            build_tokenizer().save_pretrained(folder)
        return folder

    def compress(self, family: str, case: str, out: Path) -> Path:
        """The checkpoint of a case, in the folder `out`."""
        method, settings, options = CASES[case]
        options = dict(options)
        source = self.source(family)
        if "after" in options:
            source = self.compress(family, options.pop("after"), out.with_name("first"))
        if "keep" in options:
            options["statistics"] = out.with_name("statistics")
            method_before, settings_before, options_before = CASES[options.pop("keep")]
            shared = dict(options_before, statistics=options["statistics"])
            before = out.with_name("before")
            self._call(family, source, before, method_before, settings_before, shared)
        export, at = options.pop("export", False), options.pop("killed", None)
        options.pop("processes", None)
        if at is not None:
            try:
                with killed_at(at):
                    self._call(family, source, out, method, settings, options)
            except Killed:
                assert not out.exists() and list(out.parent.glob(f".{out.name}*"))
            else:
                raise AssertionError(f"{case} was through before it was killed")
        self._call(family, source, out, method, settings, options)
        return camera.export(out, out.with_name("export")) if export else out

    def _call(
        self,
        family: str,
        source: Path,
        out: Path,
        method: str,
        settings: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        options = dict(options)
        if "memory" in options:
            options["memory"] = MemoryChoices(**options["memory"])
        if "measures" in options:
            options["measures"] = EvaluationRequest(data=self.data, **options["measures"])
        camera.compress(
            source,
            method,
            out,
            calibration=camera.Calibration(**CALIBRATION | options.pop("calibration", {})),
            data=str(self.data),
            device="cpu",
            name=family,
            progress=False,
            **options,
            **settings,
        )


@contextmanager
def killed_at(number: int) -> Iterator[None]:
    """Kills at the file of this number, once it is written under another name but not in place."""
    original, count = os.replace, [0]

    def replace(*arguments: Any, **more: Any) -> None:
        count[0] += 1
        if count[0] == number:
            raise Killed
        original(*arguments, **more)

    with mock.patch("os.replace", replace):
        yield


def attempt(workshop: Workshop, family: str, case: str, out: Path) -> Record:
    """What a case gave: its record, or what it was refused with."""
    try:
        return record(workshop.compress(family, case, out))
    except Exception as error:
        return refusal(error, out.parent)


def refusal(error: Exception, folder: Path) -> Record:
    """What an error says, without the name of a folder that is another one each time."""
    return {"error": f"{type(error).__name__}: {error}".replace(str(folder), "WORK")}


def in_processes(workshop: Workshop, wanted: list[tuple[str, str]], number: int) -> list[Record]:
    """Records of cases that so many processes share, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["--standalone", f"--nproc-per-node={number}", "-m", __package__]
        what = [folder, "--worker", str(workshop.folder), json.dumps(wanted)]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *launch, *what],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stderr[-5000:])
        found = []
        for place in range(len(wanted)):
            said = Path(folder, f"{place}.error")
            out = Path(folder, str(place), "out")
            found.append(json.loads(said.read_text()) if said.exists() else record(out))
        return found


def work_in_a_process(folder: Path, workshop: Workshop, wanted: list[tuple[str, str]]) -> None:
    """What each of several processes does."""
    with process_group():
        for place, (family, case) in enumerate(wanted):
            try:
                workshop.compress(family, case, folder / str(place) / "out")
            except camera.CameraError as error:
                (folder / f"{place}.error").write_text(json.dumps(refusal(error, folder)))
