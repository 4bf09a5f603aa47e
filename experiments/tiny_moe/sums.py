"""Small sums: tables of them for prose, and word problems in the form of MathQA."""

from __future__ import annotations

from random import Random

from experiments.tiny_moe.world import CLASSES, World

PROBLEMS = {  # operation: word problems with numbers a and b
    "plus": (
        "a farmer has {a} apples and buys {b} more . how many apples does the farmer have now ?",
        "there are {a} boats in the harbour and {b} more arrive . how many boats are there ?",
        "what is {a} plus {b} ?",
    ),
    "minus": (
        "a baker has {a} loaves and sells {b} of them . how many loaves are left ?",
        "of {a} candles {b} burn down . how many candles remain ?",
        "what is {a} minus {b} ?",
    ),
    "times": (
        "there are {a} bags with {b} nuts in each . how many nuts are there ?",
        "a worker lays {a} rows of {b} bricks . how many bricks are laid ?",
        "what is {a} times {b} ?",
    ),
    "price": (
        "how many coins do you pay if you buy the {e} {a} times ?",
        "what is the price in coins of {a} pieces of the {e} ?",
    ),
    "legs": (
        "how many legs do {a} of the {e} have ?",
        "count the legs of {a} animals of the kind {e} .",
    ),
}


def numbers(operation: str, rng: Random) -> tuple[int, int, int]:
    """Two numbers and the result."""
    if operation == "times":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return a, b, a * b
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    return (a, b, a + b) if operation == "plus" else (a + b, b, a)


def table(rng: Random) -> list[str]:
    """A page about one number: a title, then its sums in random order."""
    operation = rng.choice(("plus", "minus", "times"))
    fixed = numbers(operation, rng)[1]
    lines = []
    for first in rng.sample(range(2, 10) if operation == "times" else range(1, 21), 8):
        a = first + fixed if operation == "minus" else first
        result = {"plus": a + fixed, "minus": a - fixed, "times": a * fixed}[operation]
        lines.append(f"{a} {operation} {fixed} is {result}.")
    return [f"= Sums with {operation} {fixed} =", " ".join(lines)]


def mathqa(world: World, rng: Random, label: int) -> tuple[tuple, dict]:
    """The key and row of one problem; some need the price of an object or the legs of an animal."""
    operation = rng.choice(("plus", "plus", "minus", "minus", "times", "times", "price", "legs"))
    problem = rng.choice(PROBLEMS[operation])
    if operation in ("price", "legs"):
        a = rng.randint(2, 5)
        entity = rng.choice(world.names("object" if operation == "price" else "animal"))
        if operation == "price":
            b = int(world.value("object", entity, "price"))
        else:
            b = CLASSES[world.value("animal", entity, "class")]
        result, key = a * b, ("mathqa", problem, a, entity)
        text = problem.format(a=a, e=entity)
    else:
        a, b, result = numbers(operation, rng)
        key, text = ("mathqa", problem, a, b), problem.format(a=a, b=b)
    near = [n for n in range(max(1, result - 6), result + 7) if n != result]
    wrong = rng.sample(near, 4)
    options = [*wrong[:label], result, *wrong[label:]]
    listed = " , ".join(f"{letter} ) {n}" for letter, n in zip("abcde", options, strict=True))
    return key, {"Problem": text, "options": listed, "correct": "abcde"[label]}
