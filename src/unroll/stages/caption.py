"""`unroll caption`: what a trained recipe says of images and clips."""

from __future__ import annotations

from pathlib import Path

from unroll.config import check, load_recipe
from unroll.decoding.beam import BeamOptions
from unroll.device import default_device
from unroll.errors import UserError
from unroll.pictures import filmstrip, image_attention
from unroll.place import Place
from unroll.tasks.captioner import Caption, Captioner
from unroll.training.runs import load_model


def caption(root: Path, name: str, files: list[Path], beam: int, n_best: int, attention: Path | None) -> None:
    """Print one caption a line, in the files' order; of several files each after its name, of several captions each
    with its score. `attention`: draw where the model looked in the first file into this PNG.

    Raises:
        UserError: not a trained captioning recipe, a file that cannot be read, nothing to draw.
    """
    recipe, place = load_recipe(root, name), Place(root)
    if recipe.task != "captioning":
        raise UserError(f"recipes.{name}.task: found {recipe.task!r}, only recipes of task captioning caption")
    options: BeamOptions = check(BeamOptions, {"width": beam, "n_best": n_best, "longest": 30}, "")
    folder = place.model(recipe, recipe.seeds[0])
    description, model = load_model(folder)
    captioner = Captioner(model, folder, description, default_device())
    for number, found in enumerate(captioner.caption(files, options)):
        for each in found:
            before = f"{files[number]}\t" if len(files) > 1 else ""
            print(before + (each.text if n_best == 1 else f"{each.score:.4f}\t{each.text}"), flush=True)
        if number == 0 and attention is not None:
            draw(found[0], attention)


def draw(found: Caption, out: Path) -> None:
    """Where the model looked, word by word over an image, or over the frames of a clip.

    Raises:
        UserError: the model has no attention, the caption is empty, or the file cannot be written.
    """
    if found.weights is None or not found.words:
        raise UserError("--attention: nothing to draw; the model has no attention, or the caption is empty")
    try:
        if len(found.seen) == 1:
            image_attention.draw_pixels(found.seen[0], found.words, found.weights, "", out)
        else:
            filmstrip.draw_frames(list(found.seen), found.words, found.weights, found.text, "", out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None
