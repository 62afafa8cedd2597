"""Progress with rate, time left and values such as the loss, for everything that may last longer than two seconds.

    with progress("train", total=1000, start=200) as bar:
        bar.advance(1, loss=2.31)

On a terminal: a bar drawn by rich, twice a second at most. Elsewhere: a plain line every ten seconds at most. Either
way nothing is shown in the first two seconds, and one last line stays: how much was done, how fast, the last values.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self, SupportsFloat

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET_SECONDS = 2.0
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.5


def progress(name: str, total: float | None = None, start: float = 0) -> Bar:
    """A bar, to be used in a `with` statement. `start`: what was done before, in an earlier process."""
    return Bar(name, total, start)


class Bar:
    """One thing that is going on. The values of the last `advance` are shown as they are given: tensors are read only
    when the line is drawn, so that a GPU is not waited for at every step."""

    def __init__(self, name: str, total: float | None, start: float) -> None:
        self.name = printable(name)
        self.total = total
        self.start = start
        self.done = start
        self.values: dict[str, SupportsFloat] = {}
        self._began = time.monotonic()
        self._next_show = self._began + QUIET_SECONDS
        self._drawing: _Drawing | None = None

    def advance(self, count: float = 1, **values: SupportsFloat) -> None:
        """`count` more are done; `values` (loss=1.23) stand beside the bar."""
        self.done += count
        if values:
            self.values = values
        now = time.monotonic()
        if now >= self._next_show:
            self._show(now)

    def reach(self, done: float, total: float | None = None) -> None:
        """`done` in all are done; `total` if it is known by now."""
        self.total = total or self.total
        self.advance(done - self.done)

    def line(self) -> str:
        """Where it stands, as text."""
        seconds = time.monotonic() - self._began
        rate = (self.done - self.start) / max(seconds, 1e-9)
        parts = [f"{_count(self.done)}{f' of {_count(self.total)}' if self.total else ''}", f"{_count(rate)}/s"]
        if self.total and rate > 0:
            parts.append(f"{duration(max(0.0, self.total - self.done) / rate)} left")
        return f"{self.name}: {', '.join([*parts, *self._shown_values()])}"

    def last_line(self, complete: bool) -> str:
        """What was done, as text."""
        seconds = time.monotonic() - self._began
        rate = f"{_count((self.done - self.start) / max(seconds, 1e-9))}/s"
        how_far = _count(self.done) if complete else f"stopped at {_count(self.done)}"
        if not complete and self.total:
            how_far += f" of {_count(self.total)}"
        return f"{self.name}: {', '.join([f'{how_far} in {duration(seconds)}', rate, *self._shown_values()])}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._drawing is not None:
            self._drawing.close()
        print(self.last_line(kind is None), flush=True)

    def _show(self, now: float) -> None:
        if not sys.stdout.isatty() and self._drawing is None:
            print(self.line(), flush=True)
            self._next_show = now + SECONDS_BETWEEN_LINES
            return
        if self._drawing is None:
            self._drawing = _Drawing()
        self._drawing.draw(self.line(), self.done, self.total)
        self._next_show = now + SECONDS_BETWEEN_DRAWINGS

    def _shown_values(self) -> list[str]:
        return [f"{printable(name)} {float(value):.4g}" for name, value in self.values.items()]


class _Drawing:
    """One row of the terminal. Rows that are open at the same time share one live display, as rich demands."""

    screen: Progress | None = None
    rows = 0

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        if _Drawing.screen is None:
            # markup=False: a data set's name such as "[red]" is text, not a command
            columns = [BarColumn(bar_width=20), TextColumn("{task.description}", markup=False)]
            _Drawing.screen = Progress(*columns, auto_refresh=False, transient=True)
            _Drawing.screen.start()
        _Drawing.rows += 1
        self.row = _Drawing.screen.add_task("", total=None)

    def draw(self, line: str, done: float, total: float | None) -> None:
        assert _Drawing.screen is not None
        _Drawing.screen.update(self.row, description=line, completed=done, total=total, refresh=True)

    def close(self) -> None:
        assert _Drawing.screen is not None
        _Drawing.screen.remove_task(self.row)
        _Drawing.rows -= 1
        if _Drawing.rows == 0:
            _Drawing.screen.stop()
            _Drawing.screen = None


def printable(text: Any) -> str:
    """`text` without characters that would steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def _count(value: float) -> str:
    """1,234 or 1.23M or 0.0123."""
    if value < 100 and value != int(value):
        return f"{value:.3g}"
    if value < 100_000:
        return f"{value:,.0f}"
    for power, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= power:
            return f"{value / power:.3g}{suffix}"
    return f"{value / 1e3:.0f}k"


def duration(seconds: float) -> str:
    """0.4 s or 1:02 or 3:04:05."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
