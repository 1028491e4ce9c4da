"""A time budget ends a real Tune run: trials that still run are stopped in good order, and nothing is left open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import json, sys, time
from pathlib import Path

import optuna
import ray
from ray import tune

from ssn.config import Config, flatten
from tuning.budget import Budget
from tuning.execution.budget_stopper import BudgetStopper
from tuning.reporting.progress import ProgressCallback
from tuning.search.rungs import Rungs
from tuning.search.scheduler import MultiplexScheduler
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import FloatRange
from tuning.sweep import connect_ray
from tuning.tracking.callback import TrackerCallback
from tuning.tracking.memory import MemoryTracker
from tuning.tracking.protocol import Sweep
from tuning.execution.weights import weights_key

OUT = sys.argv[1]  # trials run in processes with arguments of their own
connect_ray()
optuna.logging.set_verbosity(optuna.logging.WARNING)


def train(config):
    # the first trial of each category ends; the others would go on for ever
    epoch = 0
    while epoch < 1000:
        epoch = 1000 if config["index"] == 0 else epoch + 1
        time.sleep(0.1)
        folder = Path(OUT, config["category"]); folder.mkdir(exist_ok=True)
        for name in ("config.json", "heads.safetensors", "meta.json"):
            (folder / name).touch()
        tune.report({"epoch": min(epoch, 999) if config["index"] else 1000, "category": config["category"],
                     **({"objective": 0.5} if config["index"] == 0 else {})},
                    checkpoint=tune.Checkpoint.from_directory(folder))


base = flatten(Config().resolved()) | {"train.epochs": 1000}
space = {"synthesis.noise_sigma": FloatRange(1e-3, 0.3, log=True)}
digests = {weights_key(Config().model): "weights"}
searcher = MultiplexSearcher(
    [CategorySearch(c, base, space, c, digests, 0) for c in ("screw", "tile")], sweep_id="s", trials_per_category=5
)
tracker, sweep = MemoryTracker(), Sweep("s", "made_up", {"screw": {}, "tile": {}})
tracker.start_sweep(sweep)


def clock():
    # time passes once two trials have ended and two others are under way, however long that takes here
    ended = sum(r.state == "complete" for r in searcher.records())
    under_way = sum(r.state == "running" and r.epoch >= 3 for r in searcher.records())
    return 60.0 if ended == under_way == 2 else 0.0


stopper = BudgetStopper(Budget(time_budget="1m"), gpus_per_trial=0.0, clock=clock)
tuner = tune.Tuner(
    tune.with_resources(train, {"cpu": 1}),
    tune_config=tune.TuneConfig(
        search_alg=searcher, scheduler=MultiplexScheduler(Rungs(), history=searcher), num_samples=-1,
        max_concurrent_trials=2, reuse_actors=True,
    ),
    run_config=tune.RunConfig(
        name="sweep", storage_path=OUT + "/tune", verbose=0, stop=stopper,
        callbacks=[ProgressCallback(searcher), TrackerCallback(tracker, sweep)],
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
    ),
)
tuner.fit()
print(json.dumps({
    "ended_by": stopper.ended_by,
    "done_before": searcher.done,
    "states": [r.state for r in searcher.records()],
    "runs": [(r.status, r.trial_state) for r in tracker.find_runs("made_up") if r.parent_run_id],
}))
searcher.end(stopper.ended_by)
print(json.dumps({"done": searcher.done, "states": [r.state for r in searcher.records()], "notices": searcher.notices}))
"""


def test_time_budget_ends_the_search_in_good_order(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)], env=env, capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stderr
    before, after = map(json.loads, done.stdout.splitlines()[-2:])
    assert before["ended_by"] == "search.time_budget=1m"
    assert not before["done_before"]
    assert before["states"] == ["complete", "complete", "running", "running"]
    assert sorted(before["runs"]) == sorted([["FINISHED", "COMPLETE"]] * 2 + [["KILLED", "INTERRUPTED"]] * 2)
    assert after["done"]
    assert after["states"] == ["complete", "complete", "stopped", "stopped"]
    assert after["notices"] == [
        "search.time_budget=1m ended the search after 4 of 10 trials and stopped 2 that still ran"
    ]
