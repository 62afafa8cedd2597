"""Faults on a real Ray cluster of two nodes; `make test-cluster` runs all of it with the full numbers of trials."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import RayCluster, cluster_of_two


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Two nodes of one processor each, for the tests of one file."""
    with tempfile.TemporaryDirectory(prefix="unroll-") as folder, cluster_of_two(Path(folder)) as cluster:
        yield cluster
