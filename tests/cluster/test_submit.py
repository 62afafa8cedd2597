"""`unroll submit` to a cluster of two nodes that takes jobs (`pip install '.[cluster]'`)."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray_cluster import Project, RayCluster, cluster_of_two

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        importlib.util.find_spec("opencensus") is None, reason="no ray[default]: pip install '.[cluster]'"
    ),
]
STAGES = {
    "prepare": {"cmd": "python -m unroll prepare own", "deps": ["own.txt"], "outs": ["data/prepared/own"]},
    "train": {
        "cmd": "python -m unroll train small",
        "meta": {"runs_on": "workers"},
        "deps": ["data/prepared/own"],
        "outs": ["models/small", "histories/small"],
    },
}


@pytest.fixture(scope="module")
def taking_jobs() -> Iterator[RayCluster]:
    with tempfile.TemporaryDirectory(prefix="unroll-") as folder:
        # A node runs the code of the environment that it was started in, as an image would hold it.
        source = {
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with cluster_of_two(Path(folder), dashboard=True, variables=source) as cluster:
            yield cluster


def test_a_job_trains_on_the_cluster_and_its_results_come_back(tmp_path: Path, taking_jobs: RayCluster) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    project = Project(here, taking_jobs, {"steps": 40, "checkpoint_every": 20, "validate_every": 20})
    (here / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=here, check=True)
    command = [sys.executable, "-m", "unroll", "submit", "--address", taking_jobs.jobs, "--folder", str(there)]
    command += ["--profile", "run", "--include", "own.txt", "train"]
    environment = {name: value for name, value in taking_jobs.environment.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (there / "models/small/seed-1/weights.safetensors").exists()
    assert '"workers": 2' in (there / "histories/small/seed-1/cost.json").read_text()
    assert "models/small" in (here / "dvc.lock").read_text(), "the lock file was fetched"
    assert "fetched dvc.lock" in done.stdout
    assert taking_jobs.token not in done.stdout + done.stderr
    assert not (project.root / "models").exists()


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_without_the_token_no_job_is_taken(tmp_path: Path, taking_jobs: RayCluster, mode: str) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    environment = {**taking_jobs.environment, "RAY_AUTH_TOKEN_PATH": str(wrong), "RAY_AUTH_MODE": mode}
    environment.pop("RAY_ADDRESS")
    Project(tmp_path / "here", taking_jobs, {"steps": 4})
    (tmp_path / "here" / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    command = [sys.executable, "-m", "unroll", "submit", "--address", taking_jobs.jobs, "train"]
    done = subprocess.run(command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error:") or "error:" in done.stderr
