"""An elastic group loses a node and gets another in mid-epoch: the same global order, every sample once, the same losses."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import Project, RayCluster, until

from unroll.data.plan import StreamPlan
from unroll.data.shards import load_manifest
from unroll.journal import history
from unroll.training.context import WorkerContext
from unroll.training.runs import train_one

pytestmark = [pytest.mark.cluster, pytest.mark.fault]
ROWS, WINDOW = 6, 9
TRAIN = {
    "batch": ROWS,
    "window": WINDOW,
    "steps": 3000,
    "checkpoint_every": 50,
    "validate_every": 3000,
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "clip": 1.0},
}

# Every worker writes down which rows of which window it learns from; Python runs this file when the worker starts. It goes
# slowly until the test says that the cluster is whole again: the run must last until Ray has seen the new node.
WITNESS = """
import json, os, time
from unroll.training.loop import Run
step = Run.step

def witnessed(self, batches):
    before = self.progress.step
    if not os.path.exists(os.path.join(os.environ["WITNESS"], "whole")):
        time.sleep(0.03)
    result = step(self, batches)
    with open(os.path.join(os.environ["WITNESS"], f"{os.getpid()}.jsonl"), "a") as file:
        for batch in batches:
            rows = [batch.first_row, batch.first_row + len(batch.tensors["tokens"])]
            line = {"step": before, "size": self.context.size, "rows": rows, "name": batch.description, "weight": batch.weight}
            file.write(json.dumps(line) + "\\n")
    return result

Run.step = witnessed
"""


def witnessed(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What was learnt from at each step, by the group that did it last: a step that was redone replaces the earlier one."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_ctime):
        complete = path.read_text().rpartition("\n")[0]  # a line may be half written, now or for ever
        for line in map(json.loads, complete.splitlines()):
            kept = [other for other in steps.get(line["step"], []) if other["size"] == line["size"]]
            same = [other for other in kept if other["rows"] == line["rows"]]
            steps[line["step"]] = [*(other for other in kept if other not in same), line]
    return steps


def test_two_one_two_workers_in_mid_epoch(tmp_path: Path, cluster: RayCluster) -> None:
    witness = tmp_path / "witness"
    witness.mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(WITNESS)
    path = os.pathsep.join(filter(None, [str(tmp_path / "code"), cluster.environment.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": path, "WITNESS": str(witness)}
    project = Project(tmp_path / "elastic", cluster, TRAIN, workers=[1, 2], environment=environment)
    training = project.start()

    def learnt_with(size: int) -> int:
        """Steps that were done by a group of this size since this was first asked."""
        lines = (line for lines in witnessed(witness).values() for line in lines)
        return sum(line["size"] == size for line in lines)

    training.wait_for_step(200)
    lost = cluster.nodes.pop()
    lost.kill()
    until(lambda: learnt_with(1) > 100, 150, lambda: f"one worker does not go on: {training.text()}")
    cluster.add()
    before = learnt_with(2)
    until(lambda: learnt_with(2) > before + 200, 150, lambda: f"the group does not grow: {training.text()}")
    (witness / "whole").touch()
    training.wait(400)

    steps = witnessed(witness)
    assert sorted(steps) == list(range(TRAIN["steps"]))
    sizes = [lines[0]["size"] for _, lines in sorted(steps.items())]
    changes = [size for number, size in enumerate(sizes) if number == 0 or size != sizes[number - 1]]
    assert changes == [2, 1, 2]
    changed = [number for number in range(1, len(sizes)) if sizes[number] != sizes[number - 1]]
    assert all(" step 0 " not in steps[number][0]["name"] for number in changed), "in mid-epoch"
    assert_every_token_once(steps, project)
    print(f"steps by number of workers: {dict(Counter(sizes))}; changes before steps {changed}")

    one = Project(tmp_path / "one", cluster, TRAIN)
    train_one(one.recipe, 1, one.place, WorkerContext())
    losses = [
        [point.value for point in history(root / "histories/small/seed-1")["train/loss"]]
        for root in (project.root, one.root)
    ]
    assert len(losses[0]) == len(losses[1])
    for first in (sizes.index(1), len(sizes) - sizes[::-1].index(1)):
        assert losses[0][first : first + 200] == pytest.approx(losses[1][first : first + 200], rel=1e-5)


def test_the_next_command_takes_over_what_a_killed_driver_had_reserved(tmp_path: Path, cluster: RayCluster) -> None:
    """Ray keeps machines for an elastic group until its reservation expires; nobody is left to give it back."""
    project = Project(tmp_path, cluster, {**TRAIN, "steps": 100_000}, workers=[1, 2])
    killed = project.start()
    killed.wait_for_step(60)
    killed.stop()
    seen = len(killed.text())
    training = project.start()
    try:
        until(lambda: "resumed at step" in training.text()[seen:], 150, training.text)
        assert "Deciding NOT to start" not in training.text()[seen:]
    finally:
        training.stop()


def assert_every_token_once(steps: dict[int, list[dict[str, Any]]], project: Project) -> None:
    """In each epoch that was done in full, each row of each window once, whatever the size of the group."""
    tokens = load_manifest(project.place.data("own"))["splits"]["train"]["tokens"]
    plan = StreamPlan(tokens, ROWS, WINDOW, seed=1)
    number, epoch = 0, 0
    while number + plan.steps(epoch) <= len(steps):
        seen: Counter[tuple[int, int]] = Counter()
        weight = 0.0
        for step in range(plan.steps(epoch)):
            for line in steps[number + step]:
                assert line["name"].startswith(f"epoch {epoch} step {step} ")
                seen.update((row, step) for row in range(*line["rows"]))
                weight += line["weight"]
        assert set(seen.values()) == {1}
        assert len(seen) == ROWS * plan.steps(epoch)
        assert weight == tokens - 1
        number, epoch = number + plan.steps(epoch), epoch + 1
    assert epoch > 2
