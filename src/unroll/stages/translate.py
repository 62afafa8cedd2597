"""`unroll translate`: sentences from the command line, a file or standard input, through a trained recipe."""

from __future__ import annotations

import sys
from pathlib import Path

from unroll.config import check, load_recipe
from unroll.decoding.beam import BeamOptions
from unroll.device import default_device
from unroll.errors import UserError
from unroll.place import Place
from unroll.report.attention import attention_svg
from unroll.tasks.translator import Translation, Translator
from unroll.training.runs import load_model


def translate(
    root: Path,
    name: str,
    text: list[str] | None,
    file: Path | None,
    beam: int,
    n_best: int,
    length_penalty: float,
    attention: Path | None,
) -> None:
    """Print one translation a line, or with `n_best` > 1 each with its score and an empty line between sentences.

    Raises:
        UserError: not a trained translation recipe, a file that cannot be read, a line that cannot be translated.
    """
    recipe, place = load_recipe(root, name), Place(root)
    if recipe.task != "translation":
        raise UserError(f"recipes.{name}.task: found {recipe.task!r}, only recipes of task translation translate")
    options: BeamOptions = check(BeamOptions, {"width": beam, "n_best": n_best, "length_penalty": length_penalty}, "")
    lines = read_lines(text, file)
    seeds = recipe.seeds if recipe.predict.get("ensemble") else recipe.seeds[:1]
    loaded = [load_model(place.model(recipe, seed)) for seed in seeds]
    folder = place.model(recipe, seeds[0])
    translator = Translator([model for _, model in loaded], folder, loaded[0][0], default_device())
    found = []
    for number, hypotheses in enumerate(translator.translate(lines, options)):
        found.append(hypotheses[0])
        show(hypotheses, n_best, last=number + 1 == len(lines))
    empty = sum(not line.strip() for line in lines)
    if empty:
        print(f"{empty} of {len(lines)} lines were empty; so are their translations", file=sys.stderr)
    if attention is not None:
        attention.write_text(picture(found), encoding="utf-8")


def read_lines(text: list[str] | None, file: Path | None) -> list[str]:
    """The sentences to translate.

    Raises:
        UserError: both were given, no such file, or not UTF-8 (with the line).
    """
    if text and file:
        raise UserError("give sentences or --file, not both")
    if text:
        return text
    place = str(file) if file else "standard input"
    try:
        content = file.read_bytes() if file else sys.stdin.buffer.read()
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from None
    lines = []
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: line {number}: not UTF-8 at byte {error.start} of the line") from None
    return lines


def show(hypotheses: list[Translation], n_best: int, last: bool) -> None:
    """One line a hypothesis."""
    if n_best == 1:
        print(hypotheses[0].text, flush=True)
        return
    for hypothesis in hypotheses:
        print(f"{hypothesis.score:.4f}\t{hypothesis.text}", flush=True)
    if not last:
        print()


def picture(found: list[Translation]) -> str:
    """The attention of the first sentence that has any, as SVG.

    Raises:
        UserError: there is none.
    """
    for translation in found:
        if translation.weights is not None and translation.target:
            return attention_svg(translation.source, translation.target, translation.weights)
    raise UserError("--attention: nothing to draw; the model has no attention, or the translation is empty")
