"""Freed memory is kept for the next step."""

import subprocess
import sys

import pytest

from unroll.memory import keep_freed_memory

COUNT_FAULTS = """
import resource, torch
from unroll.memory import keep_freed_memory
if {keep}: assert keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
before = faults()
for _ in range(4): torch.ones(1 << 24)
print(faults() - before)
"""


def faults(keep: bool) -> int:
    """Page faults of making four tensors of 64 MiB where one was made before, in a process of their own."""
    code = COUNT_FAULTS.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_tensor_of_the_next_step_costs_no_page_faults() -> None:
    assert faults(keep=False) > 10_000
    assert faults(keep=True) < 1_000


def test_it_says_whether_it_could(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unroll.memory.ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False
