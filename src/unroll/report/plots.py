"""The pictures of the report, drawn by matplotlib and given to the page as inline SVG.

A system has one colour, one marker and one dash pattern in all pictures of its group, in the order of the ranking: the
colours alone need not be told apart. The legend stands in the page.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from unroll.report import svg
from unroll.report.attention import Attention, label
from unroll.report.formatting import decimals, fixed
from unroll.report.inputs import MetricValue, System, number
from unroll.report.leaderboard import Group

TRAIN_LOSS, VALIDATION_LOSS, GRADIENT_NORM = "train/loss", "validation/loss", "train/gradient_norm"

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))

_WIDTH, _HEIGHT = 380, 290  # CSS pixels at the natural size; the page scales them between about 300 and 480
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unroll",
    "font.size": 12,
    "text.color": svg.INK,
    "axes.labelcolor": svg.INK,
    "axes.edgecolor": svg.GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": svg.GRID,
    "grid.linewidth": 0.8,
    "xtick.color": svg.GRID,
    "ytick.color": svg.GRID,
    "xtick.labelcolor": svg.FAINT,
    "ytick.labelcolor": svg.FAINT,
    "axes.unicode_minus": True,
}
Curve = tuple[np.ndarray, np.ndarray]  # steps [points], values [points]


def losses(group: Group, name: str) -> Markup | None:
    """Training (thin) and validation loss (thick, marked) over the steps; None where no system has a curve."""
    thick = {index: curves(system.history, VALIDATION_LOSS) for index, system in enumerate(group.systems)}
    thin = {index: curves(system.history, TRAIN_LOSS) for index, system in enumerate(group.systems)}
    if not any(thick.values()) and not any(thin.values()):
        return None
    with matplotlib.style.context(["default", _STYLE]):
        figure, axes = _figure("training step", "loss (nats per predicted token)")
        for index in thin:
            _draw(axes, thin[index], index, linewidth=0.9, alpha=0.45)
            _draw(axes, thick[index], index, linewidth=2.0, marks=True)
        _step_axis(axes)
        _limit_losses(axes, [*thick.values(), *thin.values()])
        return svg.inline(figure, name, _last_values("Loss over training steps", group, thick))


def save_losses(history: Sequence[dict[str, Any]], path: Path) -> bool:
    """The loss curves of one run as a PNG of its own, for the tracker; false where there is no curve."""
    thick, thin = curves(history, VALIDATION_LOSS), curves(history, TRAIN_LOSS)
    if not thick and not thin:
        return False
    # On the page the colours are names that its style sheet fills in; a picture of its own needs real ones.
    with matplotlib.style.context(["default", _STYLE, {"grid.color": "#dddddd", "axes.edgecolor": "#999999"}]):
        figure, axes = _figure("training step", "loss (nats per predicted token)")
        _draw(axes, thin, 0, linewidth=0.9, alpha=0.45)
        _draw(axes, thick, 0, linewidth=2.0, marks=True)
        _step_axis(axes)
        _limit_losses(axes, [thick, thin])
        figure.savefig(path, dpi=144, metadata={"Software": None})
    return True


def has_losses(system: System) -> bool:
    """Whether the system has a training or a validation curve; models fitted by counting have none."""
    return has_validation_losses(system) or bool(curves(system.history, TRAIN_LOSS))


def has_validation_losses(system: System) -> bool:
    """Whether the system was validated by its loss; many are by a score of what they generate."""
    return bool(curves(system.history, VALIDATION_LOSS))


def gradient_norms(group: Group, name: str) -> Markup | None:
    """Norm of the gradient before clipping over the steps, on a logarithmic scale; None where none was logged."""
    drawn = {index: curves(system.history, GRADIENT_NORM) for index, system in enumerate(group.systems)}
    if not any(drawn.values()):
        return None
    with matplotlib.style.context(["default", _STYLE]):
        figure, axes = _figure("training step", "gradient norm before clipping")
        for index, lines in drawn.items():
            _draw(axes, lines, index, linewidth=0.7, alpha=0.25)
            _draw(axes, [_smooth(*line) for line in lines], index, linewidth=2.0, marks=True)
        axes.set_yscale("log")
        _step_axis(axes)
        _label_logarithmic(axes)
        return svg.inline(figure, name, _last_values("Gradient norm over training steps", group, drawn))


def bars(group: Group, metric: str, name: str) -> Markup | None:
    """One bar a system with its 95 % interval, best first; None where no system has a finite value."""
    scores = [(index, system, system.result.metrics.get(metric)) for index, system in enumerate(group.systems)]
    shown = [(index, system, score) for index, system, score in scores if score and math.isfinite(score.value)]
    if not shown:
        return None
    digits = decimals((score.value for _, _, score in shown), shown[0][2].unit)
    with matplotlib.style.context(["default", _STYLE]):
        figure, axes = _figure(shown[0][2].unit, "", height=90 + 42 * len(shown))
        longest = max(_reach(score) for _, _, score in shown)
        for row, (index, system, score) in enumerate(shown):
            _bar(axes, row, index, system.result.name, score, fixed(score.value, digits), longest)
        axes.set_ylim(len(shown) - 0.55, -0.7)
        axes.set_xlim(0, longest * 1.2)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(False, axis="y")
        axes.tick_params(left=False, labelleft=False)
        axes.spines["left"].set_visible(False)
        values = ", ".join(f"{system.result.name} {fixed(score.value, digits)}" for _, system, score in shown)
        return svg.inline(figure, name, f"Bars with 95 % intervals, {shown[0][2].unit}: {values}")


def by_length(group: Group, name: str) -> Markup | None:
    """The group's metric over samples of like length, a line a system; None where no system has two buckets."""
    shown = {
        index: [bucket for bucket in system.lengths if math.isfinite(bucket.scores.get(group.metric, math.nan))]
        for index, system in enumerate(group.systems)
    }
    buckets = sorted({bucket.low: bucket for found in shown.values() for bucket in found}.items())
    if len(buckets) < 2:
        return None
    places = {low: place for place, (low, _) in enumerate(buckets)}
    with matplotlib.style.context(["default", _STYLE]):
        figure, axes = _figure(
            "length of the source: words, symbols or vectors (how many)", group.unit, bottom=58, left=74
        )  # `left`: scores such as 0.0003 stand beside the axis
        for index, found in shown.items():
            line = np.array([(places[bucket.low], bucket.scores[group.metric]) for bucket in found]).reshape(-1, 2)
            _draw(axes, [(line[:, 0], line[:, 1])] if len(line) else [], index, linewidth=2.0, marks=True)
        axes.set_xticks(range(len(buckets)), [f"{bucket.label}\n({bucket.n:,})" for _, bucket in buckets])
        axes.set_xlim(-0.3, len(buckets) - 0.7)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(False, axis="x")
        words = [
            f"{group.systems[index].result.name}: "
            + ", ".join(f"{b.label} {b.scores[group.metric]:.2f}" for b in found)
            for index, found in shown.items()
            if found
        ]
        return svg.inline(figure, name, f"{group.unit} by length of the source. {'; '.join(words)}")


