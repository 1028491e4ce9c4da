"""Sweeps whose objective is weighed against labels, and that start from what others and earlier ones found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssn.config import Config, flatten
from tuning.tracking import MLflowTracker
from tuning.tracking.mlflow_tracker import default_tracking_uri

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CATEGORIES, TRIALS = ("gadget", "widget"), 4

DRIVER = """
import json, sys
from dataclasses import replace
from pathlib import Path

import ray

from ssn.config import unflatten
from tuning.settings import FinalistSettings, ObjectiveSettings, ResourceSettings, SearchSettings, SweepSettings
from tuning.sweep import sweep

folder, data_uri, tracking_uri = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = unflatten(json.loads((folder / "config.json").read_text()))
settings = SweepSettings(
    model=config.model, data=config.data, synthesis=config.synthesis, train=config.train, eval=config.eval,
    search=SearchSettings(trials=4, grace_epochs=1, eta=2, transfer=True, max_concurrent=1),
    finalists=FinalistSettings(count=1),
    objective=ObjectiveSettings(against="labels", pick="knee", max_masks=4, max_latency_ms=1e6),
    resources=ResourceSettings(use_gpu=False),
)
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
said = []
for _ in range(2):
    result = sweep(
        settings, dataset="tiny", data_uri=data_uri, categories=None, tracking_uri=tracking_uri, out=folder / "runs"
    )
    said.append({**result.to_dict(), "sweep_id": result.leaderboard.sweep_id})
(folder / "said.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def outcome(
    tiny_data: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], MLflowTracker]:
    folder = tmp_path_factory.mktemp("studies")
    (folder / "config.json").write_text(json.dumps(flatten(tiny_config)))
    tracking_uri = default_tracking_uri(folder)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, str(folder), str(tiny_data), tracking_uri]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "said.json").read_text()), MLflowTracker(tracking_uri)


def test_default_is_dearer_than_allowed_and_never_wins(outcome: Any) -> None:
    """It uses six masks; four are allowed."""
    for sweep in outcome[0]:
        for category in CATEGORIES:
            found = sweep["categories"][category]
            default = found["history"][0]
            assert (default["state"], default["masks_used"], default["feasible"]) == ("complete", 6, False)
            assert found["failure"] is None
            assert found["masks_used"] <= 4
        said = f"trials that exceeded a bound and could not win: gadget [1-4] of {TRIALS}, widget [1-4] of {TRIALS}"
        assert any(re.fullmatch(said, note) for note in sweep["notes"])
        assert any(n.startswith("champions are the knee of each category's front") for n in sweep["notes"])


def test_latency_is_measured_once_for_all(outcome: Any) -> None:
    for sweep in outcome[0]:
        measured = {t["latency_ms"] for c in CATEGORIES for t in sweep["categories"][c]["history"]}
        assert len(measured) == 1
        assert measured.pop() > 0


def test_fronts_are_kept_with_the_parent_runs(outcome: Any) -> None:
    said, tracker = outcome
    for sweep in said:
        parents = [r for r in tracker.find_runs("tiny", sweep_id=sweep["sweep_id"]) if r.parent_run_id is None]
        assert sorted(p.category for p in parents) == sorted(CATEGORIES)
        for parent in parents:
            assert {"pareto.csv", "pareto.png", "leaderboard.md"} <= set(tracker.list_artifacts(parent.run_id, ""))


def test_runs_say_where_their_configuration_came_from(outcome: Any) -> None:
    said, tracker = outcome
    for number, sweep in enumerate(said):
        for category in CATEGORIES:
            runs = tracker.find_runs("tiny", sweep_id=sweep["sweep_id"], category=category)
            origins = {r.tags["trial_index"]: r.tags["suggested_by"] for r in runs if r.parent_run_id is not None}
            assert origins["0"] == "default"
            assert ("champion" in origins.values()) == (number == 1)
            assert origins == {str(t["index"]): t["suggested_by"] for t in sweep["categories"][category]["history"]}
