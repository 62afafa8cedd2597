"""Tables of weights as heat maps, side by side or one below the other: what was read, written, chosen or looked at.

data: {"panels": [{"values": [[number]], "title": str, "rows": labels or none, "columns": labels or none, "x": name of the
columns' axis, "y": of the rows'}], "arrange": "columns" (side by side) or "rows" (the default)}. Panels of weights from 0
to 1 share one scale; others are scaled each on its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from unroll.errors import UserError
from unroll.pictures._png import write_png

INCHES_PER_CELL = 0.16
LARGEST = 200_000
"""Cells of a panel; more are no picture."""
LABELS_SHOWN = 60
LABEL_CHARACTERS = 60
INCHES_PER_CHARACTER = 0.068
"""Of a label, 8 points high; a title's are a quarter larger."""


def draw(data: dict[str, Any], folder: Path, out: Path) -> None:
    """Write the PNG.

    Raises:
        UserError: a panel that is empty, too large or no table.
    """
    panels = data["panels"]
    tables = [_table(panel["values"], number) for number, panel in enumerate(panels)]
    side_by_side = data.get("arrange") == "columns"
    shape = (1, len(panels)) if side_by_side else (len(panels), 1)
    heights = [_inches(table.shape[0], 0.9, 4.0) for table in tables]
    widths = [_width(panel, table) for panel, table in zip(panels, tables, strict=True)]
    beside = [1.2 + INCHES_PER_CHARACTER * max(0, _longest(panel.get("rows")) - 8) for panel in panels]
    size = (
        (sum(widths) + sum(beside) - 1.2 * (len(panels) - 1), max(heights) + 0.9)
        if side_by_side
        else (max(widths) + max(beside), sum(heights) + 0.9 * len(panels))
    )
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    ratios = {"width_ratios": widths} if side_by_side else {"height_ratios": heights}
    axes = figure.subplots(*shape, squeeze=False, gridspec_kw=ratios)
    for ax, panel, table, width in zip(axes.flat, panels, tables, widths, strict=True):
        _panel(ax, panel, table, width / table.shape[1])
    write_png(figure, out)


def _table(values: Any, number: int) -> np.ndarray:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size or table.size > LARGEST:
        raise UserError(
            f"panel {number}: found a table of shape {table.shape}, 1 to {LARGEST} cells in two dimensions can be drawn"
        )
    return table


def _inches(cells: int, least: float, most: float) -> float:
    return min(most, max(least, cells * INCHES_PER_CELL))


def _width(panel: dict[str, Any], table: np.ndarray) -> float:
    """Inches of a panel without its labels: its cells, and its title above them."""
    return max(_inches(table.shape[1], 2.0, 9.0), 1.25 * INCHES_PER_CHARACTER * len(_plain(panel.get("title", ""))))


def _longest(labels: list[object] | None) -> int:
    """Characters of the longest label that is shown."""
    return max((len(_plain(label)) for label in labels), default=0) if labels and len(labels) <= LABELS_SHOWN else 0


def _panel(ax: Axes, panel: dict[str, Any], table: np.ndarray, cell: float) -> None:
    """Draw a table; `cell`: inches of a column at least."""
    weights = bool(np.nanmin(table) >= 0 and np.nanmax(table) <= 1)
    low, high = (0.0, 1.0) if weights else (None, None)
    ax.imshow(
        table, aspect="auto", interpolation="nearest", cmap="Blues" if weights else "viridis", vmin=low, vmax=high
    )
    ax.set_title(_plain(panel.get("title", "")), fontsize=10, loc="left")
    ax.set_xlabel(_plain(panel.get("x", "")), fontsize=9)
    ax.set_ylabel(_plain(panel.get("y", "")), fontsize=9)
    ax.tick_params(labelsize=8, length=2)
    for axis, cells in ((ax.xaxis, table.shape[1]), (ax.yaxis, table.shape[0])):
        axis.set_major_locator(MaxNLocator(integer=True) if cells > 1 else NullLocator())
    rows, columns = panel.get("rows"), panel.get("columns")
    if rows and len(rows) <= LABELS_SHOWN:
        ax.set_yticks(range(len(rows)), [_plain(label) for label in rows])
    if columns and len(columns) <= LABELS_SHOWN:
        slanted = INCHES_PER_CHARACTER * (_longest(columns) + 1) > cell
        ax.set_xticks(range(len(columns)), [_plain(label) for label in columns], rotation=60 if slanted else 0,
                      ha="right" if slanted else "center", rotation_mode="anchor")  # fmt: skip


def _plain(label: object) -> str:
    """Text that matplotlib takes for no formula."""
    text = str(label)
    text = text if len(text) <= LABEL_CHARACTERS else text[: LABEL_CHARACTERS - 1] + "…"
    return text.replace("$", r"\$")
