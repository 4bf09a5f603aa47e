"""Tables in RAM or in a file that is unlinked while it is open."""

import errno
import os

import pytest
import torch

from camera.runtime.errors import CameraError
from camera.runtime.mapped import MappedTable


def test_hidden_states_on_disk_are_kept_and_a_full_disk_is_refused(tmp_path, monkeypatch):
    rows_BLH = torch.randn(2, 300, 40).bfloat16()
    for ram in (0, 10**9):
        table = MappedTable(700, 40, torch.bfloat16, ram, tmp_path)
        assert table.on_disk == (ram == 0)
        table.write(100, rows_BLH)
        assert torch.equal(table.read(100, 600), rows_BLH.flatten(0, 1))
        table.write(0, rows_BLH[0] * 2)
        assert torch.equal(table.read(0, 300), rows_BLH[0] * 2)
        assert torch.equal(table.read(300, 400), rows_BLH.flatten(0, 1)[200:])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CameraError, match=r"no room for 0.1 GB.*No space left"):
        MappedTable(10**6, 40, torch.bfloat16, 0, tmp_path)
