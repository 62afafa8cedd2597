"""Notices that this machine will be taken away: a file that appears, or a signal. Needs nothing but Python.

Clouds and schedulers announce a preemption in their own ways: a daemon writes a file, Slurm sends the signal that
`--signal` names. A profile of cluster/profiles.yaml says which one counts; SIGTERM always does.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from unroll.errors import UserError

POLL_SECONDS = 1.0


def signal_number(name: str) -> signal.Signals:
    """`USR1` or `SIGUSR1`.

    Raises:
        UserError: no such signal, or one that cannot be caught.
    """
    found = signal.Signals.__members__.get(f"SIG{name.upper().removeprefix('SIG')}")
    if found is None or found in (signal.SIGKILL, signal.SIGSTOP):
        raise UserError(f"notice_signal: found {name!r}, allowed: a signal that can be caught, e.g. USR1")
    return found


@contextmanager
def on_notice(act: Callable[[], None], file: str = "", signal_name: str = "") -> Iterator[None]:
    """While inside, call `act` on SIGTERM, on the signal named, and once when `file` appears.

    Signals reach the main thread alone; elsewhere only the file counts.
    """
    over = threading.Event()
    if file:
        threading.Thread(target=_watch, args=(Path(file), act, over), name="unroll-notice", daemon=True).start()
    before: dict[signal.Signals, object] = {}
    numbers = {signal.SIGTERM, *([signal_number(signal_name)] if signal_name else [])}

    def ask(number: int, frame: FrameType | None) -> None:
        act()

    try:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, ask) for number in numbers}
        yield
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _watch(file: Path, act: Callable[[], None], over: threading.Event) -> None:
    while not over.wait(POLL_SECONDS):
        if file.exists():
            act()
            return
