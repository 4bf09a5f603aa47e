"""The checkpoint format: a quantization_config with quant_method NAME, registered on import.

A compressed checkpoint is a transformers folder whose config.json maps module paths to specs of
module formats.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from camera.checkpoint.source import INDEX
from camera.moe.families import FAMILIES, family_of
from camera.runtime.errors import CameraError
from camera.runtime.files import content_key

# Programs that don't know the format print this name: that of the package to install.
NAME = "camera-moe"
NAMES = (NAME, "camera")  # the second in checkpoints of before
FORMAT = 2
GENERATION = "generation_config.json"
MODULES = "camera_modules"  # key of the index's metadata: which specs the weights were written by
# Keys of any family that no model can be built without.
COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
COUNTS += ("num_key_value_heads",)


@register_quantization_config(NAMES[1])
@register_quantization_config(NAME)
class CameraConfig(QuantizationConfigMixin):
    """The modules of a compressed checkpoint, and the method that made it.

    `modules` maps a module's path to its spec, {"form": name of the format, ...}. `made_by` is the
    method's name and settings. `source` is the quantization_config by which the other modules are
    stored, where they are as a quantised source had them; those that aren't are named in it.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        made_by: dict[str, Any] | None = None,
        format: int = FORMAT,
        source: dict[str, Any] | None = None,
        **_: Any,
    ):
        self.quant_method = NAME
        self.format = format
        self.modules = {} if modules is None else modules
        self.made_by = {} if made_by is None else made_by
        self.source = source
        if not isinstance(self.modules, dict) or type(format) is not int:
            raise CameraError(
                "quantization_config of config.json has no modules by path, or no format number: "
                "take the config.json that was written with these weights."
            )
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
        told = {
            "quant_method": self.quant_method,
            "format": self.format,
            "made_by": self.made_by,
            "modules": self.modules,
        }
        return told if self.source is None else told | {"source": self.source}


