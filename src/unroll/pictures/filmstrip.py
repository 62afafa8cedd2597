"""A clip as its frames in time, its caption above, and with temporal attention the frames' weights for each word.

data: {"files": [frames beside the predictions], "caption", "reference", "words": [word], "weights": [[weight of each
frame, or of each region of each frame: their sums are drawn]] or none}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import Normalize

from unroll.errors import UserError
from unroll.pictures._photos import LINE, photo, sheet, show, wrapped
from unroll.pictures._png import write_png

MOST = 32
FRAME, GAP, WORD = 1.15, 0.03, 0.22
"""Of a frame, around it, and the height of a word, in inches."""


def draw(data: dict[str, Any], folder: Path, out: Path) -> None:
    """Write the PNG.

    Raises:
        UserError: no frames or too many, weights that do not belong to them, a frame that is not there.
    """
    frames = [photo(folder, name) for name in data["files"][: MOST + 1]]
    draw_frames(frames, data.get("words") or [], data.get("weights"), data["caption"], data["reference"], out)


def draw_frames(
    frames: list[np.ndarray], words: list[str], weights: Any, caption: str, reference: str, out: Path
) -> None:
    """The same of frames uint8 [H,W,3] at hand."""
    if not 0 < len(frames) <= MOST:
        raise UserError(f"found {len(frames)} frames, 1 to {MOST} can be drawn")
    table = None if weights is None or not words else np.asarray(weights, dtype=np.float64)  # [T,F] or [T,F*P]
    if table is not None:
        if table.ndim != 2 or len(table) != len(words) or not table.size or table.shape[1] % len(frames):
            raise UserError(
                f"found weights of shape {table.shape}, ({len(words)} words, {len(frames)} frames or their regions) is drawn"
            )
        table = table.reshape(len(words), len(frames), -1).sum(-1)  # [T,F]
    title = wrapped(caption, 14 * len(frames))
    below = wrapped(f"a person: {reference}", 16 * len(frames)) if reference else ""
    above = 0.35 + 0.2 * (title.count("\n") + 1)
    words_end = above + FRAME + (0 if table is None else 0.1 + WORD * len(words))
    left = 0.6 if table is None else max(1.1, 0.2 + 0.09 * max(map(len, words)))
    height = words_end + 0.15 + (LINE * (below.count("\n") + 1) + 0.1 if below else 0)
    figure, page = sheet(left + FRAME * len(frames) + (0.6 if table is None else 0.1), height)
    for number, pixels in enumerate(frames):
        show(page, pixels, left + FRAME * number + GAP, above + GAP, FRAME - 2 * GAP)
        middle = left + FRAME * (number + 0.5)
        page.text(middle, above, str(number + 1), fontsize=8, color="#666666", ha="center", va="bottom")
    if table is not None:
        shades = Normalize(0, table.max() or 1)
        for number in range(len(frames)):
            start = left + FRAME * number + GAP
            extent = (start, start + FRAME - 2 * GAP, words_end, words_end - WORD * len(words))
            page.imshow(table[:, number : number + 1], aspect="auto", cmap="Blues", norm=shades, extent=extent)
        for number, word in enumerate(words):
            middle = words_end - WORD * (len(words) - number - 0.5)
            page.text(left - 0.05, middle, word, fontsize=8, ha="right", va="center", parse_math=False)
    page.text(figure.get_figwidth() / 2, 0.1, title, fontsize=11, ha="center", va="top")
    if below:
        page.text(
            figure.get_figwidth() / 2, words_end + 0.15, below, fontsize=9, color="#666666", ha="center", va="top"
        )
    write_png(figure, out)
