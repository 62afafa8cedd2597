"""Generated stories: people move, take, leave and give objects; where is the ring, where was it before, who has it?

Of the kind of bAbI's tasks 1-3, 5, 6 and 11 (Weston et al. 2015, arXiv:1502.05698), with more verbs, people and places
that are not introduced ("Gollum dropped the ring there"), pronouns, and sentences that tell nothing. A small world is
simulated, so every answer follows from the facts; what they leave open is answered "unknown".

Names of people, objects and places are invented from syllables, and a hash gives each to one split: no name of the
test split is in training. The words of the vocabulary are those of the sentence patterns alone; every other word,
names and some invented verbs, is anonymised (`data/stories.py`). Only `random.Random.random` is drawn from, which
Python keeps the same from version to version.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator

from unroll.config import DatasetEntry, Strict, check
from unroll.data.sources import Progress, no_progress
from unroll.data.splits import HashSplit, check_names
from unroll.data.stories import Story, StoryTokenizer, StoryWriter, words_of
from unroll.data.writers import write_manifest
from unroll.errors import UserError
from unroll.files import new_folder

BEGINNINGS = ["b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gl", "h", "j", "k", "kr", "l", "m", "n", "p", "pr", "qu",
              "r", "s", "sh", "st", "t", "th", "tr", "v", "w", "y", "z"]  # fmt: skip
MIDDLES = ["a", "e", "i", "o", "u", "ae", "ai", "ea", "ei", "io", "ou", "y"]
ENDS = ["b", "ck", "d", "f", "g", "l", "ll", "m", "n", "nd", "r", "rn", "s", "sk", "st", "t", "th", "v", "x", "z"]
MOVES = ["went", "moved", "travelled", "journeyed", "walked", "ran", "returned", "went back", "came", "came back",
         "hurried", "sailed", "rode", "fled", "climbed"]  # fmt: skip
TAKES = ["got", "took", "grabbed", "picked up", "found", "seized", "fetched"]
DROPS = ["dropped", "left", "put down", "discarded", "laid down", "lost", "hid"]
GIVES = ["gave", "handed", "passed"]
IDLE = ["died", "slept", "sang", "laughed", "waited", "smiled", "sat down", "was tired", "was hungry", "looked around"]
SCENERY = ["It was night", "The sun rose", "It rained", "The wind blew", "Nobody spoke", "The moon was bright"]
OPENINGS = ["then", "afterwards", "later", "after that", "at last", "meanwhile"]
UNKNOWN, NOBODY, NOTHING = "unknown", "nobody", "nothing"
PATTERNS = ["the a an is are was in at to there he she they now again of and before where who what has had it this "
            "carrying holding does did have entered reached end story"]  # fmt: skip
KINDS = {1: "where is the person", 2: "where is the object", 3: "where was the object before", 4: "who has the object",
         5: "where was the person before", 6: "what does the person carry"}  # fmt: skip
"""What a question asks, by its task number."""
DRAWS = 10_000
T = TypeVar("T")


class Options(Strict):
    """samples {split: number of questions}. shortest, longest: facts of a story. questions: asked of each story. names:
    invented ones of each kind. held_out: share of them that belongs to each split other than train. entities: names
    and unknown words told apart in one story. lists: also ask what a person carries, which may be several answers."""

    samples: dict[str, int]
    shortest: int = Field(2, ge=1)
    longest: int = Field(20, ge=2, le=1000)
    questions: int = Field(3, ge=1)
    names: int = Field(3000, ge=60)
    held_out: float = Field(0.2, ge=0.05)
    entities: int = Field(40, ge=30, le=1000)
    lists: bool = False
    seed: int = 1

    @model_validator(mode="after")
    def consistent(self) -> Options:
        if self.shortest > self.longest:
            raise ValueError("shortest is above longest")
        if min(self.samples.values(), default=0) < 1:
            raise ValueError("every split needs at least one sample")
        if self.held_out * (len(self.samples) - 1) >= 1:
            raise ValueError(f"held_out leaves no name for training beside {len(self.samples) - 1} other splits")
        return self


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest. `progress` counts questions.

    Raises:
        UserError: options that do not fit, or sources given to a data set that has none.
    """
    place = f"params.yaml: datasets.{name}"
    options: Options = check(Options, entry.options, f"{place}.options")
    check_names(options.samples, f"{place}.options.samples")
    if entry.sources:
        raise UserError(f"{place}.sources: these stories are generated, no source is allowed")
    tokenizer = StoryTokenizer(vocabulary(), sorted([UNKNOWN, NOBODY, NOTHING]), options.entities)
    pools = names_of(options)
    with new_folder(out) as folder:
        splits, done = {}, 0
        for split, count in options.samples.items():
            asked: Counter[int] = Counter()
            with StoryWriter(folder, split, tokenizer) as writer:
                for number, story in enumerate(stories(split, count, options, pools[split]), 1):
                    writer.write(story)
                    asked[story.task] += 1
                    progress(done + number, sum(options.samples.values()))
            splits[split] = {**writer.summary, "questions": {str(task): asked[task] for task in sorted(asked)}}
            done += count
        manifest = {
            "dataset": name,
            "preparer": "generated_stories",
            "kind": "samples",
            "options": options.model_dump(mode="json"),
            "licence": entry.licence,
            "sources": [],
            **tokenizer.save(folder),
            "tasks": {str(number): kind for number, kind in KINDS.items()},
            "splits": splits,
            "skipped": {},
        }
        return write_manifest(folder, manifest)


