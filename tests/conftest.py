"""Settings for every test: one torch thread (many small tests on few cores), no tracker, no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import sys
from pathlib import Path

import pytest

gc.disable()  # while tests are collected: see `one_thread`
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """For fixtures of any scope too, whatever the environment says."""
    import torch  # not at the top: the process that only hands tests to workers would load it first

    torch.set_num_threads(1)
    # Modules and collected tests stay: walking them in every full collection was a fourteenth of the unit tests' time.
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Tests draw the same numbers whatever ran before them."""
    from unroll.training.loop import seed_generators  # a thousand times what `torch.manual_seed` takes is seconds

    seed_generators(0)
