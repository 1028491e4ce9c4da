"""A real Tune sweep that is interrupted and restored leaves every trial's run once, and none running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuning.tracking import MLflowTracker
from tuning.tracking.mlflow_tracker import default_tracking_uri

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 4

DRIVER = f"""
import json, sys, tempfile, time
from pathlib import Path

import ray
from ray import tune

from tuning.tracking import MLflowTracker, Sweep
from tuning.tracking.callback import TrackerCallback
from tuning.tracking.mlflow_tracker import default_tracking_uri
from tuning.tracking.protocol import TRIAL_MODEL_FILES

folder, restored = Path(sys.argv[1]), sys.argv[2] == "restored"


def train(trial):
    start = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as path:
            start = json.loads(Path(path, "meta.json").read_text())["epoch"]
    for epoch in range(start + 1, {EPOCHS} + 1):
        if trial["index"] == 1:
            raise ValueError("no such sigma")
        if trial["index"] == 2 and epoch == 3 and not restored:
            Path(folder, "third epoch").touch()
            time.sleep(600)
        with tempfile.TemporaryDirectory() as path:
            for name in TRIAL_MODEL_FILES:
                Path(path, name).write_text(json.dumps({{"epoch": epoch}}))
            tune.report({{"epoch": epoch, "objective": epoch / 10}}, checkpoint=tune.Checkpoint.from_directory(path))


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
tracker = MLflowTracker(default_tracking_uri(folder))
tracker.check()
sweep = Sweep("s1", "widgets", {{"bolt": {{}}}})
tracker.start_sweep(sweep)
if restored:
    tuner = tune.Tuner.restore(str(folder / "ray" / "s1"), train, resume_unfinished=True)
else:
    tuner = tune.Tuner(
        train,
        param_space={{
            "index": tune.grid_search([0, 1, 2, 3]),
            "trial_key": tune.sample_from(lambda spec: f"k{{spec.config.index}}"),
            "category": "bolt",
            "config": {{"train.epochs": {EPOCHS}}},
        }},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            name="s1", storage_path=str(folder / "ray"), callbacks=[TrackerCallback(tracker, sweep)]
        ),
    )
tuner.fit()
tracker.finish_sweep(sweep, "FINISHED" if restored else "KILLED")
"""


def start_driver(folder: Path, mode: str) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }
    with (folder / f"{mode}.log").open("wb") as log:
        command = [sys.executable, "-c", DRIVER, str(folder), mode]
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)


def test_interrupted_and_restored_sweep_has_every_run_once(tmp_path: Path) -> None:
    tracker = MLflowTracker(default_tracking_uri(tmp_path))
    tracker.check()
    first = start_driver(tmp_path, "first")
    while not (tmp_path / "third epoch").exists():
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    assert first.wait(120) == 0, (tmp_path / "first.log").read_text()
    before = {r.name: r for r in tracker.find_runs("widgets")}
    assert {name: r.status for name, r in before.items()} == {
        "bolt": "KILLED",
        "bolt-000": "FINISHED",
        "bolt-001": "FAILED",
        "bolt-002": "KILLED",
    }

    assert start_driver(tmp_path, "restored").wait(300) == 0, (tmp_path / "restored.log").read_text()

    after = tracker.find_runs("widgets")
    assert {r.name: (r.status, r.trial_state) for r in after} == {
        "bolt": ("FINISHED", None),
        "bolt-000": ("FINISHED", "COMPLETE"),
        "bolt-001": ("FAILED", "FAIL"),
        "bolt-002": ("FINISHED", "COMPLETE"),
        "bolt-003": ("FINISHED", "COMPLETE"),
    }
    assert len(after) == 5
    runs = {r.name: r for r in after}
    assert {name: runs[name].run_id for name in before} == {name: r.run_id for name, r in before.items()}
    assert "ValueError: no such sigma" in runs["bolt-001"].tags["error"]
    for name in ("bolt-000", "bolt-002", "bolt-003"):
        history = tracker.metric_history(runs[name].run_id, "objective")
        assert history == [(epoch, epoch / 10) for epoch in range(1, EPOCHS + 1)]
        assert len(tracker.list_artifacts(runs[name].run_id)) == 3
