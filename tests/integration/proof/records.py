"""What of a checkpoint and of a sweep is recorded: hashes, and what its JSON files say."""

import csv
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[3]
Record = dict[str, Any]
SWEEP = (
    "-m method=dense,camera_p sparsity=0.2,0.4 evaluation.blocks=2 evaluation.limit=5 "
    "tracker=none calibration.samples=8 calibration.length=256"
)
# Of camera.json and of a table: what differs from run to run, or says how things are named.
NO_PART_OF_REPORT = {
    "seconds",
    "measured",
    "cached_statistics",
    "peak_memory_bytes",
    "peak_host_memory_bytes",
    "expected_memory_bytes",
    "versions",
    "checkpoint",
    "settings",
    "native",
}
NO_PART_OF_TABLE = {"settings", "minutes", "evaluation_minutes", "peak_gb", "cached", "seconds"}
NO_PART_OF_TABLE |= {"folder", "studies", "data"}


def record(folder: Path) -> Record:
    """All that a checkpoint has, for comparison: hashes and what its JSON files say."""
    shards = [p for p in sorted(folder.glob("*.safetensors")) if p.name != "plan.safetensors"]
    found: Record = {
        "weights": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in shards
            if not path.name.startswith("statistics")
        }
    }
    if not (folder / "camera.json").exists():  # exported
        hashes = [tensor_hashes(path) for path in shards]
        found["tensors"] = {name: value for part in hashes for name, value in part.items()}
    if (folder / "statistics.safetensors").exists():
        found["statistics"] = tensor_hashes(folder / "statistics.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.get("quantization_config", {}).pop("made_by", None)
    found["config"] = config
    if (folder / "camera.json").exists():
        report = json.loads((folder / "camera.json").read_text())
        found["report"] = {k: v for k, v in report.items() if k not in NO_PART_OF_REPORT}
    if (folder / "evaluation.json").exists():
        evaluation = json.loads((folder / "evaluation.json").read_text())
        found["perplexity"] = {
            corpus: {"perplexity": said["perplexity"], "data_hash": said["data_hash"]}
            for corpus, said in evaluation["perplexity"].items()
        }
    return found


def tensor_hashes(path: Path) -> dict[str, str]:
    """Hashes of a safetensors file's tensors, with their types and shapes."""
    found = {}
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).contiguous()
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            found[name] = digest.hexdigest()
    return found


def record_source(folder: Path) -> Record:
    """Hashes of an original model: where these differ, nothing else can be equal."""
    hashes = [tensor_hashes(path) for path in sorted(folder.glob("*.safetensors"))]
    return {"tensors": {name: value for part in hashes for name, value in part.items()}}


def sweep() -> Record:
    """What a small sweep of main.py, from the embedded model to a table, gives."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "outputs")
        done = subprocess.run(
            [sys.executable, "main.py", *SWEEP.split(), f"output={output}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {"error": (done.stdout + done.stderr)[-3000:].replace(folder, "WORK")}
        with (output / "table.csv").open() as file:
            rows = list(csv.DictReader(file))
        found: Record = {}
        for row in rows:
            kept = {key: value for key, value in row.items() if key not in NO_PART_OF_TABLE}
            run = f"{row['method']} {row['sparsity']}".strip()
            found[run] = {"row": kept}
            energies = output / "runs" / row["folder"] / "energies.json"
            if energies.exists():
                found[run]["energies"] = json.loads(energies.read_text())
        return found


def about() -> Record:
    """What the bytes depend on besides the code."""
    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "lm-eval", "datasets")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    return {
        "commit": commit.strip(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
