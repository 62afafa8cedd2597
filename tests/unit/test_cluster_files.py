"""The files of `cluster/`: they fit their published schemas, hold no secret, and listen to nobody outside."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from unroll.config import read_yaml
from unroll.remote_job import COMMANDS, PROJECT
from unroll.training.launch import load_profile

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
VALUES = {
    "ray_ssh.yaml": ["HEAD=10.0.0.1", "WORKERS=10.0.0.2,10.0.0.3", "SSH_USER=ann", "PROJECT=/shared/unroll"],
    "ray_aws.yaml": ["IMAGE=registry/unroll:0.1", "FILE_SYSTEM=fs-1.example.org:/"],
    "kuberay_cluster.yaml": ["IMAGE=registry/unroll:0.1", "CLAIM=shared"],
    "kuberay_job.yaml": ["IMAGE=registry/unroll:0.1", "CLAIM=shared", "TARGETS=report@demo", "PROFILE=cluster_cpu"],
}
FILES = sorted(path for path in CLUSTER.iterdir() if path.is_file())


def fill(name: str, *values: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CLUSTER / "fill"), str(CLUSTER / name), *values]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})


def filled(name: str) -> dict[str, Any]:
    done = fill(name, *VALUES[name])
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = yaml.safe_load(done.stdout)
    return content


@pytest.mark.parametrize("name", VALUES)
def test_a_missing_value_is_named_and_an_unknown_or_broken_one_refused(name: str) -> None:
    for value in VALUES[name]:
        rest = [other for other in VALUES[name] if other != value]
        done = fill(name, *rest)
        needed = value.partition("=")[0]
        if needed not in ("TARGETS", "PROFILE"):
            assert done.returncode != 0
            assert f"{needed} is needed" in done.stderr
    assert "has no IMAGES" in fill(name, *VALUES[name], "IMAGES=x").stderr
    assert "line break" in fill(name, *VALUES[name][1:], f"{VALUES[name][0]}\nkey: value").stderr


@pytest.mark.parametrize("name", read_yaml(CLUSTER / "profiles.yaml")["profiles"])
def test_every_profile_can_be_used(name: str) -> None:
    profile = load_profile(ROOT, name)
    assert profile.address in ("local", "auto")
    assert profile.address == "auto" or profile.max_failures < 10


@pytest.mark.parametrize("name", ["ray_ssh.yaml", "ray_aws.yaml"])
def test_ray_cluster_files_fit_rays_schema(name: str) -> None:
    package = importlib.util.find_spec("ray")
    assert package is not None
    assert package.submodule_search_locations
    schema = json.loads((Path(package.submodule_search_locations[0]) / "autoscaler/ray-schema.json").read_text())
    content = filled(name)
    jsonschema.validate(content, schema)
    starts = content["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in starts
    for commands in (content["head_start_ray_commands"], content["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
    if name == "ray_aws.yaml":
        types = content["available_node_types"]
        assert content["head_node_type"] in types
        assert max(kind.get("max_workers", 0) for kind in types.values()) == content["max_workers"]


def test_kubernetes_manifests_have_what_kuberay_needs() -> None:
    """Checked in full against the resource definitions of KubeRay 1.7; here what a mistake would most likely hit."""
    cluster, job = filled("kuberay_cluster.yaml"), filled("kuberay_job.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == (job["apiVersion"], "RayCluster")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"], "one cluster, written down twice"
    command = shlex.split(job["spec"]["entrypoint"].partition(" -- ")[2])
    assert command == ["unroll", "repro", "--ray", "--profile", "cluster_cpu", "report@demo"]
    assert command[0] in COMMANDS, "what remote_job runs"
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["image"] == "registry/unroll:0.1"
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    worker = spec["workerGroupSpecs"][0]
    assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


def test_the_version_of_ray_is_the_pinned_one() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert filled("kuberay_cluster.yaml")["spec"]["rayVersion"] == pinned[1]


def test_the_trackers_are_reached_from_this_machine_alone_unless_told_otherwise() -> None:
    compose = yaml.safe_load((CLUSTER / "mlflow_compose.yaml").read_text())
    database, server = compose["services"]["database"], compose["services"]["server"]
    assert server["ports"] == ["${MLFLOW_BIND:-127.0.0.1}:${MLFLOW_PORT:-5000}:5000"]
    assert "ports" not in database
    assert database["networks"] == ["inside"]
    assert compose["networks"]["inside"] == {"internal": True}
    assert "--artifacts-destination" in server["command"][-1]
    unit = (CLUSTER / "mlflow.service").read_text()
    assert "HOST=127.0.0.1" in unit
    assert "--artifacts-destination" in unit


def test_the_image_and_a_job_find_the_packages_that_they_name() -> None:
    """`.[cluster]`: Ray's dashboard, which takes jobs, is not in `ray[train]`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(name.startswith("ray[default]") for name in extras["cluster"])
    assert "'.[cluster]'" in (CLUSTER / "Dockerfile").read_text()


