"""What the Tune callback makes of the events of a sweep; Ray itself does not run here."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs as pafs
from ray.exceptions import RayActorError, RayTaskError
from ray.tune import Checkpoint

from tuning.tracking import MemoryTracker, RunRecord, Sweep
from tuning.tracking.callback import TrackerCallback, epoch_metrics
from tuning.tracking.protocol import TRIAL_MODEL_FILES

SWEEP = Sweep("s1", "widgets", {"bolt": {}})
EPOCHS = 3


def make_trial(index: int, checkpoint_dir: Path | None = None, **result: Any) -> SimpleNamespace:
    return SimpleNamespace(
        trial_id=f"t{index}",
        status="RUNNING",
        config={
            "trial_key": f"k{index}",
            "category": "bolt",
            "index": index,
            "config": {"train.epochs": EPOCHS, "synthesis.noise_sigma": 0.01},
        },
        last_result=result,
        checkpoint=Checkpoint(str(checkpoint_dir)) if checkpoint_dir else None,
        pickled_error_file=None,
        error_file=None,
        run_metadata=SimpleNamespace(num_failures=3),
        get_pickled_error=lambda: None,
        get_error=lambda: None,
    )


class Driver:
    """Calls the callback in the order in which Tune does."""

    def __init__(self, tracker: MemoryTracker) -> None:
        self.callback: Any = TrackerCallback(tracker, SWEEP)

    def start(self, trial: Any) -> None:
        self.callback.on_trial_start(0, [trial], trial)

    def report(self, trial: Any, epoch: int, **metrics: Any) -> None:
        result = {"epoch": epoch, "category": "bolt", "pid": 1, "time_total_s": 2.0 * epoch, "done": False, **metrics}
        self.callback.on_trial_result(0, [trial], trial, result)
        trial.last_result = result

    def complete(self, trial: Any) -> None:
        self.callback.on_trial_complete(0, [trial], trial)
        trial.status = "TERMINATED"


@pytest.fixture
def tracker() -> MemoryTracker:
    tracker = MemoryTracker()
    tracker.start_sweep(SWEEP)
    return tracker


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in TRIAL_MODEL_FILES:
        (folder / name).write_text(name)
    return folder


def trial_run(tracker: MemoryTracker, index: int) -> RunRecord:
    (run,) = [r for r in tracker.find_runs("widgets") if r.tags.get("trial_index") == str(index)]
    return run


def test_full_budget_is_complete_with_its_model(tracker: MemoryTracker, checkpoint_dir: Path) -> None:
    driver, trial = Driver(tracker), make_trial(0, checkpoint_dir)
    driver.start(trial)
    for epoch in range(1, EPOCHS + 1):
        driver.report(
            trial, epoch, objective=epoch / 10, val_pixel_ap=None, hostname="node-a", feature_source="streamed"
        )
    driver.complete(trial)
    run = trial_run(tracker, 0)
    assert (run.status, run.trial_state, run.tags["hostname"]) == ("FINISHED", "COMPLETE", "node-a")
    assert run.tags["feature_source"] == "streamed"
    assert run.metrics == {"objective": 0.3, "epoch": 3.0, "elapsed_s": 6.0}
    assert tracker.list_artifacts(run.run_id) == [f"model/{name}" for name in sorted(TRIAL_MODEL_FILES)]


def test_model_may_lie_in_a_subfolder_of_the_checkpoint(tracker: MemoryTracker, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in TRIAL_MODEL_FILES:
        (tmp_path / "model" / name).touch()
    driver, trial = Driver(tracker), make_trial(0, tmp_path)
    driver.report(trial, EPOCHS)
    driver.complete(trial)
    assert trial_run(tracker, 0).trial_state == "COMPLETE"


def test_train_inside_tune_gives_a_path(tracker: MemoryTracker, checkpoint_dir: Path) -> None:
    driver, trial = Driver(tracker), make_trial(0)
    driver.report(trial, EPOCHS, checkpoint_path=str(checkpoint_dir))
    driver.complete(trial)
    assert len(tracker.list_artifacts(trial_run(tracker, 0).run_id)) == 3


def test_a_path_from_train_lies_on_the_sweeps_file_system(tracker: MemoryTracker, checkpoint_dir: Path) -> None:
    driver, trial = Driver(tracker), make_trial(0)
    driver.callback.filesystem = pafs.SubTreeFileSystem(str(checkpoint_dir.parent), pafs.LocalFileSystem())
    driver.report(trial, EPOCHS, checkpoint_path=checkpoint_dir.name)
    driver.complete(trial)
    assert len(tracker.list_artifacts(trial_run(tracker, 0).run_id)) == 3


def test_told_to_stop_it_closes_every_run_at_once(tracker: MemoryTracker) -> None:
    driver, done, running = Driver(tracker), make_trial(0), make_trial(1)
    driver.report(done, 1)
    driver.complete(done)
    driver.report(running, 1)
    driver.callback.on_step_end(0, [done, running])
    assert trial_run(tracker, 1).status == "RUNNING"
    driver.callback.stop.set()
    driver.callback.on_step_end(1, [done, running])
    driver.report(running, 2)  # Tune hears of it while it ends the trials
    driver.callback.on_experiment_end([done, running])
    states = {r.name: (r.status, r.trial_state) for r in tracker.find_runs("widgets")}
    assert trial_run(tracker, 0).trial_state == "PRUNED"
    assert (trial_run(tracker, 1).status, trial_run(tracker, 1).trial_state) == ("KILLED", "INTERRUPTED")
    assert trial_run(tracker, 1).metrics["epoch"] == 1
    assert "RUNNING" not in {status for status, _ in states.values()}


def test_complete_trial_without_checkpoint_is_a_bug(tracker: MemoryTracker) -> None:
    driver, trial = Driver(tracker), make_trial(0)
    driver.report(trial, EPOCHS)
    with pytest.raises(RuntimeError, match="without a checkpoint"):
        driver.complete(trial)


def test_stopped_early_is_pruned_without_model(tracker: MemoryTracker, checkpoint_dir: Path) -> None:
    driver, trial = Driver(tracker), make_trial(0, checkpoint_dir)
    driver.report(trial, EPOCHS - 1)
    driver.complete(trial)
    run = trial_run(tracker, 0)
    assert (run.status, run.trial_state, tracker.list_artifacts(run.run_id)) == ("FINISHED", "PRUNED", [])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("sigma is\nnegative"), "ValueError: sigma is negative"),
        (RayTaskError("f", "Traceback ...\nValueError: boom", ValueError("boom")), "ValueError: boom"),
        (
            RuntimeError("Traceback (most recent call last):\n  ...\nssn.errors.SSNError: no mask"),
            "ssn.errors.SSNError: no mask",
        ),
        (RayTaskError("f", "Traceback ...\nMemoryError", MemoryError()), "MemoryError"),
        (
            RayActorError(
                error_msg="The actor died unexpectedly.\n\tclass_name: ImplicitFunc\nits worker process has died."
            ),
            "its process died 3 times (killed, for its memory perhaps); lower train.batch_size, or give it more memory",
        ),
        (None, "the trial failed without an error message; see its folder in the sweep's storage"),
    ],
)
def test_failure_is_one_line(tracker: MemoryTracker, error: Exception | None, line: str) -> None:
    driver, trial = Driver(tracker), make_trial(0)
    driver.start(trial)
    trial.get_pickled_error = lambda: error
    driver.callback.on_trial_error(0, [trial], trial)
    run = trial_run(tracker, 0)
    assert (run.status, run.trial_state, run.tags["error"]) == ("FAILED", "FAIL", line)


def test_failure_is_read_beside_the_driver_before_storage_has_it(tracker: MemoryTracker, tmp_path: Path) -> None:
    driver, trial = Driver(tracker), make_trial(0)
    trial.pickled_error_file = str(tmp_path / "error.pkl")
    Path(trial.pickled_error_file).write_bytes(pickle.dumps(ValueError("boom")))
    driver.callback.on_trial_error(0, [trial], trial)
    assert trial_run(tracker, 0).tags["error"] == "ValueError: boom"

    trial.pickled_error_file, trial.error_file = None, str(tmp_path / "error.txt")
    Path(trial.error_file).write_text("Failure # 1 (occurred at 12:00)\nTraceback ...\nRuntimeError: node lost\n")
    driver.callback.on_trial_error(0, [trial], trial)
    assert trial_run(tracker, 0).tags["error"] == "RuntimeError: node lost"


def test_interrupt_and_resume_continue_the_same_runs(tracker: MemoryTracker, checkpoint_dir: Path) -> None:
    driver, done, cut_short = Driver(tracker), make_trial(0, checkpoint_dir), make_trial(1, checkpoint_dir)
    driver.report(done, EPOCHS)
    driver.complete(done)
    driver.report(cut_short, 1, objective=0.1)
    driver.report(cut_short, 2, objective=0.2)
    cut_short.status = "TERMINATED"  # as Tune marks it on the way out
    driver.callback.on_experiment_end([done, cut_short])
    interrupted = trial_run(tracker, 1)
    assert (interrupted.status, interrupted.trial_state) == ("KILLED", "INTERRUPTED")

    resumed = Driver(tracker)
    cut_short.status = "PENDING"
    resumed.start(cut_short)
    for epoch in (2, 3):
        resumed.report(cut_short, epoch, objective=epoch / 10)
    resumed.complete(cut_short)
    resumed.callback.on_experiment_end([done, cut_short])

    assert len(tracker.find_runs("widgets")) == 3
    run = trial_run(tracker, 1)
    assert (run.run_id, run.status, run.trial_state) == (interrupted.run_id, "FINISHED", "COMPLETE")
    assert tracker.metric_history(run.run_id, "objective") == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_trial_that_reports_why_it_gave_up_has_failed(tracker: MemoryTracker, checkpoint_dir: Path) -> None:
    driver, trial = Driver(tracker), make_trial(0, checkpoint_dir)
    driver.report(trial, 1)
    trial.last_result = {"failure": "the training loss became nan", "category": "bolt"}
    driver.callback.on_trial_result(0, [trial], trial, trial.last_result)
    driver.complete(trial)
    run = trial_run(tracker, 0)
    assert (run.status, run.trial_state, run.tags["error"]) == ("FAILED", "FAIL", "the training loss became nan")


def test_failed_trial_that_is_tried_again_can_complete(tracker: MemoryTracker, checkpoint_dir: Path) -> None:
    driver, trial = Driver(tracker), make_trial(0, checkpoint_dir)
    driver.report(trial, 1)
    driver.callback.on_trial_error(0, [trial], trial)
    driver.start(trial)
    driver.report(trial, EPOCHS)
    driver.complete(trial)
    run = trial_run(tracker, 0)
    assert (run.status, run.trial_state, "error" in run.tags) == ("FINISHED", "COMPLETE", False)


def test_pickled_callback_holds_no_open_runs(tracker: MemoryTracker) -> None:
    driver = Driver(tracker)
    driver.start(make_trial(0))
    copy = pickle.loads(pickle.dumps(driver.callback))
    copy.on_experiment_end([])
    assert trial_run(copy.tracker, 0).status == "RUNNING"


def test_epoch_metrics_are_the_trials_own_numbers() -> None:
    result = {"epoch": 1, "train_loss": 2, "done": True, "flag": True, "category": "bolt", "timestamp": 5, "x": None}
    assert epoch_metrics(result) == {"train_loss": 2.0}
