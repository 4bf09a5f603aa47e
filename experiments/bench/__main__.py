"""`camera bench NAME [options]`: run one benchmark, print one line of JSON."""

import argparse
import importlib
import inspect
import json
import pkgutil
import platform
import sys

import torch

import experiments.bench as bench
from camera.runtime.errors import CameraError


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark that the first argument names; every file of the package is one."""
    found = [
        module.name
        for module in pkgutil.iter_modules(bench.__path__)
        if not module.ispkg and not module.name.startswith("_")
    ]
    modules = {name: importlib.import_module(f"{bench.__name__}.{name}") for name in found}
    parser = argparse.ArgumentParser(prog="camera bench", description=bench.__doc__)
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module in modules.items():
        about = inspect.getdoc(module.run)
        module.arguments(names.add_parser(name, help=module.__doc__, description=about))
    args = parser.parse_args(argv)
    where = {"torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps({"benchmark": args.name, **modules[args.name].run(args), **where}))


if __name__ == "__main__":
    try:
        main()
    except CameraError as error:
        sys.exit(str(error))
