"""Registration of the checkpoint format and of the model types that transformers lacks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from camera.moe.families import FAMILIES

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"
MODEL_BASE = "transformers.modeling_utils"  # loads the configurations while it loads itself


def register() -> None:
    """Make transformers know the format `camera` and the model types that it lacks."""
    import_module(MODELS)
    import_module("camera.checkpoint.config")  # registers as it is imported
    for family in FAMILIES.values():
        if family.register is not None:
            import_module(family.register).register()


def register_with_transformers() -> None:
    """Register now if transformers' models are loaded, else as soon as Auto classes are."""
    if MODELS in sys.modules:
        register()
        return
    hooks = {MODELS: register, CONFIGURATIONS: _load_models, MODEL_BASE: _load_models}
    sys.meta_path.insert(0, _AfterLoading(hooks))
    if CONFIGURATIONS in sys.modules:
        _load_models()


def _load_models() -> None:
    base = sys.modules.get(MODEL_BASE)
    if base is None or not base.__spec__._initializing:  # half loaded, it can't be imported from
        import_module(MODELS)


class _AfterLoading(MetaPathFinder):
    """Finds nothing itself: calls `hooks[name]` when the module `name` has been loaded."""

    def __init__(self, hooks: dict[str, Callable[[], None]]) -> None:
        self.hooks = hooks

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        hook = self.hooks.pop(name, None)
        if hook is None:
            return None
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_then_hook(module: ModuleType) -> None:
            execute(module)
            if name == MODEL_BASE:
                module.__spec__._initializing = False
            hook()

        spec.loader.exec_module = execute_then_hook
        return spec
