"""Freed memory is kept for the next step."""

import subprocess
import sys

import pytest

from unroll.memory import keep_freed_memory

COUNT_FAULTS = """
import resource, torch
from unroll.memory import keep_freed_memory

if {keep}:
    assert keep_freed_memory()

def step():
    inputs = torch.ones(1 << 23)
    hidden = inputs * 2
    return (hidden + inputs).sum()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(6):
    step()
before = faults()
for _ in range(4):
    step()
print(faults() - before)
"""


def faults(keep: bool) -> int:
    """Page faults of four steps with activations of 32 MiB, in a process of their own."""
    code = COUNT_FAULTS.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_training_goes_on_in_the_memory_of_the_steps_before() -> None:
    assert faults(keep=True) < faults(keep=False) / 5


def test_it_says_whether_it_could(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unroll.memory.ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False