def test_the_image_holds_what_a_job_uploads() -> None:
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert sorted(line[1:] for line in lines if line.startswith("!")) == sorted(PROJECT)
    image = (CLUSTER / "Dockerfile").read_text()
    assert "USER unroll" in image
    assert "--constraint constraints.txt" in image


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_secret_or_opens_the_dashboard(path: Path) -> None:
    text = path.read_text()
    assert "dashboard-host=0.0.0.0" not in text
    assert "dashboard-host 0.0.0.0" not in text
    secret = re.compile(r"(?i)(password|secret|token|access_key)[a-z_]*\s*[:=]\s*['\"]?[A-Za-z0-9+]{12,}")
    assert not secret.search(text)
    assert "RAY_AUTH_MODE=disabled" not in text


# --- Slurm, with stand-ins for its commands ----------------------------------------------------------------------------

STAND_INS = {
    "scontrol": 'case "$1 $2" in "show hostnames") echo one; echo two;; "show job") echo "JobId=7 JobState=$STATE";;\n'
    '*) echo "$*" >> "$SAID/scontrol";; esac',
    "srun": 'while [ "$1" != -w ]; do shift; done; shift; export NODE=$1; shift; exec "$@"',
    "hostname": "echo 10.0.0.1 10.9.9.9",
    "ray": 'echo "$NODE $RAY_AUTH_MODE $(wc -c < "$RAY_AUTH_TOKEN_PATH") $*" >> "$SAID/ray"\n'
    '[ "$1" = start ] && exec sleep 600\ngrep -q -e --head "$SAID/ray"',
    "python": 'if [ "$1" = -c ]; then exec {python} "$@"; fi\n'
    'while [ "$(grep -c " start " "$SAID/ray")" -lt 2 ]; do sleep 0.05; done\n'
    "trap '[ -z \"$!\" ] || kill $!; exit 75' TERM\n"
    'echo "$RAY_ADDRESS $UNROLL_PROFILE $*" >> "$SAID/python"\n'
    'if [ -n "$LONG" ]; then sleep 600 & wait; fi; exit $CODE',
}


def slurm(root: Path, **variables: str) -> subprocess.Popen[str]:
    tools = root / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, text in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text.replace('{python}', shlex.quote(sys.executable))}\n")
        (tools / name).chmod(0o755)
    (tools / "activate").write_text(f'PATH="{tools}:$PATH"\n')
    job = {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_CPUS_PER_TASK": "4"}
    environment = {
        "PATH": os.environ["PATH"],
        "SAID": str(root),
        "LONG": "",
        "CODE": "0",
        "STATE": "RUNNING",
        **job,
        **variables,
    }
    command = ["bash", str(CLUSTER / "slurm.sh"), "report@demo"]
    return subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)


def said(root: Path, command: str) -> list[str]:
    return (root / command).read_text().splitlines() if (root / command).exists() else []


@pytest.mark.parametrize(("gpus", "profile"), [("0", "cluster_cpu"), ("2", "cluster")])
def test_slurm_starts_ray_on_every_node_and_the_pipeline_on_the_first(tmp_path: Path, gpus: str, profile: str) -> None:
    job = slurm(tmp_path, CODE="3", SLURM_GPUS_ON_NODE=gpus)
    assert job.wait(timeout=30) == 3, job.stderr.read() if job.stderr else ""
    assert said(tmp_path, "python") == [f"10.0.0.1:20007 {profile} -m unroll repro --ray report@demo"]
    head, *others = [line for line in said(tmp_path, "ray") if " start " in line]
    assert head.startswith("one token 64 start --block")
    assert "--head --node-ip-address 10.0.0.1 --port 20007 --dashboard-host 127.0.0.1" in head
    assert f"--num-cpus 4 --num-gpus {gpus}" in head
    assert [line.split(" --disable")[0] for line in others] == ["two token 64 start --block"]
    assert not list((tmp_path / ".dvc/tmp").iterdir()), "the token is gone"
    assert said(tmp_path, "scontrol") == []


@pytest.mark.parametrize(("state", "expected"), [("RUNNING", ["requeue 7"]), ("COMPLETING", [])])
def test_slurm_lets_trainings_save_and_queues_again_unless_cancelled(
    tmp_path: Path, state: str, expected: list[str]
) -> None:
    job = slurm(tmp_path, LONG="yes", STATE=state)
    deadline = time.monotonic() + 30
    while not said(tmp_path, "python"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 75
    assert said(tmp_path, "scontrol") == expected
