"""On PYTHONPATH, this gives every Python process the fake device that the environment names, once
it imports torch. It takes the place of any other sitecustomize."""

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


class _AfterTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_activate(module) -> None:
                execute(module)
                if "tests.fake_device" in sys.modules:
                    return  # it is what imports torch, and whoever imports it activates it
                sys.path.append(str(ROOT))
                from tests import fake_device

                fake_device.activate(**fake_device.asked())

            spec.loader.exec_module = execute_and_activate
        return spec


if os.environ.get("CAMERA_FAKE_DEVICE"):
    sys.meta_path.insert(0, _AfterTorch())
