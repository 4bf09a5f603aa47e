"""Tokens per second of a compressed model against the original, in one process, taking turns.

Shapes: B prompts at once, L tokens of a prompt, M tokens that follow, one at a time.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from camera.checkpoint.loading import grouped, native_experts
from camera.moe.families import family_of
from camera.runtime.device.accelerator import synchronize
from camera.runtime.errors import CameraError

# transformers' own ways to run experts, to prefill and to decode; it never prefills by batched_mm,
# which copies the weights of an expert for every token routed to it.
WAYS = (("grouped_mm", "grouped_mm"), ("grouped_mm", "batched_mm"), ("eager", "eager"))
ALSO_RAN = 1.3  # a way this much slower than the best one when all are tried is not tried again
PHASES = ("prefill", "decode")


def measure_speed(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    text: torch.Tensor | PreTrainedTokenizerBase | int,
    batch_sizes: Sequence[int] = (1, 4, 16),
    prompt_length: int = 128,
    new_tokens: int = 16,
    repeats: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Prefill and decode speed of both models at every batch size.

    Both read the same prompts of `prompt_length` tokens, then the same `new_tokens`, one by one
    with a cache. They take turns, first one, then the other first; after a warm-up the median of
    `repeats` turns counts, and `ratio` is the median of the ratios within a turn. Native experts
    run in whichever of transformers' own implementations is fastest here, chosen for each batch
    size and phase. `text` is 1-D token ids (whose routing decides which experts are read); of a
    tokenizer or the size of a vocabulary, random ids. With `clock=time.process_time` a model that
    runs on one CPU thread is measured without what other programs take meanwhile.

    Returns {"batches": {"1": {"prefill": {"dense", "compressed", "ratio", "implementation"},
    "decode": {...}}, ...}, "settings": {...}}: tokens/s of all prompts together, how many times
    as fast the compressed model is, and how the original ran its experts (null: it has none).
    Raises CameraError for counts below 1.
    """
    counts = {"prompt_length": prompt_length, "new_tokens": new_tokens, "repeats": repeats}
    for name, value in {**counts, "batch_sizes": min(batch_sizes, default=0)}.items():
        if value < 1:
            raise CameraError(f"evaluation.speed.{name}={value} must be at least 1.")
    models = {"dense": dense.eval(), "compressed": compressed.eval()}
    batches = {}
    with _restored(dense), _restored(compressed):
        for size in batch_sizes:
            ids_BL = _prompts(text, size, prompt_length + new_tokens).to(dense.device)
            batches[str(size)] = _compare(models, ids_BL, prompt_length, repeats, clock)
    place = {"device": dense.device.type, "dtype": str(dense.dtype).removeprefix("torch.")}
    place |= {"threads": torch.get_num_threads()} if dense.device.type == "cpu" else {}
    return {"batches": batches, "settings": counts | place}


@dataclass(eq=False)
class _Runner:
    """A model with a way to run its experts, and the seconds of each of its turns."""

    model: PreTrainedModel
    ways: tuple[str | None, str | None]
    clock: Callable[[], float]
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})

    @torch.no_grad()
    def turn(self, ids_BL: torch.Tensor, prompt_length: int) -> None:
        """Read the prompts, then the rest one by one."""
        self._choose(0)
        start = self._now()
        cache = self.model(
            ids_BL[:, :prompt_length], use_cache=True, **_last_logits(self.model)
        ).past_key_values
        self.seconds["prefill"].append(self._now() - start)
        self._choose(1)
        start = self._now()
        for ids_B1 in ids_BL[:, prompt_length:].split(1, dim=1):
            self.model(ids_B1, past_key_values=cache, use_cache=True)
        self.seconds["decode"].append(self._now() - start)

    def _choose(self, phase: int) -> None:
        if self.ways[phase] is not None:
            self.model.set_experts_implementation(self.ways[phase])

    def _now(self) -> float:
        synchronize(self.model.device)
        return self.clock()


def _compare(
    models: dict[str, PreTrainedModel],
    ids_BL: torch.Tensor,
    prompt_length: int,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, dict[str, Any]]:
    runners = {}
    for side, model in models.items():
        every = [_Runner(model, ways, clock) for ways in _ways(model, len(ids_BL))]
        runners[side] = _favourites(every, ids_BL, prompt_length)
    everyone = [runner for some in runners.values() for runner in some]
    for repeat in range(repeats):
        for runner in everyone[::-1] if repeat % 2 else everyone:
            runner.turn(ids_BL, prompt_length)
    tokens = {"prefill": prompt_length, "decode": ids_BL.shape[1] - prompt_length}
    return {phase: _summary(phase, runners, len(ids_BL) * count) for phase, count in tokens.items()}


def _summary(phase: str, runners: dict[str, list[_Runner]], tokens: int) -> dict[str, Any]:
    best = {
        side: min(some, key=lambda runner: median(runner.seconds[phase]))
        for side, some in runners.items()
    }
    spent = {side: runner.seconds[phase] for side, runner in best.items()}
    pairs = zip(spent["dense"], spent["compressed"], strict=True)
    return {
        **{side: round(tokens / median(seconds), 2) for side, seconds in spent.items()},
        "ratio": round(median(slow / fast for slow, fast in pairs), 3),
        "implementation": best["dense"].ways[PHASES.index(phase)],
    }


def _favourites(runners: list[_Runner], ids_BL: torch.Tensor, prompt_length: int) -> list[_Runner]:
    """Warm up; those that came near the best in any phase, with clean sheets."""
    for _ in range(2):
        for runner in runners:
            runner.turn(ids_BL, prompt_length)
    near = []
    for i, phase in enumerate(PHASES):
        ways = {runner.ways[i]: runner for runner in reversed(runners)}  # the first of each way
        limit = ALSO_RAN * min(runner.seconds[phase][-1] for runner in ways.values())
        near += [runner for runner in ways.values() if runner.seconds[phase][-1] <= limit]
    return [_Runner(r.model, r.ways, r.clock) for r in runners if r in near]


def _ways(model: PreTrainedModel, batch_size: int) -> list[tuple[str | None, str | None]]:
    """The ways that may be fastest; no choice where there are no native experts."""
    native = native_experts(model)
    if not native:
        return [(None, None)]
    if not grouped(model):
        return [("eager", "eager")]
    slots = batch_size * family_of(model.config.model_type).top_k(model.config)
    few = slots <= max(len(experts.down_proj) for experts in native)
    return [ways for ways in WAYS if few or "batched_mm" not in ways]


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Leave the model with the implementation it came with."""
    before = getattr(model.config, "_experts_implementation", None)
    try:
        yield
    finally:
        if before is not None:
            model.set_experts_implementation(before)


def _last_logits(model: PreTrainedModel) -> dict[str, int]:
    """Where the model can, leave out all logits but the last, as generation does."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def _prompts(
    text: torch.Tensor | PreTrainedTokenizerBase | int, batch_size: int, length: int
) -> torch.Tensor:
    """ids_BL: consecutive pieces of a text, from its start again where it ends."""
    count = batch_size * length
    if not isinstance(text, torch.Tensor):
        vocabulary = text if isinstance(text, int) else len(text)
        draw = torch.Generator().manual_seed(0)
        text = torch.randint(vocabulary, (count,), generator=draw)
    return text.repeat(-(-count // len(text)))[:count].view(batch_size, length)
