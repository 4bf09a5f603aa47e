"""The C++ half, compiled once for each source text, PyTorch and Python, and kept in a cache."""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock

SOURCE = Path(__file__).with_name("source")
CACHE = "CAMERA_FAKE_DEVICE_CACHE"
FLAGS = ("-O1", "-std=c++20", "-w", "-shared", "-fPIC")


class CannotBuildError(RuntimeError):
    """Why there is no fake device on this machine, in one sentence."""


def load() -> ModuleType:
    """The library, compiled first where it isn't there yet (about a minute).

    Raises CannotBuildError.
    """
    texts = [path.read_text() for path in sorted(SOURCE.iterdir())]
    key = "|".join((*texts, torch.__version__, sys.version, *FLAGS))
    name = f"fake_device_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = _cache()
    built = folder / f"{name}.so"
    if not built.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotBuildError(
                f"{folder} can't be made ({error}); {CACHE} names another"
            ) from error
        with FileLock(folder / f"{name}.lock"):
            if not built.exists():
                _compile(name, built)
    spec = importlib.util.spec_from_file_location(name, built)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(home) / "camera-fake-device")


def _compile(name: str, built: Path) -> None:
    from torch.utils import cpp_extension

    if torch.version.cuda or torch.version.hip:
        raise CannotBuildError("this PyTorch has kernels of a real GPU; the fake needs one without")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise CannotBuildError(f"no C++ compiler ({compiler[0]})")
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    libraries = cpp_extension.library_paths()
    unfinished = built.with_suffix(".unfinished")
    command = [
        *compiler,
        *FLAGS,
        f"-DTORCH_EXTENSION_NAME={name}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{folder}" for folder in includes),
        str(SOURCE / "device.cpp"),
        *(f"-L{folder}" for folder in libraries),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
        *("-o", str(unfinished)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise CannotBuildError(f"device.cpp does not compile here: {errors[0]}")
    unfinished.rename(built)
