"""Searcher, scheduler and progress in a real Ray Tune run of three categories, interrupted and restored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EPOCHS, TRIALS, CATEGORIES = 9, 6, ("screw", "tile", "wood")


def sweep(folder: Path, mode: str) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("replayed_sweep.py")), str(folder), mode],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Tune is silent: nothing but our JSON and, on standard error, our progress.
    (line,) = done.stdout.splitlines()
    return json.loads(line), done.stderr


@pytest.mark.integration
def test_interrupted_and_restored_sweep_is_whole(tmp_path: Path) -> None:
    first, first_lines = sweep(tmp_path, "run")
    assert not first["done"]
    records = {(r["category"], r["index"]): r for r in first["records"]}
    assert records["wood", 0]["state"] == "running"
    assert records["tile", 0]["state"] == "failed"
    assert "tile: trial 0 failed: RuntimeError: replayed failure; see " in first_lines

    whole, lines = sweep(tmp_path, "restore")
    assert whole["done"]
    assert "18/18 trials" in lines.splitlines()[-1]
    for line in (first_lines + lines).splitlines():
        assert " elapsed" in line or line.startswith(tuple(f"{c}: " for c in CATEGORIES)), line

    records = {(r["category"], r["index"]): r for r in whole["records"]}
    assert sorted(records) == [(c, i) for c in CATEGORIES for i in range(TRIALS)]
    assert len({r["trial_key"] for r in records.values()}) == len(records)
    assert {r["state"] for r in records.values()} == {"complete", "pruned"}
    for key, record in records.items():
        assert record["state"] != "complete" or record["epoch"] == EPOCHS
        assert record["state"] != "pruned" or record["epoch"] in (1, 3)
        starts = [int(e) for e in (tmp_path / f"started-{key[0]}-{key[1]}").read_text().split()]
        assert starts[0] == 0
        if first_states(first).get(key) in ("complete", "pruned"):
            assert starts == [0], "what had ended does not run again"

    # Those two had reports behind them, and went on from their checkpoints.
    assert int((tmp_path / "started-wood-0").read_text().split()[1]) in (4, 5)
    assert int((tmp_path / "started-tile-0").read_text().split()[1]) == 2

    for category in CATEGORIES:
        default = records[category, 0]
        assert default["params"] == {"synthesis.noise_sigma": 0.015, "train.supervision_ratio": 0.0}
        assert default["state"] == "complete"
        study = {t["index"]: t for t in whole["studies"][category] if t["state"] != "FAIL"}
        assert len(study) == TRIALS
        for index, trial in study.items():
            record = records[category, index]
            assert trial["state"] == record["state"].upper()
            assert trial["steps"] == [e for e in (1, 3, EPOCHS) if e <= record["epoch"]]
        failed = [t["index"] for t in whole["studies"][category] if t["state"] == "FAIL"]
        assert failed == ([0] if category == "tile" else [])


def first_states(first: dict[str, Any]) -> dict[tuple[str, int], str]:
    return {(r["category"], r["index"]): r["state"] for r in first["records"]}
