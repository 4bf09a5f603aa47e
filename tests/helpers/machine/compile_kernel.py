"""Shared memory that the grouped products' kernel takes on cards, which needs none of them."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from camera.moe.grouped.grouped_gemm import FULL, HALF, TILE_ROWS, _kernel


def shared(dtype: str, capability: int, config: triton.Config, varies: int) -> int:
    """Bytes of shared memory that a tile takes, of weights stored [D, C]."""
    fixed = dict(x_column=1, weight_row=1, VARIES=varies, PRECISION="ieee", ROWS=TILE_ROWS[-1])
    fixed |= config.kwargs
    types = dict.fromkeys(("x", "weight", "y"), "*" + dtype) | {"tile": "*i32"}
    names = _kernel.arg_names
    signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in fixed}
    source = ASTSource(
        _kernel, signature, {(names.index(n),): v for n, v in fixed.items()}, aligned
    )
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    made = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    assert "cp.async.cg" in made.asm["ptx"], "16 bytes at once"
    assert dtype == "fp32" or "mma" in made.asm["ptx"], "tensor cores"
    return made.metadata.shared


for capability in (80, 86):
    for config in HALF:
        print(shared("bf16", capability, config, 0))
    print(shared("fp32", capability, FULL[0], 0))
for dtype, capability, varies in ("fp16", 89, 1), ("bf16", 90, 2):
    print(shared(dtype, capability, HALF[0], varies))
