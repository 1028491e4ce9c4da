"""The fixed list that Tune is served, and what becomes of a run that ends. No Ray runtime."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from ssn.config import flatten
from ssn.data.reader import SearchData, open_test_data
from tests.made_up_benchmark import ONE_CORE, REPORTED, FakeTrial, make_info, plan_of
from tests.planted_features import CONFIG, plant_features
from tuning.benchmarking.plan import PlannedRun
from tuning.benchmarking.results import ResultStore
from tuning.benchmarking.runs import BenchmarkCallback, make_result
from tuning.benchmarking.score import ScoreOnTest, describe_hardware
from tuning.execution.objective import TrialContext, run_trial
from tuning.execution.train_worker import MODEL_FOLDER, Placement, _finishing
from tuning.reporting.progress import ProgressCallback
from tuning.reporting.report import leaderboard_from_runs
from tuning.search.fixed_runs import FixedRuns
from tuning.tracking import MemoryTracker, Sweep
from tuning.tracking.protocol import ALL_CATEGORIES, BENCHMARK_STAGE, TRIAL_MODEL_FILES, count_scores

PLAN = plan_of([make_info("bolt"), make_info("nut")], seeds=3)


def fixed(plan_runs: tuple[PlannedRun, ...] = PLAN.runs, limit: int | None = None) -> FixedRuns[PlannedRun]:
    runs = FixedRuns(
        plan_runs,
        stage=BENCHMARK_STAGE,
        label=lambda run: f"{run.labels[0]}, repetition {run.seed}",
        tags=lambda run: {"repetition": str(run.seed)},
    )
    if limit is not None:
        runs.set_max_concurrency(limit)
    return runs


def test_every_run_is_suggested_once_spread_over_categories() -> None:
    runs = fixed()
    suggested: list[Any] = [runs.suggest(f"t{i}") for i in range(6)]
    assert [s["category"] for s in suggested] == ["bolt", "nut"] * 3
    assert {(s["category"], s["trial_key"]) for s in suggested} == {(r.category, r.identity) for r in PLAN.runs}
    assert runs.suggest("t6") == "FINISHED"
    first = suggested[0]
    assert (first["stage"], first["label"], first["index"]) == (BENCHMARK_STAGE, "default, repetition 0", 0)
    assert first["tags"] == {"repetition": "0"}
    assert first["config"] == PLAN.runs[0].config
    assert json.loads(json.dumps(suggested)) == suggested


def test_category_stays_with_its_place_while_others_have_work() -> None:
    """Two places, two categories: each place works one category off, so that no run waits for another's features."""
    runs = fixed(limit=2)
    assert [runs.suggest(f"t{i}")["category"] for i in range(2)] == ["bolt", "nut"]  # type: ignore[index]
    assert runs.suggest("t2") is None
    runs.on_trial_complete("t0", {"epoch": 5})
    assert runs.suggest("t2")["category"] == "bolt"  # type: ignore[index]
    runs.on_trial_complete("t2", {"epoch": 5})
    assert runs.suggest("t3")["category"] == "bolt"  # type: ignore[index]


def test_ends_are_told_apart() -> None:
    runs = fixed(PLAN.runs[:4])
    for i in range(4):
        runs.suggest(f"t{i}")
    assert runs.expected_trials("bolt") == 3
    assert runs.categories == ("bolt", "nut")
    runs.on_trial_result("t0", {"epoch": 1})
    runs.on_trial_complete("t0", {"epoch": 5})
    runs.note_failure("t1", "the training loss became nan")
    runs.on_trial_complete("t1", None, error=True)
    runs.on_trial_complete("t2", {"epoch": 3})
    assert [r.state for r in runs.records()] == ["complete", "failed", "failed", "running"]
    assert not runs.done, "one was cut short"
    runs.on_trial_complete("t3", {"epoch": 5})
    assert runs.done
    assert [(run.category, reason) for run, reason in runs.failures()] == [
        ("nut", "the training loss became nan"),
        ("bolt", "it ended after 3 of 5 epochs"),
    ]


def test_run_that_succeeds_at_the_second_attempt_has_not_failed() -> None:
    runs = fixed(PLAN.runs[:1])
    runs.suggest("t0")
    runs.note_failure("t0", "a node was taken away")
    runs.on_trial_complete("t0", {"epoch": 5})
    assert runs.failures() == []


