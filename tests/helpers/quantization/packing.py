"""What the tests of packed modules share."""

import torch

from camera.quantization.quantizers.gptq import GPTQ


def solver(group_size=8, sym=False, **options) -> GPTQ:
    return GPTQ(group_size=group_size, sym=sym, scale_dtype=torch.float16, **options)


def stored_bytes(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())
