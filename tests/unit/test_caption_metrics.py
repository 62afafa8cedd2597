"""Scores of captions are pycocoevalcap's; what a caption says of a generated scene is checked against what is in it."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from unroll.datasets.drawn_scenes import Options, lexicon, scenes
from unroll.errors import UserError
from unroll.metrics import Unavailable
from unroll.metrics._predictions import read_sentences
from unroll.metrics._scenes import Mention, all_right, mentions, terms

WORDS = ["a", "dog", "runs", "over", "the", "green", "hill", "and", "two", "men", "look", "at", "it"]
TRUTH = {
    "objects": [
        {"size": "small", "colour": "red", "shape": "circle", "box": [0.1, 0.1, 0.3, 0.3]},
        {"size": "large", "colour": "blue", "shape": "star", "box": [0.6, 0.1, 0.9, 0.4]},
    ],
    "relation": {"name": "left of", "subject": 0, "object": 1},
}


def metric(name: str) -> Any:
    return importlib.import_module(f"unroll.metrics.{name}")


def corpus(size: int = 30, seed: int = 1) -> list[tuple[list[str], str]]:
    generator = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(generator.choice(WORDS, int(generator.integers(3, 10))))

    return [([text() for _ in range(int(generator.integers(1, 6)))], text()) for _ in range(size)]


def write(folder: Path, pairs: list[tuple[list[str], str]], **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [
        {"id": number, "source": f"{number}.jpg", "references": references, "hypothesis": hypothesis, **more}
        for number, (references, hypothesis) in enumerate(pairs)
    ]
    (folder / "translations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def library(name: str, pairs: list[tuple[list[str], str]]) -> float:
    given = {number: references for number, (references, _) in enumerate(pairs)}
    said = {number: [hypothesis] for number, (_, hypothesis) in enumerate(pairs)}
    if name.startswith("bleu"):
        return float(Bleu(4).compute_score(given, said, verbose=0)[0][int(name[-1]) - 1])
    return float({"cider": Cider(), "rouge_l": Rouge()}[name].compute_score(given, said)[0])


@pytest.mark.parametrize("name", ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"])
def test_scores_are_the_library_s(name: str, tmp_path: Path) -> None:
    pairs = corpus()
    found = metric(name).compute(write(tmp_path / "p", pairs), {})
    assert found.value == pytest.approx(library(name, pairs), abs=1e-9)
    assert found.low < found.value < found.high
    assert found.n == 30
    assert "references:1-5|tokenizer:words" in found.signature
    assert "(0 to " in found.unit


@pytest.mark.parametrize("name", ["bleu_1", "bleu_4"])
def test_scores_of_resampled_sums_are_the_library_s(name: str, tmp_path: Path) -> None:
    """What the interval is made of: sums over some pictures, some of them twice. (CIDEr keeps its frequencies.)"""
    pairs, generator = corpus(), np.random.default_rng(2)
    values = metric(name).statistics(write(tmp_path / "p", pairs), {}).values
    for _ in range(20):
        rows = generator.integers(0, len(pairs), len(pairs))
        found = float(metric(name).score(values[rows].sum(0)))
        assert found == pytest.approx(library(name, [pairs[row] for row in rows]), abs=1e-9)


def test_case_and_punctuation_do_not_count(tmp_path: Path) -> None:
    plain = write(tmp_path / "a", [(["a dog runs over the hill", "it's green"], "a dog runs over a hill")] * 2)
    marked = write(tmp_path / "b", [(["A dog runs, over the hill .", "It's green!"], "A dog - runs over a hill.")] * 2)
    for name in ("bleu_4", "rouge_l", "cider"):
        assert metric(name).compute(plain, {}).value == metric(name).compute(marked, {}).value


def test_what_needs_java_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "p", corpus(3))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="meteor: needs a Java runtime"):
        metric("meteor").compute(folder, {})
    with pytest.raises(Unavailable, match="tokenizer: ptb: needs a Java runtime.*use words"):
        metric("cider").compute(folder, {"tokenizer": "ptb"})
    with pytest.raises(Unavailable, match="spice: needs a Java runtime"):
        metric("spice").compute(folder, {})


def test_spice_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr("unroll.metrics.spice.MODELS", "nowhere.jar")
    with pytest.raises(Unavailable, match=r"nowhere.jar\) are not installed.*get_stanford_models"):
        metric("spice").compute(write(tmp_path / "p", corpus(3)), {})


# ---------------------------------------------------------------- what is said of a scene


def test_terms_and_mentions_of_a_caption() -> None:
    words = ["a", "tiny", "red", "disc", "is", "to", "the", "left", "of", "a", "blue", "star"]
    found = terms(words, lexicon("image"))
    assert [(term.kind, term.name) for term in found] == [
        ("size", "small"), ("colour", "red"), ("shape", "circle"), ("relation", "left of"), ("colour", "blue"),
        ("shape", "star")]  # fmt: skip
    assert mentions(found) == [Mention("red", "circle", 3), Mention("blue", "star", 11)]


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("a red circle is left of a blue star", True),
        ("there is a big blue star on the right of a disc", False),  # a shape without a colour
        ("there is a big blue star on the right of a red disc", True),
        ("a red circle is right of a blue star", False),
        ("a blue star is left of a red circle", False),
        ("a red star is left of a blue circle", False),
        ("a red circle is above a blue star", False),
        ("a red circle is left of a red circle", False),
        ("a red circle", True),
        ("a red circle left of", False),
        ("a picture", False),
        ("", False),
    ],
)
def test_a_caption_is_right_if_all_that_it_states_is(caption: str, right: bool) -> None:
    assert all_right(caption.split(), lexicon("image"), TRUTH) is right


@pytest.mark.parametrize("media", ["image", "clip"])
def test_what_people_say_of_scenes_is_right(media: Any) -> None:
    options = Options(media=media, samples={"train": 40})
    kind = "relation" if media == "image" else "motion"
    first, second = ("subject", "object") if media == "image" else ("mover", "landmark")
    checked = 0
    for scene in scenes("train", options):
        objects = [{"colour": thing.colour, "shape": thing.shape} for thing in scene.things]
        truth = {"objects": objects, kind: {"name": scene.link, first: 0, second: 1}}
        wrong = {**truth, kind: {"name": "down" if scene.link != "down" else "up", first: 1, second: 0}}
        if media == "image":
            wrong = {**truth, kind: {"name": scene.link, first: 1, second: 0}}
        for caption in scene.captions:
            assert all_right(caption.split(), lexicon(media), truth), caption
            assert not all_right(caption.split(), lexicon(media), wrong), caption
            checked += 1
    assert checked == 200


def scene_folder(folder: Path, caption: str, looked: list[list[float]]) -> Path:
    write(folder, [(["x"], caption)] * 2, truth=TRUTH, words=caption.split(), looked=looked, grid=8)
    (folder / "lexicon.json").write_text(json.dumps(lexicon("image")))
    return folder


def test_attributes_and_pointing_by_hand(tmp_path: Path) -> None:
    caption = "a red circle left of a blue star"
    looked = (
        [[0.5, 0.5]] * 2 + [[0.35, 0.2]] + [[0.5, 0.5]] * 4 + [[0.55, 0.7]]
    )  # the first a cell away, the second off
    folder = scene_folder(tmp_path / "p", caption, looked)
    assert metric("attributes").compute(folder, {}).value == 100
    found = metric("pointing").compute(folder, {})
    assert found.value == 50
    assert "objects:4|chance:20 %" in found.signature
    assert metric("pointing").compute(scene_folder(tmp_path / "q", "a green ring", [[0, 0]] * 3), {}).n == 2


def test_only_scenes_with_attention_are_pointed_at(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", [(["x"], "y")])
    with pytest.raises(UserError, match="lexicon.json: no such file; only captions of generated scenes"):
        metric("attributes").compute(folder, {})
    (folder / "lexicon.json").write_text("{}")
    with pytest.raises(UserError, match="translations.jsonl:1: truth or hypothesis is missing"):
        metric("attributes").compute(folder, {})
    scene_folder(folder, "a red circle", [[0.2, 0.2]] * 3)
    lines = [json.loads(line) for line in (folder / "translations.jsonl").read_text().splitlines()]
    (folder / "translations.jsonl").write_text(json.dumps({k: v for k, v in lines[0].items() if k != "looked"}) + "\n")
    with pytest.raises(UserError, match="has no attention over an image"):
        metric("pointing").compute(folder, {})
    assert read_sentences(folder)
