"""A clip as its frames in time, its caption above, and with temporal attention the frames' weights for each word.

data: {"files": [frames beside the predictions], "caption", "reference", "words": [word], "weights": [[weight of each
frame]] or none}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from unroll.errors import UserError
from unroll.pictures._photos import photo, show, wrapped

MOST = 32


def draw(data: dict[str, Any], folder: Path, out: Path) -> None:
    """Write the PNG.

    Raises:
        UserError: no frames or too many, weights that do not belong to them, a frame that is not there.
    """
    files, words, weights = data["files"], data.get("words") or [], data.get("weights")
    if not 0 < len(files) <= MOST:
        raise UserError(f"found {len(files)} frames, 1 to {MOST} can be drawn")
    table = None if weights is None else np.asarray(weights, dtype=np.float64)  # [T,F]
    if table is not None and table.shape != (len(words), len(files)):
        raise UserError(f"found weights of shape {table.shape}, ({len(words)} words, {len(files)} frames) is drawn")
    heights = [1.2] if table is None else [1.2, 0.22 * len(words)]
    figure = Figure(figsize=(1.15 * len(files) + 1.2, sum(heights) + 0.9), dpi=100, layout="constrained")
    axes = figure.subplots(len(heights), len(files), squeeze=False, gridspec_kw={"height_ratios": heights})
    for number, (ax, name) in enumerate(zip(axes[0], files, strict=True)):
        show(ax, photo(folder, name))
        ax.set_title(str(number + 1), fontsize=8, color="#666666")
    if table is not None:
        for number, ax in enumerate(axes[1]):
            ax.imshow(table[:, number : number + 1], aspect="auto", cmap="Blues", vmin=0, vmax=table.max() or 1)
            ax.set_xticks([])
            ax.set_yticks(range(len(words)) if number == 0 else [], words if number == 0 else [], fontsize=8)
    figure.suptitle(wrapped(data["caption"], 14 * len(files)), fontsize=11)
    figure.supxlabel(f"a person: {wrapped(data['reference'], 16 * len(files))}", fontsize=9, color="#666666")
    figure.savefig(out, format="png", metadata={"Software": None})
