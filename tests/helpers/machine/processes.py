"""Processes that tests start: the environment they get, and torchrun."""

import os
import subprocess
import sys

from experiments.config.location import CONF


def python_path(*folders: object) -> str:
    """PYTHONPATH for these folders, the project, and what tests have there (a fake device)."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([*map(str, folders), *filter(None, before), str(CONF.parent)])


def torchrun(
    *arguments: object, restarts: int = 0, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Two processes of a script, on one thread each."""
    launch = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, *map(str, arguments)],
        cwd=CONF.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
