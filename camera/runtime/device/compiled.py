"""Functions of many elementwise operators as few kernels, where an accelerator can compile them."""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from camera.runtime.device.accelerator import has_own_memory

log = logging.getLogger("camera")
LARGE = 2**24  # numbers; what has fewer is done before it would be compiled


class Compiled:
    """A function of tensors, the first one's device deciding how it runs.

    On an accelerator with a compiler, which its builds of torch bring, torch compiles it for large
    tensors; for small ones, on others and on a CPU it runs operator by operator, equal up to the
    order of summation. So it does, with a line in the log, where compiling fails: Triton asks for a
    C compiler too.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._ways: dict[str, Callable[..., Any]] = {}

    def __call__(self, tensor: torch.Tensor, *rest: Any) -> Any:
        if tensor.numel() < LARGE:
            return self._function(tensor, *rest)
        kind = tensor.device.type
        if kind not in self._ways:
            self._ways[kind] = self._way(tensor, *rest)
        return self._ways[kind](tensor, *rest)

    def _way(self, tensor: torch.Tensor, *rest: Any) -> Callable[..., Any]:
        """Decided by the first call of a process on such a device."""
        if not has_compiler(tensor.device):
            return self._function
        compiled = torch.compile(self._function, dynamic=True)
        try:
            compiled(tensor, *rest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise what they like
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log.warning(
                "torch.compile fails on %s (%s): operators run one by one, which takes longer.",
                tensor.device,
                reason[0],
            )
            return self._function
        return compiled


def has_compiler(device: torch.device) -> bool:
    """Whether torch compiles kernels for a device: Triton, which builds for accelerators bring."""
    versions = (getattr(torch.version, kind, None) for kind in ("cuda", "hip", "xpu"))
    return has_own_memory(device) and any(versions) and find_spec("triton") is not None
