"""A model on meta whose layers are loaded from shards and freed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from camera.checkpoint.config import load_config
from camera.checkpoint.loading import (
    choose_experts,
    choose_kernels,
    compute_dtype,
    resolve_dtype,
)
from camera.checkpoint.matching import convert, refuse_missing
from camera.checkpoint.places import read_places
from camera.checkpoint.quantized.kept import KeptAsStored
from camera.checkpoint.quantized.opening import open_weights
from camera.moe.budget import Budget, budget_of, require_counts
from camera.moe.capture import replaced_submodule
from camera.moe.experts.block_check import refuse_other_sums
from camera.moe.experts.group import RoutedExperts
from camera.moe.families import family_of, layer_of
from camera.moe.feed_forward import FeedForward
from camera.runtime.buffers import trim_heap
from camera.runtime.device.finite import FiniteCheck, all_finite
from camera.runtime.errors import CameraError
from camera.runtime.overlap import LayerPrefetcher
from camera.streaming.disk_experts import (
    DiskExperts,
    single_expert_module,
    single_expert_places,
)
from camera.streaming.meta_build import StoredDtypes, build_on_meta, decoder_of, tied_names
from camera.streaming.recorder import ArgumentRecorder


class MetaModel:
    """A causal language model on meta whose layers are read from disk one by one and freed.

    `stored_dtype` is what most of its tensors are written in (`dtype_on_disk` tells of each): that
    of the files, unless `save_dtype` says otherwise. `dtype` is what they are computed in.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        save_dtype: str = "auto",
    ):
        self.folder, self.device = folder, torch.device(device)
        self.trust_remote_code, self._asked = trust_remote_code, (dtype, save_dtype)
        self.kept: KeptAsStored | None = None
        self.config = load_config(folder, trust_remote_code)
        self.text_config = self.config.get_text_config()
        choose_kernels(self.config)
        self.family = family_of(self.config.model_type)
        self.reader = open_weights(folder, self.config)
        if getattr(self.config, "quantization_config", None) is None:
            shapes = {key: place.shape for key, place in self.reader.places.items()}
            require_counts(self.text_config, self.family, shapes)
        layers = self.text_config.num_hidden_layers
        self.prefetcher = LayerPrefetcher(self._read_layer, layers, self.device)
        told, asked = self.config.dtype, resolve_dtype(save_dtype, "save_dtype")
        self.model, self._conversions = build_on_meta(
            self.config,
            self.reader,
            self.family,
            asked or self.reader.main_dtype(),
            trust_remote_code,
        )
        self.dtype = compute_dtype(dtype, self.reader.main_dtype(), device)
        self._dtypes = StoredDtypes(self.model, self.reader, asked, self.dtype)
        self.stored_dtype = self._dtypes.main
        self.compressed = getattr(self.config, "quantization_config", None)
        self.base = decoder_of(self.model, self.family)
        layers = self.base.layers
        self.root = next(name for name, part in self.model.named_modules() if part is layers)
        self._layer_of_key: dict[str, int | None] = {}
        if asked:
            self.model.to(asked)
        else:
            self._dtypes.warn_of_another(folder, told)
        self.budget: Budget = budget_of(self.model, self.layers, self.family, self.root)
        self._refuse_other_sums()
        self.model.to(self.dtype)
        choose_experts(self.model)
        self._materialise_rotary()

    def _refuse_other_sums(self) -> None:
        views = map(self.feed_forward, range(len(self.layers)))
        block = next((view for view in views if view.is_moe), None)
        if block is not None and self.compressed is None:
            refuse_other_sums(block, self.text_config.hidden_size)

    def reopened(self) -> "MetaModel":
        """The model as its files have it; this object holds no memory from then on."""
        self.prefetcher.drop()
        self.free(self.model)
        dtype, save_dtype = self._asked
        again = MetaModel(self.folder, str(self.device), dtype, self.trust_remote_code, save_dtype)
        if self.kept is not None:
            again.keep_as_stored(self.kept.native)
        return again

    def keep_as_stored(self, native: bool) -> None:
        """Have what nobody changes of a quantised source written as it is stored, in a native
        checkpoint or in one of this package; CameraError where its config.json couldn't say so."""
        if self.reader.quantisation is not None:
            names = self.family.checkpoint_names
            self.kept = KeptAsStored(self.reader, names, self.name_of, native)

    @property
    def unpacking(self) -> int:
        """Bytes that reading tensors takes at most beside them, where the source is quantised, and
        that what is written as it was stored takes beside the layer."""
        kept = 0 if self.kept is None else self.reader.unpacking + self.kept.nbytes
        return self.reader.unpacking + kept

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.layers

    def feed_forward(self, index: int) -> FeedForward:
        """The view of a layer that methods work on."""
        return FeedForward(self.layers[index], self.family, f"{self.root}.{index}")

    def recorder(self, layer: nn.Module, output: torch.Tensor | None = None) -> ArgumentRecorder:
        """A stand-in for one of the model's layers that records its arguments."""
        tokens_of = None
        if self.family.hands_on is not None:
            argument, most = self.family.hands_on
            tokens_of = argument, getattr(self.text_config, most)
        return ArgumentRecorder(layer, output, tokens_of)

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
                self._layer_of(key) == index
                and not (without_experts and self.family.checkpoint_names.holds(key))
            ),
            self.device,
        )

    def _leave_on_disk(self, index: int, experts: RoutedExperts) -> None:
        native, ffn = experts.module, self.feed_forward(index)
        places = {
            key: place
            for key, place in self.reader.places.items()
            if self._layer_of(key) == index and self.family.checkpoint_names.holds(key)
        }

        def read(expert: int) -> RoutedExperts:
            one = single_expert_module(native)
            with replaced_submodule(ffn.module, self.family.experts, one):
                tensors = read_places(
                    single_expert_places(places, expert, self.family.checkpoint_names),
                    self.device,
                )
                self._load(tensors, lambda name: name.startswith(f"{experts.path}."))
            return RoutedExperts(experts.path, one, self.family, experts.scale)

        ffn.replace(experts, DiskExperts(experts, read))

    def load_rest(self, only: str = "") -> None:
        """Read what is outside the layers: embeddings, final norm, head (or those named `only`)."""
        tied = tied_names(self.model)
        self._load(
            self.reader.read(
                lambda key: self._layer_of(key) is None and only in self.name_of(key),
                self.device,
            ),
            lambda name: self._found_layer(name) is None and only in name and name not in tied,
        )

    def _layer_of(self, key: str) -> int | None:
        """The decoder layer of a tensor of the checkpoint; None for all outside, those of other
        towers' layers too."""
        if key not in self._layer_of_key:
            self._layer_of_key[key] = self._found_layer(self.name_of(key))
        return self._layer_of_key[key]

    def _found_layer(self, name: str) -> int | None:
        """The same of a tensor of the model, by its name there."""
        before = f".{name}".partition(".layers.")[0]
        # a model that was saved without its head lacks the first part of the names
        return layer_of(name) if f".{self.root}".removesuffix(".layers").endswith(before) else None

    def name_of(self, key: str) -> str:
        """The model's name of a checkpoint's tensor; of one of several that are put together."""
        for rule in self._conversions:
            key = rule.rename_source_key(key)[0]
        return key

    def take_out(self, module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
        """Free a module; its tensors, by their names with `prefix`, as they are written."""
        held = {prefix + name: tensor for name, tensor in module.state_dict().items()}
        held = {name: tensor for name, tensor in held.items() if not tensor.is_meta}
        self.free(module)
        found = self._dtypes.cast(held)
        trim_heap()
        return found

    def dtype_on_disk(self, name: str) -> torch.dtype:
        """What a floating-point tensor of this name is written in."""
        return self._dtypes.of(name)

    def free(self, module: nn.Module) -> None:
        """Give a module's memory back."""
        module.to("meta")
        trim_heap()

    def _load(self, tensors: dict[str, torch.Tensor], due: Callable[[str], bool]) -> None:
        """Move tensors of the checkpoint into the model; those that are `due` must be there."""
        once = {key: _Once(tensors, key) for key in list(tensors)}
        info = convert(self.model, once, self._conversions, self.dtype, self.device)
        if info.mismatched_keys or info.conversion_errors:
            wrong = next(iter(info.mismatched_keys or info.conversion_errors))
            name = wrong[0] if isinstance(wrong, tuple) else wrong
            raise CameraError(
                f"tensor '{name}' in {self.folder} doesn't have the shape config.json asks for."
            )
        refuse_missing(self.folder, {name for name in info.missing_keys if due(name)})
        check = FiniteCheck()
        for name, tensor in self.model.state_dict().items():
            if due(name) and not tensor.is_meta:
                check.add(name, tensor)
        broken = check.first_broken()
        if broken is not None:
            self._blame(broken)

    def _blame(self, name: str) -> None:
        """CameraError for a tensor that isn't finite: the file's fault, or that of the dtype."""
        layer = self._found_layer(name)
        for key in [key for key in self.reader.places if self._layer_of(key) == layer]:
            if not all_finite(self.reader.read(lambda other, key=key: other == key)[key]):
                raise CameraError(f"tensor '{key}' in {self.folder} holds NaN or inf.")
        dtype = str(self.dtype).removeprefix("torch.")
        raise CameraError(
            f"tensor '{name}' in {self.folder} holds numbers that {dtype} can't: set "
            "dtype=bfloat16 or float32."
        )

    def _materialise_rotary(self) -> None:
        for name, module in list(self.base.named_modules()):
            if "inv_freq" in str(module._non_persistent_buffers_set):  # in code, not on disk
                real = type(module)(config=self.text_config).to(self.device)
                self.base.set_submodule(name, real)


class _Once:
    """A tensor that is given away when it is first looked at: converting it then frees it."""

    def __init__(self, tensors: dict[str, torch.Tensor], key: str):
        self.tensors, self.key = tensors, key

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.tensors.pop(self.key)
