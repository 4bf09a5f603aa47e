"""Classes by name: registered, found in packages, announced by installed ones, unknown."""

import os
import subprocess
import sys
import textwrap

import pytest

from camera.runtime.errors import CameraError
from camera.runtime.registry import Registry


class Round:
    name = "round"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(files): the name of a package with these modules, which can be imported."""
    name = "shapes_of_a_test"

    def write(files):
        for path, text in {"__init__.py": "", **files}.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return name

    yield write
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


@pytest.fixture
def announced(tmp_path, monkeypatch):
    """announced(**classes): what an installed distribution announces under camera.shapes."""

    def install(**classes):
        folder = tmp_path / "site" / "shapes-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: shapes\nVersion: 1.0\n")
        lines = [f"{name} = {place}" for name, place in classes.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[camera.shapes]", *lines]))
        monkeypatch.syspath_prepend(folder.parent)

    return install


def test_a_registered_class_is_found_by_its_name():
    shapes = Registry("shape", "shape")
    assert shapes.register(Round) is Round
    assert shapes["round"] is Round and dict(shapes) == {"round": Round}


REGISTERS = """
from {package} import SHAPES

@SHAPES.register
class {name}:
    name = "{name}"
"""


def test_classes_of_a_package_are_found_when_a_name_is_first_asked_for(package):
    name = "shapes_of_a_test"
    made = f"from camera.runtime.registry import Registry\nSHAPES = Registry('a', 'b', ('{name}',))"
    files = {"__init__.py": made, "more/__init__.py": ""}
    for path, cls in (("flat.py", "flat"), ("more/deep.py", "deep")):
        files[path] = REGISTERS.format(package=name, name=cls)
    package(files)
    shapes = __import__(name).SHAPES
    shapes.register(Round)
    assert shapes["round"] is Round and f"{name}.flat" not in sys.modules
    assert "deep" in shapes and sorted(shapes) == ["deep", "flat", "round"] and len(shapes) == 3
    assert shapes["deep"].__module__ == f"{name}.more.deep"


def test_a_package_that_can_t_be_imported_says_so_each_time(package):
    shapes = Registry("shape", "shape", (package({"broken.py": "import no_such_module"}),))
    shapes.register(Round)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            list(shapes)
    assert shapes["round"] is Round


def test_an_installed_entry_point_is_loaded_when_it_is_asked_for(announced):
    shapes = Registry("shape", "shape", entry_points="camera.shapes")
    announced(pair="collections:OrderedDict", broken="no_such_module:Broken")
    assert set(shapes) == {"pair", "broken"} and len(shapes) == 2 and "broken" in shapes
    assert shapes["pair"].__name__ == "OrderedDict"
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        shapes["broken"]


def test_what_registers_comes_before_what_is_installed(announced):
    announced(round="collections:Counter")
    shapes = Registry("shape", "shape", entry_points="camera.shapes")
    assert shapes["round"].__name__ == "Counter"
    shapes.register(Round)
    assert shapes["round"] is Round and list(shapes) == ["round"]


def test_an_unknown_name_is_refused_with_the_nearest_one(announced):
    shapes = Registry("shape", "method.shape", entry_points="camera.shapes")
    announced(flat="a:A")
    shapes.register(Round)
    with pytest.raises(CameraError, match=r"method\.shape=ruond is none of flat, round") as e:
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


def test_every_method_is_known_by_its_name_alone():
    """The library knows the baselines without an import of theirs."""
    code = textwrap.dedent("""
        from camera.api import as_method
        from camera.runtime.errors import CameraError

        for name in "reap naee frequency aimer mone heapr d2_moe magnitude random".split():
            as_method(name, {"sparsity": 0.25})
        for name in ("gptq", "rtn", "mc"):
            as_method(name, {"bits": 2.25})
        for name in ("Camera-P", "camera-p", "CAMERA_P"):
            try:
                as_method(name, {"sparsity": 0.25})
            except CameraError as error:
                assert str(error).endswith("Did you mean camera_p?"), error
    """)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
