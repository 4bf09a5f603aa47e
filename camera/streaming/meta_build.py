"""A model on meta that fits what its checkpoint holds: the files count, config.json follows."""

import logging
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from camera.checkpoint.matching import HeaderMatch, empty_model, match_headers
from camera.checkpoint.places import read_places
from camera.checkpoint.shards import ShardReader
from camera.moe.families import layer_of
from camera.moe.families.family import Family
from camera.runtime.device.finite import FiniteCheck
from camera.runtime.errors import CameraError

log = logging.getLogger("camera")
ROWS = 4096  # of two tables that are compared at a time

_IN_CODE = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that older versions stored
_OF_AN_ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save|base_layer|prompt_encoder|ia3_l)\b")


def build_on_meta(
    config: Any, reader: ShardReader, family: Family, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[nn.Module, list]:
    """The model, its tensors in the dtypes that are stored, and transformers' rules for its keys.

    Names of tied tensors and unused tensors are put right in `reader` and `config`.
    CameraError where tensors are missing or don't fit.
    """
    model, conversions = empty_model(config, reader.folder, dtype, trust_remote_code)
    match = match_headers(model, reader.places, conversions)
    _refuse_adapters(match, reader)
    if tied_names(model) and not _settle_ties(model, match, reader):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        model, conversions = empty_model(config, reader.folder, dtype, trust_remote_code)
        match = match_headers(model, reader.places, conversions)
    _leave_out(match.unused, config, reader, family, _ignored_by(model))
    missing = set(match.missing)
    for name, source in tied_names(model).items():
        if name not in match.missing:
            missing.discard(source)
        missing.discard(name)
    replace(match, missing=missing).require(reader.folder)
    return model, conversions


def decoder_of(model: nn.Module, family: Family) -> nn.Module:
    """The module of a model's embedding, decoder layers and final norm; CameraError, naming what
    there is, where a declaration doesn't fit."""
    modules = dict(model.base_model.named_modules())
    if family.tower not in modules:
        towers = [name for name, part in modules.items() if hasattr(part, "layers")]
        raise CameraError(
            f"{type(model).__name__} has no '{family.tower}', but layers in {', '.join(towers)}: "
            "declare where its decoder is in `tower` of its Family."
        )
    base = modules[family.tower]
    for name in ("layers", "embed_tokens", family.final_norm):
        if getattr(base, name, None) is None:
            there = ", ".join(child for child, _ in base.named_children())
            named = "`final_norm` of its Family" if name == family.final_norm else "no declaration"
            raise CameraError(
                f"the decoder {type(base).__name__} has no '{name}', but {there}: its own name can "
                f"be given in {named}."
            )
    return base


def tied_names(model: nn.Module) -> dict[str, str]:
    """{name of a parameter that shares another one's memory: name of that one}."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _settle_ties(model: nn.Module, match: HeaderMatch, reader: ShardReader) -> bool:
    """Give each tied pair one tensor, under the first one's name; False if both are stored and
    differ: then transformers doesn't tie them."""
    for name, source in tied_names(model).items():
        key, source_key = _key_of(name, model, reader), _key_of(source, model, reader)
        if key is None or name in match.missing:
            continue
        if source_key is None:
            reader.places[source] = reader.places.pop(key)
        elif _equal(reader, key, source_key):
            reader.leave_out([key])
        else:
            log.warning(
                "%s holds '%s' and '%s', which differ: they are kept apart, and "
                "tie_word_embeddings is written as false.",
                reader.folder,
                key,
                source_key,
            )
            return False
    return True


def _key_of(name: str, model: nn.Module, reader: ShardReader) -> str | None:
    bare = name.removeprefix(f"{model.base_model_prefix}.")  # of a model saved without its head
    return next((key for key in (name, bare) if key in reader.places), None)


def _equal(reader: ShardReader, one: str, other: str) -> bool:
    """Whether two tables hold the same numbers, a part of the rows at a time."""
    tables = [reader.places[key] for key in (one, other)]
    if tables[0].shape != tables[1].shape:
        return False
    for first in range(0, tables[0].shape[0], ROWS):
        parts = read_places({str(i): table.rows(first, ROWS) for i, table in enumerate(tables)})
        if not torch.equal(parts["0"].double(), parts["1"].double()):
            return False
    return True


def _refuse_adapters(match: HeaderMatch, reader: ShardReader) -> None:
    """CameraError if tensors of an adapter lie among the weights."""
    for key in match.unused:
        if _OF_AN_ADAPTER.search(key):
            raise CameraError(
                f"tensor '{key}' in {reader.folder} is part of an adapter: merge the adapter into "
                "the model first."
            )


def _ignored_by(model: nn.Module) -> list[re.Pattern[str]]:
    """What a model's class says checkpoints hold beside it: heads for several tokens at once."""
    return [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]


def _leave_out(
    unused: list[str],
    config: Any,
    reader: ShardReader,
    family: Family,
    ignored: list[re.Pattern[str]],
) -> None:
    """Forget the tensors that the model doesn't use, and say so; CameraError where they look like
    layers or experts of it, and its class doesn't name them as `ignored`."""
    sizes = {key: reader.places[key].bytes for key in unused if key in reader.places}
    reader.leave_out(list(sizes))
    text, promised = config.get_text_config(), family.keys.prediction_layers
    layers, predicting = text.num_hidden_layers, getattr(text, promised, None) or 0
    strange = []
    for key in sizes:
        layer = layer_of(key)
        if _IN_CODE.search(key) or (layer is not None and 0 <= layer - layers < predicting):
            continue
        if any(pattern.search(key) for pattern in ignored):
            strange.append(key)
            continue
        if layer is not None and layer >= layers:
            raise CameraError(
                f"{reader.folder} holds tensor '{key}', and config.json has num_hidden_layers="
                f"{layers}: correct it, or remove that layer's tensors."
            )
        if family.checkpoint_names.holds(key):
            raise CameraError(
                f"{reader.folder} holds the expert's tensor '{key}', which the model of "
                "config.json doesn't have: download both again."
            )
        strange.append(key)
    if strange:
        size = sum(sizes[key] for key in strange) / 1e6
        _warn_once(
            f"{reader.folder} holds {len(strange)} tensors ({size:.1f} MB) that the model doesn't "
            f"use, '{min(strange)}' first: they are left out."
        )
    if predicting:
        _warn_once(
            f"{reader.folder}: the model that transformers builds has no prediction layers "
            f"({promised}={predicting}): they are left out, and the key is written as 0."
        )
        setattr(text, promised, 0)


@cache
def _warn_once(message: str) -> None:
    """A run builds its model several times: to describe, compress and evaluate it."""
    log.warning("%s", message)


class StoredDtypes:
    """The dtypes on disk of a model's tensors: those of its files, or one that was asked for.

    `main` is that of most; computed: what the model computes in.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: ShardReader,
        asked: torch.dtype | None,
        computed: torch.dtype,
    ):
        self.main = asked or reader.main_dtype()
        self._model, self._reader, self._computed = model, reader, computed
        self._held: dict[str, torch.dtype] = {}  # of the tensors that the files hold
        if not asked:
            self._held = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def of(self, name: str) -> torch.dtype:
        """What a floating-point tensor of this name is written in."""
        if name in self._held:
            return self._held[name]
        exempt = self._model._get_dtype_plan(self.main)  # what the family keeps in fp32
        return torch.float32 if any(part in name for part in exempt) else self.main

    def cast(self, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors as they are written; no more than one is there in both dtypes: `held` is emptied.

        CameraError for a tensor that doesn't fit the dtype in which it is stored.
        """
        found, check = {}, FiniteCheck()
        for name in list(held):
            tensor = held.pop(name)
            found[name] = self._cast(name, tensor, check)
        self._require_storable(check, found)
        return found

    def _cast(self, name: str, tensor: torch.Tensor, check: FiniteCheck) -> torch.Tensor:
        """A tensor in the dtype of its place on disk, entered in `check` unless it is as it was."""
        if not tensor.is_floating_point():
            return tensor
        dtype = self.of(name)
        coarser = torch.promote_types(dtype, self._computed) != self._computed
        if coarser and name in self._reader.places:
            # computed in a coarser dtype: what nobody changed is written as it was
            original = self._reader.read(lambda key: key == name, tensor.device)[name]
            if torch.equal(original.to(tensor), tensor):
                return original.to(dtype)
        check.add(name, tensor)
        return tensor.to(dtype)

    def _require_storable(self, check: FiniteCheck, stored: dict[str, torch.Tensor]) -> None:
        name = check.first_broken({name: tensor.dtype for name, tensor in stored.items()})
        if name is None:
            return
        dtype = stored[name].dtype
        told = f"doesn't fit {dtype}, in which it is stored: set save_dtype=bfloat16 or float32"
        if check.first_broken() is not None:
            name = check.first_broken()
            told = "holds NaN or inf when it is compressed: run with dtype=float32"
        raise CameraError(f"tensor '{name}' {told}.".replace("torch.", ""))

    def warn_of_another(self, folder: Path, told: Any) -> None:
        """A line where config.json says another dtype than that of most tensors."""
        if isinstance(told, torch.dtype) and told != self.main:
            log.warning(
                "%s: config.json says %s, most weights are %s, and so they are written.",
                folder,
                *(str(dtype).removeprefix("torch.") for dtype in (told, self.main)),
            )
