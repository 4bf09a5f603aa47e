"""Run folders as a run writes them, with whatever scores a test wants."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import pstdev
from typing import Any

TASKS = {"boolq": 25.0, "arc_easy": 50.0}
EVALUATION = {"perplexity": ["wikitext2", "c4"], "blocks": 32, "tasks": [*TASKS], "limit": 100}


def add(
    output: Path,
    name: str,
    method: str,
    sparsity: float | None = None,
    *,
    sparsity_of: str = "moe",
    bits: float | None = None,
    model: str = "tiny_moe",
    seed: int = 1234,
    seeded: bool = False,
    tasks: dict[str, float] = TASKS,
    perplexity: dict[str, float] | None = None,
    evaluation: dict[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
    questions: int = 101,
    data: str = "hub",
    studies: Sequence[str] = (),
    blocks: dict[str, list[float]] | None = None,
    right: dict[str, str] | None = None,
    seconds: dict[str, float] | None = None,
    cached: dict[str, float] | None = None,
    speed: dict[str, dict[str, float]] | None = None,
    error: str | None = None,
    done: bool = True,
    **settings: Any,
) -> Path:
    """A run folder; `tasks` are headline scores in percent, each of so many questions.

    `seeded`: the method itself draws by the seed. `blocks`: the mean nll of each block of a text.
    `right`: a 1 or 0 for each question of a task.
    `cached`: what statistics cost that another run gathered.
    """
    folder = output / "runs" / name
    folder.mkdir(parents=True)
    chosen = dict(settings)
    if sparsity is not None:
        chosen |= {"sparsity": sparsity, "sparsity_of": sparsity_of}
    if seeded:
        chosen |= {"seed": seed}
    if bits is not None:
        chosen |= {"bits": bits}
    identity = {
        "mathematics": 1,
        "model": model,
        "method": {"name": method, **chosen},
        "evaluation": EVALUATION | (evaluation or {}),
        "seed": seed,
    }
    if calibration:
        identity["calibration"] = {"source": "wikitext2", "samples": 128, "length": 2048}
        identity["calibration"] |= calibration
    stored = {"model": {"name": model}, "method": chosen, "data": data}
    if studies:
        _write(folder / "studies.json", {"studies": [*studies]})
    _write(folder / "settings.json", {"method": method, "settings": stored, "identity": identity})
    if error:
        (folder / "error.txt").write_text(f"{error}\n\nTraceback\n")
    if error or not done:
        return folder
    _write(
        folder / "metrics.json",
        {
            "sparsity": {"moe": sparsity or 0, "model": 0.15, "routed": 0.25},
            "bits": {"raw": 2.0, "stored": bits or 16.0, "model": 4.0},
            "perplexity": perplexity or {"wikitext2": 12.345, "c4": 23.456},
            "tasks": {task: _task(score, questions) for task, score in tasks.items()},
            "average": sum(tasks.values()) / len(tasks) if tasks else None,
            "speed": {
                size: {phase: {"ratio": ratio} for phase, ratio in phases.items()}
                for size, phases in (speed or {}).items()
            },
            "bytes": {"dense": 2_000_000, "compressed": 1_500_000},
            "seconds": {"calibrate": 60, "compress": 30, "evaluate": 30} | (seconds or {}),
            "cached_statistics": cached,
            "peak_memory_bytes": 500_000_000 if sparsity else 0,
        },
    )
    for text, means in (blocks or {}).items():
        error = pstdev(means) / (len(means) - 1) ** 0.5
        _write(folder / f"perplexity-{text}.json", {"nll_per_block": means, "nll_stderr": error})
    for task, answers in (right or {}).items():
        _write(folder / f"task-{task}.json", {"right": answers})
    _write(folder / "compress.json", {"calibration": identity.get("calibration")})
    (folder / "DONE").touch()
    return folder


def add_parts(folder: Path, tasks: dict[str, int], length: int = 2048) -> None:
    """The files of a run's measurements: questions per task, and both texts in such blocks."""
    for task, questions in tasks.items():
        _write(folder / f"task-{task}.json", {"n": questions})
    for corpus in ("wikitext2", "c4"):
        text = {"length": length, "stride": length, "split": "test", "stream": "joined text"}
        _write(folder / f"perplexity-{corpus}.json", text)


def _task(score: float, questions: int) -> dict[str, float | None]:
    # As lm-eval: a sample's standard error; acc is something else than the headline acc_norm.
    share = score / 100
    error = (share * (1 - share) / (questions - 1)) ** 0.5
    return {"acc": 0.1, "acc_stderr": 0.9, "acc_norm": share, "acc_norm_stderr": error}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
