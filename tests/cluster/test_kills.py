"""kill -9 of a worker, a node or the driver while two workers train: nothing is lost but time.

Several kills fall into one run, each after the run has gone on from the one before: a kill that changed a weight would
change all that follow, so equal final weights speak for every kill.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from ray_cluster import SEED, Project, RayCluster, Training, trials, until

pytestmark = [pytest.mark.cluster, pytest.mark.fault]
INTERVAL = 40
KILLS_A_RUN = 10
TRAIN = {
    "batch": 6,
    "steps": 2000,
    "checkpoint_every": INTERVAL,
    "validate_every": 200,
    "optimizer": {"name": "adamw", "learning_rate": 0.01, "clip": 1.0},
}


@pytest.fixture(scope="module")
def undisturbed(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    project = Project(tmp_path_factory.mktemp("undisturbed"), cluster, TRAIN)
    training = project.start()
    training.wait()
    assert training.resumed_at() == []
    return project.weights()


def kill_a_worker(project: Project, training: Training, draw: random.Random) -> Training:
    draw.choice(project.cluster.workers()).kill()
    return training


def kill_a_node(project: Project, training: Training, draw: random.Random) -> Training:
    """The node beside the head, which holds the driver; another comes in its place."""
    lost = project.cluster.nodes.pop()
    lost.kill()
    project.cluster.add()
    return training


def kill_the_driver(project: Project, training: Training, draw: random.Random) -> Training:
    training.stop()
    return project.start()


@pytest.mark.parametrize(
    ("kill", "number"),
    [(kill_a_worker, trials(20)), (kill_a_node, trials(10)), (kill_the_driver, trials(10))],
    ids=["worker", "node", "driver"],
)
def test_kills_change_no_weight(
    tmp_path: Path,
    cluster: RayCluster,
    undisturbed: bytes,
    kill: Callable[[Project, Training, random.Random], Training],
    number: int,
) -> None:
    draw = random.Random(SEED)
    for run, done in enumerate(range(0, number, KILLS_A_RUN)):
        project = Project(tmp_path / str(run), cluster, TRAIN)
        training = project.start()
        reached = 0
        for _ in range(min(KILLS_A_RUN, number - done)):
            # Before its first checkpoint a run would begin anew, and not say that it resumes.
            training.wait_for_step(max(INTERVAL + 1, reached + draw.randint(5, 180)))
            resumed, reached = len(training.resumed_at()), training.last_step()
            training = kill(project, training, draw)
            until(lambda n=resumed, t=training: len(t.resumed_at()) > n, 120, training.text)
            assert reached - training.resumed_at()[-1] <= INTERVAL, "more than one interval is redone"
        training.wait()
        assert project.weights() == undisturbed
        steps = [step for step, _ in training.steps()]
        assert steps == list(range(1, TRAIN["steps"] + 1)), "the journal holds every step once"  # type: ignore[operator]
