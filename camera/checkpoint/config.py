"""The checkpoint format: a quantization_config with quant_method `camera`, registered on import.

A compressed checkpoint is a transformers folder whose config.json maps module paths to specs of
module formats. `from_pretrained` builds these modules on meta and loads their tensors.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from camera.checkpoint.formats.format import FORMATS
from camera.moe.families import family_of
from camera.runtime.errors import CameraError

FORMAT = 2


@register_quantization_config("camera")
class CameraConfig(QuantizationConfigMixin):
    """The modules of a compressed checkpoint, and the method that made it.

    `modules` maps a module's path to its spec, {"form": name of the format, ...}. `made_by` is the
    method's name and settings.
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
    """Replace modules of a freshly built model (on meta) by those of a compressed checkpoint."""
    for path, spec in config.modules.items():
        if spec["form"] not in FORMATS:
            raise CameraError(
                f"module {path} has the form '{spec['form']}', which this package doesn't know "
                f"({', '.join(sorted(FORMATS))}): upgrade camera-moe."
            )
        native = model.get_submodule(path)
        model.set_submodule(path, FORMATS[spec["form"]].from_spec(native, spec))


@register_quantizer("camera")
class CameraQuantizer(HfQuantizer):
    """Loads and saves compressed checkpoints in transformers."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        build_forms(model, self.quantization_config)

    def update_weight_conversions(self, conversions: list, model: PreTrainedModel) -> list:
        """The rules but those that fuse native experts: compressed ones are stored as used."""
        return [c for c in conversions if not _touches_experts(c)]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _touches_experts(conversion: Any) -> bool:
    return any(".experts" in target for target in conversion._original_target_patterns)


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """config.json as transformers reads it; CameraError for an unknown model type."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        if "custom code" in first:
            first = "it needs code of its own; set trust_remote_code=true if you trust that code."
        raise CameraError(f"{folder / 'config.json'} can't be used: {first}") from error
    told = json.loads((folder / "config.json").read_text())
    for other, key in (config.attribute_map or {}).items():
        if told.get(key, told.get(other)) != told.get(other, told.get(key)):
            raise CameraError(
                f"{folder / 'config.json'} says {key}={told[key]} and {other}={told[other]}, which "
                "are two names of one thing: remove the wrong one."
            )
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == "camera":
        config.quantization_config = CameraConfig.from_dict(stored)
    return config


def save_config(config: PretrainedConfig, folder: Path) -> None:
    """Write config.json, also under the names that programs of before transformers 5 read.

    These take their own defaults for what they don't find: 128 experts, another base of the rotary
    embedding.
    """
    config.save_pretrained(folder)
    path, family = folder / "config.json", family_of(config.model_type)
    told = json.loads(path.read_text()) | dict(family.elsewhere)
    keys = family.keys
    for key in (keys.experts, keys.width, keys.shared_width, keys.dense_width, keys.top_k):
        if hasattr(config, key):
            told.setdefault(key, getattr(config, key))
    rope = told.get("rope_parameters")
    if rope and "rope_theta" in rope:
        told["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            told["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if "dtype" in told:
        told["torch_dtype"] = told["dtype"]
    path.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
