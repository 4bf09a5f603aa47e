"""Triton kernels on a CPU: in Triton's interpreter, program after program."""

import os
from importlib.util import find_spec

import numpy as np
import pytest

from camera.moe.grouped import products


def missing() -> str | None:
    """Why kernels can't be interpreted here; None where they can."""
    if find_spec("triton") is None:
        return "Triton, which interprets kernels on a CPU, isn't installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "this machine's card compiles kernels: `pytest -m gpu` holds them against the loop"
    return None


def multiply_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Have the interpreter multiply bfloat16, whose bits it takes for integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar is not tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self, left, right, *rest):
        return create_dot(self, widened(left), widened(right), *rest)

    patch.setattr(InterpreterBuilder, "create_dot", dot)


class Interpreted:
    """Products of any size take the kernel, as on a card with a compiler; counts its launches."""

    def __init__(self, patch: pytest.MonkeyPatch):
        from triton.runtime.interpreter import GridExecutor

        self.launched, run = 0, GridExecutor.__call__

        def counted(executor, *args, **kwargs):
            self.launched += 1
            return run(executor, *args, **kwargs)

        patch.setattr(GridExecutor, "__call__", counted)
        patch.setattr("camera.runtime.device.compiled.has_compiler", lambda device: True)
        for compiled in (products.looped_or_kernel, products.ragged_products):
            patch.setattr(compiled, "large", 0)
        multiply_bfloat16(patch)
