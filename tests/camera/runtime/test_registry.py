"""Classes by name: registered, shipped, announced by installed packages, unknown."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from camera.runtime import registry
from camera.runtime.errors import CameraError
from camera.runtime.registry import Registry


class Round:
    name = "round"


def test_a_registered_class_is_found_by_its_name():
    shapes = Registry("shape", "shape")
    assert shapes.register(Round) is Round
    assert shapes["round"] is Round and dict(shapes) == {"round": Round}


def test_shipped_classes_are_named_without_being_imported():
    shapes = Registry(
        "shape", "shape", {"flat": "no_such_module:Flat", "many": "collections:Counter"}
    )
    assert list(shapes) == ["flat", "many"] and "flat" in shapes and len(shapes) == 2
    assert shapes["many"].__name__ == "Counter"
    with pytest.raises(ModuleNotFoundError):
        shapes["flat"]


def test_an_installed_entry_point_is_loaded_when_it_is_asked_for(monkeypatch):
    entries = [
        EntryPoint("pair", "collections:OrderedDict", "camera.shapes"),
        EntryPoint("broken", "no_such_module:Broken", "camera.shapes"),
    ]
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or entries)
    shapes = Registry("shape", "shape", entry_points="camera.shapes")
    assert not asked
    assert set(shapes) == {"pair", "broken"}
    assert shapes["pair"].__name__ == "OrderedDict" and asked == ["camera.shapes"]


def test_what_registers_comes_before_what_ships():
    shapes = Registry("shape", "shape", {"round": "collections:Counter"})
    shapes.register(Round)
    assert shapes["round"] is Round and list(shapes) == ["round"]


def test_an_unknown_name_is_refused_with_the_nearest_one():
    shapes = Registry("shape", "method.shape", {"flat": "a:A", "round": "b:B"})
    with pytest.raises(
        CameraError, match=r"method\.shape=ruond is no shape: choose from flat, round"
    ) as e:
        shapes["ruond"]
    assert str(e.value).endswith("Did you mean round?")
    with pytest.raises(CameraError) as e:
        shapes["xyz"]
    assert "Did you mean" not in str(e.value) and "xyz" not in shapes


def test_a_registry_needs_no_torch():
    # the package's own __init__ may still load torch: only the module itself is asked here
    script = (
        "import importlib.util, sys, types\n"
        "sys.modules['camera'] = types.ModuleType('camera')\n"
        "sys.modules['camera'].__path__ = ['camera']\n"
        "import camera.runtime.registry, camera.moe.families\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
