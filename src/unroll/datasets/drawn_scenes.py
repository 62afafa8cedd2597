"""Generated scenes with captions: two coloured shapes in a relation (images), or one moving past the other (clips).

    image: "a small red circle is left of a blue square", as a JPEG
    clip:  "a red circle moves from left to right past a blue square", as an MP4

Each has five captions, of different templates with synonyms drawn anew; sizes are named now and then. Every split but
train shows combinations that training never does, and each of its scenes shows at least one:
- `unseen: pair`: a colour on a shape ("purple star"), whatever else is there;
- `unseen: relation`: a coloured shape in a relation or motion ("purple star ... left of ...").
Combinations lie on diagonals of the table of colours and shapes, so that every colour, shape, relation and motion is in
training often and alike, and validation and test hold out different ones.

What is drawn stands in the sample's `truth`: `objects` [{size, colour, shape, box [left, top, right, bottom] as shares
of the side}] and `relation` {name, subject, object}: objects by number, "subject is <name> object". Of a clip `motion`
{name, mover, landmark}; the box of the mover is its place in the middle of the clip and `boxes` has one for each frame.
`unseen` lists the objects whose combination training lacks. The manifest's `lexicon` says what words of captions mean:
{word or words: [kind, name]}, longer ones first. What a caption names before its relation stands in that relation to
what it names after it; what moves is what it names last before the motion.

Only `random.Random.random` is drawn from, which Python keeps the same from version to version.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field, model_validator

from unroll.config import DatasetEntry, Strict, check
from unroll.data.captions import Captioned, CaptionWriter, learn_tokenizer, save_tokenizer
from unroll.data.media import encode_clip, encode_jpeg
from unroll.data.sources import Progress, no_progress
from unroll.data.splits import check_names
from unroll.data.tokenizers import TokenizerOptions
from unroll.data.writers import write_manifest
from unroll.errors import UserError
from unroll.files import new_folder

CAPTIONS = 5
OVERSAMPLED = 4
MARGIN, GAP = 0.03, 0.06
DRAWS = 100_000

COLOURS = {
    "red": (214, 38, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (242, 214, 30),
    "purple": (140, 50, 175),
    "orange": (250, 135, 20),
    "pink": (250, 150, 195),
    "black": (25, 25, 28),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (0.10, 0.12), "large": (0.17, 0.20)}
"""Radius as a share of the side."""
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MOTIONS = ("left to right", "right to left", "up", "down", "bounce", "grow", "shrink")
RESIZING = ("grow", "shrink")

NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "size": {"small": ("small", "little", "tiny"), "large": ("large", "big")},
    "colour": {colour: (colour,) for colour in COLOURS} | {"purple": ("purple", "violet")},
    "shape": {shape: (shape,) for shape in SHAPES} | {"circle": ("circle", "disc"), "square": ("square", "box")},
    "relation": {
        "left of": ("left of", "to the left of", "on the left of"),
        "right of": ("right of", "to the right of", "on the right of"),
        "above": ("above", "over"),
        "below": ("below", "under", "beneath"),
    },
    "motion": {
        "left to right": ("moves from left to right", "slides from left to right", "goes from left to right"),
        "right to left": ("moves from right to left", "slides from right to left", "goes from right to left"),
        "up": ("moves up", "rises", "goes up"),
        "down": ("moves down", "falls", "goes down"),
        "bounce": ("bounces", "hops up and down", "bounces up and down"),
        "grow": ("grows", "gets bigger", "expands"),
        "shrink": ("shrinks", "gets smaller"),
    },
}
IMAGE_TEMPLATES = (
    "{subject} is {relation} {object}",
    "{subject} {relation} {object}",
    "there is {subject} {relation} {object}",
    "{subject} can be seen {relation} {object}",
    "the picture shows {subject} {relation} {object}",
    "{object} is {opposite} {subject}",
    "there is {object} {opposite} {subject}",
)
CLIP_TEMPLATES = (
    "{subject} {motion} {past} {object}",
    "we see how {subject} {motion} {past} {object}",
    "the clip shows how {subject} {motion} {past} {object}",
    "{subject} {motion} while {object} stays still",
    "{past} {object} {subject} {motion}",
)
BESIDE = ("near", "next to", "beside")


class Options(Strict):
    """media: image or clip. samples {split: number of scenes}. side: in pixels. unseen: what the splits other than train
    hold out. frames, rate: of a clip, and frames a second. quality: of the JPEGs."""

    media: Literal["image", "clip"] = "image"
    samples: dict[str, int]
    side: int = Field(64, ge=32, le=1024, multiple_of=2)
    unseen: Literal["pair", "relation"] = "pair"
    frames: int = Field(16, ge=2, le=512)
    rate: int = Field(8, ge=1, le=60)
    quality: int = Field(90, ge=1, le=100)
    seed: int = 1

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if min(self.samples.values(), default=0) < 1:
            raise ValueError("every split needs at least one sample")
        if len(self.samples) - 1 > len(SHAPES) - 3:
            raise ValueError(f"at most {len(SHAPES) - 3} splits beside train leave enough for training")
        return self


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest. `progress` counts scenes.

    Raises:
        UserError: options that do not fit, or sources given to a data set that has none.
    """
    place = f"params.yaml: datasets.{name}"
    options: Options = check(Options, entry.options, f"{place}.options")
    check_names(options.samples, f"{place}.options.samples")
    if entry.sources:
        raise UserError(f"{place}.sources: scenes are generated, no source is allowed")
    training = (caption for scene in scenes("train", options) for caption in scene.captions)
    tokenizer = learn_tokenizer(((place, caption) for caption in training), TokenizerOptions(kind="words"))
    with new_folder(out) as folder:
        splits, done = {}, 0
        for split, count in options.samples.items():
            with CaptionWriter(folder, split, tokenizer) as writer:
                for number, scene in enumerate(scenes(split, options)):
                    writer.write(_captioned(scene, f"{split}-{number:06d}", options))
                    progress(done + number + 1, sum(options.samples.values()))
            splits[split], done = writer.summary, done + count
        manifest = {
            "dataset": name,
            "preparer": "drawn_scenes",
            "kind": "samples",
            "media": options.media,
            "options": options.model_dump(mode="json"),
            "licence": entry.licence,
            "sources": [],
            **save_tokenizer(tokenizer, folder),
            "lexicon": lexicon(options.media),
            "splits": splits,
            "skipped": {},
        }
        return write_manifest(folder, manifest)


