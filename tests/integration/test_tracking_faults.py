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
import json, shutil, sys, time
from pathlib import Path
from types import SimpleNamespace

from ray.tune import Checkpoint

from tuning.tracking import MLflowTracker, Outbox, Sweep
from tuning.tracking.callback import TrackerCallback
from tuning.tracking.protocol import TRIAL_MODEL_FILES

folder, uri, hangs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tracker = Outbox(MLflowTracker(uri, persistent=False), folder / "outbox")
sweep = Sweep("s1", "widgets", {{"bolt": {{}}}})
tracker.start_sweep(sweep)
callback = TrackerCallback(tracker, sweep)
for index in range({TRIALS}):
    config = {{"category": "bolt", "trial_key": f"k{{index}}", "index": index, "config": {{"train.epochs": {EPOCHS}}}}}
    trial = SimpleNamespace(trial_id=f"t{{index}}", config=config, last_result={{}}, checkpoint=None)
    callback.on_trial_start(0, [trial], trial)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    for epoch in range(1, {EPOCHS} + 1):
        if index == hangs and epoch == {EPOCHS // 2}:
            print("hangs", flush=True)
            time.sleep(3600)
        trial.last_result = {{"epoch": epoch, "objective": epoch / 10}}
        callback.on_trial_result(0, [trial], trial, trial.last_result)
    for name in TRIAL_MODEL_FILES:
        (checkpoint / name).write_text(json.dumps({{"index": index}}))
    trial.checkpoint = Checkpoint(str(checkpoint))
    callback.on_trial_complete(0, [trial], trial)
    shutil.rmtree(checkpoint)
    while not (folder / "go on").exists():
        time.sleep(0.1)
callback.on_experiment_end([])
tracker.finish_sweep(sweep)
print("said all", flush=True)
tracker.close(600)
"""
"""What Tune's driver tells the tracker of trials that follow one another, without a cluster.

It waits after the first trial for the file ``go on``, and, given a trial's index, hangs in the middle of that trial.
"""


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """A server over the database in ``folder``, killed at the end with all its workers."""
    command = [sys.executable, "-m", "mlflow", "server", "-w", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", default_tracking_uri(folder), "--artifacts-destination", str(folder / "files")]
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"127.0.0.1:{port}", server, timeout_s=600)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def start_driver(folder: Path, uri: str, *, hangs: int = -1) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, str(folder), uri, str(hangs)]
    with (folder / "driver.log").open("wb") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def wait_for_first_run(seen: MLflowTracker, driver: subprocess.Popen[bytes], log: Path) -> None:
    while not any(r.trial_state == "COMPLETE" and r.status == "FINISHED" for r in seen.find_runs("widgets")):
        assert driver.poll() is None, log.read_text()
        time.sleep(0.5)


def wait_for_line(line: str, driver: subprocess.Popen[bytes], log: Path) -> None:
    while line not in log.read_text():
        assert driver.poll() is None, log.read_text()
        time.sleep(0.1)


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
    """The server is killed in the middle of the sweep and started again ``$OUTAGE_S`` later."""
    seen, port = MLflowTracker(default_tracking_uri(tmp_path)), free_port()
    seen.check()
    log = tmp_path / "driver.log"
    with mlflow_server(tmp_path, port):
        driver = start_driver(tmp_path, f"http://127.0.0.1:{port}")
        wait_for_first_run(seen, driver, log)
    (tmp_path / "go on").touch()
    wait_for_line("said all", driver, log)  # without a server
    wait_for_line("tracking waits: MLflow at", driver, log)
    time.sleep(float(os.environ.get("OUTAGE_S", "5")))
    with mlflow_server(tmp_path, port):
        back_s = time.monotonic()
        assert driver.wait(600) == 0, log.read_text()
        print(f"everything was there {time.monotonic() - back_s:.1f} s after the server was back")
        check_whole(MLflowTracker(f"http://127.0.0.1:{port}"))
    lines = log.read_text()
    assert lines.count("tracking waits: MLflow at") == lines.count("the store answers again") >= 1
    assert "Metrics go on" not in lines, "the server is away, not its disk full"
    assert not (tmp_path / "outbox").exists()


@pytest.mark.slow
def test_driver_killed_while_the_server_is_away_leaves_an_outbox_to_replay(tmp_path: Path) -> None:
    seen, port = MLflowTracker(default_tracking_uri(tmp_path)), free_port()
    seen.check()
    log = tmp_path / "driver.log"
    with mlflow_server(tmp_path, port):
        driver = start_driver(tmp_path, f"http://127.0.0.1:{port}", hangs=5)
        wait_for_first_run(seen, driver, log)
    (tmp_path / "go on").touch()
    wait_for_line("hangs", driver, log)
    wait_for_line("tracking waits", driver, log)
    driver.kill()
    driver.wait()
    with mlflow_server(tmp_path, port):
        assert replay(tmp_path / "outbox", patience_s=600) > 0
        check_cut_short(MLflowTracker(f"http://127.0.0.1:{port}"))
    assert not (tmp_path / "outbox").exists()


def check_cut_short(seen: MLflowTracker) -> None:
    """Five trials are whole, the sixth was cut short in its middle, and none is open."""
    runs = {r.name: r for r in seen.find_runs("widgets")}
    assert {name: r.status for name, r in runs.items()} == {
        "bolt": "KILLED",
        **{f"bolt-{i:03d}": "FINISHED" for i in range(5)},
        "bolt-005": "KILLED",
    }
    for name, run in runs.items():
        epochs = {"bolt": 0, "bolt-005": EPOCHS // 2 - 1}.get(name, EPOCHS)
        assert seen.metric_history(run.run_id, "objective") == [(e, e / 10) for e in range(1, epochs + 1)]
        assert len(seen.list_artifacts(run.run_id)) == (len(TRIAL_MODEL_FILES) if epochs == EPOCHS else 0)
