"""A score against length, difficulty or any other number: one line with a dot for each group of samples.

data: {"x": name of the axis, "y": name of the axis, "points": [{"x": number, "y": number, "n": samples in the group}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from unroll.errors import UserError
from unroll.pictures._png import write_png


def draw(data: dict[str, Any], folder: Path, out: Path) -> None:
    """Write the PNG.

    Raises:
        UserError: no points.
    """
    points = sorted(data["points"], key=lambda point: point["x"])
    if not points:
        raise UserError("found no points, at least one can be drawn")
    figure = Figure(figsize=(5.0, 2.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot([p["x"] for p in points], [p["y"] for p in points], "o-", color="#4c72b0", clip_on=False)
    for point in points:
        axes.annotate(f"n={point['n']}", (point["x"], point["y"]), textcoords="offset points", xytext=(0, -13),
                      ha="center", fontsize=7, color="#666666")  # fmt: skip
    if str(data["y"]).endswith("%"):
        axes.set_ylim(0, 105)
    axes.set_xlim(left=0)
    axes.set_xlabel(data["x"], fontsize=9)
    axes.set_ylabel(data["y"], fontsize=9)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    write_png(figure, out)