def lexicon(media: str) -> dict[str, list[str]]:
    """What words of the captions mean: {word or words: [kind, name]}."""
    kinds = ("size", "colour", "shape", "relation" if media == "image" else "motion")
    found = {phrase: [kind, name] for kind in kinds for name, phrases in NAMES[kind].items() for phrase in phrases}
    return dict(sorted(found.items(), key=lambda item: -len(item[0].split())))


# ---------------------------------------------------------------- what is in a scene


class _Thing:
    """A coloured shape: where it is and how large (`x`, `y`, `radius` as shares of the side), turned by `angle`."""

    def __init__(self, colour: str, shape: str, size: str, generator: random.Random) -> None:
        self.colour, self.shape, self.size = colour, shape, size
        low, high = SIZES[size]
        self.radius = low + (high - low) * generator.random()
        self.angle = math.radians(24 * generator.random() - 12)
        self.tint = tuple(round(24 * generator.random() - 12) for _ in range(3))
        self.x = self.y = 0.5


class Scene:
    """Two things and what is between them: the first one is the subject, or the mover."""

    def __init__(
        self, things: list[_Thing], link: str, unseen: list[int], captions: list[str], look: list[float]
    ) -> None:
        self.things, self.link, self.unseen, self.captions, self.look = things, link, unseen, captions, look


def scenes(split: str, options: Options) -> Iterator[Scene]:
    """The scenes of a split, always the same ones; another split's number of scenes does not change them."""
    generator = random.Random(f"{options.seed} {split}")
    held_out = _held_out(options)
    for _ in range(options.samples[split]):
        things, link, unseen = _drawn(split, held_out, options, generator)
        (_place_still if options.media == "image" else _place_moving)(things, link, generator)
        captions = _captions(things, link, options.media, generator)
        look = [generator.random() for _ in range(66)]
        yield Scene(things, link, unseen, captions, look)


def _combination(thing: _Thing, link: str, options: Options) -> tuple[str, ...]:
    return (thing.colour, thing.shape) if options.unseen == "pair" else (thing.colour, thing.shape, link)


def _links(options: Options) -> Sequence[str]:
    return list(OPPOSITE) if options.media == "image" else MOTIONS


def _held_out(options: Options) -> dict[tuple[str, ...], str]:
    """The combinations that each split other than train has for itself: {combination: split}."""
    generator = random.Random(f"{options.seed} held out")
    colours, shapes = _shuffled(list(COLOURS), generator), _shuffled(list(SHAPES), generator)
    held: dict[tuple[str, ...], str] = {}
    for diagonal, split in enumerate(name for name in options.samples if name != "train"):
        for i, colour in enumerate(colours):
            if options.unseen == "pair":
                held[colour, shapes[(i + diagonal) % len(shapes)]] = split
                continue
            for j, link in enumerate(_links(options)):
                held[colour, shapes[(i + j + diagonal) % len(shapes)], link] = split
    return held


def _shuffled(items: list[str], generator: random.Random) -> list[str]:
    return sorted(items, key=lambda _: generator.random())


