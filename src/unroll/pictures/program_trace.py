"""The calls of a program over time: a bar for each call, from the step that opens it to the one that ends it.

data: {"steps": int, "programs": [name], "primitive": name, "calls": [{"program", "arguments": [int], "level": int, "start",
"end": step or null}], "rows": [name of each row of the pad], "input": str}. Calls stand at their depth in the stack;
actions of the primitive are dots, one line below their caller: filled ones write, open ones move a pointer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from unroll.errors import UserError
from unroll.pictures._png import write_png

COLOURS = ["#4c72b0", "#dd8452", "#c44e52", "#55a868", "#8172b3", "#937860"]
MOST_STEPS = 400
WRITE = 0


def draw(data: dict[str, Any], folder: Path, out: Path) -> None:
    """Write the PNG.

    Raises:
        UserError: no calls, or more steps than a picture shows.
    """
    calls, steps = data["calls"], int(data["steps"])
    if not calls or not 0 < steps <= MOST_STEPS:
        raise UserError(f"found {len(calls)} calls in {steps} steps, 1 to {MOST_STEPS} steps can be drawn")
    depth = max(call["level"] for call in calls) + 1
    figure = Figure(figsize=(min(14.0, 3.0 + 0.16 * steps), 1.4 + 0.42 * depth), dpi=110, layout="constrained")
    axes = figure.subplots()
    for call in calls:
        if call["program"] == data["primitive"]:
            _dot(axes, call, data["rows"])
        else:
            _bar(axes, call, steps, COLOURS[data["programs"].index(call["program"]) % len(COLOURS)])
    axes.set_xlim(-0.7, steps + 0.2)
    axes.set_ylim(depth - 0.4, -0.6)
    axes.set_yticks(range(depth))
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("depth of the call", fontsize=9)
    axes.set_title(str(data["input"]).replace("$", r"\$"), fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    write_png(figure, out)


def _bar(axes: Axes, call: dict[str, Any], steps: int, colour: str) -> None:
    end = steps if call["end"] is None else call["end"]
    left, width = call["start"] - (0.4 if call["level"] else 0.6), end - call["start"] + 0.8
    axes.add_patch(Rectangle((left, call["level"] - 0.34), width, 0.68, facecolor=colour, alpha=0.85, linewidth=0))
    axes.text(left + width / 2, call["level"], call["program"], ha="center", va="center", fontsize=6.5, color="white",
              clip_on=True)  # fmt: skip


def _dot(axes: Axes, call: dict[str, Any], rows: list[str]) -> None:
    """An action: the row it is on, and the digit that it writes."""
    kind, row, value = (*call["arguments"], 0, 0, 0)[:3]
    writes = kind == WRITE
    axes.plot(
        call["start"], call["level"], "o", color="#333333", markersize=4.5, fillstyle="full" if writes else "none"
    )
    name = rows[row][:1] if row < len(rows) else "?"
    text = f"{name}={value}" if writes else name
    axes.text(call["start"], call["level"] + 0.36, text, ha="center", va="center", fontsize=5.5, color="#333333")
