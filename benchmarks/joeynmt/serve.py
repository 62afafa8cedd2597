"""How a system is driven while it is measured: commands as JSON lines in, answers as JSON lines out, between the
updates of its own training loop. Needs Python alone, for `theirs.py` and `ours.py` run in different environments.

    {"do": "train", "updates": 20, "seconds": 60}             go on for so many updates or seconds (one may be absent)
    {"do": "validate"}                                        score the weights as they are; the best ones are kept
    {"do": "use_best"}                                        go back to them
    {"do": "translate", "beam": 5, "batch": 64, "length": 15} translate the test set; length: every output is that long
    {"do": "end"}

A training loop calls `Pace.before_update` where an update begins. Within a turn that call returns at once; at the end
of a turn it answers and waits for the next command. So the seconds of a turn hold all that the loop does, from reading
data to logging, and none of the time in which the other system has its turn.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

FOREVER = float("inf")


class Ended(KeyboardInterrupt):
    """There are no more commands. Both training loops take an interrupt as a wish to stop in good order."""


class Pace:
    """Holds a training loop to the turns that it is given, and does what is asked for between them."""

    def __init__(self, does: Mapping[str, Callable[..., dict[str, Any]]], parameters: int) -> None:
        self.does = does
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the system prints must not stand among the answers
        self.turn: dict[str, float] | None = None
        self._answer({"parameters": parameters})

    def before_update(self, target_tokens: int) -> None:
        """An update begins, with so many target tokens (EOS counts, padding does not).

        Raises:
            Ended: there are no more commands.
        """
        if self.turn is None or self._is_over(self.turn):
            self.end_turn()
            self.wait()
        self.updates += 1
        self.target_tokens += target_tokens

    def _is_over(self, turn: Mapping[str, float]) -> bool:
        seconds = time.perf_counter() - self.start
        return self.updates >= turn.get("updates", FOREVER) or seconds >= turn.get("seconds", FOREVER)

    def end_turn(self) -> None:
        """Say what was done in this turn, if there is one."""
        if self.turn is not None:
            seconds = time.perf_counter() - self.start
            self.turn = None
            self._answer({"updates": self.updates, "target_tokens": self.target_tokens, "seconds": seconds})

    def wait(self) -> None:
        """Do what is asked for until that is training.

        Raises:
            Ended: there are no more commands.
        """
        for line in iter(sys.stdin.readline, ""):
            command = json.loads(line)
            do = command.pop("do")
            if do == "end":
                break
            if do == "train":
                self.turn, self.updates, self.target_tokens, self.start = command, 0, 0, time.perf_counter()
                return
            self._answer(self.does[do](**command))
        raise Ended

    def _answer(self, value: dict[str, Any]) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
        self.answers.write(json.dumps({**value, "peak_mb": peak}) + "\n")
        self.answers.flush()
