"""A clip as its frames in time, its caption above, and with temporal attention the frames' weights for each word.

data: {"files": [frames beside the predictions], "caption", "reference", "words": [word], "weights": [[weight of each
frame, or of each region of each frame: their sums are drawn]] or none}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from unroll.errors import UserError
from unroll.pictures._photos import photo, show, wrapped
from unroll.pictures._png import write_png

MOST = 32


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
    heights = [1.2] if table is None else [1.2, 0.22 * len(words)]
    figure = Figure(figsize=(1.15 * len(frames) + 1.2, sum(heights) + 0.9), dpi=100, layout="constrained")
    axes = figure.subplots(len(heights), len(frames), squeeze=False, gridspec_kw={"height_ratios": heights})
    for number, (ax, pixels) in enumerate(zip(axes[0], frames, strict=True)):
        show(ax, pixels)
        ax.set_title(str(number + 1), fontsize=8, color="#666666")
    if table is not None:
        for number, ax in enumerate(axes[1]):
            ax.imshow(table[:, number : number + 1], aspect="auto", cmap="Blues", vmin=0, vmax=table.max() or 1)
            ax.set_xticks([])
            ax.set_yticks(range(len(words)) if number == 0 else [], words if number == 0 else [], fontsize=8)
    figure.suptitle(wrapped(caption, 14 * len(frames)), fontsize=11)
    if reference:
        figure.supxlabel(f"a person: {wrapped(reference, 16 * len(frames))}", fontsize=9, color="#666666")
    write_png(figure, out)
