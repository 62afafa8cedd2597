"""Error of each task in %, a bar a task, with the line above which a task has failed.

data: {"errors": {task: error}, "names": {task: name, may lack some}, "failed": number}
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
        UserError: there is no task.
    """
    errors, failed = {str(task): float(error) for task, error in data["errors"].items()}, float(data["failed"])
    if not errors:
        raise UserError("no errors of tasks to draw")
    labels = [f"{task} {data['names'][task]}" if task in data["names"] else f"task {task}" for task in errors]
    figure = Figure(figsize=(7, 0.9 + 0.24 * len(errors)), dpi=110, layout="constrained")
    ax = figure.subplots()
    bars = ax.barh(labels, list(errors.values()), color=["#c33" if e > failed else "#47a" for e in errors.values()])
    ax.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    ax.axvline(failed, color="#888", linewidth=1, linestyle="--")
    ax.set_xlim(0, max(2 * failed, 1.15 * max(errors.values())))
    ax.invert_yaxis()
    ax.set_xlabel(f"error in %; above {failed:g} % a task has failed", fontsize=9)
    ax.tick_params(labelsize=8, length=2)
    write_png(figure, out)
