"""Where a model looked at an image for each word: the image once, then once a word with the rest of it darkened.

data: {"files": [image beside the predictions], "words": [word], "weights": [[weight of each region, row by row]],
"reference"}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unroll.errors import UserError
from unroll.pictures._photos import LINE, photo, sheet, show, wrapped
from unroll.pictures._png import write_png

ACROSS, MOST = 6, 60
WIDE, HIGH, SIZE = 1.8, 2.1, 1.74
"""Of a cell and its picture, in inches."""


def draw(data: dict[str, Any], folder: Path, out: Path) -> None:
    """Write the PNG.

    Raises:
        UserError: words and weights that do not belong together, regions that are no square grid, no image.
    """
    draw_pixels(photo(folder, data["files"][0]), data["words"], data["weights"], data.get("reference", ""), out)


def draw_pixels(pixels: np.ndarray, words: list[str], weights: Any, reference: str, out: Path) -> None:
    """The same of an image uint8 [H,W,3] at hand: of the first `MOST` words, and of none where a model said nothing."""
    table = np.asarray(weights, dtype=np.float64) if words else np.zeros((0, 1))  # [T,P]
    side = round(table.shape[1] ** 0.5) if table.ndim == 2 else 0
    if len(table) != len(words) or side * side != table.shape[-1]:
        raise UserError(f"found {len(words)} words and weights of shape {table.shape}, [words, side x side] is drawn")
    words, table = words[:MOST], table[:MOST]
    count = len(words) + 1
    across = min(ACROSS, count)
    down = -(-count // across)
    below = wrapped(f"a person: {reference}", 18 * across) if reference else ""
    figure, page = sheet(WIDE * across, HIGH * down + 0.1 + (0.1 + LINE * (below.count("\n") + 1) if below else 0))
    shown = [
        ("the picture", pixels),
        *((word, lit(pixels, row.reshape(side, side))) for word, row in zip(words, table, strict=True)),
    ]
    for number, (word, seen) in enumerate(shown):
        left, top = WIDE * (number % across), HIGH * (number // across)
        show(page, seen, left + (WIDE - SIZE) / 2, top + HIGH - SIZE, SIZE)
        style = {"fontsize": 11} if number else {"fontsize": 9, "color": "#666666"}
        page.text(left + WIDE / 2, top + HIGH - SIZE - 0.05, wrapped(word, 20, 1), ha="center", va="bottom", **style)
    if below:
        page.text(WIDE * across / 2, HIGH * down + 0.1, below, fontsize=9, color="#666666", ha="center", va="top")
    write_png(figure, out)


def lit(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The picture as bright as the weights [h,w] over their largest one say, a quarter where they are 0."""
    height, width = pixels.shape[:2]
    levels = Image.fromarray((255 * weights / max(weights.max(), 1e-12)).astype(np.uint8))
    shares = np.asarray(levels.resize((width, height), Image.Resampling.BICUBIC), np.float64) / 255
    brightness = 0.25 + 0.75 * shares.clip(0, 1)[..., None]
    return (pixels * brightness).astype(np.uint8)
