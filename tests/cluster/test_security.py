"""Who can reach a run, and what it lets slip: listening sockets, Ray's token, secrets in what a run leaves behind."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from ray_cluster import Project, RayCluster, until

pytestmark = pytest.mark.cluster
TRAIN = {"batch": 6, "steps": 100_000, "checkpoint_every": 50_000, "validate_every": 100_000}
SHORT = {"steps": 20, "checkpoint_every": 10, "validate_every": 10}
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "seeded-aws-secret-4711",
    "MLFLOW_TRACKING_PASSWORD": "seeded-mlflow-password-4712",
    "GITHUB_TOKEN": "seeded-github-token-4713",
}
CLIENT = "import ray; ray.init(address='auto'); print(len(ray.nodes()))"


def test_what_ray_opens_on_a_cluster_wants_the_token(tmp_path: Path, cluster: RayCluster) -> None:
    """On a cluster nodes must reach each other: Ray listens on all addresses of a node, whatever it is told."""
    project = Project(tmp_path, cluster, TRAIN)
    training = project.start()
    try:
        training.wait_for_step(20)
        opened: dict[str, set[str]] = {}
        names = {process.pid: process.name() for node in cluster.nodes for process in node.processes()}
        names[training.process.pid] = "driver"
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid in names:
                opened.setdefault(names[connection.pid], set()).add(connection.laddr.ip)
        print({name: sorted(ips) for name, ips in sorted(opened.items())})
        known = {"gcs_server", "raylet", "driver", "python", "python3"}
        assert all(name in known or name.startswith(("ray::", "python")) for name in opened)
    finally:
        training.stop()


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["none", "wrong"])
def test_without_the_token_nobody_joins(cluster: RayCluster, tmp_path: Path, token: str | None) -> None:
    def client(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [sys.executable, "-c", CLIENT], env=environment, capture_output=True, text=True, timeout=60
            )
        except subprocess.TimeoutExpired as error:  # it goes on asking, and is not let in
            return subprocess.CompletedProcess([], 1, str(error.stdout or ""), str(error.stderr or ""))

    other = tmp_path / "token"
    other.write_text(token or "")
    environment = {**cluster.environment, "RAY_AUTH_TOKEN_PATH": str(other)}
    if token is None:
        environment["RAY_AUTH_MODE"] = "disabled"
    assert client(cluster.environment).stdout.strip() == "2"
    refused = client(environment)
    assert refused.returncode != 0
    assert refused.stdout.strip() != "2"


def test_no_secret_is_left_in_logs_parameters_or_reports(tmp_path: Path, cluster: RayCluster) -> None:
    project = Project(tmp_path, cluster, SHORT)
    tracker = f"sqlite:///{tmp_path}/mlflow.db"
    environment = {**cluster.environment, **SECRETS, "UNROLL_TRACK": "1", "MLFLOW_TRACKING_URI": tracker}
    for words in (
        ["train", "small", "--profile", "run"],
        ["predict", "small"],
        ["evaluate", "small"],
        ["report", "tiny"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "unroll", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (tmp_path / f"log-{words[0]}").write_text(done.stdout + done.stderr)
    until((tmp_path / "mlflow.db").exists, 60, "nothing was sent to the tracker")
    places = [tmp_path, *(cluster.folder / "ray").glob("session_*/logs")]
    secrets = {**SECRETS, "Ray's token": cluster.token}
    read = 0
    for path in (path for place in places for path in place.rglob("*") if path.is_file()):
        content = path.read_bytes()
        read += 1
        for name, secret in secrets.items():
            assert secret.encode() not in content, f"{name} is in {path}"
    assert read > 30
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracker)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    shown = [value for run in runs for value in (*run.data.params.values(), *run.data.tags.values())]
    assert len(shown) > 10
    assert not [value for value in shown if str(tmp_path) in value or str(Path.home()) + "/" in value]
    assert project.weights()
