"""Which questions train and which test: rows with a held-out key never enter training text."""

from __future__ import annotations

from random import Random

from experiments.tiny_moe.items import Item
from experiments.tiny_moe.tasks import TASKS
from experiments.tiny_moe.world import World


def training_item(world: World, task: str, rng: Random) -> Item:
    """A random item whose key is not held out."""
    make, choices = TASKS[task]
    while (item := make(world, rng, rng.randrange(choices))).held_out:
        pass
    return item


def held_out_rows(world: World, task: str, count: int, rng: Random) -> list[dict]:
    """Different held-out rows with labels in equal numbers, in random order."""
    make, choices = TASKS[task]
    rows: dict[str, dict] = {}
    while len(rows) < count:
        item = make(world, rng, len(rows) % choices)
        if item.held_out:
            rows.setdefault(prompt_and_answer(task, item.row)[0] + repr(item.row), item.row)
    rows_list = list(rows.values())
    rng.shuffle(rows_list)
    return [{**row, "idx": i} for i, row in enumerate(rows_list)]


def prompt_and_answer(task: str, row: dict) -> tuple[str, str]:
    """The text before the right answer, and the answer, as lm-eval's template has them."""
    if task == "boolq":
        return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes")[
            row["label"]
        ]
    if task == "rte":
        prompt = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
        return prompt, ("True", "False")[row["label"]]
    if task in ("arc_easy", "arc_challenge", "openbookqa"):
        prompt = (
            row["question_stem"]
            if task == "openbookqa"
            else f"Question: {row['question']}\nAnswer:"
        )
        return prompt, row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
    if task == "winogrande":
        before, after = row["sentence"].split("_")
        return before + row["option" + row["answer"]], after.strip()
    if task == "hellaswag":
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return context, row["endings"][int(row["label"])]
    if task == "piqa":
        return f"Question: {row['goal']}\nAnswer:", row[f"sol{row['label'] + 1}"]
    options = [o.split(" ) ")[1] for o in row["options"].split(" , ")]
    return f"Question: {row['Problem']}\nAnswer:", options["abcde".index(row["correct"])]
