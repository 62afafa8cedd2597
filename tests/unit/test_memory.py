"""Freed memory is kept for the next step."""

import subprocess
import sys

import pytest

from unroll.memory import keep_freed_memory

COUNT_FAULTS = """
import resource, torch
from unroll.memory import keep_freed_memory

def step():
    inputs = torch.ones(1 << 23)
    hidden = inputs * 2
    return (hidden + inputs).sum()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def faults_of_four_steps():
    for _ in range(3):
        step()
    before = faults()
    for _ in range(4):
        step()
    return faults() - before

freely = faults_of_four_steps()
assert keep_freed_memory()
print(freely, faults_of_four_steps())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_training_goes_on_in_the_memory_of_the_steps_before() -> None:
    """Page faults of four steps with activations of 32 MiB, before and after, in a process of their own."""
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    freely, kept = map(int, done.stdout.split())
    assert kept < freely / 5


def test_it_says_whether_it_could(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unroll.memory.ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False