def _pick(items: Sequence[str], generator: random.Random) -> str:
    return items[int(generator.random() * len(items))]


def _drawn(
    split: str, held_out: Mapping[tuple[str, ...], str], options: Options, generator: random.Random
) -> tuple[list[_Thing], str, list[int]]:
    """Two things unlike in colour and shape, and their relation or motion: seen in training for train, else not."""
    for _ in range(DRAWS):
        link = _pick(_links(options), generator)
        things = [
            _Thing(_pick(list(COLOURS), generator), _pick(SHAPES, generator), _pick(list(SIZES), generator), generator)
            for _ in range(2)
        ]
        links = [link, OPPOSITE.get(link, "still")]
        owners = [
            held_out.get(_combination(thing, seen, options), "train") for thing, seen in zip(things, links, strict=True)
        ]
        alike = things[0].colour == things[1].colour or things[0].shape == things[1].shape
        if not alike and (
            owners == ["train"] * 2 if split == "train" else split in owners and {split, "train"} >= {*owners}
        ):
            return things, link, [number for number, owner in enumerate(owners) if owner != "train"]
    raise AssertionError("no scene of this split can be drawn")


def _place_still(things: list[_Thing], relation: str, generator: random.Random) -> None:
    """Side by side along the axis of the relation, with a gap, and nearly level across it."""
    first, second = things if relation in ("left of", "above") else things[::-1]
    slack = 1 - 2 * MARGIN - GAP - 2 * (first.radius + second.radius)
    before = generator.random() * slack
    between = generator.random() * (slack - before)
    along = MARGIN + before + first.radius, MARGIN + before + 2 * first.radius + GAP + between + second.radius
    level = generator.random()
    for thing, place in zip((first, second), along, strict=True):
        room = 1 - 2 * MARGIN - 2 * thing.radius
        across = MARGIN + thing.radius + room * min(max(level + 0.2 * (generator.random() - 0.5), 0), 1)
        thing.x, thing.y = (place, across) if relation in ("left of", "right of") else (across, place)


def _place_moving(things: list[_Thing], motion: str, generator: random.Random) -> None:
    """The landmark on one half of the picture, the mover on the other, so that they never touch."""
    mover, landmark = things
    if motion in RESIZING:
        mover.radius = SIZES["large"][1] + 0.02 * generator.random()
    side = 1 if generator.random() < 0.5 else -1
    apart = [0.5 + side * (0.5 - MARGIN - mover.radius), 0.5 - side * (0.5 - MARGIN - landmark.radius)]
    free = 0.2 + 0.6 * generator.random()
    if motion in ("left to right", "right to left"):
        mover.x, mover.y, landmark.x, landmark.y = 0.5, apart[0], free, apart[1]
    else:
        mover.x, mover.y, landmark.x, landmark.y = apart[0], 0.5, apart[1], free
    landmark.x, landmark.y = _inside(landmark.x, landmark.radius), _inside(landmark.y, landmark.radius)


def _inside(place: float, radius: float) -> float:
    return min(max(place, MARGIN + radius), 1 - MARGIN - radius)


def _moved(thing: _Thing, motion: str, time: float) -> tuple[float, float, float]:
    """Where a mover is (x, y) and its radius, `time` from 0 to 1."""
    low, high = MARGIN + thing.radius, 1 - MARGIN - thing.radius
    forth, back = low + (high - low) * time, high - (high - low) * time
    if motion == "bounce":
        return thing.x, high - (high - low) * abs(math.sin(2 * math.pi * time)), thing.radius
    if motion in RESIZING:
        share = 0.35 + 0.65 * (time if motion == "grow" else 1 - time)
        return thing.x, thing.y, thing.radius * share
    x = {"left to right": forth, "right to left": back}.get(motion, thing.x)
    y = {"down": forth, "up": back}.get(motion, thing.y)
    return x, y, thing.radius


# ---------------------------------------------------------------- captions


def _captions(things: list[_Thing], link: str, media: str, generator: random.Random) -> list[str]:
    templates = list(IMAGE_TEMPLATES if media == "image" else CLIP_TEMPLATES)
    captions = []
    for template in _shuffled(templates, generator)[:CAPTIONS]:
        words = {"subject": _named(things[0], link, generator), "object": _named(things[1], "still", generator)}
        if media == "image":
            words["relation"] = _pick(NAMES["relation"][link], generator)
            words["opposite"] = _pick(NAMES["relation"][OPPOSITE[link]], generator)
        else:
            words["motion"] = _pick(NAMES["motion"][link], generator)
            passes = link in ("left to right", "right to left") and not template.startswith("{past}")
            words["past"] = "past" if passes else _pick(BESIDE, generator)
        captions.append(template.format(**words))
    return captions


