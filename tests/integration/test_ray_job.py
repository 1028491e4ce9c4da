"""The sweep as it is used at work: submitted as a Ray job, with shards, checkpoints and models in an object store.

An S3 server, an MLflow server and a Ray cluster with token authentication run here as processes of their own; what a
person would type is run as a command.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests

from tests.raw_folders import write_mvtec
from tests.servers import KEY, SECRET, free_port, moto_s3, ray_head, wait_for

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SHARDS, RUNS = "s3://factory/shards", "s3://factory/runs"
TOKEN = "a-token-for-tests-and-nothing-else-0123456789abcdef"
STOP_WAIT_S = 60
AGENT_TIMEOUT_S = 60.0
"""Until a head that just started takes jobs."""
SETTINGS = (
    *("model.backbone=resnet18", "model.weights=random", "model.layers=[1,2]"),
    *("model.seg_channels=16", "model.cls_channels=4", "data.image_size=[32,48]"),
    *("train.batch_size=8", "eval.size=[24,32]", "eval.batch_size=4", "search.grace_epochs=1"),
    "finalists.count=1",
)
USE_CHAMPION = """
import json
import mlflow, numpy as np
model = mlflow.pyfunc.load_model("models:/tiny.gadget@champion")
result = model.predict(np.full((1, 40, 60, 3), 128, np.uint8))
print(json.dumps([float(result["score"][0]), list(result["anomaly_map"].shape)]))
"""


@dataclass(frozen=True)
class Cluster:
    """Addresses, and the environment of somebody who works with it."""

    dashboard: str
    mlflow: str
    s3: str
    env: dict[str, str]

    def run(self, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; standard output has what it said on either."""
        return subprocess.run(
            words, cwd=cwd, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )

    def command(self, *words: str, cwd: Path = ROOT, check: bool = True) -> str:
        """Run a command to its end; what it printed."""
        done = self.run(*words, cwd=cwd)
        assert not check or done.returncode == 0, f"{' '.join(words)}\n{done.stdout}"
        return done.stdout

    def submit(self, name: str, *options: str, submit: tuple[str, ...] = ()) -> str:
        """``ray job submit`` of a sweep from the checkout; what it printed."""
        words = (
            *("ray", "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--submission-id", name),
            *submit,
            *("--", "python", "-m", "tuning", "sweep", "tiny", "--data", SHARDS, "--out", RUNS),
            *(word for setting in SETTINGS for word in ("--set", setting)),
            *options,
        )
        done, deadline = self.run(*words), time.monotonic() + AGENT_TIMEOUT_S
        while "No available agent to submit job" in done.stdout and time.monotonic() < deadline:
            time.sleep(1)
            done = self.run(*words)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}"
        return done.stdout

    def runs(self, sweep_of_job: str) -> list[Any]:
        """MLflow's runs of the sweep that a job started."""
        from tuning.tracking.mlflow_tracker import open_client

        client = open_client(self.mlflow)
        experiment = client.get_experiment_by_name("tiny")
        if experiment is None:
            return []
        every = list(client.search_runs([experiment.experiment_id]))
        ids = {r.data.tags["sweep_id"] for r in every if r.data.tags.get("ray_job") == sweep_of_job}
        return [r for r in every if r.data.tags["sweep_id"] in ids]

    def objects(self, prefix: str) -> list[str]:
        client = boto3.client("s3", endpoint_url=self.s3, region_name="us-east-1", **_credentials())
        try:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket="factory", Prefix=prefix)
            return [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        finally:
            client.close()


def _credentials() -> dict[str, str]:
    return {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    base = tmp_path_factory.mktemp("cluster")
    (base / "token").write_text(TOKEN)
    with moto_s3("factory") as s3:
        mlflow, dashboard = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_", "MLFLOW_", "PYTEST_"))} | {
            **{key.upper(): value for key, value in _credentials().items()},
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": s3,
            "AWS_REGION": "us-east-1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes that nothing here needs
            "MLFLOW_TRACKING_URI": f"http://{mlflow}",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(base / "token"),
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            "RAY_worker_niceness": "0",
        }
        ray_options = ("--num-cpus=2", "--object-store-memory=300000000", "--dashboard-host=127.0.0.1")
        with (
            _mlflow_server(base, env, mlflow),
            ray_head(base / "ray.log", env, *ray_options, f"--dashboard-port={dashboard.rpartition(':')[2]}"),
        ):
            wait_for(dashboard)
            wait_for(mlflow, timeout_s=120)
            yield Cluster(f"http://{dashboard}", f"http://{mlflow}", s3, env)


@contextmanager
def _mlflow_server(folder: Path, env: dict[str, str], address: str) -> Iterator[None]:
    """It takes its time to answer, in which Ray can start."""
    host, _, port = address.partition(":")
    command = ["mlflow", "server", "--host", host, "--port", port, "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        "s3://factory/mlflow",
    ]
    with (folder / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its workers are processes of their own
        server.wait(60)


@pytest.fixture(scope="module")
def shards(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two categories, ingested into the object store as a person would."""
    base = tmp_path_factory.mktemp("tiny")
    write_mvtec(base / "raw", "widget")
    write_mvtec(base / "raw", "gadget", first_seed=1000)
    (base / "tiny.yaml").write_text("name: tiny\nlayout: mvtec\n")
    cluster.command(
        "python", "-m", "ssn", "ingest", str(base / "tiny.yaml"), "--raw", str(base / "raw"), "--out", SHARDS
    )
    return SHARDS


@pytest.fixture(scope="module")
def finished(cluster: Cluster, shards: str) -> str:
    """What the job of a whole sweep printed."""
    return cluster.submit("whole", "--trials", "2", "--set", "train.epochs=2")


def test_a_job_leaves_champions_that_any_process_can_load(cluster: Cluster, finished: str, tmp_path: Path) -> None:
    assert "Job 'whole' succeeded" in finished
    listed = cluster.command("python", "-m", "tuning", "champions", "list", "tiny")
    assert "tiny.gadget" in listed
    assert "tiny.widget" in listed
    printed = cluster.command("python", "-c", USE_CHAMPION, cwd=tmp_path)
    score, shape = json.loads(printed.splitlines()[-1])
    assert isinstance(score, float)
    assert shape == [1, 32, 48]


def test_all_that_a_sweep_keeps_is_in_the_store(cluster: Cluster, finished: str) -> None:
    runs = cluster.runs("whole")
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(runs) == 2 + 4
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert sum(r.data.tags["trial_state"] == "COMPLETE" for r in children) >= 2
    assert any(key.endswith("/heads.safetensors") for key in cluster.objects("mlflow/"))
    (sweep_id,) = {r.data.tags["sweep_id"] for r in runs}
    assert any("checkpoint" in key for key in cluster.objects(f"runs/{sweep_id}/"))


def test_a_log_shows_progress_line_by_line(finished: str) -> None:
    assert re.search(r"^0/4 trials, \d running, .* elapsed$", finished, re.MULTILINE)
    assert re.search(r"^4/4 trials, 0 running, .* elapsed$", finished, re.MULTILINE)
    assert not [line for line in finished.splitlines() if "\x1b" in line and "cli.py" not in line]
    assert "Traceback" not in finished


def test_without_the_token_there_is_no_answer(cluster: Cluster) -> None:
    url = f"{cluster.dashboard}/api/jobs/"
    assert requests.get(url, timeout=10).status_code == 401
    assert requests.get(url, headers={"Authorization": "Bearer wrong"}, timeout=10).status_code == 403
    assert requests.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10).status_code == 200


@pytest.mark.slow
def test_stopping_a_job_leaves_no_run_open(cluster: Cluster, shards: str) -> None:
    cluster.submit("stopped", "--trials", "50", "--set", "train.epochs=50", submit=("--no-wait",))
    deadline = time.monotonic() + 300
    while not any("mlflow.parentRunId" in r.data.tags and r.data.metrics for r in cluster.runs("stopped")):
        assert time.monotonic() < deadline, cluster.command("ray", "job", "logs", "stopped")
        time.sleep(1)
    started_s = time.monotonic()
    said = cluster.command("ray", "job", "stop", "--address", cluster.dashboard, "stopped")
    assert "was stopped" in said
    assert time.monotonic() - started_s < STOP_WAIT_S  # by itself, not by the SIGKILL that follows
    log = cluster.command("ray", "job", "logs", "--address", cluster.dashboard, "stopped")
    assert re.search(r"^interrupted; .*, and nothing is lost$", log, re.MULTILINE)
    assert re.search(r"^to go on: .* --resume \S+ --out s3://factory/runs$", log, re.MULTILINE)
    assert "Traceback" not in log
    runs = cluster.runs("stopped")
    assert {r.info.status for r in runs if "mlflow.parentRunId" not in r.data.tags} == {"KILLED"}
    assert not [r.info.run_id for r in runs if r.info.status == "RUNNING"]


@pytest.mark.slow
def test_a_worker_group_leaves_its_models_in_the_store_too(cluster: Cluster, shards: str) -> None:
    options = ("--num-workers", "1", "--trials", "1", "--category", "gadget", "--set", "train.epochs=1")
    assert "Job 'group' succeeded" in cluster.submit("group", *options)
    states = {r.data.tags.get("trial_state") for r in cluster.runs("group")}
    assert states == {None, "COMPLETE"}
