"""What `unroll doctor --cluster` makes of the answers of nodes; tests/cluster asks real ones."""

from typing import Any

import pytest

from unroll.doctor_cluster import Node, _about, worker_number
from unroll.training.launch import Profile

NODE = Node("f" * 8, "two (10.0.0.2)")
ANSWER: dict[str, Any] = {
    "versions": {"Python": "3.12.1", "unroll": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "mlflow": "3.17.2"},
    "storage": "",
    "seen here": True,
    "tracker": "http://mlflow:5000: answers",
    "tracker ok": True,
    "clock": (0.002, 0.001),
}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, ""),
        ({"versions": {**ANSWER["versions"], "torch": "2.12.0"}}, "torch 2.12.0, not 2.13.0"),
        ({"storage": "Read-only file system"}, "Read-only file system"),
        ({"seen here": False}, "what it wrote is not seen here"),
        ({"clock": (-4.0, 0.1)}, "-4.000 s"),
    ],
)
def test_what_is_wrong_with_a_node_is_one_bad_line(change: dict[str, Any], word: str) -> None:
    bad = [check for check in _about(NODE, {**ANSWER, **change}, ANSWER) if not check.ok]
    assert [check.found for check in bad] == ([] if not word else [next(c.found for c in bad if word in c.found)])
    assert all(check.name.startswith("two (10.0.0.2)") for check in bad)


def test_a_tracker_that_a_node_does_not_reach_costs_nothing() -> None:
    change = {"tracker": "http://mlflow:5000: not reached (refused)", "tracker ok": False}
    checks = _about(NODE, {**ANSWER, **change}, ANSWER)
    assert all(check.ok for check in checks)
    assert any("unroll track" in check.advice for check in checks)


def test_a_node_that_does_not_answer_is_named() -> None:
    [check] = _about(NODE, "ModuleNotFoundError: No module named 'unroll'", ANSWER)
    assert not check.ok
    assert "unroll" in check.advice


@pytest.mark.parametrize(
    ("profile", "resources", "expected"),
    [
        ({"workers": 2}, {"CPU": 8.0}, 2),
        ({"workers": [1, 8], "cpus_per_worker": 2}, {"CPU": 6.0}, 3),
        ({"workers": [1, 8], "gpu": True, "cpus_per_worker": 4}, {"CPU": 64.0, "GPU": 2.0}, 2),
        ({"workers": "auto"}, {"CPU": 3.0}, 3),
        ({"workers": 4}, {}, 1),
    ],
)
def test_as_many_workers_as_there_is_room_for(
    profile: dict[str, Any], resources: dict[str, float], expected: int
) -> None:
    assert worker_number(Profile(**profile), resources) == expected
