"""Notices that a machine goes: a file or a signal, each acted upon once, and nothing of it left afterwards."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from unroll import notice
from unroll.errors import UserError
from unroll.notice import on_notice, signal_number


def wait_for(seen: list[str], count: int) -> None:
    deadline = time.monotonic() + 10
    while len(seen) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_signals_of_a_profile_are_acted_upon_and_given_back(number: signal.Signals) -> None:
    before, seen = signal.getsignal(number), []  # type: ignore[var-annotated]
    with on_notice(lambda: seen.append("asked"), signal_name="USR1"):
        os.kill(os.getpid(), number)
        wait_for(seen, 1)
    assert signal.getsignal(number) is before


def test_a_file_that_appears_is_acted_upon_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice, "POLL_SECONDS", 0.01)
    seen: list[str] = []
    with on_notice(lambda: seen.append("asked"), str(tmp_path / "notice")):
        time.sleep(0.1)
        assert seen == []
        (tmp_path / "notice").touch()
        wait_for(seen, 1)
        time.sleep(0.1)
    assert seen == ["asked"]
    assert [thread.name for thread in threading.enumerate() if thread.name == "unroll-notice"] == []


@pytest.mark.parametrize("name", ["USR3", "KILL", "SIGSTOP", ""])
def test_a_signal_that_cannot_be_caught_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="notice_signal"):
        signal_number(name)


def test_names_of_signals() -> None:
    assert signal_number("usr1") is signal_number("SIGUSR1") is signal.SIGUSR1
