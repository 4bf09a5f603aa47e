"""The closed world: people, towns, animals, objects, dishes, and every fact about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from random import Random

SEED = 20
FIRST_NAMES, SURNAMES, TOWNS, ANIMALS = 50, 40, 48, 32  # people have all pairs of names

JOBS = {  # job: (workplace, three things done at work)
    "baker": ("bakery", ("kneads the dough", "heats the oven", "sells warm loaves")),
    "fisher": ("harbour", ("mends the nets", "rows out to sea", "pulls in the catch")),
    "teacher": ("school", ("wipes the board", "reads a lesson", "marks the tests")),
    "doctor": ("hospital", ("listens to hearts", "bandages a leg", "writes down pills")),
    "smith": ("forge", ("lights the coals", "hammers hot iron", "cools the horseshoes")),
    "weaver": ("mill", ("spins the wool", "sets up the loom", "folds the new cloth")),
    "gardener": ("park", ("digs the beds", "plants the roses", "waters the lawn")),
    "potter": ("workshop", ("wets the clay", "turns the wheel", "glazes the bowls")),
    "miner": ("quarry", ("puts on a helmet", "climbs down the shaft", "breaks the rock")),
    "judge": ("court", ("puts on a black robe", "hears both sides", "reads out the law")),
    "barber": ("salon", ("sharpens the razor", "trims a beard", "sweeps up the hair")),
    "painter": ("studio", ("stretches a canvas", "mixes the colours", "frames a portrait")),
    "driver": ("depot", ("checks the brakes", "starts the bus", "stops at the station")),
    "cook": ("kitchen", ("chops the onions", "stirs the pot", "tastes the sauce")),
    "guard": ("tower", ("locks the gate", "watches the wall", "lights the beacon")),
    "farmer": ("barn", ("milks the cows", "ploughs the field", "stacks the hay")),
}
HOBBIES = {  # hobby: two things done for it
    "chess": ("sets up the board", "moves a bishop"),
    "singing": ("warms up the voice", "holds a high note"),
    "dancing": ("puts on soft shoes", "spins to the music"),
    "knitting": ("picks out some yarn", "counts the stitches"),
    "running": ("ties the laces", "jogs along the road"),
    "swimming": ("finds the goggles", "dives into the pool"),
    "reading": ("opens a thick novel", "turns the pages"),
    "drawing": ("sharpens a crayon", "sketches a tree"),
    "sailing": ("hoists the jib", "steers into the wind"),
    "fencing": ("puts on a mask", "lunges with the foil"),
    "juggling": ("picks up three balls", "throws them in circles"),
    "cycling": ("pumps up the tyres", "pedals up the hill"),
}
OBJECTS_TABLE = """
bucket: carry water; ladder: reach the roof; lamp: light a dark room; hammer: drive in a
nail; needle: sew a torn shirt; comb: tidy your hair; kettle: boil water; broom: sweep the
floor; spade: dig a hole; saw: cut a plank; rope: tie up a boat; basket: gather fruit;
knife: slice bread; blanket: stay warm at night; brush: paint a fence; bell: call people to
dinner; key: open a locked door; map: find the way; net: catch fish; pan: fry an egg; soap:
wash your hands; towel: dry your face; scale: weigh flour; clock: tell the time; mirror:
look at yourself; drum: beat a rhythm; whistle: call the dog; jar: store jam; tent: camp in
the hills; sail: catch the wind; barrow: move stones; rake: clear the leaves
"""
OBJECTS = dict(pair.split(": ") for pair in " ".join(OBJECTS_TABLE.split()).split("; "))
DISHES = (
    "porridge",
    "stew",
    "dumplings",
    "pancakes",
    "broth",
    "pudding",
    "noodles",
    "salad",
    "pie",
    "curry",
    "risotto",
    "toast",
    "soup",
    "fritters",
    "chowder",
    "pastry",
)
INGREDIENTS = (
    "barley",
    "turnips",
    "lentils",
    "buckwheat",
    "leeks",
    "plums",
    "rice",
    "beans",
    "pumpkin",
    "peppers",
    "mushrooms",
    "rye",
    "carrots",
    "corn",
    "clams",
    "butter",
)
REGIONS = (
    "the north",
    "the south",
    "the east",
    "the west",
    "the coast",
    "the hills",
    "the marsh",
    "the valley",
)
RIVERS = ("Bel", "Corr", "Dun", "Fenn", "Gar", "Hest", "Lud", "Wye")
PRODUCTS = (
    "glass",
    "salt",
    "paper",
    "cheese",
    "honey",
    "silk",
    "bricks",
    "rope",
    "wine",
    "tea",
    "coal",
    "boots",
    "clocks",
    "pots",
    "carpets",
    "candles",
)
LANDMARKS = (
    "bridge",
    "castle",
    "lighthouse",
    "windmill",
    "fountain",
    "statue",
    "cathedral",
    "market hall",
    "library",
    "theatre",
    "museum",
    "gate",
)
CLASSES = {"bird": 2, "mammal": 4, "insect": 6, "spider": 8, "lizard": 4}
HABITATS = ("forest", "lake", "desert", "meadow", "mountains", "swamp", "caves", "cliffs")
FEEDS = ("seeds", "leaves", "fish", "roots", "berries", "worms", "nuts", "grass", "snails", "moss")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
MATERIALS = ("wood", "iron", "clay", "copper", "leather", "glass", "wool", "stone")
ROOMS = ("kitchen", "cellar", "attic", "garden shed", "hall", "bedroom")


@dataclass(frozen=True)
class World:
    """Facts by kind of entity: `facts["person"]["Nifry Weler"]["home"]` is a town."""

    facts: dict[str, dict[str, dict[str, str]]]
    pools: dict[tuple[str, str], tuple[str, ...]] = field(repr=False)
    share: float = 1.0  # of the people that are talked about

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        names = {kind: tuple(facts) for kind, facts in self.facts.items()}
        people = names["person"]
        return names | {"person": people[: round(len(people) * self.share)]}

    def names(self, kind: str) -> tuple[str, ...]:
        """The entities of one kind, in their fixed order."""
        return self._names[kind]

    def value(self, kind: str, name: str, attribute: str) -> str:
        """One fact."""
        return self.facts[kind][name][attribute]

    def others(self, kind: str, attribute: str, value: str, count: int, rng: Random) -> list[str]:
        """`count` wrong values for a fact, all different."""
        return rng.sample([v for v in self.pools[kind, attribute] if v != value], count)


def _invent(rng: Random, count: int, endings: tuple[str, ...], taken: set[str]) -> list[str]:
    """Made-up names that differ in their first three letters, lest two be near twins."""
    names: list[str] = []
    while len(names) < count:
        stem = rng.choice("bdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice("bdfgklmnprstvz")
        if stem not in taken:
            taken.add(stem)
            names.append(stem + rng.choice(endings))
    return names


def _spread(rng: Random, count: int, pool: tuple[str, ...]) -> list[str]:
    """`count` values of a pool, each used as often as the others, in random order."""
    values = [pool[i % len(pool)] for i in range(count)]
    rng.shuffle(values)
    return values


@cache
def build_world(seed: int = SEED) -> World:
    """The world of a seed; the same on every machine."""
    rng = Random(seed)
    taken: set[str] = set()
    first_names = _invent(rng, FIRST_NAMES, ("a", "o", "in", "el", "ry"), taken)
    surnames = _invent(rng, SURNAMES, ("man", "son", "er", "dal", "ley"), taken)
    people = [f"{a.capitalize()} {b.capitalize()}" for a in first_names for b in surnames]
    rng.shuffle(people)
    towns = [n.capitalize() for n in _invent(rng, TOWNS, ("ton", "ford", "by", "wick"), taken)]
    animals = _invent(rng, ANIMALS, ("rel", "uck", "ot", "ish"), taken)
    pools = {
        "person": {
            "home": tuple(towns),
            "job": tuple(JOBS),
            "pet": tuple(animals),
            "dish": DISHES,
            "hobby": tuple(HOBBIES),
            "colour": COLOURS,
        },
        "town": {"region": REGIONS, "product": PRODUCTS, "river": RIVERS, "landmark": LANDMARKS},
        "animal": {"class": tuple(CLASSES), "habitat": HABITATS, "feed": FEEDS, "fur": COLOURS},
        "object": {
            "use": tuple(OBJECTS.values()),
            "material": MATERIALS,
            "room": ROOMS,
            "price": tuple(str(n) for n in range(2, 10)),
        },
        "job": {"workplace": tuple(place for place, _ in JOBS.values())},
        "dish": {"ingredient": INGREDIENTS},
    }
    names = {"person": people, "town": towns, "animal": animals}
    names |= {"object": list(OBJECTS), "job": list(JOBS), "dish": list(DISHES)}
    facts: dict[str, dict[str, dict[str, str]]] = {}
    for kind, attributes in pools.items():
        columns = {a: _spread(rng, len(names[kind]), pool) for a, pool in attributes.items()}
        facts[kind] = {n: {a: columns[a][i] for a in columns} for i, n in enumerate(names[kind])}
    for i, name in enumerate(people):
        facts["person"][name]["gender"] = "she" if i % 2 else "he"
    for name, use in OBJECTS.items():
        facts["object"][name]["use"] = use
    for name, (workplace, _) in JOBS.items():
        facts["job"][name]["workplace"] = workplace
    return World(
        facts, {(k, a): pool for k, attributes in pools.items() for a, pool in attributes.items()}
    )
