"""Names, order of rows and types of a model's tensors in GGUF.

Shapes: E experts, W width of one expert, H hidden, D rows of one attention head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from camera.engines.gguf.architectures import Architecture
from camera.moe.families import layer_of
from camera.runtime.errors import CameraError

_ALWAYS_FULL = ("ffn_gate_inp", "exp_probs_b")  # routers decide by small differences


class TensorNames:
    """gguf's own table of names, for one architecture."""

    def __init__(self, architecture: Architecture, layers: int):
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == architecture.name)
        self._map = get_tensor_name_map(arch, layers)

    def of(self, name: str) -> str:
        """GGUF's name of a tensor; CameraError for one that has none."""
        if name.endswith("e_score_correction_bias"):
            return f"blk.{layer_of(name)}.exp_probs_b.bias"
        if name.endswith("block_sparse_moe.router.weight"):
            return f"blk.{layer_of(name)}.ffn_gate_inp.weight"
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise CameraError(f"tensor '{name}' has no name in GGUF: this model can't be written.")
        return found


def converted(
    name: str, tensor: torch.Tensor, config: Any, architecture: Architecture, names: TensorNames
) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF's tensors for one of the model: experts' gate and up apart, rows in its order."""
    layer = layer_of(name)
    if name.endswith("experts.gate_up_proj"):
        gate_EWH, up_EWH = tensor.chunk(2, dim=1)
        yield f"blk.{layer}.ffn_gate_exps.weight", gate_EWH
        yield f"blk.{layer}.ffn_up_exps.weight", up_EWH
    elif name.endswith("experts.down_proj"):
        yield f"blk.{layer}.ffn_down_exps.weight", tensor
    elif name.endswith("kv_b_proj.weight"):
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        heads_ADR = tensor.view(config.num_attention_heads, nope + value, -1)
        key, value = heads_ADR.split([nope, value], dim=1)
        yield f"blk.{layer}.attn_k_b.weight", key.transpose(1, 2)
        yield f"blk.{layer}.attn_v_b.weight", value
    else:
        found = re.search(r"self_attn\.([qk])_proj\.", name)
        if found and architecture.interleaved:
            heads = config.num_attention_heads
            tensor = interleaved(tensor, heads if found[1] == "q" else config.num_key_value_heads)
        if name.endswith("shared_expert_gate.weight"):
            tensor = tensor[0]
        yield names.of(name), tensor


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k with the halves of every head interleaved, as rotary pairs of neighbours."""
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def stored_type(name: str, shape: tuple[int, ...], asked: str) -> str:
    """What a tensor is stored in: F32 for vectors and routers, F16 where rows don't fit Q8_0."""
    if len(shape) == 1 or any(part in name for part in _ALWAYS_FULL):
        return "F32"
    if asked == "Q8_0" and shape[-1] % 32:
        return "F16"
    return asked
