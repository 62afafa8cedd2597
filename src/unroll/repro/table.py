"""What `unroll repro` shows: a live table of stages on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from unroll.progress import duration, printable

if TYPE_CHECKING:
    from rich.table import Table

TAIL_LINES = 20
DRAWINGS_PER_SECOND = 4


class State(StrEnum):
    FAILED = "failed"
    RUNNING = "running"
    WAITING = "waiting"
    DONE = "done"
    CACHED = "cached"
    SKIPPED = "not run"
    STOPPED = "stopped"


COLOURS = {State.FAILED: "red", State.RUNNING: "yellow", State.DONE: "green", State.STOPPED: "red"}


@dataclass
class Row:
    """A stage as shown. `note`: why it failed, or the last line that it wrote."""

    state: State = State.WAITING
    note: str = ""
    began: float = 0.0
    seconds: float = 0.0
    log: Path | None = None
    read: int = 0


class Display:
    """Plain lines: each change of a running stage, and what it writes behind its name."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.rows = {stage: Row() for stage in stages}
        self.began = time.monotonic()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, stage: str, log: Path) -> None:
        self.rows[stage] = Row(State.WAITING, began=time.monotonic(), log=log)

    def begin(self, stage: str) -> None:
        """A started stage got its machine."""
        row = self.rows[stage]
        if row.state is not State.RUNNING:
            row.state, row.began = State.RUNNING, time.monotonic()
            self.changed(stage)

    def end(self, stage: str, state: State, note: str = "") -> None:
        row = self.rows[stage]
        self.read(stage, last=True)
        if row.state is State.RUNNING:
            row.seconds = time.monotonic() - row.began
        row.state, row.note = state, note
        self.changed(stage)

    def tick(self) -> None:
        """Look for new output of what runs."""
        for stage, row in self.rows.items():
            if row.state is State.RUNNING:
                self.read(stage)

    def changed(self, stage: str) -> None:
        row = self.rows[stage]
        if row.state not in (State.CACHED, State.SKIPPED):  # hundreds of these say nothing; the last line counts them
            print(f"{stage}: {told(row)}", flush=True)

    def wrote(self, stage: str, lines: list[str]) -> None:
        for line in lines:
            print(f"{stage} | {line}", flush=True)

    def read(self, stage: str, last: bool = False) -> None:
        """Whole lines that a stage wrote since; `last`: also a line without an end."""
        row = self.rows[stage]
        if row.log is None or not row.log.exists():
            return
        with row.log.open("rb") as log:
            log.seek(row.read)
            content = log.read()
        if not last:
            content = content[: content.rfind(b"\n") + 1]
        row.read += len(content)
        text = content.decode(errors="replace")
        lines = [printable(line.rstrip("\r").rpartition("\r")[2]) for line in text.split("\n")]
        lines = [line for line in lines if line.strip()]
        if lines:
            row.note = lines[-1]
            self.wrote(stage, lines)

    def summary(self) -> str:
        """One line: how many stages are in which state, and the time since the start."""
        counts = Counter(row.state for row in self.rows.values())
        parts = [f"{counts[state]} {state}" for state in State if counts[state]]
        return f"{len(self.rows)} stages: {', '.join(parts)} in {duration(time.monotonic() - self.began)}"

    def close(self) -> None:
        """The last words: failures with their logs, and the summary."""
        for stage, row in self.rows.items():
            if row.state is State.FAILED:
                where = f"; its output: {row.log}" if row.log is not None else ""
                print(f"{stage}: failed: {row.note}{where}")
        print(self.summary(), flush=True)


class LiveTable(Display):
    """A table that is drawn anew four times a second; what stages write goes to their logs, the last line is shown."""

    def __enter__(self) -> Display:
        from rich.console import Console
        from rich.live import Live

        self.console = Console()
        self.live = Live(
            console=self.console, get_renderable=self.table, refresh_per_second=DRAWINGS_PER_SECOND, transient=True
        )
        self.live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.__exit__(None, None, None)

    def changed(self, stage: str) -> None:
        pass

    def wrote(self, stage: str, lines: list[str]) -> None:
        pass

    def table(self) -> Table:
        """As many rows as the screen has room for, the most telling first."""
        from rich.table import Table

        order = {state: number for number, state in enumerate(State)}
        room = max(1, self.console.height - 5)
        shown = set(sorted(self.rows, key=lambda stage: order[self.rows[stage].state])[:room])
        table = Table(box=None, caption=self.summary(), caption_justify="left", expand=True)
        for name, ratio in (("stage", 2), ("state", None), ("time", None), ("", 3)):
            table.add_column(name, no_wrap=True, ratio=ratio, overflow="ellipsis")
        now = time.monotonic()
        for stage, row in self.rows.items():
            if stage not in shown:
                continue
            seconds = now - row.began if row.state is State.RUNNING else row.seconds
            table.add_row(
                stage, f"[{COLOURS.get(row.state, 'default')}]{row.state}", duration(seconds) if seconds else "",
                row.note.replace("[", "\\["),
            )  # fmt: skip
        return table

    def close(self) -> None:
        for row in self.rows.values():
            if row.state is State.FAILED and row.log is not None and row.log.exists():
                print("\n".join(row.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]))
        super().close()


def told(row: Row) -> str:
    """State, time and reason of a stage in one line."""
    if row.state is State.RUNNING:
        return "running"
    took = f" after {duration(row.seconds)}" if row.seconds else ""
    return f"{row.state}{took}" + (f": {row.note}" if row.note and row.state is not State.DONE else "")


def display(stages: Sequence[str]) -> Display:
    """The table on a terminal, else lines."""
    return LiveTable(stages) if sys.stdout.isatty() else Display(stages)
