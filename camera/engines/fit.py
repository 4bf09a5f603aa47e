"""Which engines read a checkpoint, as it is or after which export, or what methods make of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from camera.checkpoint.config import CameraConfig
from camera.checkpoint.formats.format import FORMATS, Spec
from camera.engines.compressed_tensors import bits_of, require_packable
from camera.engines.expert_names import names_each_expert
from camera.engines.gguf.architectures import architecture_of
from camera.moe.families import family_of
from camera.runtime.errors import CameraError

SGLANG_BITS = {4, 8}
AS_IT_IS = "as it is"
GROUPED = 16  # bytes: rows of experts are a multiple of it, or the grouped product is refused
NATIVE, PADDED = "camera export FROM TO", "every expert as wide as the widest"
CONSTANTS = "camera export FROM TO --format approximate-experts"
PACKED = "camera export FROM TO --format compressed-tensors"
TOGETHER = "checkpoints of this type hold all experts of a layer in one tensor"


def engines(config: Any) -> dict[str, str]:
    """By engine what it needs of a checkpoint with this config.json, or why it can't have it.

    Whether the engine knows the model type is its own matter, but for llama.cpp: an architecture
    there computes the same or not.
    """
    stored = getattr(config, "quantization_config", None)
    modules = stored.modules if isinstance(stored, CameraConfig) else {}
    native, bits = AS_IT_IS, set().union(*(bits_of(spec) for spec in modules.values()))
    if modules:
        kind = "unpacked" if bits else PADDED
        native = f"after `{NATIVE}` ({kind})"
    found = {
        "transformers": "after `import camera`" if modules else _transformers(config),
        "vLLM": native,
        "SGLang": native,
        "llama.cpp": _llama_cpp(config),
    }
    if any(FORMATS[spec["form"]].holds_constants for spec in modules.values()):
        vllm = f"after `{CONSTANTS}`" if names_each_expert(config) else f"no: {TOGETHER}"
        own = {"transformers": found["transformers"], "vLLM": vllm}
        return engines_of_constants() | own
    if bits and _is_packable(config, modules):
        found["vLLM"] = f"after `{PACKED}`"
        if bits <= SGLANG_BITS:
            found["SGLang"] = f"after `{PACKED}`"
    return found


def engines_of_constants() -> dict[str, str]:
    """By engine whether it reads an export with constants in the place of experts."""
    no = "no: constants stand in the place of experts"
    return {"transformers": no, "vLLM": AS_IT_IS, "SGLang": no, "llama.cpp": no}


def engines_of_outcomes(config: Any) -> dict[str, str]:
    """By engine what it takes of a compressed model of this config, or why it takes nothing."""
    native = f"a native checkpoint of one width or fewer experts, where it has {config.model_type}"
    try:
        gguf = f"GGUF ({architecture_of(config).name}), every expert padded to one width"
    except CameraError as error:
        gguf = f"nothing: {error}"
    return {
        "transformers": "every checkpoint, after `import camera`; a native one without it",
        "vLLM": f"{native}; bits by layer as compressed-tensors; constants as approximate experts",
        "SGLang": f"{native}; 4 or 8 bits as compressed-tensors",
        "llama.cpp": gguf,
    }


def _transformers(config: Any) -> str:
    text, keys = config.get_text_config(), family_of(config.model_type).keys
    experts, width = getattr(text, keys.experts, None), getattr(text, keys.width, None)
    if experts and width * (config.dtype or torch.float32).itemsize % GROUPED:
        return f'with `experts_implementation="eager"` (experts are {width} wide)'
    return AS_IT_IS


def _llama_cpp(config: Any) -> str:
    try:
        architecture_of(config)
    except CameraError as error:
        return f"no: {str(error).rstrip('.')}"
    return f"after `{NATIVE}.gguf`"


def _is_packable(config: Any, modules: Mapping[str, Spec]) -> bool:
    try:
        require_packable(modules, config.model_type)
    except CameraError:
        return False
    return names_each_expert(config)
