"""Curves over one quantity: error against length, computation against difficulty.

data: {"x": name of the axis, "y": name of the other, "curves": [{"label": str, "x": [number], "y": [number], "spread": [number]
or none}], "mark": {"at": x, "label": str} or none, "logarithmic": bool}. `spread`: half the height of the band around y.
A logarithmic axis is linear below its least positive value, so that zeros are shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from unroll.errors import UserError
from unroll.pictures._png import write_png

LARGEST = 100_000
"""Points of a curve; more are no picture."""


def draw(data: dict[str, Any], folder: Path, out: Path) -> None:
    """Write the PNG.

    Raises:
        UserError: no curve, one without points, or too many.
    """
    curves = data["curves"]
    if not curves:
        raise UserError("no curve to draw")
    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    ax = figure.subplots()
    least = np.inf
    for number, curve in enumerate(curves):
        x, y = (np.asarray(curve[key], dtype=np.float64) for key in ("x", "y"))
        if x.ndim != 1 or x.shape != y.shape or not 0 < len(x) <= LARGEST:
            raise UserError(f"curve {number}: found {x.shape} and {y.shape}, 1 to {LARGEST} points are expected")
        least = min([least, *y[y > 0].tolist()])
        [line] = ax.plot(x, y, marker="o", markersize=3, linewidth=1.2, label=_plain(curve.get("label", "")))
        if curve.get("spread"):
            spread = np.asarray(curve["spread"], dtype=np.float64)
            ax.fill_between(x, y - spread, y + spread, color=line.get_color(), alpha=0.15, linewidth=0)
    if data.get("logarithmic") and np.isfinite(least):
        ax.set_yscale("symlog", linthresh=least)
    mark = data.get("mark")
    if mark:
        ax.axvline(float(mark["at"]), color="0.5", linewidth=0.8, linestyle="--")
        ax.annotate(_plain(mark["label"]), (float(mark["at"]), 0.97), xycoords=("data", "axes fraction"), fontsize=8,
                    color="0.35", ha="right", va="top", rotation=90)  # fmt: skip
    ax.set_xlabel(_plain(data.get("x", "")), fontsize=9)
    ax.set_ylabel(_plain(data.get("y", "")), fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(visible=True, color="0.92", linewidth=0.6)
    ax.set_axisbelow(True)
    if any(curve.get("label") for curve in curves):
        ax.legend(fontsize=8, frameon=False)
    write_png(figure, out)


def _plain(label: object) -> str:
    """Text that matplotlib takes for no formula."""
    return str(label).replace("$", r"\$")
