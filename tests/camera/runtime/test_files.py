"""Sizes of a refusal show their difference."""

import shutil
from types import SimpleNamespace

import pytest

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
