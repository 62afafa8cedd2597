"""Settings for every test: one torch thread (many small tests on few cores), no tracker, no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Tests draw the same numbers whatever ran before them."""
    torch.manual_seed(0)
