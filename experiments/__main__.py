"""The command: `python main.py` in a checkout, `python -m experiments` where it is installed.

    python main.py method=camera_p sparsity=0.2            one run
    python main.py -m method=camera_p sparsity=0.2,0.4,0.6 a sweep, ending in a table
    python main.py experiment=main                         a preset
    python main.py --help                                  the groups and their choices

`conf/` is the table of contents. Everything is written below `output` (default: outputs).
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from camera.runtime.errors import CameraError
from experiments.config.arguments import as_typed
from experiments.config.location import CONF
from experiments.config.reference import help_text
from experiments.config.schema import naming_valid_keys
from experiments.config.spelling import check_spelling
from experiments.config.started import start
from experiments.config.values import check_typed


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(config: DictConfig) -> dict[str, Any] | str | float | None:
    """One job of Hydra: a run, recorded in its folder whether it succeeds or fails."""
    from experiments.sweeps.job import job

    return job(config)


def command() -> None:
    """Compose the command line and do what it asks for, with the other ranks of a torchrun."""
    if not {"--help", "-h"}.isdisjoint(sys.argv[1:]):
        print(help_text(sys.argv[1:], _program()))
        return
    try:
        sys.argv[1:] = as_typed(sys.argv[1:])
        check_spelling(sys.argv[1:])
        check_typed(sys.argv[1:])
    except CameraError as refusal:
        sys.exit(str(refusal))
    with naming_valid_keys(), _interruptible():
        if "WORLD_SIZE" not in os.environ:
            start(sys.argv[1:])
            main()
            return
        from camera.runtime.distributed import process_group

        with process_group():
            start(sys.argv[1:])
            main()


def _program() -> str:
    """What the user typed before the settings: `camera run`, or `python` and a file."""
    name = sys.argv[0]
    if name.startswith("camera"):
        return name
    file = Path(name)
    return "python -m experiments" if file.name == "__main__.py" else f"python {file.name}"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl+C and SIGTERM alike: what is open is closed and recorded, then a line and the exit."""
    main_thread = threading.current_thread() is threading.main_thread()

    def leave(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough: records and tables are written now
        _tell_interrupted()
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave) if main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        _tell_interrupted()
        sys.exit(128 + signal.SIGINT)
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def _tell_interrupted() -> None:
    from camera.runtime.progress import reached

    where = f" at {reached()}" if reached() else ""
    print(f"Interrupted{where}; the same command goes on.", file=sys.stderr)


if __name__ == "__main__":
    command()
