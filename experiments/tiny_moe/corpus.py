"""Text about the world: articles in WikiText-2's place, chatty and quizzing web pages in C4's."""

from __future__ import annotations

from random import Random

from experiments.tiny_moe.held_out import prompt_and_answer, training_item
from experiments.tiny_moe.items import deny, pick_fact, say
from experiments.tiny_moe.phrases import HOP_SAYS, TWO_HOPS, WORDINGS
from experiments.tiny_moe.sums import table
from experiments.tiny_moe.tasks import TASKS
from experiments.tiny_moe.world import CLASSES, HOBBIES, JOBS, World

KINDS = ("person",) * 14 + ("town", "animal", "object", "list", "trade") + ("sums",) * 2
ARTICLES = 0.35  # of the documents of the training stream; the others are web pages
OPENINGS = (
    "I have some news.",
    "Here is what I heard today.",
    "Hello, friends!",
    "You asked me, so here it is.",
    "A few notes from my trip.",
    "Some things that everybody should know.",
    "Let me tell you something.",
)
LINKS = (
    "",
    "",
    "",
    "By the way: ",
    "You know what? ",
    "I am sure of this: ",
    "Believe it or not: ",
    "And one more thing: ",
)
REPLIES = (
    "Thank you!",
    "I did not know that.",
    "Yes, I have heard so too.",
    "Really?",
    "That is good to know.",
)


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _title(name: str) -> str:
    return f"= {name[0].upper()}{name[1:]} ="


def person_hop(world: World, name: str, rng: Random) -> str:
    """A statement about the town, pet, job or dish of a person."""
    first, kind, second, _ = rng.choice(TWO_HOPS)
    return HOP_SAYS[second].format(
        e=name, v=world.value(kind, world.value("person", name, first), second)
    )


def _entity_lines(world: World, kind: str, rng: Random) -> list[str]:
    name = rng.choice(world.names(kind))
    attributes = [a for k, a in WORDINGS if k == kind]
    rng.shuffle(attributes)
    lines = [say(world, kind, name, a, rng) for a in attributes]
    if kind == "animal":
        legs = CLASSES[world.value(kind, name, "class")]
        lines.append(f"The {name} has {legs} legs.")
    if kind == "person":
        pronoun = world.value(kind, name, "gender").capitalize()
        lines = [
            f"{pronoun}{s[len(name) :]}" if i and s.startswith(name) and rng.random() < 0.5 else s
            for i, s in enumerate(lines)
        ]
    paragraphs = [_title(name), " ".join(lines)]
    if kind == "person":
        paragraphs.append(" ".join(dict.fromkeys(person_hop(world, name, rng) for _ in range(4))))
    return paragraphs


def _list_lines(world: World, rng: Random) -> list[str]:
    kind, _, attribute, value = pick_fact(world, rng)
    same = [n for n in world.names(kind) if world.value(kind, n, attribute) == value]
    rng.shuffle(same)
    sentences = [say(world, kind, n, attribute, rng) for n in same[:12]]
    return [_title(value), " ".join(sentences)]


def _trade_lines(world: World, rng: Random) -> list[str]:
    if rng.random() < 0.4:
        hobby = rng.choice(tuple(HOBBIES))
        return [
            _title(hobby),
            f"Whoever enjoys {hobby} {_joined(list(HOBBIES[hobby]))}.",
        ]
    if rng.random() < 0.4:
        dish = rng.choice(world.names("dish"))
        return [_title(dish), say(world, "dish", dish, "ingredient", rng)]
    job = rng.choice(tuple(JOBS))
    steps = _joined(list(JOBS[job][1]))
    return [
        _title(job),
        f"{say(world, 'job', job, 'workplace', rng)} At work the {job} {steps}.",
    ]


def article(world: World, rng: Random) -> list[str]:
    """An encyclopaedia article: a title line, then one line for each paragraph."""
    kind = rng.choice(KINDS)
    if kind == "list":
        return _list_lines(world, rng)
    if kind == "sums":
        return table(rng)
    if kind == "trade":
        return _trade_lines(world, rng)
    return _entity_lines(world, kind, rng)


def articles(world: World, rng: Random, count: int) -> str:
    """So many articles, joined as WikiText-2 is."""
    return "\n\n".join(line for _ in range(count) for line in article(world, rng))


def chat(world: World, rng: Random) -> str:
    """A chatty page: facts in no order, with small talk between them."""
    lines = [rng.choice(OPENINGS)]
    for _ in range(rng.randint(3, 7)):
        if rng.random() < 0.25:
            fact = person_hop(world, rng.choice(world.names("person")), rng)
        else:
            kind, name, attribute, _ = pick_fact(
                world, rng, ("person", "person", "town", "animal", "object", "job", "dish")
            )
            fact = (deny if rng.random() < 0.2 else say)(world, kind, name, attribute, rng)
        lines.append(rng.choice(LINKS) + fact)
        if rng.random() < 0.2:
            lines.append(rng.choice(REPLIES))
    return " ".join(lines)


def quiz(world: World, rng: Random) -> str:
    """A page of one to three items in the tasks' forms with their answers; none is held out."""
    items = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        task = rng.choice(tuple(TASKS))
        items.append(" ".join(prompt_and_answer(task, training_item(world, task, rng).row)))
    return "\n\n".join(items)


def web_page(world: World, rng: Random) -> str:
    """A document for C4's place."""
    return quiz(world, rng) if rng.random() < 0.75 else chat(world, rng)


def training_document(world: World, rng: Random) -> str:
    """One document of the training stream: articles joined as WikiText-2 is, or a web page."""
    if rng.random() < ARTICLES:
        return articles(world, rng, rng.randint(1, 3))
    return web_page(world, rng)
