"""What the tensors of a model are written in."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from camera.checkpoint.shards import ShardReader
from camera.runtime.device.finite import FiniteCheck
from camera.runtime.errors import CameraError

log = logging.getLogger("camera")


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
