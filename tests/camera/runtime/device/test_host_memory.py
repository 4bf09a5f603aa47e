"""Memory limits of control groups, in trees of files as Linux has them."""

from types import SimpleNamespace

import psutil
import pytest

from camera.runtime.device import host_memory
from camera.runtime.device.host_memory import free_host_memory, total_host_memory

GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(group, files): one of 64 GB, 40 of them available, and this process in a group."""
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "OWN_GROUPS", tmp_path / "own")
    memory = SimpleNamespace(total=64 * GB, available=40 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    def go(group: str, files: dict[str, object]) -> None:
        (tmp_path / "own").write_text(group)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    return go


def test_a_machine_without_groups_has_what_the_system_says(machine):
    assert (free_host_memory(), total_host_memory()) == (40 * GB, 64 * GB)


def test_version_2_limits_this_group_and_those_above(machine):
    machine(
        "0::/slurm/job7\n",
        {
            "slurm/job7/memory.max": "max",
            "slurm/job7/memory.current": 9 * GB,
            "slurm/memory.max": 20 * GB,
            "slurm/memory.current": 12 * GB,
        },
    )
    assert (free_host_memory(), total_host_memory()) == (8 * GB, 20 * GB)


def test_version_1_names_its_controllers(machine):
    machine(
        "7:cpu,cpuacct:/other\n4:memory:/docker/abc\n",
        {
            "memory/docker/abc/memory.limit_in_bytes": 16 * GB,
            "memory/docker/abc/memory.usage_in_bytes": 10 * GB,
            "memory/docker/abc/memory.stat": f"total_inactive_file {3 * GB}\ntotal_active_file 0",
            "memory/memory.limit_in_bytes": 9223372036854771712,
            "memory/memory.usage_in_bytes": 50 * GB,
        },
    )
    assert (free_host_memory(), total_host_memory()) == (9 * GB, 16 * GB)


def test_in_a_container_the_limit_stands_at_the_root(machine):
    machine("0::/docker/seen/from/outside\n", {"memory.max": 4 * GB, "memory.current": 5 * GB})
    assert (free_host_memory(), total_host_memory()) == (0, 4 * GB)


def test_cached_files_are_free(machine):
    machine(
        "0::/\n",
        {
            "memory.max": 10 * GB,
            "memory.current": 10 * GB,
            "memory.stat": f"anon {2 * GB}\ninactive_file {5 * GB}\nactive_file {3 * GB}",
        },
    )
    assert free_host_memory() == 8 * GB
