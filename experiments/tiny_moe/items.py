"""What questions are made of: facts as statements, and items with a key that may be held out."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from random import Random

from experiments.tiny_moe.phrases import WORDINGS
from experiments.tiny_moe.world import World

HELD_OUT_ONE_IN = 8
SUBJECTS = ("person",) * 6 + ("town", "animal", "object")  # people have the most facts


@dataclass(frozen=True)
class Item:
    """One question: `row` is what a task's file holds, `key` puts it to testing or to training."""

    key: tuple
    row: dict

    @property
    def held_out(self) -> bool:
        """True if nothing with this key may enter training text."""
        return zlib.crc32(repr(self.key).encode()) % HELD_OUT_ONE_IN == 0


def pick_fact(
    world: World, rng: Random, kinds: tuple[str, ...] = SUBJECTS
) -> tuple[str, str, str, str]:
    """A random fact: kind, entity, attribute, value."""
    kind = rng.choice(kinds)
    name = rng.choice(world.names(kind))
    attribute = rng.choice([a for k, a in WORDINGS if k == kind])
    return kind, name, attribute, world.value(kind, name, attribute)


def say(world: World, kind: str, name: str, attribute: str, rng: Random, besides: str = "") -> str:
    """One fact as a statement, not in the wording `besides`."""
    wording = rng.choice([w for w in WORDINGS[kind, attribute].says if w != besides])
    return wording.format(e=name, v=world.value(kind, name, attribute))


def deny(world: World, kind: str, name: str, attribute: str, rng: Random, value: str = "") -> str:
    """A statement that the fact isn't `value`; without one, any wrong value."""
    value = value or world.others(kind, attribute, world.value(kind, name, attribute), 1, rng)[0]
    return rng.choice(WORDINGS[kind, attribute].denies).format(e=name, v=value)


def other_facts(
    world: World, kind: str, name: str, attribute: str, count: int, rng: Random
) -> list[str]:
    """Statements of the entity's other facts, as often what they are as what they aren't."""
    attributes = [a for k, a in WORDINGS if k == kind and a != attribute]
    return [
        rng.choice((say, deny))(world, kind, name, a, rng)
        for a in rng.sample(attributes, min(count, len(attributes)))
    ]