def test_run_that_reports_its_failure_has_failed_with_its_reason() -> None:
    runs = fixed(PLAN.runs[:1])
    runs.suggest("t0")
    runs.on_trial_result("t0", {"epoch": 1, "val_loss": 2.0})
    runs.on_trial_complete("t0", {"failure": "the training loss became nan"})
    assert runs.failures() == [(PLAN.runs[0], "the training loss became nan")]
    assert runs.record("t0").metrics["val_loss"] == 2.0


class Tracked:
    """A benchmark's callback with a tracker and a store to look into."""

    def __init__(self, folder: Path) -> None:
        for name in TRIAL_MODEL_FILES:
            (folder / name).touch()
        self.folder = folder
        self.tracker = MemoryTracker()
        self.store = ResultStore.open(str(folder / "out"), "made_up")
        tags = {name: {"test_fingerprint": "0" * 64} for name in ("bolt", "nut")}
        self.sweep = Sweep("b1", "made_up", tags, stage=BENCHMARK_STAGE)
        self.parents = self.tracker.start_sweep(self.sweep)
        self.callback = BenchmarkCallback(
            self.tracker,
            self.sweep,
            runs=PLAN.runs,
            store=self.store,
            placement=ONE_CORE,
            code="commit 1234567",
            times_scored={"bolt": 4, "nut": 0},
        )

    def end(self, suggestion: dict[str, Any], *, failed: bool = False) -> None:
        trial: Any = FakeTrial(suggestion, REPORTED, self.folder)
        self.callback.on_trial_start(0, [], trial)
        if failed:
            self.callback.on_trial_error(0, [], trial)
        else:
            self.callback.on_trial_complete(0, [], trial)


def test_finished_run_is_tracked_and_kept(tmp_path: Path) -> None:
    tracked, runs = Tracked(tmp_path), fixed()
    for index in range(2):
        tracked.end(runs.suggest(f"t{index}"))  # type: ignore[arg-type]
    results = tracked.store.read_all(PLAN)
    assert {result.category for result in results.values()} == {"bolt", "nut"}
    bolt = next(result for result in results.values() if result.category == "bolt")
    assert bolt.validation == {"image_auroc": 0.7}, "what is not a number is absent"
    assert bolt.test_intervals == {"image_auroc": (0.8, 1.0)}
    assert (bolt.elapsed_s, bolt.cores, bolt.gpus) == (12.0, 1.0, 0.0)
    run = next(r for r in tracked.tracker.find_runs("made_up") if r.name == "bolt-benchmark-000")
    assert run.metrics["test_image_auroc"] == 0.9
    assert run.tags["test_split_scored_times"] == "5"
    assert run.tags["undefined_test_pixel_ap"] == "no masks"
    assert run.tags["test_image_auroc_95"] == "0.8000 to 1.0000"
    assert run.tags["repetition"] == "0"
    assert (run.status, run.trial_state, run.stage) == ("FINISHED", "COMPLETE", BENCHMARK_STAGE)
    assert len(tracked.tracker.list_artifacts(run.run_id)) == 3


def test_failed_run_leaves_no_result(tmp_path: Path) -> None:
    tracked = Tracked(tmp_path)
    tracked.end(fixed().suggest("t0"), failed=True)  # type: ignore[arg-type]
    assert tracked.store.read_all(PLAN) == {}
    (run,) = [r for r in tracked.tracker.find_runs("made_up") if r.parent_run_id]
    assert run.tags["error"] == "ValueError: no such sigma"


def test_benchmark_has_one_parent_that_no_leaderboard_shows(tmp_path: Path) -> None:
    tracked = Tracked(tmp_path)
    assert len(set(tracked.parents.values())) == 1
    tracked.end(fixed().suggest("t0"))  # type: ignore[arg-type]
    runs = tracked.tracker.find_runs("made_up")
    parent, child = sorted(runs, key=lambda run: run.parent_run_id is not None)
    assert (parent.category, parent.stage, child.parent_run_id) == (ALL_CATEGORIES, BENCHMARK_STAGE, parent.run_id)
    assert leaderboard_from_runs("made_up", "b1", runs).rows == []
    # and yet whoever looks at this test split next is told
    assert count_scores(runs, category="bolt", test_fingerprint="0" * 64) == 1
    assert count_scores(runs, category="bolt", test_fingerprint="1" * 64) == 0
    assert count_scores(runs, category="bolt", test_fingerprint="0" * 64, besides={child.run_id}) == 0


