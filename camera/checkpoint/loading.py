"""Loading of models and tokenizers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from camera.checkpoint.config import load_config
from camera.checkpoint.matching import require_whole
from camera.checkpoint.shards import ShardReader
from camera.checkpoint.source import refuse_adapter, refuse_no_model
from camera.runtime.errors import CameraError
from camera.runtime.values import refuse_unknown

DTYPES = ("float32", "bfloat16", "float16")
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
OPTIONS = (*OF_THE_HUB, "attn_implementation", "device_map", "key_mapping", "max_memory")
OPTIONS += ("offload_buffers", "offload_folder", "variant")  # of transformers' from_pretrained


def load(
    model: str | Path,
    *,
    device: Any = "auto",
    dtype: Any = "auto",
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load a causal language model, compressed or not, from a folder or the hub.

    As `AutoModelForCausalLM.from_pretrained`, whose `options` it takes, on the accelerator if there
    is one, in the checkpoint's dtype (on a CPU float32), in eval mode, and with one sentence
    (CameraError) for what can't be loaded: a tensor that is missing is never a random one.
    """
    refuse_unknown("load", options, ("device", "dtype", "trust_remote_code", *OPTIONS))
    dtype = str(dtype).removeprefix("torch.")
    return load_model(model, str(device), dtype, trust_remote_code, **options)


def load_model(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load any causal language model, compressed or not, for evaluation.

    `device` auto is the accelerator if there is one (spread over all of them by accelerate if there
    are several), else the CPU. `dtype` auto is the checkpoint's own, on a CPU float32. `options`
    (OPTIONS) are those of transformers' `from_pretrained`. Raises CameraError for what can't be
    loaded.
    """
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if device == "auto":
        placement = "auto" if count > 1 else {"": resolve_device(device)}
    else:
        placement = {"": device}
    on_cpu = count == 0 or device.startswith("cpu")
    precision = resolve_dtype(dtype) or (torch.float32 if on_cpu else "auto")
    folder = _local(path)
    if isinstance(folder, Path) and not options.get("subfolder"):
        if not (folder / "config.json").exists():
            raise CameraError(f"{folder} is no model: it has no config.json.")
        ShardReader(folder)  # its sentences tell more than transformers'
    hub = {key: value for key, value in options.items() if key in OF_THE_HUB}
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, **hub)
        choose_kernels(config)
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=precision,
            device_map=options.pop("device_map", placement),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and isinstance(folder, Path):  # a tensor: which one?
            config = load_config(folder, trust_remote_code)
            require_whole(config, folder, trust_remote_code)
        first = str(error).strip().splitlines()[0]
        raise CameraError(f"model {path} can't be loaded: {first}") from error
    for name, found, asked in sorted(info["mismatched_keys"]):
        raise CameraError(
            f"model {path}: tensor '{name}' has the shape {list(found)} where config.json asks for "
            f"{list(asked)}: download or compress it again."
        )
    if info["missing_keys"]:  # transformers fills these with random numbers
        name = sorted(info["missing_keys"])[0]
        raise CameraError(f"model {path} lacks tensor '{name}': download or compress it again.")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            kind = str(parameter.dtype).removeprefix("torch.")
            raise CameraError(f"model {path}: tensor '{name}' is {kind}, which no weight can be.")
    choose_experts(model)
    return model.eval()


def choose_kernels(config: PretrainedConfig) -> None:
    """Let transformers choose the attention where config.json names one that other machines have.

    FlashAttention and the like can also not be told what a token may see, as streamed layers and
    packed rows do.
    """
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None


def choose_experts(model: PreTrainedModel) -> None:
    """Run native experts one by one where torch's grouped product doesn't take their widths."""
    if not grouped(model):
        model.set_experts_implementation("eager")


def grouped(model: PreTrainedModel) -> bool:
    """Whether torch's grouped product takes the native experts: rows of whole 16 bytes."""
    return all(
        weight.shape[-1] * weight.element_size() % 16 == 0
        for module in native_experts(model)
        for weight in module.parameters(recurse=False)
        if weight.dim() == 3
    )


def native_experts(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that hold all experts of a layer and run by one of transformers' ways."""
    return [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed")]


def resolve_device(device: str) -> str:
    """`auto` is the accelerator torch sees, else the CPU; CameraError for one it hasn't got."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return found.type if found else "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise CameraError(f"device={device} is no device: use auto, cpu or cuda.") from error
    count = torch.accelerator.device_count() if found and asked.type == found.type else 0
    if asked.type != "cpu" and (asked.index or 0) >= count:
        raise CameraError(f"device={device} is not available here: use device=auto or device=cpu.")
    return device


def resolve_dtype(dtype: str, key: str = "dtype") -> torch.dtype | None:
    """The torch dtype of a name, None for `auto` (the checkpoint's own); CameraError for others."""
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise CameraError(f"{key}={dtype} is none of auto, {', '.join(DTYPES)}.")
    return getattr(torch, dtype)


def compute_dtype(dtype: str, stored: torch.dtype, device: str) -> torch.dtype:
    """What to compute in: the dtype asked for; for `auto` the stored one, on a CPU float32.

    Most CPUs emulate 16-bit arithmetic, three times slower than float32 and less exact.
    """
    asked = resolve_dtype(dtype)
    return asked or (torch.float32 if torch.device(device).type == "cpu" else stored)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id; CameraError if it has none."""
    folder = _local(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise CameraError(f"{path} has no tokenizer that loads: {first}") from error
    # transformers makes an empty one of config.json where a folder has none
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise CameraError(f"{path} has no tokenizer: copy the files of the model's own into it.")
    return tokenizer


def _local(path: str | Path) -> Path | str:
    """The folder of a model, or its id on the hub; CameraError for what is neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        refuse_adapter(folder)
        return folder
    refuse_no_model(str(path))
    return str(path)