def vocabulary() -> list[str]:
    """The words of the patterns, in the order of the alphabet."""
    phrases = [*MOVES, *TAKES, *DROPS, *GIVES, *IDLE, *SCENERY, *OPENINGS, *PATTERNS]
    return sorted({word.lower() for phrase in phrases for word in words_of(phrase)})


# ---------------------------------------------------------------- names


@dataclass(frozen=True)
class Names:
    """The invented names of one split."""

    people: list[str]
    objects: list[str]
    places: list[str]
    words: list[str]


def names_of(options: Options) -> dict[str, Names]:
    """The names of every split; none is in two of them, nor a word of the patterns."""
    others = {split: options.held_out for split in options.samples if split != "train"}
    split_of = HashSplit({**others, "train": 1 - sum(others.values())}, salt=f"{options.seed} names ")
    draw = Draw(random.Random(f"{options.seed} names"))
    taken = set(vocabulary())
    found: dict[str, dict[str, list[str]]] = {s: {k: [] for k in Names.__annotations__} for s in options.samples}
    for kind in Names.__annotations__:
        for _ in range(options.names):
            name = next(name for name in (_invented(draw, kind) for _ in range(DRAWS)) if name.lower() not in taken)
            taken.add(name.lower())
            found[split_of(name)][kind].append(name)
    return {split: Names(**kinds) for split, kinds in found.items()}


def _invented(draw: Draw, kind: str) -> str:
    def word() -> str:
        syllables = draw.number(1, 2)
        return "".join(draw.one(BEGINNINGS) + draw.one(MIDDLES) for _ in range(syllables)) + draw.one(ENDS)

    if kind == "places" and draw.chance(0.3):
        return f"{word()}-{word()}".title() if draw.chance(0.5) else f"{word().title()}-{word()}"
    return word() if kind in ("objects", "words") or (draw.chance(0.3) and kind == "places") else word().title()


