"""Freed memory is kept for the next step; what was compiled for shapes of long ago is not."""

import os
import subprocess
import sys

import pytest

from unroll.memory import COMPILED_SHAPES, keep_freed_memory

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


COMPILE_TWICE = """
import torch
from unroll.memory import keep_few_compiled_shapes

{bound}
weight = torch.ones(8, 8, 3)
for turn in range(2):
    print("turn", turn, flush=True)
    for length in range(10, 110):
        torch.conv1d(torch.ones(2, 8, length), weight)
"""


@pytest.mark.parametrize("bound", ["", "keep_few_compiled_shapes()"])
def test_what_was_compiled_for_old_shapes_is_let_go(bound: str) -> None:
    """A hundred shapes of a convolution, twice: without the bound the second time finds all of them compiled."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_TWICE.format(bound=bound)],
        capture_output=True, text=True, check=True, env={**clean_environment(), "ONEDNN_VERBOSE": "profile_create"},
    )  # fmt: skip
    first, second = (turn.count("create:cache_miss") for turn in done.stdout.split("turn ")[1:])
    if not first:
        pytest.skip("convolutions do not go through oneDNN here")
    assert first >= 100
    assert second >= 100 if bound else second == 0


def clean_environment() -> dict[str, str]:
    """The environment without what other tests of this process have said of the caches."""
    return {name: value for name, value in os.environ.items() if name not in COMPILED_SHAPES}


def test_it_says_whether_it_could(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unroll.memory.ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False
