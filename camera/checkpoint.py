"""The format on disk: a quantization_config with quant_method `camera`, registered on import.

A compressed checkpoint is an ordinary transformers folder whose config.json says by path what form
(camera/experts/) a module has; `from_pretrained` builds the skeleton of these and loads into it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from camera.errors import CameraError
from camera.experts import FORMS

FORMAT = 2
DTYPES = ("float32", "bfloat16", "float16")


@register_quantization_config("camera")
class CameraConfig(QuantizationConfigMixin):
    """What a compressed checkpoint holds, and how it was made.

    `modules` maps a module's path to its form, {"form": name, ...}; `made_by` is the method's name
    and settings.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        made_by: dict[str, Any] | None = None,
        format: int = FORMAT,
        **_: Any,
    ):
        self.quant_method = "camera"
        self.format = format
        self.modules = modules or {}
        self.made_by = made_by or {}
        if format < FORMAT:
            raise CameraError(
                f"checkpoint format {format} is older than this package reads ({FORMAT}): compress "
                "the model again."
            )
        if format > FORMAT:
            raise CameraError(
                f"checkpoint format {format} is newer than this package knows ({FORMAT}): "
                "upgrade camera-moe."
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "format": self.format,
            "made_by": self.made_by,
            "modules": self.modules,
        }


def build_forms(model: nn.Module, config: CameraConfig) -> None:
    """Give a freshly built model (on meta) the modules of a compressed checkpoint."""
    for path, spec in config.modules.items():
        if spec["form"] not in FORMS:
            raise CameraError(
                f"module {path} has the form '{spec['form']}', which this package doesn't know "
                f"({', '.join(sorted(FORMS))}): upgrade camera-moe."
            )
        native = model.get_submodule(path)
        model.set_submodule(path, FORMS[spec["form"]].build(native, spec))


@register_quantizer("camera")
class CameraQuantizer(HfQuantizer):
    """Teaches transformers to load and save compressed checkpoints."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        build_forms(model, self.quantization_config)

    def update_weight_conversions(self, conversions: list, model: PreTrainedModel) -> list:
        """Drop the rules that fuse native experts: ours are stored as they are used."""
        return [c for c in conversions if not _touches_experts(c)]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _touches_experts(conversion: Any) -> bool:
    return any(".experts" in target for target in conversion._original_target_patterns)


def load_model(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load any causal language model, compressed or not, for evaluation.

    `device` auto is the accelerator if there is one (spread over all of them by accelerate if there
    are several), else the CPU. `dtype` auto is the checkpoint's own, on a CPU float32. Raises
    CameraError for what can't be loaded.
    """
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if device == "auto":
        placement = "auto" if count > 1 else {"": resolve_device(device)}
    else:
        placement = {"": device}
    on_cpu = count == 0 or device.startswith("cpu")
    precision = resolve_dtype(dtype) or (torch.float32 if on_cpu else "auto")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=precision,
            device_map=placement,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise CameraError(f"model {path} can't be loaded: {first}") from error
    if info["missing_keys"]:  # transformers fills these with random numbers
        name = sorted(info["missing_keys"])[0]
        raise CameraError(f"model {path} lacks tensor '{name}': download or compress it again.")
    return model.eval()


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


def resolve_dtype(dtype: str) -> torch.dtype | None:
    """The torch dtype of a name, None for `auto` (the checkpoint's own); CameraError for others."""
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise CameraError(f"dtype={dtype} is none of auto, {', '.join(DTYPES)}.")
    return getattr(torch, dtype)


def compute_dtype(dtype: str, stored: torch.dtype, device: str) -> torch.dtype:
    """What to compute in: the dtype asked for; for `auto` the stored one, on a CPU float32.

    Most CPUs emulate 16-bit arithmetic, three times slower than float32 and less exact.
    """
    asked = resolve_dtype(dtype)
    return asked or (torch.float32 if torch.device(device).type == "cpu" else stored)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id; CameraError if it has none."""
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise CameraError(f"{path} has no tokenizer that loads: {first}") from error