@register_quantizer(NAMES[1])
@register_quantizer(NAME)
class CameraQuantizer(HfQuantizer):
    """Loads and saves compressed checkpoints in transformers."""

    requires_calibration = True
    _unpacking: Sequence[Any] = ()  # rules for what stayed as a quantised source stored it

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.quantization_config.source is not None and checkpoint_files:
            from camera.checkpoint.quantized.conversions import unpacking_rules

            self._unpacking = unpacking_rules(Path(checkpoint_files[0]).parent)
        from camera.checkpoint.modules import build_forms

        build_forms(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self._unpacking:  # in memory all is plain, and so it is saved
            rules = [c for c in model._weight_conversions if c not in self._unpacking]
            model._weight_conversions, self.quantization_config.source = rules, None

    def update_weight_conversions(self, conversions: list, model: PreTrainedModel) -> list:
        """The rules but those that fuse native experts: compressed ones are stored as used."""
        return [*self._unpacking, *(c for c in conversions if not _touches_experts(c))]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _touches_experts(conversion: Any) -> bool:
    return any(".experts" in target for target in conversion._original_target_patterns)


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """config.json as transformers reads it; CameraError if it can't.

    What a forward pass is to return beside logits is no property of the weights: it is left out.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except CameraError:
        raise
    except Exception as error:  # a value of another type leads to any of a dozen types
        reason = reason_of(error)
        if "custom code" in reason:
            reason = "it needs code of its own; set trust_remote_code=true if you trust that code"
        raise CameraError(f"{folder / 'config.json'} can't be used: {reason}.") from error
    for switch in ("output_attentions", "output_hidden_states"):
        setattr(config, switch, False)
    return config


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """config.json as transformers reads it; CameraError, with the key, for an unknown model type
    and for values that no model can have."""
    path = folder / "config.json"
    told = json_object(path)
    if (folder / GENERATION).exists():
        json_object(folder / GENERATION)
    config = read_config(folder, trust_remote_code)
    for key in _not_numbers(told):
        raise CameraError(f"{path} says {key}=NaN: give a number.")
    for other, key in (config.attribute_map or {}).items():
        if key in told and other in told and told[key] != told[other]:
            raise CameraError(
                f"{path} says {key}={told[key]} and {other}={told[other]}, which "
                "are two names of one thing: remove the wrong one."
            )
    _refuse_values(config, path)
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") in NAMES:
        config.quantization_config = compressed = CameraConfig.from_dict(stored)
        _require_own(compressed, folder)
    return config


def auto_class(config: Any) -> type:
    """The Auto class that builds a model's own class, vision tower and all."""
    family = FAMILIES.get(config.model_type)
    return AutoModelForImageTextToText if family and family.tower else AutoModelForCausalLM


def modules_key(modules: dict[str, Any]) -> str:
    """A short name of these specs, for the index beside weights that were written by them."""
    return content_key({"modules": modules})


def _require_own(compressed: CameraConfig, folder: Path) -> None:
    """CameraError for specs that weights were not written by: their tensors may have equal shapes.

    An index that says nothing, of an older folder or another program, is taken.
    """
    index = folder / INDEX
    metadata = json_object(index).get("metadata") if index.exists() else None
    wanted = metadata.get(MODULES) if isinstance(metadata, dict) else None
    if wanted is not None and wanted != modules_key(compressed.modules):
        raise CameraError(
            f"quantization_config in {folder / 'config.json'} isn't the one that its weights were "
            "written with: take the config.json of the same run."
        )


def reason_of(error: Exception) -> str:
    """One sentence of what another library raised: its first line, or the rule that was broken."""
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
    lines = str(cause or error).strip().splitlines() or [""]
    text = re.sub(r"<class '([\w.]+)'>", r"\1", lines[0].partition(". Errors:")[0])
    if not isinstance(error, ValueError | OSError | StrictDataclassError):
        text = f"{type(error).__name__}: {text}"
    return text.rstrip(" .")


def look_at(config: Any) -> str:
    """The keys of a config that no model can be made of whose values are unlikely."""
    odd = []
    for key, value in vars(config).items():
        strange = type(value) is int and not (0 < value < 2**31) and not key.endswith("_id")
        if (strange or value is None) and getattr(type(config), key, None) not in (None, value):
            odd.append(f"{key}={value}")
    return f": look at {', '.join(odd)}" if odd else ""


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file says; CameraError unless it is an object."""
    try:
        told = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CameraError(f"{path} is no valid JSON ({error}): download it again.") from error
    if not isinstance(told, dict):
        raise CameraError(f"{path} holds no JSON object: download it again.")
    return told


def _refuse_values(config: Any, path: Path) -> None:
    """CameraError for values that transformers takes, and nothing can be computed with."""
    for key in COUNTS:
        _require_count(config, key, path)
    sliding = getattr(config, "use_sliding_window", True)  # where it isn't, its width is 0
    if sliding and getattr(config, "sliding_window", None) is not None:
        _require_count(config, "sliding_window", path)
    family, text = FAMILIES.get(config.model_type), config.get_text_config()
    experts = None if family is None else getattr(text, family.keys.experts, None)
    if isinstance(experts, int):
        _require_value(family.top_k(text), family.keys.top_k, path, experts)
    act = getattr(config, "hidden_act", None)
    if isinstance(act, str) and act not in ACT2FN:
        raise CameraError(f"{path} says hidden_act={act!r}, which transformers doesn't know.")
    if config.dtype is not None and not isinstance(config.dtype, torch.dtype):
        raise CameraError(f"{path} says dtype={config.dtype!r}: give float32, bfloat16 or float16.")


def _require_count(config: Any, key: str, path: Path, most: int | None = None) -> None:
    _require_value(getattr(config, key, 1), key, path, most)


def _require_value(value: Any, key: str, path: Path, most: int | None = None) -> None:
    if not isinstance(value, int) or value < 1 or (most and value > most):
        asked = f"from 1 to {most}" if most else "of at least 1"
        raise CameraError(f"{path} says {key}={value!r}: give a whole number {asked}.")


def _not_numbers(told: dict[str, Any]) -> list[str]:
    """Keys, of inner objects too, whose value is NaN."""
    found = []
    for key, value in told.items():
        if isinstance(value, dict):
            found += [f"{key}.{inner}" for inner in _not_numbers(value)]
        elif isinstance(value, float) and value != value:
            found.append(key)
    return found


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
