"""A model on meta whose layers are loaded from shards and freed."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from camera.checkpoint.config import CameraConfig, CameraQuantizer, build_forms
from camera.checkpoint.loading import (
    choose_experts,
    choose_kernels,
    compute_dtype,
    resolve_dtype,
)
from camera.checkpoint.shards import ShardReader, read_places
from camera.moe.budget import IN_A_LAYER, Budget, budget_of, require_counts
from camera.moe.capture import replaced_submodule
from camera.moe.families import family_of
from camera.moe.feed_forward import ExpertGroup, FeedForward
from camera.runtime.buffers import trim_heap
from camera.runtime.errors import CameraError
from camera.runtime.overlap import LayerPrefetcher
from camera.streaming.disk_experts import (
    DiskExperts,
    single_expert_module,
    single_expert_places,
)


class MetaModel:
    """A causal language model on meta whose layers are read from disk one by one and freed.

    `stored_dtype` is what its tensors are written in, `dtype` what they are computed in.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ):
        self.folder, self.device = folder, torch.device(device)
        self.config = load_config(folder, trust_remote_code)
        self.family = family_of(self.config.model_type)
        self.reader = ShardReader(folder)
        if getattr(self.config, "quantization_config", None) is None:
            shapes = {key: place.shape for key, place in self.reader.places.items()}
            require_counts(self.config, self.family, shapes)
        layers = self.config.num_hidden_layers
        self.prefetcher = LayerPrefetcher(self._read_layer, layers, self.device)
        self.stored_dtype = resolve_dtype(dtype) or self._checkpoint_dtype()
        self.dtype = compute_dtype(dtype, self.stored_dtype, device)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(
                self.config, dtype=self.stored_dtype, trust_remote_code=trust_remote_code
            )
        self.model.eval().requires_grad_(False)
        self._conversions = get_model_conversion_mapping(self.model)
        self.compressed = getattr(self.config, "quantization_config", None)
        if self.compressed is not None:
            self._prepare_compressed()
        self.base = self.model.base_model
        self.root = f"{self.model.base_model_prefix}.layers"
        self.budget: Budget = budget_of(self.model, self.layers, self.family, self.root)
        self.model.to(self.dtype)
        choose_experts(self.model)
        self._materialise_rotary()

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.layers

    def feed_forward(self, index: int) -> FeedForward:
        """The view of a layer that methods work on."""
        return FeedForward(self.layers[index], self.family, f"{self.root}.{index}")

    def load_layer(self, index: int, experts_on_disk: bool = False) -> nn.Module:
        """Read one decoder layer, and begin to read the next one; with `experts_on_disk` its native
        routed experts stay there (`camera.streaming.disk_experts`).

        CameraError for missing tensors, NaN and inf.
        """
        prefix = f"{self.root}.{index}."
        experts = self.feed_forward(index).routed if experts_on_disk else None
        apart = f"{experts.path}." if experts else ()
        self._load(
            self.prefetcher.get(index, experts_on_disk),
            lambda name: name.startswith(prefix) and not (apart and name.startswith(apart)),
        )
        trim_heap()
        self.prefetcher.start_next()
        if experts is not None:
            self._leave_on_disk(index, experts)
        return self.layers[index]

    def free_layer(self, index: int) -> None:
        """Free the memory of a layer that is as it was loaded."""
        ffn = self.feed_forward(index)
        if ffn.routed is not None and isinstance(ffn.routed.module, DiskExperts):
            ffn.replace(ffn.routed, ffn.routed.module.native)
        self.free(self.layers[index])

    def _read_layer(self, index: int, without_experts: bool) -> dict[str, torch.Tensor]:
        return self.reader.read(
            lambda key: (
                _layer_of(key) == index
                and not (without_experts and self.family.checkpoint_names.holds(key))
            )
        )

    def _leave_on_disk(self, index: int, experts: ExpertGroup) -> None:
        native, ffn = experts.module, self.feed_forward(index)
        places = {
            key: place
            for key, place in self.reader.places.items()
            if _layer_of(key) == index and self.family.checkpoint_names.holds(key)
        }

        def read(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
            one = single_expert_module(native)
            with replaced_submodule(ffn.module, self.family.experts, one):
                tensors = read_places(
                    single_expert_places(places, expert, self.family.checkpoint_names)
                )
                self._load(tensors, lambda name: name.startswith(f"{experts.path}."))
            return one.gate_up_proj.data[0], one.down_proj.data[0]

        ffn.replace(experts, DiskExperts(native, experts.widths, read))

    def load_rest(self, only: str = "") -> None:
        """Read what is outside the layers: embeddings, final norm, head (or those named `only`)."""
        tied = tied_names(self.model)
        self._load(
            self.reader.read(lambda key: _layer_of(key) is None and only in key),
            lambda name: _layer_of(name) is None and only in name and name not in tied,
        )

    def take_out(self, module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
        """Free a module; its tensors, by their names with `prefix`, as its checkpoint holds them.

        No more than one is there in both precisions.
        """
        exempt = self.model._get_dtype_plan(self.stored_dtype)  # what the family keeps in fp32
        held = {prefix + name: tensor for name, tensor in module.state_dict().items()}
        held = {name: tensor for name, tensor in held.items() if not tensor.is_meta}
        self.free(module)
        found = {}
        for name in list(held):
            tensor = held.pop(name)
            if tensor.is_floating_point() and not any(part in name for part in exempt):
                tensor = tensor.to(self.stored_dtype)
            found[name] = tensor
        trim_heap()
        return found

    def free(self, module: nn.Module) -> None:
        """Give a module's memory back."""
        module.to("meta")
        trim_heap()

    def _load(self, tensors: dict[str, torch.Tensor], due: Callable[[str], bool]) -> None:
        """Move tensors of the checkpoint into the model; those that are `due` must be there."""
        settings = LoadStateDictConfig(
            dtype=self.dtype,
            device_map={"": self.device},
            weight_mapping=self._conversions,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
        )
        once = {key: _Once(tensors, key) for key in list(tensors)}
        with _quiet(), _one_by_one():
            info, _ = convert_and_load_state_dict_in_model(self.model, once, settings)
        if info.mismatched_keys or info.conversion_errors:
            wrong = next(iter(info.mismatched_keys or info.conversion_errors))
            name = wrong[0] if isinstance(wrong, tuple) else wrong
            raise CameraError(
                f"tensor '{name}' in {self.folder} doesn't have the shape config.json asks for."
            )
        missing = sorted(name for name in info.missing_keys if due(name))
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CameraError(
                f"{self.folder} lacks tensor '{missing[0]}'{more}: download the model again."
            )
        for name, tensor in self.model.named_parameters():
            if due(name) and not all_finite(tensor):
                raise CameraError(f"tensor '{name}' in {self.folder} holds NaN or inf.")

    def _prepare_compressed(self) -> None:
        if not isinstance(self.compressed, CameraConfig):
            raise CameraError(
                f"{self.folder} is already quantised ({self.compressed}): start from its "
                "unquantised weights."
            )
        build_forms(self.model, self.compressed)
        quantizer = CameraQuantizer(self.compressed)
        self._conversions = quantizer.update_weight_conversions(self._conversions, self.model)

    def _materialise_rotary(self) -> None:
        for name, module in list(self.model.named_modules()):
            if name.endswith("rotary_emb"):  # its buffers live in code, not in the checkpoint
                real = type(module)(config=self.config).to(self.device)
                self.model.set_submodule(name, real)

    def _checkpoint_dtype(self) -> torch.dtype:
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        return next(iter(self.reader.places.values())).dtype


def tied_names(model: nn.Module) -> set[str]:
    """Names of the parameters that share another one's memory."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor is free of NaN and inf, in one read and without a copy."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """config.json as transformers reads it; CameraError for an unknown model type."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        if "custom code" in first:
            first = "it needs code of its own; set trust_remote_code=true if you trust that code."
        raise CameraError(f"{folder / 'config.json'} can't be used: {first}") from error
    choose_kernels(config)
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == "camera":
        config.quantization_config = CameraConfig.from_dict(stored)
    return config


def _layer_of(key: str) -> int | None:
    found = IN_A_LAYER.search(key)
    return int(found.group(1)) if found else None


class _Once:
    """A tensor that is given away when it is first looked at: converting it then frees it."""

    def __init__(self, tensors: dict[str, torch.Tensor], key: str):
        self.tensors, self.key = tensors, key

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.tensors.pop(self.key)


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
