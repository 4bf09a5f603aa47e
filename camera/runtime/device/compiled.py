"""Functions of many operators as few kernels, where an accelerator can compile them."""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from camera.runtime.device.accelerator import has_own_memory

log = logging.getLogger("camera")
LARGE = 2**24  # numbers; what has fewer is done before it would be compiled

Function = Callable[..., Any]


def by_torch(function: Function) -> Function:
    """The function as torch compiles it."""
    return torch.compile(function, dynamic=True)


class Compiled:
    """A function of tensors, the first one's device deciding how it runs.

    On an accelerator with a compiler, which its builds of torch bring, `kernel` makes something
    faster of it for tensors of so many numbers; for smaller ones, on others and on a CPU it runs
    operator by operator, equal up to the order of summation. So it does, with a line in the log,
    where compiling fails: Triton asks for a C compiler too.
    """

    def __init__(
        self,
        function: Function,
        kernel: Callable[[Function], Function] = by_torch,
        large: int | None = None,
    ):
        self._function, self._make, self.large = function, kernel, large
        self._kernel: Function | None = None
        self._failed: set[str] = set()  # kinds of devices

    def compiles(self, tensor: torch.Tensor) -> bool:
        """Whether it is compiled for such a tensor, as far as is known."""
        large = LARGE if self.large is None else self.large
        if tensor.numel() < large or tensor.device.type in self._failed:
            return False
        return has_compiler(tensor.device)

    def __call__(self, tensor: torch.Tensor, *rest: Any) -> Any:
        if not self.compiles(tensor):
            return self._function(tensor, *rest)
        try:
            if self._kernel is None:
                self._kernel = self._make(self._function)
            return self._kernel(tensor, *rest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise what they like
            self._failed.add(tensor.device.type)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log.warning(
                "compiling fails on %s (%s): operators run one by one, which takes longer.",
                tensor.device,
                reason[0],
            )
            return self._function(tensor, *rest)


def has_compiler(device: torch.device) -> bool:
    """Whether torch compiles kernels for a device: Triton, which builds for accelerators bring."""
    versions = (getattr(torch.version, kind, None) for kind in ("cuda", "hip", "xpu"))
    return has_own_memory(device) and any(versions) and find_spec("triton") is not None
