"""Trains the tiny model: `python -m experiments.tiny_moe.training.train --out DIR --steps N`.

Run again with the same folder, it goes on where it was and ends in the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from experiments.tiny_moe.training.batches import (
    source,
    token_weights,
    training_batch,
    validation_batches,
)
from experiments.tiny_moe.training.model import SIZES, RouterWatch, build_model
from experiments.tiny_moe.training.saving import export, load_checkpoint, save_checkpoint
from experiments.tiny_moe.training.tokenizer import build_tokenizer
from experiments.tiny_moe.world import build_world

DEFAULTS = {
    "seed": 0,
    "tokens": 1536,  # in a batch
    "short": 96,  # length of rows at first: fewer names compete, and recall is learnt sooner
    "long": 0.15,  # share of the steps, the last, in which rows are as long as the context
    "first": 1 / 64,  # share of the people that the first documents are about
    "focus": 0.5,  # share of the steps in which that grows to all of them
    "odds": 0.9,  # of a document to be about those in that time
    "answers": 4.0,  # weight of answer tokens in the loss
    "verdicts": 8.0,  # weight of yes, no, True and False
    "peak": 3e-3,  # learning rate of the plateau
    "warmup": 100,  # steps
    "decay": 0.4,  # share of the steps in which the rate falls
    "weight_decay": 0.1,
    "balance": 0.01,  # weight of the routers' balance loss
    "until": 0,  # stop after this step, to go on later; 0: never
    "minutes": 0.0,  # stop after so many, wherever the steps are; 0: never
    "report": 50,
    "validate": 200,
    "checkpoint_seconds": 120.0,
    "export_seconds": 600.0,
    "tokenizer_documents": 15_000,
    "bf16": 0,  # 1: autocast, for processors with native bf16
}


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float) -> float:
    """Warm-up, a plateau, and a linear fall to zero over the last `decay` of the steps."""
    fall = max(1, round(steps * decay))
    return peak * min((step + 1) / warmup, 1.0, max(0.0, (steps - step) / fall))


def known_share(step: int, steps: int, first: float, focus: float) -> float:
    """Which share of the people documents are mostly about: it grows by a factor from step to step.

    `first` at the beginning, 1 after the share `focus` of the steps.
    """
    return first ** max(0.0, 1 - step / (focus * steps))


def token_loss(model, ids: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean next-token loss."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits.float(), ids[:, 1:].flatten(), weight=weights)


def make_optimizer(model, peak: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    groups += [{"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def validate(model, watch: RouterWatch, batches: dict[str, Tensor]) -> dict[str, float]:
    """Perplexity on each kind of held-apart text."""
    model.eval()
    result = {name: round(math.exp(token_loss(model, ids)), 4) for name, ids in batches.items()}
    watch.seen.clear()
    model.train()
    return result


def describe(model, options: dict, steps: int, sizes: dict) -> dict:
    """The record of a run before its first step."""
    return {
        "settings": options | {"steps": steps, "sizes": sizes},
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "seconds": 0.0,
        "curve": [],
        "legs": [],
    }


def train(out: Path, steps: int, sizes: dict | None = None, **options) -> dict:
    """Trains to `steps` or the minutes' end, resuming from `out`; returns the training record."""
    o = DEFAULTS | options
    sizes = SIZES | (sizes or {})
    length = sizes["max_position_embeddings"]
    out.mkdir(parents=True, exist_ok=True)
    world = build_world()
    tokenizer = build_tokenizer(world, length, documents=o["tokenizer_documents"])
    model = build_model(tokenizer, o["seed"], **sizes)
    model.set_experts_implementation("tiny_moe_sorted")
    watch = RouterWatch(model)
    optimizer = make_optimizer(model, o["peak"], o["weight_decay"])
    record, first = describe(model, o, steps, sizes), 0
    if (checkpoint := out / "checkpoint.pt").exists():
        first, earlier = load_checkpoint(checkpoint, model, optimizer)
        kept = ("seconds", "curve", "legs")
        record |= {key: earlier[key] for key in kept if key in earlier}
        print(f"resumed at step {first}", flush=True)
    record["legs"] += [{"from": first, **record["settings"]}]
    weights = token_weights(world, tokenizer, o["answers"], o["verdicts"])
    validation = validation_batches(world, tokenizer, 8, length)
    before, start = record["seconds"], time.monotonic()
    saved = exported = start
    patience = o["export_seconds"] / 3  # the first export comes early, to be tried at once
    model.train()
    for step in range(first + 1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, steps, o["peak"], o["warmup"], o["decay"])
        width = length if step > (1 - o["long"]) * steps else min(length, o["short"])
        count, share = o["tokens"] // width, known_share(step, steps, o["first"], o["focus"])
        document = source(world, o["odds"], share)
        ids = training_batch(world, tokenizer, o["seed"], step - 1, count, width, document)
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(o["bf16"])):
            loss = token_loss(model, ids, weights)
        balance = watch.balance_loss()
        (loss + o["balance"] * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        now = time.monotonic()
        record |= {"seconds": before + now - start, "tokens": step * o["tokens"], "steps": step}
        if step % o["report"] == 0 or step == steps:
            point = {"step": step, "seconds": round(record["seconds"], 1)}
            point |= {"loss": round(loss.item(), 4), "balance": round(balance.item(), 4)}
            if step % o["validate"] == 0 or step == steps:
                point["perplexity"] = validate(model, watch, validation)
            record["curve"].append(point)
            speed = (step - first) / (now - start)
            left = (steps - step) / speed / 60
            print(
                f"{json.dumps(point)} {speed * ids.numel():.0f} tokens/s, {left:.1f} min to go",
                flush=True,
            )
        late = o["minutes"] and record["seconds"] > 60 * o["minutes"]
        last = bool(late) or step in (steps, o["until"])
        if last or now - saved > o["checkpoint_seconds"]:
            save_checkpoint(checkpoint, model, optimizer, step, record)
            saved = now
        if last or now - exported > patience:
            export(model, tokenizer, record, out / "model")
            exported, patience = now, o["export_seconds"]
        if last:
            break
    return record


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and model")
    parser.add_argument("--steps", type=int, default=9000, help="steps in all")
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    record = train(options.pop("out"), options.pop("steps"), **options)
    print(json.dumps(record["curve"][-1:]))


if __name__ == "__main__":
    main()
