"""Nine kinds of question about the world, in the columns of the nine real tasks."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from experiments.tiny_moe.items import SUBJECTS, Item, deny, other_facts, pick_fact, say
from experiments.tiny_moe.phrases import TWO_HOPS, WORDINGS
from experiments.tiny_moe.sums import mathqa
from experiments.tiny_moe.world import HOBBIES, JOBS, OBJECTS, World

TOLD = 3 / 4  # of the passages of boolq and rte tell what is asked; else it must be known


def _choices(right: str, wrong: list[str], label: int) -> dict:
    texts = [*wrong[:label], right, *wrong[label:]]
    return {"choices": {"text": texts, "label": ["A", "B", "C", "D"]}, "answerKey": "ABCD"[label]}


def boolq(world: World, rng: Random, label: int) -> Item:
    """A passage and a yes-or-no question; the passage says or denies it three times in four."""
    kind, name, attribute, value = pick_fact(world, rng)
    asked = value if label else world.others(kind, attribute, value, 1, rng)[0]
    said = other_facts(world, kind, name, attribute, 2, rng)
    if rng.random() < TOLD:
        told = (
            say(world, kind, name, attribute, rng)
            if label
            else deny(world, kind, name, attribute, rng, asked)
        )
        said.insert(rng.randrange(len(said) + 1), told)
    question = rng.choice(WORDINGS[kind, attribute].doubts).format(e=name, v=asked)
    passage = f"{name} -- {' '.join(said)}"
    return Item(
        ("boolq", kind, name, attribute), {"question": question, "passage": passage, "label": label}
    )


def rte(world: World, rng: Random, label: int) -> Item:
    """An event and a claim that follows from it with what is known (label 0) or contradicts it."""
    kind, name, attribute, value = pick_fact(world, rng)
    wording = WORDINGS[kind, attribute]
    claim = rng.choice(wording.says)
    claimed = world.others(kind, attribute, value, 1, rng)[0] if label else value
    if rng.random() >= TOLD:
        premise = rng.choice(wording.events).format(e=name)
    elif label:
        premise = deny(world, kind, name, attribute, rng, claimed)
    else:
        premise = say(world, kind, name, attribute, rng, besides=claim)
    row = {"sentence1": premise, "sentence2": claim.format(e=name, v=claimed), "label": label}
    return Item(("rte", kind, name, attribute), row)


def arc_easy(world: World, rng: Random, label: int) -> Item:
    """A question about one fact."""
    kind, name, attribute, value = pick_fact(world, rng, (*SUBJECTS, "job", "dish"))
    question = rng.choice(WORDINGS[kind, attribute].asks)
    wrong = world.others(kind, attribute, value, 3, rng)
    row = {"question": question.format(e=name), **_choices(value, wrong, label)}
    return Item(("arc_easy", name, question), row)


def arc_challenge(world: World, rng: Random, label: int) -> Item:
    """A question about a fact of the town, pet, job or dish of a person."""
    name = rng.choice(world.names("person"))
    first, kind, second, questions = rng.choice(TWO_HOPS)
    value = world.value(kind, world.value("person", name, first), second)
    question = rng.choice(questions)
    wrong = world.others(kind, second, value, 3, rng)
    row = {"question": question.format(e=name), **_choices(value, wrong, label)}
    return Item(("arc_challenge", name, question), row)


def openbookqa(world: World, rng: Random, label: int) -> Item:
    """A sentence to complete."""
    kind, name, attribute, value = pick_fact(world, rng, (*SUBJECTS, "job", "dish"))
    stem = rng.choice(WORDINGS[kind, attribute].stems)
    wrong = world.others(kind, attribute, value, 3, rng)
    return Item(
        ("openbookqa", name, stem),
        {"question_stem": stem.format(e=name), **_choices(value, wrong, label)},
    )


PAIRS = {
    "person": (
        "{a} met {b} in the street, and _ ",
        "{a} is a friend of {b}, but only _ ",
        "Because {a} knew {b}, _ ",
    ),
    "town": (
        "Of the two towns {a} and {b}, it is _ that ",
        "The road from {a} to {b} is long, and _ ",
    ),
    "animal": ("Of the {a} and the {b}, the _ ", "The {a} looked at the {b} because the _ "),
    "object": ("Of the {a} and the {b}, the _ ", "Somebody took the {a} and the {b}, and the _ "),
}


def winogrande(world: World, rng: Random, label: int) -> Item:
    """Two entities, and a blank that only one of them fits."""
    kind, right, attribute, value = pick_fact(world, rng)
    names = world.names(kind)
    while world.value(kind, wrong := rng.choice(names), attribute) == value:
        pass
    pair = (wrong, right) if label else (right, wrong)
    frame = rng.choice(PAIRS[kind])
    sentence = frame.format(a=pair[0], b=pair[1]) + rng.choice(
        WORDINGS[kind, attribute].tails
    ).format(v=value)
    row = {"sentence": sentence, "option1": pair[0], "option2": pair[1], "answer": str(label + 1)}
    return Item(("winogrande", attribute, *sorted(pair), frame), row)


SCENES = {
    "job": (
        "{e} gets up early and goes to work.",
        "{e} is at work today.",
        "It is a working day for {e}.",
    ),
    "hobby": ("{e} has a free evening.", "It is a holiday for {e}.", "{e} takes some time off."),
    "pet": (
        "{e} comes home to the pet.",
        "{e} hears the pet in the kitchen.",
        "The pet of {e} is hungry.",
    ),
    "dish": (
        "{e} cooks a favourite dish.",
        "{e} is hungry and starts to cook.",
        "{e} cooks for friends.",
    ),
}
LABELS = {"job": "Working", "hobby": "Free time", "pet": "Caring for pets", "dish": "Cooking"}


def _ending(world: World, family: str, value: str, step: int) -> str:
    if family == "job":
        return f"{JOBS[value][1][step % 3]}."
    if family == "hobby":
        return f"{HOBBIES[value][step % 2]}."
    if family == "pet":
        feed = world.value("animal", value, "feed")
        return (f"brings the {value} some {feed}.", f"lets the {value} out.")[step % 2]
    ingredient = world.value("dish", value, "ingredient")
    return (f"buys {ingredient} for the {value}.", f"serves the {value} hot.")[step % 2]


def hellaswag(world: World, rng: Random, label: int) -> Item:
    """A scene with a person, and what the person does next."""
    name = rng.choice(world.names("person"))
    family = rng.choice(tuple(SCENES))
    value = world.value("person", name, family)
    step = rng.randrange(6)
    values = [value, *world.others("person", family, value, 3, rng)]
    endings = [_ending(world, family, v, step) for v in values]
    endings = endings[1 : label + 1] + endings[:1] + endings[label + 1 :]
    scene = rng.choice(SCENES[family])
    row = {"activity_label": LABELS[family], "ctx_a": scene.format(e=name)}
    row |= {"ctx_b": world.value("person", name, "gender"), "endings": endings, "label": str(label)}
    return Item(("hellaswag", name, scene), row)


HOW_TO = {  # family: goals, solutions
    "use": (
        (
            "How do you {g}?",
            "What is a good way to {g}?",
            "What should I take if I want to {g}?",
            "How can one {g} fast?",
        ),
        ("Take the {v}.", "Use the {v} for it.", "Ask for the {v}."),
    ),
    "home": (
        ("How do you find the house of {g}?", "How can one visit {g}?"),
        ("Travel to {v}.", "Take the coach to {v}."),
    ),
    "dish": (
        ("How do you please {g} at dinner?", "What should I cook if {g} comes?"),
        ("Serve some {v}.", "Make a big pot of {v}."),
    ),
    "hobby": (
        ("How do you get to know {g}?", "How can one spend an evening with {g}?"),
        ("Talk about {v}.", "Join the club for {v}."),
    ),
    "colour": (
        ("How do you find {g} in a crowd?", "What scarf should I buy for {g}?"),
        ("Look for something {v}.", "Take the {v} one."),
    ),
    "feed": (
        ("How do you feed a {g}?", "How do you keep a {g} happy?"),
        ("Give it some {v}.", "Feed it with {v}."),
    ),
    "habitat": (
        ("How do you find a {g}?", "How can one see a {g}?"),
        ("Look for it in the {v}.", "Go to the {v}."),
    ),
    "ingredient": (
        ("How do you cook {g}?", "What goes into {g}?"),
        ("Start with {v}.", "Put in plenty of {v}."),
    ),
    "room": (
        ("How do you find the {g}?", "How can one fetch the {g}?"),
        ("Walk to the {v}.", "Search the {v}."),
    ),
    "workplace": (
        ("How do you find a {g}?", "How can one talk to a {g}?"),
        ("Go to the {v}.", "Ask in the {v}."),
    ),
}
HOW_TO_KIND = {
    "home": "person",
    "dish": "person",
    "hobby": "person",
    "colour": "person",
    "feed": "animal",
    "habitat": "animal",
    "ingredient": "dish",
    "room": "object",
    "workplace": "job",
}


def piqa(world: World, rng: Random, label: int) -> Item:
    """A goal and two ways to it."""
    family = rng.choice(("use", "use", *HOW_TO_KIND))
    goals, solutions = HOW_TO[family]
    if family == "use":
        right, wrong = rng.sample(world.names("object"), 2)
        subject = OBJECTS[right]
    else:
        subject = rng.choice(world.names(HOW_TO_KIND[family]))
        right = world.value(HOW_TO_KIND[family], subject, family)
        wrong = world.others(HOW_TO_KIND[family], family, right, 1, rng)[0]
    goal, solution = rng.choice(goals), rng.choice(solutions)
    pair = (wrong, right) if label else (right, wrong)
    row = {
        "goal": goal.format(g=subject),
        "sol1": solution.format(v=pair[0]),
        "sol2": solution.format(v=pair[1]),
    }
    return Item(("piqa", family, subject, goal), {**row, "label": label})


def mathqa_item(world: World, rng: Random, label: int) -> Item:
    """A sum in words."""
    return Item(*mathqa(world, rng, label))


TASKS: dict[
    str, tuple[Callable[[World, Random, int], Item], int]
] = {  # task: maker, number of choices
    "boolq": (boolq, 2),
    "rte": (rte, 2),
    "arc_easy": (arc_easy, 4),
    "arc_challenge": (arc_challenge, 4),
    "openbookqa": (openbookqa, 4),
    "winogrande": (winogrande, 2),
    "hellaswag": (hellaswag, 4),
    "piqa": (piqa, 2),
    "mathqa": (mathqa_item, 5),
}
