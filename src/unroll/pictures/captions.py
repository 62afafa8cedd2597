"""A page of captioned pictures: what the system says, and below it what a person wrote.

data: {"items": [{"file": image beside the predictions, "caption", "reference", "score"}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unroll.errors import UserError
from unroll.pictures._photos import photo, sheet, show, wrapped
from unroll.pictures._png import write_png

ACROSS, MOST = 4, 40
WIDE, HIGH, SIZE, ABOVE = 2.7, 3.75, 2.4, 0.66
"""Of a cell, its picture and the caption above that, in inches."""


def draw(data: dict[str, Any], folder: Path, out: Path) -> None:
    """Write the PNG.

    Raises:
        UserError: no pictures, too many, or one that is not there.
    """
    items = data["items"]
    if not 0 < len(items) <= MOST:
        raise UserError(f"found {len(items)} captions, 1 to {MOST} can be drawn")
    across = min(ACROSS, len(items))
    down = -(-len(items) // across)
    figure, page = sheet(WIDE * across, HIGH * down)
    for number, item in enumerate(items):
        left, top = WIDE * (number % across), HIGH * (number // across)
        middle = left + WIDE / 2
        show(page, photo(folder, item["file"]), middle - SIZE / 2, top + ABOVE, SIZE)
        caption = wrapped(item["caption"], 34) or "(nothing)"
        page.text(middle, top + ABOVE - 0.06, caption, fontsize=9, ha="center", va="bottom")
        below = f"{wrapped(item['reference'], 36)}\nCIDEr-D {item['score']:.2f}"
        page.text(middle, top + ABOVE + SIZE + 0.06, below, fontsize=8, color="#666666", ha="center", va="top")
    write_png(figure, out)
