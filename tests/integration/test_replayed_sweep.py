"""Search, scheduler, progress, ledger and tracker in a real Ray Tune run of three categories, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from tuning.champions.winner import TrialRecord
from tuning.persistence.ledger import STUDIES_FILE, SweepLedger
from tuning.tracking import MLflowTracker
from tuning.tracking.mlflow_tracker import default_tracking_uri

ROOT = Path(__file__).parents[2]
EPOCHS, TRIALS, CATEGORIES = 9, 6, ("screw", "tile", "wood")


def sweep(folder: Path, mode: str, returns: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("replayed_sweep.py")), str(folder), mode],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == returns, done.stderr
    return done.stdout, done.stderr


def by_place(records: list[TrialRecord]) -> dict[tuple[str, int], TrialRecord]:
    return {(r.category, r.index): r for r in records}


@pytest.mark.integration
def test_killed_and_resumed_sweep_is_whole(tmp_path: Path) -> None:
    ledger, tracker = SweepLedger.open(tmp_path, "replayed"), MLflowTracker(default_tracking_uri(tmp_path))
    said, first_lines = sweep(tmp_path, "run", returns=-signal.SIGKILL)
    assert said == ""
    before = by_place(ledger.read_trials())
    assert (before["wood", 0].state, before["wood", 0].checkpoint_epoch) == ("running", 4)
    assert before["tile", 0].state == "failed"
    assert "tile: trial 0 failed: RuntimeError: replayed failure; see " in first_lines
    runs_before = {r.name: r.run_id for r in tracker.find_runs("parts")}

    output, lines = sweep(tmp_path, "resume")
    # Tune is silent: nothing but our JSON and, on standard error, our progress.
    (line,) = output.splitlines()
    whole: dict[str, Any] = json.loads(line)
    assert (whole["done"], whole["lines"]) == (True, [])
    assert "18/18 trials" in lines.splitlines()[-1]
    for line in (first_lines + lines).splitlines():
        assert " elapsed" in line or line.startswith(tuple(f"{c}: " for c in CATEGORIES)), line

    after = by_place(ledger.read_trials())
    assert sorted(after) == [(c, i) for c in CATEGORIES for i in range(TRIALS)]
    assert len({r.trial_key for r in after.values()}) == len(after)
    assert {r.state for r in after.values()} == {"complete", "pruned"}
    for place, record in after.items():
        assert record.state != "complete" or record.epoch == EPOCHS
        assert record.state != "pruned" or record.epoch in (1, 3)
        starts = [int(e) for e in (tmp_path / f"started-{place[0]}-{place[1]}").read_text().split()]
        assert starts[0] == 0
        if place in before and before[place].state in ("complete", "pruned"):
            assert starts == [0], "what had ended does not run again"
            assert record == before[place], "nor is it told anew"
        elif place in before:
            assert starts[-1] == before[place].checkpoint_epoch, "what was cut short goes on from its checkpoint"
        assert record.checkpoint is None or Path(record.checkpoint).is_dir()
    checkpoints = [path.parent for path in tmp_path.rglob("meta.json") if "mlruns" not in path.parts]
    left = {str(c) for c in checkpoints if "tune" in c.parts}
    named = {r.checkpoint for r in after.values() if r.checkpoint is not None}
    assert named <= left
    # a trial may have written one that the driver died before it heard of
    cut_short = sum(record.state == "running" for record in before.values())
    assert len(left - named) <= cut_short, "no other checkpoint is left"

    check_runs(tracker, after, runs_before)
    check_studies(tmp_path, after)


def check_runs(tracker: MLflowTracker, records: dict[tuple[str, int], TrialRecord], before: dict[str, str]) -> None:
    runs = {r.name: r for r in tracker.find_runs("parts")}
    assert len(runs) == len(tracker.find_runs("parts")) == len(CATEGORIES) * (1 + TRIALS)
    assert {r.status for r in runs.values()} == {"FINISHED"}
    assert {name: runs[name].run_id for name in before} == before
    for (category, index), record in records.items():
        run = runs[f"{category}-{index:03d}"]
        assert run.trial_state == record.state.upper()
        history = tracker.metric_history(run.run_id, "duration_s")
        assert history == [(epoch, epoch / 10) for epoch in range(1, record.epoch + 1)], "every epoch, once"
        assert len(tracker.list_artifacts(run.run_id, "model")) == (3 if record.state == "complete" else 0)


def check_studies(folder: Path, records: dict[tuple[str, int], TrialRecord]) -> None:
    url = f"sqlite:///{folder}/replayed/{STUDIES_FILE}"
    for category in CATEGORIES:
        default = records[category, 0]
        assert default.params == {"synthesis.noise_sigma": 0.015, "train.supervision_ratio": 0.0}
        assert default.state == "complete"
        trials = optuna.load_study(study_name=f"replayed.{category}", storage=url).trials
        study = {t.user_attrs["index"]: t for t in trials if t.state.name != "FAIL"}
        assert len(study) == TRIALS
        assert len(trials) - sum(t.state.name == "FAIL" for t in trials) == TRIALS
        for index, trial in study.items():
            record = records[category, index]
            assert trial.state.name == record.state.upper()
            assert sorted(trial.intermediate_values) == [e for e in (1, 3, EPOCHS) if e <= record.epoch]
