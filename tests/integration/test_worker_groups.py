"""Trials of several Ray Train workers: the numbers of one process, whatever happens to a worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssn.config import Config, flatten
from tests.tolerances import SHARED_RTOL, TRAINED_RTOL

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, RUNG = 6, 2

# One Ray for all trials. The worker is killed between the rung, whose checkpoint is kept, and the last epoch.
DRIVER = """
import json, os, signal, sys
from pathlib import Path

import ray

from ssn.config import unflatten
from tests.trials_on_ray import Watch, run_trials, train_workers
from tuning.search.rungs import Rungs
from tuning.execution.train_worker import Placement

folder, data_uri = Path(sys.argv[1]), sys.argv[2]
config = unflatten(json.loads((folder / "config.json").read_text()))
epochs, rung = config.train.epochs, int(sys.argv[3])


class Killer(Watch):
    pids, killed = set(), None

    def on_trial_result(self, iteration, trials, trial, result, **info):
        super().on_trial_result(iteration, trials, trial, result, **info)
        workers = train_workers()
        self.pids |= {worker.pid for worker in workers}
        if self.killed is None and result["epoch"] == rung + 1:
            self.killed = max(worker.pid for worker in workers)
            os.kill(self.killed, signal.SIGKILL)


def run(name, num_workers, watch=None):
    (trial,) = run_trials(
        [config], data_uri=data_uri, dataset="tiny", category="widget", out=folder / "runs", name=name, watch=watch,
        placement=Placement(num_workers=num_workers, use_gpu=False, cpus=1.0, gpus=0.0),
        rungs=Rungs(grace_epochs=rung, eta=3),
    )
    keep = lambda r: {k: v for k, v in r.items() if k in ("epoch", "objective", "train_loss") or k.startswith("val_")}
    return {"failed": trial.failed, "results": [keep(r) for r in trial.results if "epoch" in r]}


os.environ.update(RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", RAY_AUTH_MODE="disabled")
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
killer = Killer()
said = {"alone": run("alone", 0), "pair": run("pair", 2), "killed": run("killed", 2, killer)}
said["pids"], said["victim"] = sorted(killer.pids), killer.killed
(folder / "said.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tiny_data: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the driver left."""
    folder = tmp_path_factory.mktemp("groups")
    config = replace(tiny_config, train=replace(tiny_config.train, epochs=EPOCHS, batch_size=7))
    (folder / "config.json").write_text(json.dumps(flatten(config)))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, str(folder), str(tiny_data), str(RUNG)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "said.json").read_text())


def test_a_group_of_two_computes_what_the_trial_process_computes(said: dict[str, Any]) -> None:
    alone, pair = said["alone"]["results"], said["pair"]["results"]
    assert [r["epoch"] for r in pair] == [r["epoch"] for r in alone] == list(range(1, EPOCHS + 1))
    for found, expected in zip(pair, alone, strict=True):
        assert found == pytest.approx(expected, rel=TRAINED_RTOL)
    assert {"objective", "val_pixel_ap", "val_aupro", "val_image_auroc"} <= pair[-1].keys()


def test_a_killed_worker_is_replaced_and_the_trial_ends_the_same(said: dict[str, Any]) -> None:
    killed, pair = said["killed"]["results"], said["pair"]["results"]
    assert not said["killed"]["failed"]
    assert said["victim"] in said["pids"]
    assert len(said["pids"]) == 4, "a second group of two took over"
    epochs = [r["epoch"] for r in killed]
    assert epochs[-1] == EPOCHS
    again = epochs.index(RUNG + 1, epochs.index(RUNG + 1) + 1)
    assert epochs[again:] == list(range(RUNG + 1, EPOCHS + 1)), "it went on from the rung's checkpoint"
    assert killed[-1] == pytest.approx(pair[-1], rel=SHARED_RTOL)