def save_attention(attention: Attention, path: Path) -> None:
    """A heat-map as a PNG of its own, for the tracker; on a page `attention_svg` draws it."""
    columns, rows = ([label(token) for token in tokens] for tokens in (attention.source, attention.target))
    with matplotlib.style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # scripts that the font lacks
        figure = Figure(figsize=(2 + 0.3 * len(columns), 2 + 0.3 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(attention.weights, cmap="Blues", vmin=0.0, vmax=1.0, aspect="equal")
        axes.set_xticks(range(len(columns)), columns, rotation=50, ha="left", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(range(len(rows)), rows, parse_math=False)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})  # `savefig` lays it out twice


def curves(history: Sequence[dict[str, Any]], key: str) -> list[Curve]:
    """The values of one key over the steps, one curve a seed; values that are no finite number are left out."""
    points: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        step, value = number(entry.get("step")), number(entry.get(key))
        if math.isfinite(step) and math.isfinite(value):
            points.setdefault(str(entry.get("seed", "")), []).append((step, value))
    sorted_points = [np.array(sorted(points[seed])) for seed in sorted(points)]
    return [(curve[:, 0], curve[:, 1]) for curve in sorted_points]


def _figure(x_label: str, y_label: str, height: int = _HEIGHT, bottom: int = 44, left: int = 54) -> tuple[Figure, Axes]:
    """Axes with room for labels of the usual width: fixed, so that the pictures of a row line up."""
    left, right, top = (left if y_label else 24), 10, 8  # CSS pixels; 24 hold half of a 0.0000 below the axis
    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    width_part, height_part = (_WIDTH - left - right) / _WIDTH, (height - bottom - top) / height
    axes = figure.add_axes((left / _WIDTH, bottom / height, width_part, height_part))
    axes.set_xlabel(x_label, parse_math=False)
    axes.set_ylabel(y_label, parse_math=False)
    axes.tick_params(length=0, pad=5)
    return figure, axes


def _step_axis(axes: Axes) -> None:
    """Steps in whole thousands where they are long."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"))


def _draw(
    axes: Axes, lines: list[Curve], index: int, linewidth: float, alpha: float = 1.0, marks: bool = False
) -> None:
    for steps, values in lines:
        axes.plot(
            steps,
            values,
            color=svg.SERIES[index % len(svg.SERIES)],
            linestyle=DASHES[index % len(DASHES)],
            linewidth=linewidth,
            alpha=alpha,
            marker=MARKERS[index % len(MARKERS)] if marks or len(steps) == 1 else None,
            markevery=max(1, math.ceil(len(steps) / 8)),
            markersize=5.5,
        )


def _smooth(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Running geometric mean over a twentieth of the curve, as far as its window fits."""
    window = max(1, len(values) // 20)
    positive = np.log(np.maximum(values, np.finfo(float).tiny))
    means = np.convolve(positive, np.full(window, 1 / window), mode="valid")
    start = (window - 1) // 2
    return steps[start : start + len(means)], np.exp(means)


def _bar(axes: Axes, row: int, index: int, label: str, score: MetricValue, value: str, longest: float) -> None:
    """A bar under its system's name, the value behind the end of its interval."""
    axes.barh(row, score.value, height=0.3, color=svg.SERIES[index % len(svg.SERIES)], alpha=0.85)
    if score.low is not None and score.high is not None and math.isfinite(score.high):
        spread = [[max(0.0, score.value - score.low)], [max(0.0, score.high - score.value)]]
        axes.errorbar(score.value, row, xerr=spread, color=svg.INK, capsize=4, linewidth=1.6, capthick=1.6)
    axes.text(0, row - 0.24, label if len(label) <= 50 else f"{label[:49]}…", va="bottom", parse_math=False)
    axes.text(_reach(score) + longest * 0.02, row, value, va="center", weight="bold", parse_math=False)


def _reach(score: MetricValue) -> float:
    """Where a bar and its interval end."""
    return score.high if score.high is not None and math.isfinite(score.high) else score.value


def _limit_losses(axes: Axes, drawn: Sequence[list[Curve]]) -> None:
    """Leave the first steep fall above the picture: the upper tenth of each curve's points decides nothing."""
    curves_drawn = [values for lines in drawn for _, values in lines]
    top = max(float(np.quantile(values, 0.9)) for values in curves_drawn)
    bottom = min(float(values.min()) for values in curves_drawn)
    margin = 0.06 * (top - bottom) or 0.1
    axes.set_ylim(bottom - margin, top + margin)


def _label_logarithmic(axes: Axes) -> None:
    """Plain numbers on the decades, and between them where there are few."""
    low, high = axes.get_ylim()
    subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(10, subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _last_values(title: str, group: Group, drawn: dict[int, list[Curve]]) -> str:
    """What a curve picture says, in words."""
    ends = [f"{group.systems[index].result.name} {lines[0][1][-1]:.4g}" for index, lines in drawn.items() if lines]
    return f"{title}; last values: {', '.join(ends) or 'none'}"
