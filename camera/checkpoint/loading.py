"""Loading of models and tokenizers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from camera.checkpoint.config import (
    GENERATION,
    CameraConfig,
    auto_class,
    load_config,
    read_config,
    reason_of,
)
from camera.checkpoint.matching import empty_model, require_runnable, require_whole
from camera.checkpoint.places import AnyPlace, PackedPlace, Place, read_places
from camera.checkpoint.quantized.opening import open_weights
from camera.checkpoint.shards import ShardReader
from camera.checkpoint.source import refuse_adapter, resolve_model
from camera.runtime import distributed
from camera.runtime.device.accelerator import all_cards, resolve_device
from camera.runtime.device.finite import all_finite
from camera.runtime.errors import CameraError
from camera.runtime.files import remembered
from camera.runtime.values import refuse_unknown

PIECE = 2**26  # bytes of a tensor that are looked through at a time
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
    are several and no other process shares them), else the CPU. `dtype` auto is the checkpoint's
    own, on a CPU float32. `options` (OPTIONS) are those of transformers' `from_pretrained`. Raises
    CameraError for what can't be loaded.
    """
    place = resolve_device(device)
    placement = "auto" if all_cards(device) > 1 else {"": place}
    on_cpu = torch.device(place).type == "cpu"
    precision = resolve_dtype(dtype) or (torch.float32 if on_cpu else "auto")
    hub = {key: options.pop(key) for key in OF_THE_HUB if key in options}
    folder, weights = _local(path, **hub), None
    if not (folder / "config.json").exists():
        raise CameraError(f"{folder} is no model: it has no config.json.")
    config = load_config(folder, trust_remote_code)
    if not options.get("variant"):
        reader = open_weights(folder, config)  # sentences of our own tell more than transformers'
        require_runnable(config, folder, trust_remote_code)
        if isinstance(getattr(config, "quantization_config", None), CameraConfig):
            require_whole(config, reader, trust_remote_code)
        else:
            weights = _unpacking(reader)
    if weights is None:
        config = read_config(folder, trust_remote_code)
    choose_kernels(config)
    built_by = auto_class(config)
    if weights is not None:  # which Auto classes don't take
        built_by = type(empty_model(config, folder, trust_remote_code=trust_remote_code)[0])
    try:
        model, info = built_by.from_pretrained(
            None if weights else str(folder),
            config=config,
            **(weights or {}),
            dtype=precision,
            device_map=options.pop("device_map", placement),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    except CameraError:
        raise
    except Exception as error:  # what a wrong size leads to depends on the model's code
        config = load_config(folder, trust_remote_code)  # a tensor: which one?
        require_whole(config, open_weights(folder, config), trust_remote_code)
        raise CameraError(f"model {path} can't be loaded: {reason_of(error)}.") from error
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
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta and not all_finite(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CameraError(f"model {path}: tensor '{name}' holds NaN or inf as {kind}.")
    choose_experts(model)
    return model.eval()


def _unpacking(reader: ShardReader) -> dict[str, Any] | None:
    """What `from_pretrained` takes in the place of a folder whose tensors are to be unpacked, each
    when it is its turn; None for a folder of plain ones."""
    if not any(isinstance(place, PackedPlace) for place in reader.places.values()):
        return None
    found: dict[str, Any] = {"state_dict": {k: _Unread(p) for k, p in reader.places.items()}}
    if (reader.folder / GENERATION).exists():
        found["generation_config"] = GenerationConfig.from_pretrained(reader.folder)
    return found


class _Unread:
    """A tensor that is read when it is looked at."""

    def __init__(self, place: AnyPlace):
        self._place = place

    def __getitem__(self, _: Any) -> torch.Tensor:
        return read_places({"": self._place})[""]


def require_finite(reader: ShardReader) -> None:
    """CameraError that names a tensor with NaN or inf, which a run would else meet hours later.

    A large file is read for it once, not once a run; several processes share the files.
    """
    files: dict[Path, list[tuple[str, Place]]] = {}
    for key, place in reader.places.items():
        for part in place.stored:
            files.setdefault(part.file, []).append((key, part))
    for file in sorted(files)[distributed.rank() :: distributed.world()]:
        remembered(
            reader.folder / file, "finite", lambda file=file: _refuse_infinite(reader, files[file])
        )


def _refuse_infinite(reader: ShardReader, places: list[tuple[str, Place]]) -> bool:
    for key, place in places:
        for piece in _pieces(place):
            numbers = read_places({key: piece})[key]
            if numbers.is_floating_point() and numbers.element_size() == 1:
                numbers = numbers.float()  # of FP8 the least and the largest can't be asked for
            if not all_finite(numbers):
                raise CameraError(f"tensor '{key}' in {reader.folder} holds NaN or inf.")
    return True


def _pieces(place: Place) -> Iterator[Place]:
    """A tensor by some of its rows: the experts of a layer in one tensor may exceed the memory."""
    if place.bytes <= PIECE:
        yield place
        return
    rows = max(1, place.shape[0] * PIECE // place.bytes)
    for first in range(0, place.shape[0], rows):
        yield place.rows(first, rows)


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
    folder = _local(path, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise CameraError(f"{path} has no tokenizer that loads: {first}") from error
    # transformers makes an empty one of config.json where a folder has none
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise CameraError(f"{path} has no tokenizer: copy the files of the model's own into it.")
    return tokenizer


def _local(
    path: str | Path, revision: str | None = None, subfolder: str | None = None, **how: Any
) -> Path:
    """The folder of a model, fetched from the hub if need be; CameraError for what is neither a
    folder nor a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        folder = folder / (subfolder or "")
        refuse_adapter(folder)
        return folder
    name = f"{path}@{revision}" if revision else str(path)
    return resolve_model(name, subfolder=subfolder, **how)
