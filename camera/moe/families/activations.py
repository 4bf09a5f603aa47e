"""Where the modules of families keep the activation of their experts, or of a dense FFN."""

from collections.abc import Callable
from typing import Any


def own_activation(module: Any) -> Any:
    """The module's `act_fn`."""
    return module.act_fn


def silu_of_the_code(module: Any) -> Any:
    """The module's `act_fn`; silu, where its code calls that by name."""
    from torch.nn import functional as F

    return getattr(module, "act_fn", F.silu)


def named(*names: str) -> Callable[[Any], Any]:
    """The first of these attributes that a module has."""

    def activation(module: Any) -> Any:
        return next(getattr(module, name) for name in names if hasattr(module, name))

    return activation


def clamped(alpha: str, limit: str) -> Callable[[Any], Any]:
    """A clamped gate, by the attributes that hold its two numbers; that of a module which has it
    already, in `act_fn`."""

    def activation(module: Any) -> Any:
        from camera.moe.experts.activation import ClampedGate

        if hasattr(module, "act_fn"):
            return module.act_fn
        return ClampedGate(getattr(module, alpha), getattr(module, limit))

    return activation
