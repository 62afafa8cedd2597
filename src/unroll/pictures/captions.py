"""A page of captioned pictures: what the system says, and below it what a person wrote.

data: {"items": [{"file": image beside the predictions, "caption", "reference", "score"}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from unroll.errors import UserError
from unroll.pictures._photos import photo, show, wrapped
from unroll.pictures._png import write_png

ACROSS, MOST = 4, 40


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
    figure = Figure(figsize=(2.7 * across, 3.6 * down), dpi=100, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for ax in axes.flat[len(items) :]:
        ax.set_axis_off()
    for ax, item in zip(axes.flat, items, strict=False):
        show(ax, photo(folder, item["file"]))
        ax.set_title(f"{wrapped(item['caption'], 34) or '(nothing)'}", fontsize=9)
        below = f"{wrapped(item['reference'], 36)}\nCIDEr-D {item['score']:.2f}"
        ax.set_xlabel(below, fontsize=8, color="#666666")
    write_png(figure, out)
