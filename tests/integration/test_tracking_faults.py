"""A real sweep of replayed trials while its MLflow server goes away, its disk fills, its database is locked."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from tests.servers import free_port, wait_for
from tests.small_disk import grow, small_disk
from tuning.tracking import MLflowTracker, Outbox, Sweep, TrialInfo
from tuning.tracking.mlflow_tracker import default_tracking_uri
from tuning.tracking.outbox import replay
from tuning.tracking.protocol import TRIAL_MODEL_FILES

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, TRIALS = 20, 8
SWEEP = Sweep("s1", "widgets", {"bolt": {}})


def outbox_for(folder: Path) -> tuple[Outbox, MLflowTracker]:
    """An outbox before a new database in ``folder``, and the tracker that shows what came through it."""
    uri = default_tracking_uri(folder)
    MLflowTracker(uri).check()
    return Outbox(MLflowTracker(uri, persistent=False), folder / "outbox", first_pause_s=0.05), MLflowTracker(uri)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    folder.mkdir()
    for name in TRIAL_MODEL_FILES:
        (folder / name).write_bytes(b"x" * 100_000)
    return folder


def test_full_artifact_disk_loses_nothing(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", size_kb=256) as disk:
        MLflowTracker(default_tracking_uri(tmp_path)).check()
        uri = default_tracking_uri(tmp_path)
        store = MLflowTracker(uri, artifact_root=str(disk), persistent=False)
        outbox, seen = Outbox(store, tmp_path / "outbox", first_pause_s=0.05), MLflowTracker(uri)
        outbox.start_sweep(SWEEP)
        for index in range(2):
            run = outbox.start_trial(SWEEP, TrialInfo("bolt", f"k{index}", index, {"train.epochs": 1}))
            outbox.log_epoch(run, 1, {"objective": 0.5})
            outbox.finish_trial(run, "COMPLETE", artifact_dir=model_dir)
        assert not outbox.drain(30)
        runs = {r.name: r for r in seen.find_runs("widgets")}
        for index in range(2):
            waits = runs[f"bolt-00{index}"]
            assert (waits.status, waits.trial_state, waits.metrics["objective"]) == ("RUNNING", None, 0.5)
        for file in disk.rglob("*"):
            assert not file.is_file() or file.name not in TRIAL_MODEL_FILES or file.stat().st_size == 100_000

        grow(disk, size_kb=2000)
        outbox.finish_sweep(SWEEP)
        outbox.close()
        runs = {r.name: r for r in seen.find_runs("widgets")}
        assert {r.status for r in runs.values()} == {"FINISHED"}
        assert all(len(seen.list_artifacts(runs[f"bolt-00{i}"].run_id)) == len(TRIAL_MODEL_FILES) for i in range(2))
    said = capsys.readouterr().err
    assert said.count("no space left where MLflow") == 1
    assert said.count("there is space for artifacts again") == 1


def test_locked_database_is_waited_for(tmp_path: Path) -> None:
    outbox, seen = outbox_for(tmp_path)
    outbox.start_sweep(SWEEP)
    assert outbox.drain(30)
    other = sqlite3.connect(tmp_path / "mlflow.db", check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    released = threading.Timer(3.0, other.rollback)
    released.start()
    run = outbox.start_trial(SWEEP, TrialInfo("bolt", "k0", 0, {"train.epochs": 1}))
    outbox.log_epoch(run, 1, {"objective": 0.5})
    outbox.finish_trial(run, "PRUNED")
    outbox.finish_sweep(SWEEP)
    assert released.is_alive(), "nobody but the outbox's thread waits"
    outbox.close()
    released.join()
    other.close()
    assert [(r.name, r.status) for r in seen.find_runs("widgets")] == [("bolt", "FINISHED"), ("bolt-000", "FINISHED")]


def test_run_whose_creation_was_not_answered_is_not_created_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, seen = outbox_for(tmp_path)
    outbox.start_sweep(SWEEP)
    assert outbox.drain(30)
    store = outbox.tracker
    assert isinstance(store, MLflowTracker)
    create, lost = store.client.create_run, []

    def create_and_lose_the_answer(*arguments: object, **options: object) -> object:
        run = create(*arguments, **options)
        if not lost:
            lost.append(run)
            raise MlflowException("API request to http://here failed with exception connection reset")
        return run

    monkeypatch.setattr(store.client, "create_run", create_and_lose_the_answer)
    run = outbox.start_trial(SWEEP, TrialInfo("bolt", "k0", 0, {"train.epochs": 1}))
    outbox.finish_trial(run, "PRUNED")
    outbox.finish_sweep(SWEEP)
    outbox.close()
    (trial,) = [r for r in seen.find_runs("widgets") if r.parent_run_id]
    assert (trial.run_id, trial.params) == (lost[0].info.run_id, {"train.epochs": "1"})


DRIVER = f"""
import json, sys, tempfile, time
from pathlib import Path

import ray
from ray import tune

from tuning.tracking import MLflowTracker, Outbox, Sweep
from tuning.tracking.callback import TrackerCallback
from tuning.tracking.protocol import TRIAL_MODEL_FILES

folder, uri = Path(sys.argv[1]), sys.argv[2]


