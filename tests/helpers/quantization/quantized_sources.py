"""Plain checkpoints stored anew as other tools store quantised ones, with the plain weights that
these hold: written by each tool's description, a number at a time where it packs.

Shapes: R rows (outputs), C columns (inputs), G groups of columns.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from camera.checkpoint.shards import SINGLE
from tests.helpers.checkpoints import tensors_of

Stored = dict[str, torch.Tensor]
Quantise = Callable[[torch.Tensor, torch.dtype], tuple[Stored, torch.Tensor]]
"""quantise(weight, dtype): what is stored, by the ends of names, and the plain weight in dtype."""
LEFT = ("embed_tokens", "lm_head", "gate.weight", "norm")  # of every tool, as they are
BLOCK = (16, 24)  # which divides none of the tiny models' sizes but 32 and 48
GROUP = 8


def fp8(weight_RC: torch.Tensor, dtype: torch.dtype) -> tuple[Stored, torch.Tensor]:
    """Blocks of BLOCK, the last ones smaller; a loop over blocks gives the plain weight."""
    rows, columns = weight_RC.shape
    codes, plain = torch.empty_like(weight_RC, dtype=torch.float8_e4m3fn), weight_RC.to(dtype)
    scales = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (
                slice(i * BLOCK[0], min(rows, (i + 1) * BLOCK[0])),
                slice(j * BLOCK[1], min(columns, (j + 1) * BLOCK[1])),
            )
            scales[i, j] = weight_RC[part].abs().max() / 448
            codes[part] = (weight_RC[part] / scales[i, j]).to(torch.float8_e4m3fn)
            plain[part] = (codes[part].float() * scales[i, j]).to(dtype)
    return {"weight": codes, "weight_scale_inv": scales}, plain


def fp8_per_matrix(weight_RC: torch.Tensor, dtype: torch.dtype) -> tuple[Stored, torch.Tensor]:
    """One scale for the whole matrix."""
    scale = weight_RC.abs().max() / 448
    codes = (weight_RC / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, (codes.float() * scale).to(dtype)


def gptq(weight_RC: torch.Tensor, dtype: torch.dtype, bits: int = 4) -> tuple[Stored, torch.Tensor]:
    """Columns in groups of any order; zeros stored less 1."""
    rows, columns = weight_RC.shape
    index_C = torch.arange(columns).flip(0) // GROUP
    codes_RC, zeros_GR, scales_GR = _rounded(weight_RC, index_C, bits)
    plain = torch.empty(rows, columns)
    packed = torch.zeros(columns * bits // 32, rows, dtype=torch.int64)
    zeros = torch.zeros(len(zeros_GR), rows * bits // 32, dtype=torch.int64)
    each = 32 // bits
    for c in range(columns):
        packed[c // each] |= codes_RC[:, c] << (bits * (c % each))
        group = int(index_C[c])
        plain[:, c] = scales_GR[group].float() * (codes_RC[:, c] - zeros_GR[group])
    for r in range(rows):
        zeros[:, r // each] |= ((zeros_GR[:, r] - 1) % 2**bits) << (bits * (r % each))
    found = {"qweight": packed, "qzeros": zeros, "scales": scales_GR, "g_idx": index_C}
    return {name: _int32(tensor) for name, tensor in found.items()}, plain.to(dtype)


def awq(weight_RC: torch.Tensor, dtype: torch.dtype) -> tuple[Stored, torch.Tensor]:
    """Eight rows in an int32, in AutoAWQ's order."""
    rows, columns = weight_RC.shape
    index_C = torch.arange(columns) // GROUP
    codes_RC, zeros_GR, scales_GR = _rounded(weight_RC, index_C, 4)
    plain = scales_GR.float()[index_C].T * (codes_RC - zeros_GR[index_C].T)
    tables = {"qweight": codes_RC.T, "qzeros": zeros_GR}
    found = {"scales": scales_GR}
    for name, table in tables.items():
        packed = torch.zeros(len(table), rows // 8, dtype=torch.int64)
        for column in range(rows // 8):
            for i, of_eight in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                packed[:, column] |= table[:, 8 * column + of_eight] << (4 * i)
        found[name] = _int32(packed)
    return found, plain.to(dtype)


def compressed_int4(weight_RC: torch.Tensor, dtype: torch.dtype) -> tuple[Stored, torch.Tensor]:
    """pack-quantized: symmetric, eight codes in an int32."""
    rows, columns = weight_RC.shape
    scales_RG = (weight_RC.unflatten(1, (-1, GROUP)).abs().amax(2) / 7).to(dtype)
    wide_RC = scales_RG.float().repeat_interleave(GROUP, 1)
    codes_RC = (weight_RC / wide_RC).round().clamp(-8, 7).long()
    packed = torch.zeros(rows, columns // 8, dtype=torch.int64)
    for c in range(columns):
        packed[:, c // 8] |= (codes_RC[:, c] + 8) << (4 * (c % 8))
    stored = {"weight_packed": _int32(packed), "weight_scale": scales_RG}
    stored["weight_shape"] = torch.tensor([rows, columns])
    return stored, (codes_RC * wide_RC).to(dtype)


def compressed_fp8(weight_RC: torch.Tensor, dtype: torch.dtype) -> tuple[Stored, torch.Tensor]:
    """float-quantized: a scale a row, and one of activations that nobody needs here."""
    scales_R1 = (weight_RC.abs().amax(1, keepdim=True) / 448).to(dtype)
    codes = (weight_RC / scales_R1.float()).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale": scales_R1, "input_scale": torch.ones(1)}
    return stored, (codes.float() * scales_R1.float()).to(dtype)


def _groups(form: str, **weights) -> dict:
    base = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": base | weights}
    told = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    return told | {"quantization_status": "compressed", "config_groups": {"group_0": group}}


INT4 = _groups("pack-quantized", strategy="group", group_size=GROUP)
FP8 = _groups("float-quantized", strategy="channel", type="float", num_bits=8)
SOURCES: dict[str, tuple[Quantise, dict]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": list(BLOCK)}),
    "fp8_per_matrix": (fp8_per_matrix, {"quant_method": "fp8", "weight_block_size": None}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "compressed_int4": (compressed_int4, INT4),
    "compressed_fp8": (compressed_fp8, FP8),
}


def write_pair(source: Path, name: str, folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """(quantised, plain): a checkpoint as the tool `name` stores it, and what that holds."""
    quantise, told = SOURCES[name]
    stored: Stored = {}
    plain: Stored = {}
    for key, tensor in tensors_of(source).items():
        if tensor.dim() != 2 or any(left in key for left in LEFT):
            kept = tensor if tensor.dtype == torch.float32 and "bias" in key else tensor.to(dtype)
            stored[key] = plain[key] = kept
            continue
        parts, plain[key] = quantise(tensor.float(), dtype)
        stored |= {f"{key.removesuffix('weight')}{end}": part for end, part in parts.items()}
    folders = (folder / "quantised", folder / "plain")
    for target, tensors in zip(folders, (stored, plain), strict=True):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("model*", "config.json"))
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(whole, target / SINGLE, metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        if tensors is stored:
            config["quantization_config"] = told
        (target / "config.json").write_text(json.dumps(config))
    return folders


def _rounded(
    weight_RC: torch.Tensor, index_C: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [R, C], zeros and fp16 scales [G, R] of the nearest rounding."""
    groups, top = int(index_C.max()) + 1, 2**bits - 1
    zeros_GR = torch.empty(groups, len(weight_RC), dtype=torch.int64)
    scales_GR = torch.empty(groups, len(weight_RC), dtype=torch.float16)
    codes_RC = torch.empty(weight_RC.shape, dtype=torch.int64)
    for group in range(groups):
        part_RN = weight_RC[:, index_C == group]
        low_R, high_R = part_RN.amin(1).clamp(max=0), part_RN.amax(1).clamp(min=0)
        scales_GR[group] = ((high_R - low_R) / top).half()
        scale_R = scales_GR[group].float()
        zeros_GR[group] = (-low_R / scale_R).round().clamp(0, top).long()
        codes = (part_RN / scale_R[:, None]).round().long() + zeros_GR[group][:, None]
        codes_RC[:, index_C == group] = codes.clamp(0, top)
    return codes_RC, zeros_GR, scales_GR


def _int32(table: torch.Tensor) -> torch.Tensor:
    """Whole numbers of up to 32 bits as they are stored; others as they are."""
    return table.int() if table.dtype == torch.int64 else table
