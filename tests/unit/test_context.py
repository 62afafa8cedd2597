"""The worker context on one worker: sums are what they were, and a stop is asked for by file or signal."""

import os
import signal
from pathlib import Path

import torch

from unroll.training.context import WorkerContext


def test_one_worker_sums_to_itself() -> None:
    context = WorkerContext()
    assert context.sum([1.5, 2.0]) == [1.5, 2.0]
    rows = torch.arange(6).reshape(3, 2)
    assert torch.equal(context.gather_rows(rows, [3]), rows)


def test_a_stop_file_asks_for_a_stop(tmp_path: Path) -> None:
    context = WorkerContext(stop_file=tmp_path / "stop")
    assert not context.wants_stop()
    (tmp_path / "stop").touch()
    assert context.wants_stop()


def test_sigterm_asks_for_a_stop_and_the_old_handler_comes_back() -> None:
    context = WorkerContext()
    before = signal.getsignal(signal.SIGTERM)
    with context.stop_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        assert context.wants_stop()
    assert signal.getsignal(signal.SIGTERM) is before
