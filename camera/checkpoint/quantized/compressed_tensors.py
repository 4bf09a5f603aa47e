"""compressed-tensors, as llm-compressor writes it; unpacked by that package.

`X.weight_packed` (or `X.weight` in int8 or FP8), `X.weight_scale` and, by scheme, zero points, a
global scale and the shape make `X.weight` [R, C].

Shapes: R rows (outputs), C columns (inputs).
"""

from typing import Any

import torch

from camera.checkpoint.places import PackedPlace, Place, read_places
from camera.checkpoint.quantized.stored import StoredWeights
from camera.runtime.errors import CameraError

# Whose scales multiply codes: in fp32 the product is rounded once.
BY_SCALE = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
TWO_A_BYTE = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
CODES = (torch.int8, torch.float8_e4m3fn)
PARTS = ("weight_scale", "weight_zero_point", "weight_global_scale")
BESIDE = ("input_scale", "input_zero_point", "input_global_scale", "output_scale")
BESIDE += ("k_scale", "v_scale", "weight_shape", "weight_scale", "weight_zero_point")
WORKSPACE = 16  # bytes of a weight while it is unpacked


def unpacked(stored: StoredWeights) -> dict[str, PackedPlace]:
    """The plain tensors, by name, that the modules of all schemes make."""
    schemes, found = _Schemes(stored), {}
    sizes = {k: p for k, p in stored.places.items() if k.endswith(".weight_shape")}
    shapes = {key: tuple(shape.tolist()) for key, shape in read_places(sizes).items()}
    for key, place in stored.places.items():
        path, _, kind = key.rpartition(".")
        if kind != "weight_packed" and not (kind == "weight" and place.dtype in CODES):
            continue
        if f"{path}.weight_g_idx" in stored.places:
            raise CameraError(
                f"{stored.folder} holds '{path}.weight_g_idx': weights whose groups are in another "
                "order (actorder=group) can't be unpacked, convert the model to bfloat16 with its "
                "own tool first."
            )
        scheme, form = schemes.of(path)
        parts = {kind: place, "weight_scale": stored.part(key, f"{path}.weight_scale")}
        for part in PARTS:
            if f"{path}.{part}" in stored.places:
                parts[part] = stored.places[f"{path}.{part}"]
        shape = _shape(stored, key, place, form, shapes)
        found[f"{path}.weight"] = PackedPlace(
            parts,
            lambda parts, scheme=scheme, form=form, shape=shape: dequantized(
                parts, scheme, form, shape, stored.dtype
            ),
            stored.dtype,
            shape,
            workspace=WORKSPACE * shape[0] * shape[-1],
        )
    return found


def dequantized(
    parts: dict[str, torch.Tensor],
    scheme: Any,
    form: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """[R, C] of the parts of one module."""
    from compressed_tensors.compressors import BaseCompressor

    state = dict(parts)
    if form in BY_SCALE:
        state["weight_scale"] = state["weight_scale"].float()
    if "weight_packed" in state:
        state["weight_shape"] = torch.tensor(shape)
    plain = BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"]
    if tuple(plain.shape) != shape:
        raise CameraError(
            f"a weight of {form} is unpacked to {list(plain.shape)} in place of {list(shape)}: "
            "download the model again."
        )
    return plain.to(dtype)


def _shape(
    stored: StoredWeights,
    key: str,
    place: Place,
    form: str,
    shapes: dict[str, tuple[int, ...]],
) -> tuple[int, ...]:
    if key.endswith(".weight"):
        return place.shape
    if form in TWO_A_BYTE:
        return (*place.shape[:-1], 2 * place.shape[-1])
    name = f"{key.removesuffix('.weight_packed')}.weight_shape"
    stored.part(key, name)
    if len(shapes[name]) != 2 or shapes[name][0] != place.shape[0]:
        stored.refuse(name, stored.places[name], f"says {list(shapes[name])}")
    return shapes[name]


class _Schemes:
    """The scheme and format of each module, by the targets of config_groups."""

    def __init__(self, stored: StoredWeights):
        try:
            from compressed_tensors.quantization import QuantizationConfig
            from compressed_tensors.utils.match import is_match
        except ImportError as error:
            raise CameraError(
                f"{stored.folder} is stored as compressed-tensors: pip install "
                "'camera-moe[compressed-tensors]' to read it."
            ) from error
        try:
            self._config = QuantizationConfig.model_validate(dict(stored.told))
        except ValueError as error:
            first = " ".join(str(error).split())[:200]
            raise CameraError(
                f"quantization_config in {stored.folder / 'config.json'} is none of "
                f"compressed-tensors ({first}): download the model again."
            ) from error
        self._stored, self._match = stored, is_match
        self._linear = torch.nn.Linear(1, 1, device="meta")

    def of(self, path: str) -> tuple[Any, str]:
        """(scheme, format) of the module at `path`."""
        for group in self._config.config_groups.values():
            if not self._match(path, self._linear, group.targets):
                continue
            form = group.format or self._config.format
            if form not in (*BY_SCALE, *TWO_A_BYTE):
                known = ", ".join((*BY_SCALE, *TWO_A_BYTE))
                self._stored.refuse_setting("format", known)
            return group, form
        raise CameraError(
            f"{self._stored.folder} holds packed weights of module '{path}', which no group of "
            "quantization_config.config_groups targets: take the config.json that was written with "
            "these weights."
        )
