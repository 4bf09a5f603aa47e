"""Tensors of a checkpoint into a model's parameters, by transformers' own rules.

The headers of the files go the same way as their tensors: what is missing, of another shape or
type, or used by nobody is known before a weight is read.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from camera.checkpoint.config import CameraConfig, CameraQuantizer, look_at, reason_of
from camera.checkpoint.formats.format import Format
from camera.checkpoint.modules import build_forms, build_native
from camera.checkpoint.places import AnyPlace
from camera.checkpoint.shards import ShardReader
from camera.moe.budget import owner_of
from camera.moe.families import RUN_ON_META
from camera.runtime.errors import CameraError

_RAN: set[str] = set()  # configurations that were tried


def convert(
    model: nn.Module,
    tensors: dict[str, Any],
    conversions: list,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Move tensors of a checkpoint into the model, one by one; transformers' account of it."""
    settings = LoadStateDictConfig(
        dtype=dtype,
        device_map={"": device},
        weight_mapping=conversions,
        dtype_plan=model._get_dtype_plan(dtype),
    )
    with _quiet(), _one_by_one():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
    model.requires_grad_(False)  # transformers makes parameters anew, which would keep graphs
    return info


def empty_model(
    config: Any, folder: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, list]:
    """The model of a config on meta, compressed modules in place, and transformers' rules for its
    keys; CameraError for a config that no model can be built of."""
    require_runnable(config, folder, trust_remote_code)
    model = _built(config, folder, dtype=dtype, trust_remote_code=trust_remote_code)
    model.eval().requires_grad_(False)
    conversions = get_model_conversion_mapping(model)
    compressed = getattr(config, "quantization_config", None)
    if not isinstance(compressed, CameraConfig):
        return model, conversions
    build_forms(model, compressed)
    return model, CameraQuantizer(compressed).update_weight_conversions(conversions, model)


def _built(config: Any, folder: Path, **options: Any) -> nn.Module:
    try:
        return build_native(config, **options)
    except CameraError:
        raise
    except Exception as error:  # what a wrong size leads to depends on the model's code
        raise CameraError(
            f"no model can be built of {folder / 'config.json'}: {reason_of(error)}"
            f"{look_at(config)}."
        ) from error


def require_runnable(config: Any, folder: Path, trust_remote_code: bool = False) -> None:
    """CameraError for a config whose model fails when it is called: tried on meta, once a process.

    Only with families whose code asks for no number of a tensor, of which meta has none.
    """
    if config.model_type not in RUN_ON_META or trust_remote_code:
        return
    config = copy.copy(config)
    vars(config).pop("quantization_config", None)
    config._attn_implementation = "eager"  # a machine may lack the others
    key = config.to_json_string(use_diff=False)
    if key in _RAN:
        return
    trial = _built(config, folder)
    if hasattr(trial, "set_experts_implementation"):
        trial.set_experts_implementation("batched_mm")  # its shapes don't depend on the routing
    ids_BL, mask_B1LL = torch.zeros(1, 2).long().to("meta"), torch.zeros(1, 1, 2, 2).to("meta")
    try:
        trial.eval()(ids_BL, attention_mask=mask_B1LL, use_cache=False)
    except Exception as error:  # what a wrong value leads to depends on the model's code
        raise CameraError(
            f"the model of {folder / 'config.json'} can't run: {reason_of(error)}{look_at(config)}."
        ) from error
    _RAN.add(key)


@dataclass(frozen=True)
class HeaderMatch:
    """How the tensors that the headers tell of fit a model.

    `missing` are parameters, `unused` keys of the checkpoint, `misshapen` sentences, `mistyped`
    {key: (dtype there, dtype asked)} where floating point meets whole numbers. `foreign` are unused
    keys inside compressed modules, which would compute something else without them.
    """

    missing: set[str]
    unused: list[str]
    misshapen: list[str]
    mistyped: dict[str, tuple[torch.dtype, torch.dtype]]
    foreign: list[str]

    def require(self, folder: Path) -> None:
        """CameraError if a tensor is missing, or of another shape or type."""
        for key, (there, asked) in self.mistyped.items():
            raise CameraError(
                f"tensor '{key}' in {folder} is {_name(there)} where the model has {_name(asked)}: "
                "if another tool quantised this model, start from its unquantised weights."
            )
        if self.misshapen:
            raise CameraError(
                f"tensor {self.misshapen[0]}: config.json and weights in {folder} don't belong "
                "together, download the model again."
            )
        refuse_missing(folder, self.missing)
        for key in self.foreign:
            raise CameraError(
                f"{folder} holds tensor '{key}', which its module in quantization_config of "
                "config.json doesn't have: take the config.json that was written with these "
                "weights."
            )


def match_headers(model: nn.Module, places: dict[str, AnyPlace], conversions: list) -> HeaderMatch:
    """Load headers into a model on meta, whose tensors then have the dtypes that are stored."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    dtype = next(model.parameters()).dtype
    headers = {key: _Header(place) for key, place in places.items()}
    info = convert(model, headers, conversions, dtype, torch.device("meta"))
    misshapen = [
        f"'{name}' has the shape {list(found)} where config.json asks for {list(asked)}"
        for name, found, asked in sorted(info.mismatched_keys)
    ]
    misshapen += [
        f"'{name}' can't be put together from its parts, of unequal shapes or numbers, to "
        f"{list(expected[name])}"
        for name in sorted(info.conversion_errors)
    ]
    unused = [key for key, header in headers.items() if header.asked is None]
    forms = [name for name, module in model.named_modules() if isinstance(module, Format)]
    return HeaderMatch(
        set(info.missing_keys) - set(info.conversion_errors),
        unused,
        misshapen,
        {
            key: (header.place.dtype, header.asked)
            for key, header in headers.items()
            if header.asked is not None and not _same_kind(header.place.dtype, header.asked)
        },
        [key for key in unused if owner_of(key, forms) is not None],
    )


def require_whole(config: Any, reader: ShardReader, trust_remote_code: bool = False) -> None:
    """CameraError unless the headers of a folder are those of the model of a config."""
    folder = reader.folder
    model, conversions = empty_model(config, folder, trust_remote_code=trust_remote_code)
    match = match_headers(model, reader.places, conversions)
    missing = match.missing - set(getattr(model, "all_tied_weights_keys", None) or {})
    replace(match, missing=missing).require(folder)


def refuse_missing(folder: Path, missing: set[str]) -> None:
    """CameraError that names a missing tensor, if there is one."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CameraError(
            f"{folder} lacks tensor '{min(missing)}'{more}: download the model again."
        )


class _Header:
    """Stands for a tensor that isn't read; `asked` is the dtype it is to be loaded in."""

    def __init__(self, place: AnyPlace):
        self.place = place
        self.asked: torch.dtype | None = None

    def __getitem__(self, _: Any) -> "_Header":
        return self

    def to(self, device: Any, dtype: torch.dtype) -> torch.Tensor:
        self.asked = dtype
        return torch.empty(self.place.shape, dtype=self.place.dtype, device="meta")


def _same_kind(there: torch.dtype, asked: torch.dtype) -> bool:
    return there == asked or (there.is_floating_point and asked.is_floating_point)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Without transformers' threads, which convert a whole layer before any of it is in place."""
    switch = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


class _quiet:
    """No progress bar for each layer's few tensors."""

    def __enter__(self) -> None:
        self.was_on = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        if self.was_on:
            transformers_logging.enable_progress_bar()
