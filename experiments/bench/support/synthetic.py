"""A checkpoint of a published model's layers, and a text, both random."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from camera.checkpoint.formats.native import native_state
from camera.checkpoint.quantized.fp8 import BLOCK
from camera.checkpoint.shards import ShardWriter
from camera.checkpoint.source import copy_companions
from camera.moe.families import family_of
from camera.runtime.errors import CameraError
from experiments.bench.support.architectures import ARCHITECTURES
from experiments.config.location import EMBEDDED_MODEL

SCALED = ("hidden_size", "num_attention_heads", "num_key_value_heads")
SCALED += ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
RANDOM = 2**25  # numbers drawn; every tensor is a stretch of them
FP8_SCALE = 512  # of random weights, well inside the range of FP8
LETTERS = 16  # more than a token has, with the embedded model's tokenizer


def write_model(
    folder: Path, name: str, *, layers: int, scale: int, length: int, routed: int = 0
) -> None:
    """Layer by layer, a shard each, in bf16 or FP8 and under the names that published checkpoints
    have; with `routed`, so many experts a layer.

    The vocabulary is small, and the tokenizer the embedded model's; of leading dense layers there
    are fewer than `layers`. CameraError for a scale that leaves no whole width.
    """
    settings = dict(ARCHITECTURES[name])
    if routed:
        settings[family_of(settings["model_type"]).keys.experts] = routed
    if "first_k_dense_replace" in settings:
        settings["first_k_dense_replace"] = min(settings["first_k_dense_replace"], layers - 1)
    for key in SCALED:
        if key in settings and settings[key] % scale:
            raise CameraError(f"--scale {scale} doesn't divide {key}={settings[key]}.")
        if key in settings:
            settings[key] //= scale
    settings |= {"num_hidden_layers": layers, "vocab_size": 2048, "dtype": "bfloat16"}
    settings |= {"max_position_embeddings": max(length, 512), "tie_word_embeddings": False}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    numbers = torch.randn(RANDOM).mul_(config.hidden_size**-0.5).bfloat16()
    state, writer = model.state_dict(), ShardWriter(folder, layers + 1)
    folder.mkdir(parents=True)
    for i in range(layers + 1):
        prefix = f"{model.base_model_prefix}.layers."
        ours = prefix + f"{i}." if i < layers else ""
        names = [n for n in state if (n.startswith(ours) if ours else not n.startswith(prefix))]
        tensors = {name: _stretch(name, numbers, state[name].shape) for name in names}
        found = native_state(model, tensors)
        writer.add(i, _in_fp8(found) if "quantization_config" in settings and ours else found)
    writer.close()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    copy_companions(EMBEDDED_MODEL, folder)


def write_text(path: Path, tokens: int) -> Path:
    """Random letters, enough for so many tokens."""
    letters = torch.randint(ord("a"), ord("z") + 1, (LETTERS * tokens,))
    path.write_text(bytes(letters.tolist()).decode())
    return path


def _in_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices but routers' in FP8, each block with the same scale."""
    found = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        if tensor.dim() != 2 or name.endswith("gate.weight"):
            found[name] = tensor
            continue
        found[name] = (tensor * FP8_SCALE).to(torch.float8_e4m3fn)
        grid = [-(-size // block) for size, block in zip(tensor.shape, BLOCK, strict=True)]
        found[f"{name}_scale_inv"] = torch.full(grid, 1 / FP8_SCALE)
    return found


def _stretch(name: str, numbers: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Random weights of a shape; norms are 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=numbers.dtype)
    size = shape.numel()
    start = int(torch.randint(len(numbers), ()))
    repeats = (start + size) // len(numbers) + 1
    return numbers.repeat(repeats)[start : start + size].view(shape)
