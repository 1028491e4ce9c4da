"""The leaderboard, rendered and read back from runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tuning.reporting.report import Leaderboard, LeaderboardRow, format_duration, leaderboard_from_runs
from tuning.tracking import MemoryTracker, Sweep, TrialInfo
from tuning.tracking.protocol import TRIAL_MODEL_FILES

ROWS = [
    LeaderboardRow(
        category="bolt",
        noise_sigma=0.0153,
        perlin_threshold=0.2,
        supervision_ratio=0.5,
        validation_objective=0.91234,
        default_objective=0.88,
        test_image_auroc=0.97,
        test_pixel_ap=0.6,
        train_labels=10,
        train_masks=5,
        validation_labels=4,
        validation_masks=4,
        trials_complete=3,
        trials_pruned=6,
        trials_failed=1,
        duration_s=3725,
    ),
    LeaderboardRow(
        category="nut [M6]", validation_objective=0.8, test_image_auroc=0.9, trials_complete=2, duration_s=59.6
    ),
]


def render(board: Leaderboard) -> str:
    out = io.StringIO()
    Console(file=out, width=250, color_system=None).print(board.table())
    return out.getvalue()


def test_table_has_a_row_per_category_and_their_mean() -> None:
    text = render(Leaderboard("widgets", "s1", ROWS, notes=["labels were free in this search"]))
    bolt, nut, mean = (
        next(line for line in text.splitlines() if name in line) for name in ("bolt", "nut [M6]", "mean")
    )
    for shown in ("0.912", "0.880", "0.970", "0.600", "0.0153", "0.2", "10/5", "4/4", "3/6/1", "1 h 02 min"):
        assert shown in bolt
    assert nut.count("—") == 7  # what it lacks is never 0
    assert "0.856" in mean
    assert "0.600 (n=1)" in mean
    assert "5/6/1" in mean
    assert "labels were free" in text


def test_markdown_is_a_table() -> None:
    text = Leaderboard("widgets", "s1", [LeaderboardRow("a|b")]).markdown()
    header, rule, row = text.splitlines()[2:5]
    assert header.count("|") == rule.count("|") == row.replace("\\|", "").count("|") == 13
    assert row.startswith("| a\\|b | — |")


def test_as_dict_is_json(tmp_path: Path) -> None:
    board = Leaderboard("widgets", "s1", ROWS, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    data = json.loads(json.dumps(board.as_dict(), allow_nan=False))
    assert data["rows"][0]["validation_objective"] == 0.91234
    assert data["rows"][1]["test_pixel_ap"] is None
    assert data["ui_command"] == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db --port 5000"
    assert board.footer() == f"runs: {data['ui_command']}"


def test_server_needs_no_command() -> None:
    board = Leaderboard("widgets", "s1", ROWS, tracking_uri="http://tracking.example:5000")
    assert board.ui_command() is None
    assert board.footer() == "runs: http://tracking.example:5000"


@pytest.mark.parametrize(
    ("duration_s", "text"), [(None, "—"), (0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_format_duration(duration_s: float | None, text: str) -> None:
    assert format_duration(duration_s) == text


def test_leaderboard_is_read_back_from_runs(tmp_path: Path) -> None:
    for name in TRIAL_MODEL_FILES:
        (tmp_path / name).touch()
    tracker = MemoryTracker()
    sweep = Sweep("s1", "widgets", {"nut": {}, "bolt": {}})
    parents = tracker.start_sweep(sweep)
    runs = []
    for index, (state, objective) in enumerate([("COMPLETE", 0.7), ("COMPLETE", 0.9), ("PRUNED", 0.99), ("FAIL", 0.1)]):
        config = {"synthesis.noise_sigma": 0.01 * (index + 1), "synthesis.perlin_threshold": 0.2}
        run_id = tracker.start_trial(sweep, TrialInfo("bolt", f"k{index}", index, config))
        tracker.log_epoch(run_id, 1, {"objective": objective / 2, "elapsed_s": 5.0})
        excess = {"excess_max_masks": 0.5 if state == "PRUNED" else -0.5}
        tracker.log_epoch(run_id, 2, {"objective": objective, "elapsed_s": 10.0, **excess})
        tracker.finish_trial(run_id, state, artifact_dir=tmp_path)  # type: ignore[arg-type]
        runs.append(run_id)
    repeat = tracker.start_trial(sweep, TrialInfo("bolt", "r0", 0, {}, stage="repeat"))
    tracker.finish_trial(repeat, "COMPLETE", artifact_dir=tmp_path)
    tracker.log_summary(
        parents["bolt"],
        metrics={"test_image_auroc": 0.95},
        tags={"champion_run_id": runs[1], "train_labels": "8", "train_masks": "0", "ended_by": "search.time_budget=2h"},
    )
    tracker.log_summary(runs[1], tags={"champion_version": "widgets.bolt/1"})

    board = leaderboard_from_runs("widgets", "s1", tracker.find_runs("widgets", sweep_id="s1"))

    bolt, nut = board.rows
    assert bolt == LeaderboardRow(
        category="bolt",
        noise_sigma=0.02,
        perlin_threshold=0.2,
        supervision_ratio=None,
        validation_objective=0.9,
        default_objective=0.7,
        test_image_auroc=0.95,
        train_labels=8,
        train_masks=0,
        trials_complete=2,
        trials_pruned=1,
        trials_failed=1,
        trials_infeasible=1,
        duration_s=40.0,
        champion="widgets.bolt/1",
    )
    assert nut == LeaderboardRow(category="nut")
    assert list(board.notes) == [
        "search.time_budget=2h",
        "trials that exceeded a bound and could not win: bolt 1 of 4",
    ]