def test_callback_crosses_process_borders(tmp_path: Path) -> None:
    callback = Tracked(tmp_path).callback
    crossed = pickle.loads(pickle.dumps(callback))
    assert crossed.store.benchmark_id() == callback.store.benchmark_id()


def test_workers_and_gpus_cost() -> None:
    placed = Placement(num_workers=1, use_gpu=True, cpus=2.0, gpus=0.5)
    result = make_result(PLAN.runs[0], REPORTED, "made_up", placed, "code")
    assert (result.cores, result.gpus) == (2.0, 0.5)


def test_hardware_is_what_computed() -> None:
    tags = {"hardware_cpu": "an abacus", "hardware_cores": "2", "hardware_gpus": "a loom"}
    assert describe_hardware(tags, "cpu") == "an abacus, 2 cores"
    assert describe_hardware(tags, "cuda:0") == "a loom"


def test_network_is_scored_with_its_last_report(tiny_data: Path, tiny_model: Path) -> None:
    """Only then, and by the process that has it."""
    score = ScoreOnTest({"widget": open_test_data(str(tiny_data), "tiny", "widget")})
    trial = {"category": "widget", "config": {"train.epochs": 2}}
    reports: list[tuple[dict[str, Any], Any]] = []
    folders: list[Path] = []

    def save(folder: Path) -> None:
        folders.append(folder)
        shutil.copytree(tiny_model, folder)

    report = _finishing(lambda result, save: reports.append((result, save)), score, trial, "cpu")
    report({"epoch": 1, "train_loss": 0.5}, None)
    report({"epoch": 2, "train_loss": 0.4}, save)
    assert reports[0] == ({"epoch": 1, "train_loss": 0.5}, None)
    result, given = reports[1]
    assert given is save
    assert set(result["test"]["metrics"]) >= {"image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro"}
    assert set(result["test"]["intervals_95"]) == {"image_auroc", "image_ap", "image_f1_max"}
    assert result["test"]["num_images"] == 11
    assert result["hardware"]
    assert json.loads(json.dumps(result)) == result
    assert [folder.name for folder in folders] == [MODEL_FOLDER]
    assert not folders[0].exists()


def test_progress_of_a_benchmark_ranks_nothing() -> None:
    out = io.StringIO()
    runs = fixed(PLAN.runs[:4], limit=2)
    shown = ProgressCallback(runs, ranked=False, console=Console(file=out, width=200), clock=lambda: 0.0)
    shown.setup()
    for index, error in enumerate((False, False, True, False)):
        suggestion: Any = runs.suggest(f"t{index}")
        runs.on_trial_complete(f"t{index}", None if error else {"epoch": 5, "duration_s": 2.0}, error)
        trial: Any = FakeTrial(suggestion, {}, Path())
        shown.on_trial_complete(0, [], trial)
    shown.on_step_end(0, [])
    assert out.getvalue().splitlines() == [
        "bolt: 2 runs complete, 1 failed",
        "nut: 1 runs complete, 0 failed",
        "4/4 runs, 0 running, 1 failed, 2/2 categories, 0 s elapsed",
    ]


def test_live_table_of_a_benchmark_has_no_best() -> None:
    out = io.StringIO()
    runs = fixed(PLAN.runs[:2])
    console = Console(file=out, width=100, height=30, force_terminal=True, color_system=None)
    shown = ProgressCallback(runs, ranked=False, console=console, clock=lambda: 0.0)
    shown.setup()
    runs.suggest("t0")
    runs.on_trial_complete("t0", {"epoch": 5})
    shown.on_step_end(0, [])
    shown.on_experiment_end([])
    assert "ended" in out.getvalue()
    for absent in ("best", "pruned", "with"):
        assert absent not in out.getvalue()


def test_trial_that_is_not_ranked_reports_no_objective() -> None:
    features = plant_features()
    context = TrialContext(data=SearchData(features.info, {}), objective=None, rungs=None)
    results: list[dict[str, Any]] = []
    run_trial(
        {"trial_key": "k", "category": "plate", "index": 0, "config": flatten(CONFIG)},
        context,
        features,
        report=lambda result, save: results.append({**result, "saves": save is not None}),
        resume_from=None,
        device="cpu",
    )
    assert [result["saves"] for result in results] == [False, False, True], "the last epoch's network is kept"
    assert not any("objective" in result for result in results)
    assert "val_image_auroc" in results[-1]