def train(trial):
    for epoch in range(1, {EPOCHS} + 1):
        time.sleep(0.15)
        with tempfile.TemporaryDirectory() as path:
            for name in TRIAL_MODEL_FILES:
                Path(path, name).write_text(json.dumps({{"epoch": epoch}}))
            tune.report({{"epoch": epoch, "objective": epoch / 10}}, checkpoint=tune.Checkpoint.from_directory(path))


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
store = MLflowTracker(uri, persistent=False)
store.check()
tracker = Outbox(store, folder / "outbox")
sweep = Sweep("s1", "widgets", {{"bolt": {{}}}})
tracker.start_sweep(sweep)
tune.Tuner(
    train,
    param_space={{
        "index": tune.grid_search(list(range({TRIALS}))),
        "trial_key": tune.sample_from(lambda spec: f"k{{spec.config.index}}"),
        "category": "bolt",
        "config": {{"train.epochs": {EPOCHS}}},
    }},
    tune_config=tune.TuneConfig(reuse_actors=True),
    run_config=tune.RunConfig(
        name="s1",
        storage_path=str(folder / "ray"),
        callbacks=[TrackerCallback(tracker, sweep)],
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
    ),
).fit()
tracker.finish_sweep(sweep)
tracker.close()
"""


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """A server over the database in ``folder``, killed at the end with all its workers."""
    command = [sys.executable, "-m", "mlflow", "server", "-w", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", default_tracking_uri(folder), "--artifacts-destination", str(folder / "files")]
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"127.0.0.1:{port}", server, timeout_s=180)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def start_driver(folder: Path, uri: str) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_raylet_start_wait_time_s": "300",
    }
    with (folder / "driver.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-c", DRIVER, str(folder), uri], env=env, stdout=log, stderr=log)


def wait_for_runs(seen: MLflowTracker, count: int, driver: subprocess.Popen[bytes], log: Path) -> None:
    while sum(r.trial_state == "COMPLETE" for r in seen.find_runs("widgets")) < count:
        assert driver.poll() is None, log.read_text()
        time.sleep(0.5)


def check_whole(seen: MLflowTracker, trials: int = TRIALS) -> None:
    """Every run there once, every epoch once, none open."""
    runs = seen.find_runs("widgets")
    assert len(runs) == len({r.run_key for r in runs}) == 1 + trials
    for run in runs:
        assert run.status == "FINISHED"
        if run.parent_run_id is not None:
            assert run.trial_state == "COMPLETE"
            assert seen.metric_history(run.run_id, "objective") == [(e, e / 10) for e in range(1, EPOCHS + 1)]
            assert len(seen.list_artifacts(run.run_id)) == len(TRIAL_MODEL_FILES)


@pytest.mark.slow
def test_server_that_is_away_for_a_while_costs_nothing(tmp_path: Path) -> None:
    """The server is killed in the middle of the sweep and started again 15 s later (or ``$OUTAGE_S``)."""
    seen, port = MLflowTracker(default_tracking_uri(tmp_path)), free_port()
    seen.check()
    log = tmp_path / "driver.log"
    with mlflow_server(tmp_path, port):
        driver = start_driver(tmp_path, f"http://127.0.0.1:{port}")
        wait_for_runs(seen, 1, driver, log)
    time.sleep(float(os.environ.get("OUTAGE_S", "15")))
    assert driver.poll() is None, "the sweep goes on without its server: " + log.read_text()
    with mlflow_server(tmp_path, port):
        back_s = time.monotonic()
        assert driver.wait(300) == 0, log.read_text()
        print(f"whole {time.monotonic() - back_s:.1f} s after the server was back")
        check_whole(seen)
    said = log.read_text()
    assert said.count("tracking waits: MLflow at") == 1
    assert said.count("the store answers again") == 1
    assert not (tmp_path / "outbox").exists()


@pytest.mark.slow
def test_driver_killed_while_the_server_is_away_leaves_an_outbox_to_replay(tmp_path: Path) -> None:
    seen, port = MLflowTracker(default_tracking_uri(tmp_path)), free_port()
    seen.check()
    log = tmp_path / "driver.log"
    with mlflow_server(tmp_path, port):
        driver = start_driver(tmp_path, f"http://127.0.0.1:{port}")
        wait_for_runs(seen, 1, driver, log)
    while "tracking waits" not in log.read_text():
        assert driver.poll() is None, log.read_text()
        time.sleep(0.2)
    time.sleep(8)
    driver.kill()
    driver.wait()
    with mlflow_server(tmp_path, port):
        assert replay(tmp_path / "outbox") > 0
    runs = {r.name: r for r in seen.find_runs("widgets")}
    assert "RUNNING" not in {r.status for r in runs.values()}
    complete = [r for r in runs.values() if r.trial_state == "COMPLETE"]
    assert len(complete) >= 2, "one more than before the server went away"
    for run in complete:
        assert seen.metric_history(run.run_id, "objective") == [(e, e / 10) for e in range(1, EPOCHS + 1)]
        assert len(seen.list_artifacts(run.run_id)) == len(TRIAL_MODEL_FILES)
    assert {r.trial_state for r in runs.values() if r.parent_run_id} <= {"COMPLETE", "INTERRUPTED"}