def _named(thing: _Thing, link: str, generator: random.Random) -> str:
    """ "a tiny red disc"; the size is left out half of the time, and where it changes."""
    words = [_pick(NAMES["colour"][thing.colour], generator), _pick(NAMES["shape"][thing.shape], generator)]
    size = _pick(NAMES["size"][thing.size], generator)
    if generator.random() < 0.5 and link not in RESIZING:
        words.insert(0, size)
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


# ---------------------------------------------------------------- drawing


def _captioned(scene: Scene, key: str, options: Options) -> Captioned:
    objects = [
        {"size": t.size, "colour": t.colour, "shape": t.shape, "box": _box(t, t.x, t.y, t.radius)} for t in scene.things
    ]
    if options.media == "image":
        places = [(t.x, t.y, t.radius) for t in scene.things]
        media = encode_jpeg(_draw(scene, _ground(scene, options.side), places), options.quality)
        truth: dict[str, Any] = {"relation": {"name": scene.link, "subject": 0, "object": 1}}
    else:
        mover, landmark = scene.things
        places = [_moved(mover, scene.link, frame / (options.frames - 1)) for frame in range(options.frames)]
        still = (landmark.x, landmark.y, landmark.radius)
        ground = _ground(scene, options.side)
        frames = np.stack([_draw(scene, ground, [place, still]) for place in places])
        media = encode_clip(frames, options.rate)
        objects[0]["box"] = _box(mover, *places[options.frames // 2])
        truth = {
            "motion": {"name": scene.link, "mover": 0, "landmark": 1},
            "boxes": [_box(mover, *place) for place in places],
        }
    truth = {"objects": objects, **truth, "unseen": scene.unseen}
    return Captioned(key, media, "jpg" if options.media == "image" else "mp4", scene.captions, truth, key)


def _ground(scene: Scene, side: int) -> Image.Image:
    """A bright ground with soft patches, `OVERSAMPLED` times as large as the picture."""
    base = 205 + 30 * scene.look[0]
    patches = np.array(scene.look[2:66]).reshape(8, 8) * 26 - 13 + base
    tones = np.stack([patches, patches - 4 + 8 * scene.look[1], patches - 8 * scene.look[1]], -1)
    ground = Image.fromarray(tones.clip(0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return ground.resize((side * OVERSAMPLED, side * OVERSAMPLED), Image.Resampling.NEAREST)


def _draw(scene: Scene, ground: Image.Image, places: list[tuple[float, float, float]]) -> np.ndarray:
    """The scene with its things at these places (x, y, radius): uint8 [side,side,3]."""
    image, large = ground.copy(), ground.width
    pen = ImageDraw.Draw(image)
    for thing, (x, y, radius) in zip(scene.things, places, strict=True):
        colour = tuple(min(max(c + t, 0), 255) for c, t in zip(COLOURS[thing.colour], thing.tint, strict=True))
        points = [(px * large, py * large) for px, py in _outline(thing, x, y, radius)]
        if thing.shape == "ring":
            inner = [(x * large + (px - x * large) * 0.55, y * large + (py - y * large) * 0.55) for px, py in points]
            pen.polygon([*points, points[0], inner[0], *inner[::-1]], fill=colour)
        else:
            pen.polygon(points, fill=colour)
    return np.asarray(image.resize((large // OVERSAMPLED, large // OVERSAMPLED), Image.Resampling.BOX))


def _outline(thing: _Thing, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a shape around (x, y), none further away than `radius`."""
    if thing.shape in ("circle", "ring"):
        corners = [(1.0, 2 * math.pi * i / 48) for i in range(48)]
    elif thing.shape == "square":
        corners = [(1.0, math.pi * (2 * i + 1) / 4) for i in range(4)]
    elif thing.shape == "triangle":
        corners = [(1.0, math.pi * (2 * i / 3 - 0.5)) for i in range(3)]
    elif thing.shape == "star":
        corners = [((1.0, 0.42)[i % 2], math.pi * (i / 5 - 0.5)) for i in range(10)]
    else:  # a cross: twelve corners of two bars
        half = 0.3
        bar = [(1.0, half), (half, half), (half, 1.0)]
        quarter = [(math.hypot(a, b) / math.hypot(1.0, half), math.atan2(b, a)) for a, b in bar]
        corners = [(length, turn + math.pi * i / 2) for i in range(4) for length, turn in quarter]
    return [
        (x + radius * length * math.cos(turn + thing.angle), y + radius * length * math.sin(turn + thing.angle))
        for length, turn in corners
    ]


def _box(thing: _Thing, x: float, y: float, radius: float) -> list[float]:
    """Left, top, right, bottom of a shape, as shares of the side."""
    points = _outline(thing, x, y, radius)
    xs, ys = [px for px, _ in points], [py for _, py in points]
    return [round(value, 4) for value in (min(xs), min(ys), max(xs), max(ys))]
