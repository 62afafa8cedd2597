"""Tasks of memory machines under workers and stops: the same weights, bit for bit, however a run of them was shared or cut."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import yaml

from unroll.config import load_recipe
from unroll.place import Place
from unroll.stages.prepare import prepare
from unroll.training.context import WorkerContext
from unroll.training.loop import Preempted
from unroll.training.runs import train_one

ROOT = Path(__file__).parents[2]
RECIPES = {
    "demo_copy_ntm": "algorithms",
    "parity_act": "algorithms",
    "demo_stories": "question_answering",
    "addition_npi": "program_execution",
    "tables_neural_programmer": "table_questions",
}
PARTS, STEPS, STOP = 2, 8, 5
pytestmark = pytest.mark.fault


def project(root: Path, name: str) -> Place:
    """One recipe as it is, in parts, and its prepared data set."""
    file = RECIPES[name]
    described = yaml.safe_load((ROOT / "recipes" / f"{file}.yaml").read_text())
    entry = described["recipes"][name]
    entry["tiny"]["train"] |= {"parts": PARTS, "steps": STEPS, "validate_every": 4}
    (root / "recipes").mkdir(parents=True)
    (root / "recipes" / f"{file}.yaml").write_text(yaml.safe_dump({"recipes": {name: entry}}))
    dataset = entry["tiny"].get("dataset", entry["dataset"])
    names = {dataset, entry["dataset"]}
    datasets = yaml.safe_load((ROOT / "params.yaml").read_text())["datasets"]
    if file == "table_questions":
        datasets[dataset]["options"]["samples"] = {"train": 60, "validation": 9, "test": 9}
    (root / "params.yaml").write_text(yaml.safe_dump({"datasets": {n: datasets[n] for n in names}, "suites": {}}))
    prepare(root, dataset)
    return Place(root)


class StopAt(WorkerContext):
    """A group of which one worker is asked to stop before a step; all must."""

    left = STOP

    def wants_stop(self) -> bool:
        self.left -= 1
        return self.rank == 1 and self.left == 0


def worker(rank: int, port: int, root: str, name: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    with pytest.raises(Preempted):
        train_one(load_recipe(Path(root), name, tiny=True), 1, Place(Path(root)), StopAt(rank, 2))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("parity_act", "addition_npi") else name
        for name in RECIPES
    ],
)
def test_two_workers_that_stop_and_one_that_goes_on_give_the_weights_of_one(name: str, tmp_path: Path) -> None:
    weights = []
    for shared in (False, True):
        place = project(tmp_path / str(shared), name)
        recipe = load_recipe(place.root, name, tiny=True)
        if shared:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            multiprocessing.spawn(worker, args=(port, str(place.root), name), nprocs=2)
            assert not (place.model(recipe, 1) / "weights.safetensors").exists()
        train_one(recipe, 1, place, WorkerContext())
        weights.append((place.model(recipe, 1) / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]
