"""An S3-compatible server for checkpoints, shards and the DVC remote (`pip install 'moto[server]' dvc-s3`)."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from project import project
from ray_cluster import free_port, until

from unroll.place import Place
from unroll.training.context import WorkerContext
from unroll.training.runs import train_one

MISSING = [name for name, module in {"moto[server]": "moto", "dvc-s3": "dvc_s3", "s3fs": "s3fs"}.items()
           if importlib.util.find_spec(module) is None]  # fmt: skip
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.fault,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: pip install 'moto[server]' dvc-s3"),
]
STAGES = {
    "prepare": {"cmd": "python -m unroll prepare own", "deps": ["own.txt"], "outs": ["data/prepared/own"]},
    "train": {
        "cmd": "python -m unroll train small --plain",
        "deps": ["data/prepared/own"],
        "outs": ["models/small", "histories/small"],
    },
}
SLOW = """
import time
from unroll.training.loop import Run
step = Run.step
Run.step = lambda self, batches: (time.sleep(0.05), step(self, batches))[1]
from unroll.cli import main
main()
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which `s3://bucket` is a server of our own."""
    address = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    with (tmp_path_factory.mktemp("s3") / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{address}/moto-api/", timeout=5):
                return True
        except OSError:
            return False

    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "seeded-s3-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }
    try:
        until(answers, 90, "the S3 server does not start")
        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"), timeout=20)
        yield {**os.environ, **environment, "OMP_NUM_THREADS": "1", "UNROLL_TRACK": "0"}
    finally:
        server.terminate()
        server.wait()


def run(root: Path, environment: dict[str, str], *words: str) -> str:
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=root, env={**environment, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_machine_without_any_disk_goes_on_from_the_store(tmp_path: Path, store: dict[str, str]) -> None:
    train = {"steps": 600, "checkpoint_every": 20, "validate_every": 300}
    recipe, place = project(tmp_path / "undisturbed", train=train)
    train_one(recipe, 1, place, WorkerContext())
    profile = yaml.safe_dump({"profiles": {"run": {"workers": 0, "copies": "s3://bucket/runs"}}})
    roots = [tmp_path / name for name in ("lost", "other")]
    for root in roots:
        project(root, train=train)
        (root / "cluster").mkdir()
        (root / "cluster/profiles.yaml").write_text(profile)
    command = [sys.executable, "-c", SLOW, "train", "small", "--profile", "run"]
    with (tmp_path / "log").open("wb") as log:
        lost = subprocess.Popen(command, cwd=roots[0], env=store, stdout=log, stderr=log)

    def copied() -> bool:
        assert lost.poll() is None, (tmp_path / "log").read_text()
        with urllib.request.urlopen(f"{store['AWS_ENDPOINT_URL']}/bucket?list-type=2", timeout=20) as answer:
            return b"checksums.json" in answer.read()

    until(copied, 150, "nothing is copied")
    lost.send_signal(signal.SIGKILL)
    lost.wait()
    shutil.rmtree(roots[0])
    told = run(roots[1], store, "unroll", "train", "small", "--profile", "run")
    assert "taken from s3://bucket/runs" in told
    assert "resumed at step" in told
    assert "seeded-s3-secret" not in told
    weights = [(Place(at).model(recipe, 1) / "weights.safetensors").read_bytes() for at in (place.root, roots[1])]
    assert weights[0] == weights[1]


def test_shards_and_models_travel_through_a_remote_in_the_store(tmp_path: Path, store: dict[str, str]) -> None:
    """One machine computes and pushes; another pulls, and has nothing left to do."""
    here, there = tmp_path / "here", tmp_path / "there"
    project(here, train={"steps": 20})
    shutil.rmtree(here / "data")
    (here / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    run(here, store, "dvc", "init", "-q", "--no-scm")
    run(here, store, "dvc", "remote", "add", "--default", "store", "s3://bucket/dvc")
    run(here, store, "dvc", "remote", "modify", "store", "endpointurl", store["AWS_ENDPOINT_URL"])
    run(here, store, "unroll", "repro", "train")
    run(here, store, "dvc", "push")
    there.mkdir()
    for name in ("dvc.yaml", "dvc.lock", "params.yaml", "own.txt"):
        shutil.copyfile(here / name, there / name)
    shutil.copytree(here / "recipes", there / "recipes")
    run(there, store, "dvc", "init", "-q", "--no-scm")
    shutil.copyfile(here / ".dvc/config", there / ".dvc/config")
    run(there, store, "dvc", "pull")
    for name in ("data/prepared/own/manifest.json", "models/small/seed-1/weights.safetensors"):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    assert "cached" in run(there, store, "unroll", "repro", "train")
    assert not (there / "runs").exists(), "nothing was trained again"
