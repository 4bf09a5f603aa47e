"""What a quantised checkpoint holds, as its format looks at it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from camera.checkpoint.places import Place
from camera.runtime.errors import CameraError


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a folder, what config.json says of their quantisation, and the dtype that they
    are unpacked to."""

    folder: Path
    places: Mapping[str, Place]
    told: Mapping[str, Any]
    dtype: torch.dtype

    def part(self, key: str, *names: str) -> Place:
        """The first there is of the tensors that packed tensor `key` may come with."""
        for name in names:
            if name in self.places:
                return self.places[name]
        raise CameraError(
            f"{self.folder} holds tensor '{key}' without '{names[0]}', which it is unpacked by: "
            "download the model again."
        )

    def require_shape(self, name: str, place: Place, shape: tuple[int, ...]) -> None:
        """CameraError for a part of another shape."""
        if place.shape != shape:
            self.refuse(name, place, f"has the shape {list(place.shape)} in place of {list(shape)}")

    def refuse(self, name: str, place: Place, what: str) -> NoReturn:
        """CameraError for a part that can't be what config.json says."""
        raise CameraError(
            f"tensor '{name}' in {place.file} {what}: quantization_config in config.json and "
            "weights don't belong together, download the model again."
        )

    def number(self, key: str, choices: tuple[int, ...], default: int | None = None) -> int:
        """A whole number of quantization_config; CameraError unless it is one of `choices`."""
        value = self.told.get(key, default)
        if value not in choices or isinstance(value, bool):
            known = ", ".join(str(choice) for choice in choices)
            self.refuse_setting(key, known)
        return value

    def refuse_setting(self, key: str, known: str) -> NoReturn:
        """CameraError for a value of quantization_config that isn't read."""
        raise CameraError(
            f"{self.folder / 'config.json'} says quantization_config.{key}={self.told.get(key)!r}, "
            f"and only {known} can be unpacked: convert the model to bfloat16 with its own tool "
            "first."
        )
