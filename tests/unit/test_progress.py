"""Progress must tell the truth about rate and time left, cost next to nothing, and never garble a log or a terminal."""

import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from unroll import progress as module
from unroll.progress import progress


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_short_work_leaves_only_its_last_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("count", 100) as bar:
        for _ in range(100):
            clock.now += 0.01
            bar.advance()
    assert capsys.readouterr().out == "count: 100 in 1.0 s, 100/s\n"


def test_plain_lines_come_every_ten_seconds_with_rate_time_left_and_loss(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("train", 1000) as bar:
        for step in range(1000):
            clock.now += 0.125
            bar.advance(1, loss=1 / (step + 1))
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "train: 16 of 1,000, 8/s, 2:03 left, loss 0.0625"
    assert told[1] == "train: 96 of 1,000, 8/s, 1:53 left, loss 0.01042"
    assert told[-1] == "train: 1,000 in 2:05, 8/s, loss 0.001"
    assert len(told) == 14


def test_a_resumed_run_does_not_count_earlier_steps_into_its_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("train", 2000, start=1000) as bar:
        clock.now += 10
        bar.advance(10)
    assert capsys.readouterr().out.splitlines()[0] == "train: 1,010 of 2,000, 1/s, 16:30 left"


def test_reach_takes_positions_and_learns_the_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("prepare") as bar:
        clock.now += 4
        bar.reach(2_000_000)
        clock.now += 16
        bar.reach(10_000_000, 20_000_000)
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["prepare: 2M, 500k/s", "prepare: 10M of 20M, 500k/s, 0:20 left"]


def test_an_error_is_not_shown_as_success(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress("train", 10)
    bar.advance(3)
    clock.now += 5000
    with pytest.raises(ValueError, match="boom"), bar:
        raise ValueError("boom")
    assert capsys.readouterr().out == "train: stopped at 3 of 10 in 1:23:20, 0.0006/s\n"


def test_values_are_read_only_when_shown(clock: Clock) -> None:
    class Expensive:
        reads = 0

        def __float__(self) -> float:
            self.reads += 1
            return 1.0

    value = Expensive()
    with progress("train", 1000) as bar:
        for _ in range(1000):
            bar.advance(1, loss=value)
        assert value.reads == 0
        bar.advance(0, loss=torch.tensor(2.5))
        assert "loss 2.5" in bar.line()


def test_names_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("\x1b[2Jtext\n[red]") as bar:
        bar.advance()
    assert "?[2Jtext?[red]: 1 in" in capsys.readouterr().out


TERMINAL = """
import time
from unroll import progress as module
module.QUIET_SECONDS = module.SECONDS_BETWEEN_DRAWINGS = 0.0
with module.progress("outer [bold]", 4) as outer:
    for _ in range(2):
        with module.progress("inner", 3) as inner:
            inner.advance(3, loss=0.5)
        outer.advance(2)
        print("a line [of the] program")
"""


def test_bars_on_a_terminal_may_be_nested_and_leave_plain_lines() -> None:
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.Popen([sys.executable, "-c", TERMINAL], stdout=child, stderr=child, env=environment)
    os.close(child)
    told = b""
    while True:
        try:
            told += os.read(parent, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
    os.close(parent)
    assert done.wait() == 0, told
    text = told.decode()
    assert "━" in text
    assert "outer [bold]: 4 of 4" in text
    assert text.count("a line [of the] program") >= 2
    assert "outer [bold]: 4 in " in text.splitlines()[-1]
