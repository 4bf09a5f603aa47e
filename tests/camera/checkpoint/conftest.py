"""Tiny models as other tools store quantised ones."""

import pytest
import torch

from tests.helpers.quantization.quantized_sources import write_pair

SIZES = dict(num_hidden_layers=2, moe_intermediate_size=48)
FAMILIES = {"fp8": "deepseek_v3"}  # of the others qwen3_moe
DTYPES = {"gptq": torch.float16, "awq": torch.float16}  # of the others bfloat16


@pytest.fixture(scope="session")
def pair(checkpoints, tmp_path_factory):
    """pair(tool): a checkpoint as this tool stores it, and the plain one that it holds."""
    made = {}

    def folders(name):
        if name.startswith("compressed"):
            pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
        if name not in made:
            source = checkpoints(FAMILIES.get(name, "qwen3_moe"), **SIZES)
            folder, dtype = tmp_path_factory.mktemp(name), DTYPES.get(name, torch.bfloat16)
            made[name] = write_pair(source, name, folder, dtype)
        return made[name]

    return folders
