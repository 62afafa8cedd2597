"""cluster/slurm.sh under a real Slurm of two nodes on this machine (Debian: `apt-get install slurm-wlm munge`)."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from project import project
from ray_cluster import free_port, until

from unroll.training import checkpoint

ROOT = Path(__file__).parents[2]
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons run as root"),
]
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=20
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=2
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=1 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
STAGES = {
    "train": {
        "cmd": "python -m unroll train small",
        "meta": {"runs_on": "workers"},
        "deps": ["data/prepared/own"],
        "outs": ["models/small", "histories/small"],
    }
}


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which `sbatch` finds a Slurm of its own."""
    folder = Path(tempfile.mkdtemp(prefix="unroll-slurm-"))
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    conf = folder / "slurm.conf"
    ports = {"port": free_port(), "one": free_port(), "two": free_port()}
    conf.write_text(CONF.format(host=socket.gethostname().partition(".")[0], folder=folder, **ports))
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / "daemons.log").open("ab") as log:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    def answer() -> str:
        done = subprocess.run(["sinfo", "-h", "-o", "%T %D"], env=environment, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        munge = [f"--{name}={folder}/{file}" for name, file in
                 {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log",
                  "seed-file": "munged.seed"}.items()]  # fmt: skip
        start("munged", "--force", "--foreground", *munge)
        until((folder / "munge.sock").exists, 20, "munged does not start")
        start("slurmctld", "-D", "-f", str(conf))
        for node in ("one", "two"):
            (folder / f"spool-{node}").mkdir()
            start("slurmd", "-D", "-N", node, "-f", str(conf))
        until(lambda: answer() == "idle 2", 60, lambda: f"Slurm has no two idle nodes: {answer()}")
        yield environment
    finally:
        subprocess.run(["scancel", "--full", "--user", "root"], env=environment, capture_output=True)
        with contextlib.suppress(AssertionError):
            until(lambda: answer() == "idle 2", 60, "jobs do not end")
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def write(root: Path, steps: int) -> Path:
    """A project with one stage that trains with two workers, one on each node; returns its checkpoints."""
    train = {"steps": steps, "checkpoint_every": steps, "validate_every": steps, "batch": 6}
    recipe, place = project(root, train=train)
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    (root / "cluster").mkdir()
    profile = {"workers": 2, "cpus_per_worker": 1, "address": "auto", "max_failures": 2}
    (root / "cluster/profiles.yaml").write_text(yaml.safe_dump({"profiles": {"run": profile}}))
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=root, check=True)
    return place.run(recipe, 1)


def submit(root: Path, environment: dict[str, str]) -> str:
    variables = {"UNROLL_PROFILE": "run", "UNROLL_VENV": sys.prefix, "UNROLL_TRACK": "0", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in environment.items() if not name.startswith(("RAY_", "UNROLL_"))}
    command = ["sbatch", "--parsable", "--nodes", "2", "--cpus-per-task", "1", str(ROOT / "cluster/slurm.sh"), "train"]
    done = subprocess.run(command, cwd=root, env={**kept, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def state(job: str, environment: dict[str, str]) -> str:
    done = subprocess.run(["scontrol", "show", "job", "-o", job], env=environment, capture_output=True, text=True)
    return next((word.partition("=")[2] for word in done.stdout.split() if word.startswith("JobState=")), "")


def log(root: Path) -> str:
    return "".join(path.read_text() for path in root.glob("slurm-*.log"))


def test_the_pipeline_runs_on_two_nodes(tmp_path: Path, slurm: dict[str, str]) -> None:
    write(tmp_path, 60)
    job = submit(tmp_path, slurm)
    until(
        lambda: state(job, slurm) in ("COMPLETED", "FAILED", "NODE_FAIL"), 240, f"the job does not end: {log(tmp_path)}"
    )
    assert state(job, slurm) == "COMPLETED", log(tmp_path)
    assert (tmp_path / "models/small/seed-1/weights.safetensors").exists()
    assert '"workers": 2' in (tmp_path / "histories/small/seed-1/cost.json").read_text()
    assert "small" in (tmp_path / "dvc.lock").read_text()
    assert list((tmp_path / ".dvc/tmp").glob("ray-token-*")) == [], "the job's token is gone"


def test_a_preempted_job_saves_is_queued_again_and_goes_on(tmp_path: Path, slurm: dict[str, str]) -> None:
    """`scancel --signal TERM --batch` is what Slurm itself does two minutes before the limit (--signal=B:TERM@120)."""
    run = write(tmp_path, 1_000_000)
    job = submit(tmp_path, slurm)
    until(lambda: run.joinpath("journal.jsonl").exists() and '"step":50,' in run.joinpath("journal.jsonl").read_text(),
          240, f"no training: {log(tmp_path)}")  # fmt: skip
    subprocess.run(["scancel", "--signal", "TERM", "--batch", job], env=slurm, check=True)
    until(lambda: checkpoint.newest(run / "checkpoints")[0], 30, lambda: f"no checkpoint: {log(tmp_path)}")
    until(
        lambda: "resumed at step" in log(tmp_path) or _worker_log(tmp_path), 300, f"not queued again: {log(tmp_path)}"
    )
    subprocess.run(["scancel", job], env=slurm, check=True)
    until(lambda: state(job, slurm) == "CANCELLED", 90, state(job, slurm))


def _worker_log(root: Path) -> bool:
    """What a stage prints goes to a file of its own."""
    return any("resumed at step" in path.read_text(errors="replace") for path in (root / ".dvc/tmp/repro").glob("*"))