class Draw:
    """Draws from `random.Random.random` alone."""

    def __init__(self, generator: random.Random) -> None:
        self.generator = generator

    def chance(self, probability: float) -> bool:
        return self.generator.random() < probability

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        return low + int(self.generator.random() * (high - low + 1))

    def one(self, values: Sequence[T]) -> T:
        return values[int(self.generator.random() * len(values))]

    def some(self, values: Sequence[str], count: int) -> list[str]:
        """So many different ones."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.one(values)] = None
        return list(found)


# ---------------------------------------------------------------- the world


@dataclass(frozen=True)
class Stay:
    """A place where somebody or something is, and the numbers of the facts that say so, as one would look them up."""

    place: str
    why: tuple[int, ...]


@dataclass
class World:
    """Where everybody and everything is: what the facts say and what follows from them."""

    stays: dict[str, list[Stay]] = field(default_factory=dict)  # person or object -> places one after the other
    holder: dict[str, str | None] = field(default_factory=dict)  # object -> person
    handed: dict[str, int] = field(default_factory=dict)  # object -> the fact that says who has it

    def place(self, thing: str) -> str | None:
        stays = self.stays.get(thing)
        return stays[-1].place if stays else None

    def why(self, thing: str) -> tuple[int, ...]:
        stays = self.stays.get(thing)
        return stays[-1].why if stays else ()

    def put(self, thing: str, place: str, why: tuple[int, ...]) -> None:
        """A person or an object is now at a place, and what a person carries too."""
        stays = self.stays.setdefault(thing, [])
        stay = Stay(place, tuple(dict.fromkeys(why)))
        if stays and stays[-1].place == place:
            stays[-1] = stay
        else:
            stays.append(stay)
        for carried, holder in self.holder.items():
            if holder == thing:
                self.put(carried, place, (self.handed[carried], *why))

    def hand(self, thing: str, person: str, fact: int, keeps: bool = True) -> None:
        """Fact number `fact`: a person has an object, and whoever has it is where it is; or has had it and lets go."""
        before = self.why(thing)
        self.holder[thing], self.handed[thing] = person, fact
        here, there = self.place(person), self.place(thing)
        if here is not None:
            self.put(thing, here, (fact, *self.why(person)))
        elif there is not None:
            self.put(person, there, (fact, *before))
        if not keeps:
            self.holder[thing] = None

    def together(self, one: str, other: str) -> bool:
        """Whether the two can be in one place, as far as is known."""
        here, there = self.place(one), self.place(other)
        return here is None or there is None or here == there


class Teller:
    """Tells one story: draws what happens, keeps the world and the sentences."""

    def __init__(self, draw: Draw, names: Names) -> None:
        self.draw, self.names, self.world = draw, names, World()
        self.people = draw.some(names.people, draw.number(2, 4))
        self.objects = draw.some(names.objects, draw.number(1, 3))
        self.places = draw.some(names.places, draw.number(3, 6))
        self.article = {place: "the " if draw.chance(0.6) else "" for place in self.places}
        self.pronoun = {person: draw.one(["he", "she"]) for person in self.people}
        self.subject: str | None = None  # of the sentence before
        self.mentioned: str | None = None  # the place where the sentence before ended
        self.facts: list[str] = []

    def tell(self) -> None:
        """Add one sentence."""
        events: list[tuple[float, Callable[[], bool]]] = [
            (0.42, self.move), (0.18, self.take), (0.16, self.drop), (0.07, self.give), (0.05, self.lie), (0.12, self.idle)
        ]  # fmt: skip
        while True:
            share = self.draw.generator.random()
            reached = 0.0
            for probability, event in events:
                reached += probability
                if share < reached:
                    if event():
                        return
                    break

    def say(self, person: str | None, rest: str, place: str | None) -> bool:
        """A sentence about a person, who may be called he or she if the sentence before was about that person."""
        known = person is not None and person == self.subject and self.draw.chance(0.25)
        words = [rest] if person is None else [self.pronoun[person] if known else person, rest]
        text = " ".join([self.draw.one(OPENINGS), *words] if self.draw.chance(0.15) else words)
        self.facts.append(text[0].upper() + text[1:] + ".")
        self.subject, self.mentioned = person, place
        return True

    def named(self, place: str) -> str:
        return self.article[place] + place

    def here(self, person: str, probability: float = 0.4) -> str:
        """ " there" at times, where the sentence before says what that means."""
        place = self.world.place(person)
        return " there" if place is not None and place == self.mentioned and self.draw.chance(probability) else ""

    def move(self) -> bool:
        person = self.draw.one(self.people)
        place = self.draw.one(self.places)
        if place == self.world.place(person):
            return False
        self.world.put(person, place, (len(self.facts),))
        if self.draw.chance(0.1):
            return self.say(person, f"{self.draw.one(['entered', 'reached'])} {self.named(place)}", place)
        if self.draw.chance(0.08):
            return self.say(person, f"{self.draw.one(['is', 'was'])} in {self.named(place)}", place)
        verb = self.draw.one(self.names.words) if self.draw.chance(0.06) else self.draw.one(MOVES)
        return self.say(person, f"{verb} to {self.named(place)}", place)

    def take(self) -> bool:
        person, thing = self.draw.one(self.people), self.draw.one(self.objects)
        if self.world.holder.get(thing) is not None or not self.world.together(person, thing):
            return False
        there = self._arrive(person, thing)
        self.world.hand(thing, person, len(self.facts))
        return self.say(
            person, f"{self.draw.one(TAKES)} the {thing}{there}", self.world.place(person) if there else None
        )

    def drop(self) -> bool:
        person, thing = self.draw.one(self.people), self.draw.one(self.objects)
        holder = self.world.holder.get(thing)
        if holder != person and (thing in self.world.stays or holder is not None):
            return False
        there = self._arrive(person, thing)
        self.world.hand(thing, person, len(self.facts), keeps=False)
        return self.say(
            person, f"{self.draw.one(DROPS)} the {thing}{there}", self.world.place(person) if there else None
        )

    def _arrive(self, person: str, thing: str) -> str:
        """Somebody whose place is open may be told to be "there", where the sentence before ended."""
        place = self.mentioned
        free = self.world.place(person) is None and place is not None and self.world.place(thing) in (None, place)
        if free and place is not None and self.draw.chance(0.7):
            self.world.put(person, place, (len(self.facts), len(self.facts) - 1))
            return " there"
        return self.here(person)

    def give(self) -> bool:
        held = [(thing, person) for thing, person in self.world.holder.items() if person is not None]
        if not held:
            return False
        thing, person = self.draw.one(held)
        other = self.draw.one(self.people)
        if other == person or not self.world.together(person, other):
            return False
        fact, place = len(self.facts), self.world.place(person)
        if place is not None and self.world.place(other) is None:
            self.world.put(other, place, (fact, *self.world.why(person)))
        self.world.hand(thing, other, fact)
        if place is None and (place := self.world.place(other)) is not None:
            self.world.put(person, place, (fact, *self.world.why(other)))
        verb = self.draw.one(GIVES)
        both = f"the {thing} to {other}" if self.draw.chance(0.5) else f"{other} the {thing}"
        return self.say(person, f"{verb} {both}", None)

    def lie(self) -> bool:
        """An object lies somewhere from the beginning."""
        thing, place = self.draw.one(self.objects), self.draw.one(self.places)
        if thing in self.world.holder or thing in self.world.stays:
            return False
        self.world.put(thing, place, (len(self.facts),))
        self.subject = None
        return self.say(None, f"the {thing} {self.draw.one(['is', 'was'])} in {self.named(place)}", place)

    def idle(self) -> bool:
        """A sentence that tells nothing about places, some of it in words that are in no vocabulary."""
        kind = self.draw.number(1, 4)
        stranger = self.draw.one(self.names.people)
        if kind == 1:
            return self.say(None, self.draw.one(SCENERY), None)
        if kind == 2:
            return self.say(None, f"the {self.draw.one(self.names.words)}", None)
        name = self.draw.one(self.people) if kind == 3 or stranger in self.people else stranger
        verb = self.draw.one(self.names.words) if self.draw.chance(0.3) else self.draw.one(IDLE)
        said = self.say(None, f"{name} {verb}", None)
        self.subject = name if name in self.people else None
        return said

    # --- questions --------------------------------------------------------------------------------------------------

    def ask(self, lists: bool) -> tuple[int, str, list[str], tuple[int, ...]] | None:
        """(task, question, answers, supporting facts) about what has been told so far; None if this draw has nothing to ask."""
        kind = self.draw.number(1, 6 if lists else 5)
        told = {word for fact in self.facts for word in words_of(fact)}
        people = [person for person in self.people if person in told]
        objects = [thing for thing in self.objects if thing in told]
        if not people or (not objects and kind in (2, 3, 4)):
            return None
        thing = self.draw.one(objects) if kind in (2, 3, 4) else self.draw.one(people)
        the = f"the {thing}" if kind in (2, 3, 4) else thing
        now = " now" if self.draw.chance(0.3) else ""
        if kind in (1, 2):
            place = self.world.place(thing)
            if place is None and not self.draw.chance(0.3):
                return None
            return kind, f"Where is {the}{now}?", [place or UNKNOWN], self.world.why(thing)
        if kind in (3, 5):
            stays = self.world.stays.get(thing, [])
            places = [stay.place for stay in stays]
            if len(places) < 2:
                return None
            last = len(places) - 1 if self.draw.chance(0.6) else self.draw.number(1, len(places) - 1)
            if places[last] in places[last + 1 :]:
                return None
            return kind, f"Where was {the} before {self.named(places[last])}?", [places[last - 1]], stays[last - 1].why
        if kind == 4:
            question = f"Who {self.draw.one(['has', 'is carrying', 'is holding'])} {the}{now}?"
            why = (self.world.handed[thing],) if thing in self.world.handed else ()
            return kind, question, [self.world.holder.get(thing) or NOBODY], why
        carried = [thing_ for thing_, holder in self.world.holder.items() if holder == thing]
        return (
            kind,
            f"What is {thing} {self.draw.one(['carrying', 'holding'])}{now}?",
            carried or [NOTHING],
            tuple(self.world.handed[thing_] for thing_ in carried),
        )


def stories(split: str, count: int, options: Options, names: Names) -> Iterator[Story]:
    """`count` questions, several about each story, at any place in it."""
    draw = Draw(random.Random(f"{options.seed} {split}"))
    while count:
        teller = Teller(draw, names)
        length = draw.number(options.shortest, options.longest)
        asked = sorted(draw.number(min(options.shortest, length), length) for _ in range(options.questions))
        while len(teller.facts) < length:
            teller.tell()
            for _ in range(asked.count(len(teller.facts))):
                question = next((q for q in (teller.ask(options.lists) for _ in range(20)) if q is not None), None)
                if question is not None and count:
                    task, text, answers, support = question
                    yield Story(list(teller.facts), text, answers, support, task, f"{split} {count}")
                    count -= 1
