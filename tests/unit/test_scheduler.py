"""Early stopping by category, on recorded objectives; no Ray runtime."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from ssn.errors import SSNError
from tuning.search.rungs import Rungs, rung_epochs
from tuning.search.scheduler import MultiplexScheduler

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE


class FakeTrial:
    """What the scheduler looks at of a Tune trial."""

    def __init__(self, trial_id: str, category: str, epochs: int = 9) -> None:
        self.trial_id = trial_id
        self.config = {"category": category, "index": 1, "config": {"train.epochs": epochs}}


class History:
    """Objectives by trial and epoch, and last reports."""

    def __init__(
        self, objectives: dict[str, dict[int, float]], metrics: dict[str, dict[str, float]] | None = None
    ) -> None:
        self.objectives = objectives
        self.metrics = metrics or {}

    def recorded_objectives(self, trial_id: str) -> dict[int, float]:
        return self.objectives.get(trial_id, {})

    def recorded_metrics(self, trial_id: str) -> dict[str, float]:
        return self.metrics.get(trial_id, {})


def scheduler(grace: int | None = 1, eta: int = 3, history: History | None = None) -> MultiplexScheduler:
    return MultiplexScheduler(Rungs(grace, eta), history=history)


def report(
    sched: MultiplexScheduler,
    name: str,
    epoch: int,
    objective: float | None,
    category: str = "screw",
    epochs: int = 9,
) -> str:
    trial: Any = FakeTrial(name, category, epochs)
    if epoch == 1:
        sched.on_trial_add(None, trial)  # type: ignore[arg-type]
    result = {"epoch": epoch, "training_iteration": 1} | ({} if objective is None else {"objective": objective})
    return sched.on_trial_result(None, trial, result)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("max_epochs", "grace", "eta", "expected"),
    [
        (9, 1, 3, (1, 3)),
        (10, 1, 3, (1, 3, 9)),
        (300, 30, 3, (30, 90, 270)),
        (243, 1, 3, (1, 3, 9, 27, 81)),
        (244, 1, 3, (1, 3, 9, 27, 81, 243)),
        (8, 2, 2, (2, 4)),
        (5, 5, 3, ()),
        (1, 1, 2, ()),
        (3, 10, 2, ()),
    ],
)
def test_rung_epochs(max_epochs: int, grace: int, eta: int, expected: tuple[int, ...]) -> None:
    assert rung_epochs(max_epochs, grace, eta) == expected


@pytest.mark.parametrize(("max_epochs", "grace", "eta"), [(0, 1, 3), (9, 0, 3), (9, 1, 1)])
def test_rungs_out_of_range_are_refused(max_epochs: int, grace: int, eta: int) -> None:
    with pytest.raises(SSNError, match="but must be at least"):
        rung_epochs(max_epochs, grace, eta)
    with pytest.raises(SSNError, match="but must be at least"):
        Rungs(grace, eta).epochs(max_epochs)


@pytest.mark.parametrize(("grace", "eta"), [(1, 2), (1, 3), (2, 3), (5, 4)])
def test_a_poor_trial_goes_at_each_of_the_rungs(grace: int, eta: int) -> None:
    """The rungs that trials report at and those that the scheduler stops at are the same, for every budget."""
    for max_epochs in range(1, 100):
        rungs = rung_epochs(max_epochs, grace, eta)
        sched = scheduler(grace, eta)
        names = [f"good{i}" for i in range(5)] + [f"poor{i}" for i in range(len(rungs))]
        for name in names:
            report(sched, name, 1, None, epochs=max_epochs)
        for i, epoch in enumerate(rungs):
            for name in names[:5]:
                report(sched, name, epoch, 0.9, epochs=max_epochs)
            assert report(sched, f"poor{i}", epoch, 0.1, epochs=max_epochs) == STOP
            for name in names[6 + i :]:
                assert report(sched, name, epoch, 0.9, epochs=max_epochs) == CONTINUE


def test_only_the_best_third_goes_on() -> None:
    sched = scheduler()
    decisions = [report(sched, f"t{i}", 1, objective) for i, objective in enumerate([0.5, 0.4, 0.6, 0.3, 0.7, 0.55])]
    assert decisions == [CONTINUE, STOP, CONTINUE, STOP, CONTINUE, STOP]


def test_categories_do_not_meet() -> None:
    sched = scheduler()
    for i in range(6):
        report(sched, f"easy{i}", 1, 0.99, category="tile")
    assert report(sched, "hard0", 1, 0.2, category="screw") == CONTINUE
    assert report(sched, "hard1", 1, 0.3, category="screw") == CONTINUE
    assert report(sched, "hard2", 1, 0.1, category="screw") == STOP


def test_trials_of_other_lengths_do_not_meet() -> None:
    """Their learning rates fall at other epochs."""
    sched = scheduler(grace=None)
    for i in range(6):
        assert report(sched, f"long{i}", 1, 0.9, epochs=27) == CONTINUE, "no rung of long trials"
        report(sched, f"long{i}", 3, 0.9, epochs=27)
    assert report(sched, "short0", 1, 0.2) == CONTINUE
    assert report(sched, "short1", 1, 0.3) == CONTINUE
    assert report(sched, "short2", 1, 0.1) == STOP
    assert report(sched, "short1", 3, 0.3) == CONTINUE
    assert report(sched, "short0", 3, 0.2) == STOP
    assert report(sched, "long0", 9, 0.2, epochs=27) == CONTINUE, "the last epoch of short trials is a rung of these"
    report(sched, "long6", 1, None, epochs=27)
    assert report(sched, "long6", 3, 0.2, epochs=27) == STOP
    assert sched.debug_string().count("epochs: ") == 2


def test_rungs_follow_the_length() -> None:
    rungs = Rungs(None, 3)
    assert [rungs.epochs(e) for e in (4, 9, 90)] == [(1, 3), (1, 3), (10, 30)]
    assert [Rungs(2, 3).epochs(e) for e in (2, 9, 90)] == [(), (2, 6), (2, 6, 18, 54)]


def test_reports_without_objective_are_ignored() -> None:
    sched = scheduler()
    for i in range(6):
        report(sched, f"good{i}", 1, 0.9)
    assert report(sched, "t", 1, None) == CONTINUE
    assert report(sched, "t", 2, None) == CONTINUE
    trial: Any = FakeTrial("t", "screw")
    assert sched.on_trial_result(None, trial, {"objective": 0.1}) == CONTINUE  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [-1.0, math.nan, -math.inf])
@pytest.mark.parametrize("grace", [1, 3, 9])
def test_last_epoch_is_never_stopped(objective: float, grace: int) -> None:
    sched = scheduler(grace=grace)
    for i in range(6):
        report(sched, f"good{i}", 1, 0.9)
        assert report(sched, f"good{i}", 9, 0.9) == CONTINUE
    report(sched, "t", 1, None)
    assert report(sched, "t", 9, objective) == CONTINUE


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_objective_that_is_no_number_stops_even_the_first_and_spoils_nothing(bad: float) -> None:
    sched = scheduler()
    assert report(sched, "bad0", 1, bad) == STOP
    assert report(sched, "bad1", 1, bad) == STOP
    assert report(sched, "t0", 1, 0.5) == CONTINUE
    assert report(sched, "t1", 1, 0.6) == CONTINUE
    assert report(sched, "t2", 1, 0.1) == STOP


def test_without_rungs_nothing_is_stopped() -> None:
    sched = scheduler(grace=9)
    for i in range(6):
        report(sched, f"good{i}", 1, 0.9)
    assert report(sched, "t", 1, 0.0) == CONTINUE
    assert report(sched, "t", 8, 0.0) == CONTINUE


def test_rungs_are_filled_again_from_the_history() -> None:
    objectives = {f"t{i}": {1: value, 3: value, 9: value} for i, value in enumerate([0.5, 0.6, 0.7])}
    sched = scheduler(history=History(objectives))
    for name in ("t2", "t0", "t1"):
        sched.on_trial_add(None, FakeTrial(name, "screw"))  # type: ignore[arg-type]
    assert report(sched, "poor", 1, 0.55) == STOP
    assert report(scheduler(), "poor", 1, 0.55) == CONTINUE
    # A restored trial that reports an epoch again is not judged by its own record.
    assert report(sched, "t0", 3, 0.5) == CONTINUE


def test_saved_and_restored(tmp_path: Path) -> None:
    first = scheduler()
    for i in range(5):
        report(first, f"good{i}", 1, 0.9)
    first.save(str(tmp_path / "state"))
    second = scheduler()
    second.restore(str(tmp_path / "state"))
    assert report(second, "poor", 1, 0.1) == STOP


def test_tune_may_not_set_another_metric() -> None:
    assert scheduler().set_search_properties(None, None)
    assert not scheduler().set_search_properties("loss", "min")


def test_trials_that_never_ran_can_be_removed() -> None:
    sched = scheduler()
    trial: Any = FakeTrial("t", "screw")
    sched.on_trial_add(None, trial)  # type: ignore[arg-type]
    sched.on_trial_remove(None, trial)  # type: ignore[arg-type]
    assert "screw" in sched.debug_string()


def test_trials_that_wait_are_chosen_among_the_living() -> None:
    def trial(status: str) -> Any:
        return SimpleNamespace(status=status)

    pending, paused, running = trial("PENDING"), trial("PAUSED"), trial("RUNNING")
    for live, expected in (
        ((), None),
        ((running,), None),
        ((running, paused), paused),
        ((paused, running, pending), pending),
    ):
        controller: Any = SimpleNamespace(get_live_trials=lambda live=live: live)
        assert scheduler().choose_trial_to_run(controller) is expected
