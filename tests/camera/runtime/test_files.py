"""Sizes of a refusal show their difference; a file has the permissions that the user asks for."""

import os
import shutil
import stat
from types import SimpleNamespace

import pytest
import torch

from camera.calibration.statistics import Statistics
from camera.method import Plan
from camera.runtime.errors import CameraError
from camera.runtime.files import require_space


@pytest.mark.parametrize(
    ("free", "needed", "told"),
    [
        (3_000_000, 5_200_000, "has 3.0 MB free and the checkpoint may need 5.2 MB"),
        (5_010_000_000, 5_014_000_000, "has 5.010 GB free and the checkpoint may need 5.014 GB"),
        (10, 999, "has 10.0 bytes free and the checkpoint may need 999.0 bytes"),
        (40_000_000_000, 93_400_000_000, "has 40.0 GB free and the checkpoint may need 93.4 GB"),
        (9_999, 10_000, "has 9.999 kB free and the checkpoint may need 10.000 kB"),
    ],
)
def test_a_disk_that_is_too_small_is_told_in_sizes_that_differ(
    free, needed, told, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(CameraError, match=told):
        require_space(tmp_path, needed)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize(
    "content",
    [Statistics({}, {}), Plan("random", {}, {}, scores={0: torch.ones(2)})],
    ids=["statistics", "plan"],
)
def test_others_read_what_the_umask_lets_them(content, umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        content.save(tmp_path / "file.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.safetensors").stat().st_mode) == mode
