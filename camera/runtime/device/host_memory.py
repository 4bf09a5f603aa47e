"""The system's memory, as far as this process may use it.

A container or a job of a cluster may be held to less than the machine has: beyond the limit of its
control group the process is killed.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
# Limit and use of a group, and the prefix of its sums in memory.stat: version 2, version 1.
FILES = (
    ("memory.max", "memory.current", ""),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_",
    ),
)


def free_host_memory() -> int:
    """Bytes that are available in the system, or that a control group leaves if these are fewer."""
    left = [max(limit - used, 0) for limit, used in _limits()]
    return min([psutil.virtual_memory().available, *left])


def total_host_memory() -> int:
    """Bytes of the system's memory, or the limit of a control group if that is lower."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use, without cached files, of the process's groups and those above."""
    for folder in _groups():
        for names in FILES:
            limit, used, prefix = _number(folder / names[0]), _number(folder / names[1]), names[2]
            if limit is not None and used is not None:
                yield limit, used - _cached(folder / "memory.stat", prefix)


def _groups() -> Iterator[Path]:
    """Folders of this process's control groups; in a container the root stands for its own."""
    if not OWN_GROUPS.exists():
        return
    for line in OWN_GROUPS.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            root = GROUPS / "memory" if controllers else GROUPS
            own = root / path.lstrip("/")
            yield own
            yield from (above for above in own.parents if above.is_relative_to(root))


def _number(file: Path) -> int | None:
    """What a file says; None for "max" and where there is no such file."""
    text = file.read_text().strip() if file.is_file() else "max"
    return int(text) if text.isdecimal() else None


def _cached(file: Path, prefix: str) -> int:
    """Bytes of files that the system drops from memory where it is needed."""
    lines = file.read_text().splitlines() if file.is_file() else []
    sums = dict(line.split(" ", 1) for line in lines if " " in line)
    return sum(int(sums.get(f"{prefix}{part}_file", 0)) for part in ("inactive", "active"))
