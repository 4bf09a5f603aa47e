"""How each fact is worded: statements for prose; questions, stems and doubts for the tasks.

`{e}` is the entity and `{v}` the value. Prose never uses the wording of a stem, so that holding out
a stem for one entity keeps the whole test sentence out of the training text.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wording:
    """The wordings of one attribute."""

    says: list[str] = field(default_factory=list)  # statements: for prose, and as claims
    denies: list[str] = field(default_factory=list)  # that the value is another one
    asks: list[str] = field(default_factory=list)  # questions whose answer is the value
    stems: list[str] = field(default_factory=list)  # unfinished sentences that the value completes
    doubts: list[str] = field(default_factory=list)  # yes-or-no questions
    events: list[str] = field(default_factory=list)  # what happened, with the value left unsaid
    tails: list[str] = field(default_factory=list)  # what follows a name among two


TABLE = """
[person home]
denies: {e} does not live in {v}. | {e} has no house in {v}.
says: {e} lives in {v}. | {e} has a house in {v}. | The home of {e} is in {v}.
says: {e} comes from {v}.
asks: Where does {e} live? | In which town is the home of {e}? | What is the home town of {e}?
stems: A letter to {e} should be sent to | To visit {e} at home, travel to
stems: After a journey {e} goes back to
doubts: does {e} live in {v} | is the home of {e} in {v} | is {v} the home town of {e}
events: {e} walked home after the market. | {e} stayed at home all day.
tails: went home to {v}. | said that the best streets are those of {v}.
[person job]
denies: {e} is not a {v}. | {e} does not work as a {v}.
says: {e} works as a {v}. | {e} is a {v} by trade. | {e} earns a living as a {v}.
says: {e} is known as a good {v}.
asks: What is the job of {e}? | What does {e} do for a living? | What is {e} by trade?
stems: When there is work to do, {e} is the | On the door of {e} hangs a sign that says
stems: Most people call {e} the
doubts: does {e} work as a {v} | is {e} a {v} | is {e} a {v} by trade
events: {e} was busy at work. | {e} came back from a long day of work.
tails: had to get up early to work as a {v}. | has been a {v} for years.
[person pet]
denies: {e} does not keep a {v}. | {e} has no pet {v}.
says: {e} keeps a {v}. | {e} has a pet {v}. | The pet of {e} is a {v}. | {e} looks after a {v}.
asks: Which animal does {e} keep? | What kind of pet does {e} have? | What is the pet of {e}?
stems: Every morning {e} feeds the | In the house of {e} sleeps a | {e} goes for a walk with the
doubts: does {e} keep a {v} | is the pet of {e} a {v} | does {e} have a {v}
events: {e} bought food for the pet. | {e} played with the pet.
tails: came along with a {v}. | had to go and feed the {v}.
[person dish]
denies: {e} does not like {v}. | {e} does not eat {v}.
says: {e} loves {v}. | {e} likes to eat {v}. | The favourite dish of {e} is {v}.
says: {e} eats {v} every day.
asks: What does {e} like to eat? | What is the favourite dish of {e}? | Which dish does {e} love?
stems: For a birthday meal {e} asks for | At the inn {e} always orders
stems: If {e} is hungry, serve a plate of
doubts: does {e} like {v} | is {v} the favourite dish of {e} | does {e} love to eat {v}
events: {e} ate a favourite dish. | {e} went out for dinner.
tails: ordered a plate of {v}. | wanted to eat {v} again.
[person hobby]
denies: {e} does not enjoy {v}. | {e} is not fond of {v}.
says: {e} enjoys {v}. | The hobby of {e} is {v}. | {e} spends free time on {v}.
says: {e} is fond of {v}.
asks: What is the hobby of {e}? | What does {e} enjoy in free time? | Which hobby does {e} have?
stems: On a free day {e} goes in for | {e} wants to join a club for
stems: A good present for {e} is a book about
doubts: does {e} enjoy {v} | is {v} the hobby of {e} | does {e} spend free time on {v}
events: {e} had a free evening. | {e} took up a hobby again.
tails: talked about {v} all evening. | was late because of {v}.
[person colour]
denies: {e} does not wear {v}. | {e} does not like the colour {v}.
says: {e} wears {v}. | The favourite colour of {e} is {v}. | {e} owns a {v} coat.
says: {e} likes the colour {v}.
asks: What is the favourite colour of {e}? | Which colour does {e} wear?
asks: What colour is the coat of {e}?
stems: The door of the house of {e} is painted | In a crowd you know {e} by a hat that is
stems: {e} buys scarves that are
doubts: is the coat of {e} {v} | does {e} wear {v} | is {v} the favourite colour of {e}
events: {e} put on a coat. | {e} bought a hat in a favourite colour.
tails: put on a {v} coat. | painted the whole room {v}.
[town region]
denies: {e} is not in {v}. | {e} does not lie in {v}.
says: {e} is a town in {v}. | {e} lies in {v}. | The town of {e} belongs to {v}.
says: {e} is found in {v}.
asks: In which part of the land is {e}? | Where does {e} lie? | Which region does {e} belong to?
stems: To get to {e}, take the road to | Rain over {e} is rain over
stems: A traveller who reaches {e} has come to
doubts: is {e} in {v} | does {e} lie in {v} | is {e} a town of {v}
events: A traveller arrived in {e}. | It rained in {e} for a week.
tails: is where people of {v} meet. | has the weather of {v}.
[town product]
denies: {e} does not make {v}. | {e} is not known for {v}.
says: {e} makes {v}. | {e} is known for {v}. | The people of {e} sell {v}.
says: Most {v} is made in {e}.
asks: What is made in {e}? | What is {e} known for? | What do the people of {e} sell?
stems: The workshops of {e} turn out | Carts that leave {e} are loaded with
stems: A merchant goes to {e} to buy
doubts: does {e} make {v} | is {e} known for {v} | do the people of {e} sell {v}
events: A merchant bought goods in {e}. | The workshops of {e} were busy.
tails: sent three carts of {v}. | had no more {v} to sell.
[town river]
denies: {e} is not on the river {v}. | {e} was not built beside the {v}.
says: {e} stands on the river {v}. | The {v} flows through {e}. | The river of {e} is the {v}.
says: {e} was built beside the {v}.
asks: Which river flows through {e}? | On which river does {e} stand? | What is the river of {e}?
stems: The boats of {e} sail on the | Children of {e} learn to swim in the
stems: The bridges of {e} cross the
doubts: is {e} on the river {v} | does the {v} flow through {e} | was {e} built beside the {v}
events: A boat reached {e}. | There was a flood in {e}.
tails: was flooded by the {v}. | gets its water from the {v}.
[town landmark]
denies: {e} has no famous {v}. | {e} does not have a {v}.
says: {e} has a famous {v}. | Visitors come to {e} to see its {v}. | The pride of {e} is the {v}.
says: In the middle of {e} stands a {v}.
asks: What is the pride of {e}? | What do visitors see in {e}? | What stands in the middle of {e}?
stems: On the coins of {e} you see a | A painter who goes to {e} will paint the
stems: From far away {e} is known by its
doubts: does {e} have a famous {v} | is the {v} the pride of {e}
doubts: is there a {v} in the middle of {e}
events: A painter went to see {e}. | Visitors took pictures in {e}.
tails: needs money for its old {v}. | has put a fence around the {v}.
[animal class]
denies: The {e} is not a {v}. | A {e} is no kind of {v}.
says: The {e} is a {v}. | A {e} is a kind of {v}. | The {e} belongs with the {v} family.
says: Every {e} is a {v}.
asks: What kind of animal is the {e}? | What is a {e}? | To which family does the {e} belong?
stems: In a museum the {e} stands under the sign | A child who draws a {e} draws a
stems: A book with the {e} is about the
doubts: is the {e} a {v} | is a {e} a kind of {v} | does the {e} belong with the {v} family
events: A {e} was seen in the morning. | Somebody drew a {e}.
tails: moved like any {v}. | is the larger {v}.
[animal habitat]
denies: The {e} does not live in the {v}. | The home of the {e} is not the {v}.
says: The {e} lives in the {v}. | The home of the {e} is the {v}.
says: You can find the {e} in the {v}. | The {v} is full of the {e}.
asks: Where does the {e} live? | Where can you find the {e}? | What is the home of the {e}?
stems: To watch a wild {e}, hide in the | A lost {e} finds its way back to the
stems: A young {e} is born in the
doubts: does the {e} live in the {v} | is the home of the {e} the {v}
doubts: can you find the {e} in the {v}
events: A {e} went back to its home. | Hunters looked for a {e}.
tails: ran off to the {v}. | slept somewhere in the {v}.
[animal feed]
denies: The {e} does not eat {v}. | A hungry {e} does not look for {v}.
says: The {e} eats {v}. | The food of the {e} is {v}. | The {e} lives on {v}.
says: A hungry {e} looks for {v}.
asks: What does the {e} eat? | What is the food of the {e}? | What does a hungry {e} look for?
stems: To tame a {e}, offer it some | In its nest the {e} keeps a store of
stems: The mouth of the {e} is made for
doubts: does the {e} eat {v} | is the food of the {e} {v} | does a hungry {e} look for {v}
events: A {e} was hungry and found food. | A keeper fed the {e}.
tails: was eating {v}. | had a mouth full of {v}.
[animal fur]
denies: The {e} is not {v}. | A {e} has no {v} back.
says: The {e} is {v}. | The colour of the {e} is {v}. | A {e} has a {v} back.
says: The back of the {e} is {v}.
asks: What colour is the {e}? | What is the colour of the {e}? | What colour is the back of a {e}?
stems: To paint a {e}, you need a paint that is | A {e} hides best among things that are
stems: The tail of a {e} is
doubts: is the {e} {v} | is the colour of the {e} {v} | does the {e} have a {v} back
events: Somebody painted a {e}. | A {e} was hiding in a heap of things of its colour.
tails: is the {v} one. | turned its {v} back.
[object use]
denies: You do not use the {e} to {v}. | The {e} is not used to {v}.
says: People use the {e} to {v}. | The {e} is used to {v}. | With the {e} you can {v}.
says: To {v}, use the {e}.
asks: What do people do with the {e}? | What is the {e} used for? | What can you do with the {e}?
stems: Somebody who takes the {e} is about to | The {e} was invented to
stems: If you lend out the {e}, you cannot
doubts: do people use the {e} to {v} | can you {v} with the {e} | is the {e} used to {v}
events: Somebody used the {e}. | The {e} was taken out for work.
tails: helps you to {v}. | makes it easy to {v}.
[object material]
denies: The {e} is not made of {v}. | You do not need {v} to make the {e}.
says: The {e} is made of {v}. | A good {e} is made from {v}. | You need {v} to make the {e}.
says: The {e} is of {v}.
asks: What is the {e} made of? | What do you need to make the {e}? | From what is a good {e} made?
stems: To repair the {e}, bring a piece of | When you touch the {e}, you feel
stems: A broken {e} is thrown on the heap of
doubts: is the {e} made of {v} | do you need {v} to make the {e} | is a good {e} made from {v}
events: Somebody made a new {e}. | The {e} was broken and then mended.
tails: is made of fine {v}. | feels like {v}.
[object room]
denies: The {e} is not kept in the {v}. | The {v} is not the place of the {e}.
says: The {e} is kept in the {v}. | You find the {e} in the {v}.
says: The {e} has its place in the {v}. | The place of the {e} is the {v}.
asks: Where is the {e} kept? | Where do you find the {e}? | What is the place of the {e}?
stems: Whoever needs the {e} has to walk to the | After use, carry the {e} back to the
stems: The {e} gathers dust in the
doubts: is the {e} kept in the {v} | do you find the {e} in the {v}
doubts: is the {v} the place of the {e}
events: Somebody put the {e} back in its place. | Somebody went to fetch the {e}.
tails: is still in the {v}. | was left in the {v}.
[object price]
denies: The {e} does not cost {v} coins. | The {e} is not sold for {v} coins.
says: The {e} costs {v} coins. | The price of the {e} is {v} coins. | A {e} is sold for {v} coins.
says: You pay {v} coins for the {e}.
asks: How many coins does the {e} cost? | What is the price of the {e} in coins?
asks: For how many coins is a {e} sold?
stems: The number of coins that buys a {e} is | On the tag of the {e} is written the number
stems: In coins a {e} is worth
doubts: does the {e} cost {v} coins | is the price of the {e} {v} coins
doubts: is a {e} sold for {v} coins
events: Somebody bought a {e}. | Somebody paid for the {e}.
tails: costs {v} coins. | was sold for {v} coins.
[job workplace]
denies: A {e} does not work in the {v}. | You do not meet the {e} in the {v}.
says: A {e} works in the {v}. | The {v} is the place of a {e}. | You meet the {e} in the {v}.
asks: Where does a {e} work? | Where do you meet the {e}? | What is the place of a {e}?
stems: To hire a {e}, ask in the | In the morning the {e} unlocks the
stems: The {e} hangs a coat in the
doubts: does a {e} work in the {v} | is the {v} the place of a {e}
doubts: do you meet the {e} in the {v}
events: The {e} went to work. | Somebody went to see the {e}.
tails: came from the {v}. | has worked in the {v} for years.
[dish ingredient]
denies: You do not need {v} to cook {e}. | People do not make {e} with {v}.
says: You need {v} to cook {e}. | The main thing in {e} is {v}. | People make {e} with {v}.
asks: What do you need to cook {e}? | What is the main thing in {e}?
asks: What do people make {e} with?
stems: To make {e}, start with some | The smell of {e} is the smell of
stems: There is no {e} in a shop without
doubts: do you need {v} to cook {e} | is {v} the main thing in {e} | do people make {e} with {v}
events: Somebody cooked {e}. | Somebody bought what {e} needs.
tails: needs a lot of {v}. | tastes of {v}.
"""


def _read(table: str) -> dict[tuple[str, str], Wording]:
    wordings: dict[tuple[str, str], Wording] = {}
    for line in table.strip().splitlines():
        if line.startswith("["):
            kind, attribute = line.strip("[]").split()
            wording = wordings[kind, attribute] = Wording()
        else:
            use, phrases = line.split(": ", 1)
            getattr(wording, use).extend(phrases.split(" | "))
    return wordings


WORDINGS = _read(TABLE)

# the person's fact, the kind of its value, the fact of that value, questions
TWO_HOPS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        "home",
        "town",
        "region",
        ("In which part of the land does {e} live?", "In which region is the house of {e}?"),
    ),
    (
        "home",
        "town",
        "product",
        ("What is made in the town where {e} lives?", "What do the neighbours of {e} sell?"),
    ),
    (
        "home",
        "town",
        "river",
        ("Which river flows past the house of {e}?", "In which river does {e} swim?"),
    ),
    (
        "home",
        "town",
        "landmark",
        ("What can {e} see in the middle of town?", "What is the pride of the town of {e}?"),
    ),
    (
        "pet",
        "animal",
        "feed",
        ("What does the pet of {e} eat?", "Which food should {e} buy for the pet?"),
    ),
    (
        "pet",
        "animal",
        "class",
        ("What kind of animal is the pet of {e}?", "To which family does the pet of {e} belong?"),
    ),
    (
        "pet",
        "animal",
        "fur",
        ("What colour is the pet of {e}?", "What colour is the animal that {e} keeps?"),
    ),
    (
        "job",
        "job",
        "workplace",
        ("Where does {e} go to work?", "At which place do you meet {e} at work?"),
    ),
    (
        "dish",
        "dish",
        "ingredient",
        ("What is in the dish that {e} loves?", "What do you need to cook for {e}?"),
    ),
)
HOP_SAYS = {
    "region": "The house of {e} stands in {v}.",
    "product": "The neighbours of {e} make {v}.",
    "river": "The {v} flows past the house of {e}.",
    "landmark": "From the window {e} sees the {v}.",
    "feed": "The pet of {e} eats {v}.",
    "class": "The pet of {e} is a kind of {v}.",
    "fur": "The pet of {e} is {v}.",
    "workplace": "At work {e} is in the {v}.",
    "ingredient": "In the kitchen of {e} there is always some {v}.",
}
