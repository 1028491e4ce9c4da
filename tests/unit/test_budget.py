"""Budgets: how they are written, when they are spent, and what a search makes of it. Without Ray's runtime."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from ssn.config import Config, flatten
from ssn.errors import SSNError
from ssn.loader import load_config
from tuning.budget import Budget, Spent, parse_duration_s, share_trials
from tuning.champions.winner import select_winner
from tuning.execution.budget_stopper import NOTE_PERIOD_S, BudgetStopper
from tuning.execution.train_worker import Placement
from tuning.execution.weights import weights_key
from tuning.persistence.ledger import SweepLedger
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import FloatRange
from tuning.settings import SweepSettings
from tuning.sweep import check_budget


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def report(iteration: int, this_s: float, total_s: float | None = None) -> dict[str, Any]:
    """What Tune adds to a trial's result."""
    total_s = this_s if total_s is None else total_s
    return {"training_iteration": iteration, "time_this_iter_s": this_s, "time_total_s": total_s}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("1h 30m", 5400), ("45s", 45), ("1.5d", 129600), (" 2 h ", 7200)],
)
def test_times_are_read_with_their_units(text: str, seconds: float) -> None:
    assert parse_duration_s(text, "search.time_budget") == seconds
    assert Budget(time_budget=text).time_s == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "2x", "2h3", "-2h", "0m", "1,5h", "two h"])
def test_a_time_without_unit_or_sense_is_refused(text: str) -> None:
    with pytest.raises(SSNError, match=r"search\.time_budget is .*, but must be a time with its unit, such as 2h"):
        parse_duration_s(text, "search.time_budget")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("search.time_budget=2", "search.time_budget is '2', but must be a time"),
        ("search.max_trials=0", "search.max_trials is 0, but must be at least 1"),
        ("search.max_gpu_hours=0", "search.max_gpu_hours is 0.0, but must be positive"),
        ("resources.memory_gb_per_worker=-1", "resources.memory_gb_per_worker is -1.0, but must be positive"),
    ],
)
def test_budgets_out_of_range_are_refused(setting: str, message: str) -> None:
    with pytest.raises(SSNError, match=message):
        load_config(SweepSettings, sets=[setting])


def test_budgets_are_settings() -> None:
    sets = ["search.time_budget=90m", "search.max_trials=5", "search.max_gpu_hours=1e-1"]
    assert load_config(SweepSettings, sets=sets).budget() == Budget(5, "90m", 0.1)
    assert load_config(SweepSettings).budget() == Budget()


@pytest.mark.parametrize(
    ("categories", "each", "limit", "shares"),
    [(3, 4, None, [4, 4, 4]), (3, 4, 100, [4, 4, 4]), (3, 4, 7, [3, 2, 2]), (3, 4, 2, [1, 1, 0])],
)
def test_trials_are_shared_evenly(categories: int, each: int, limit: int | None, shares: list[int]) -> None:
    assert share_trials(categories, each, limit) == shares


# The stopper.


def test_time_counts_from_the_first_question() -> None:
    clock = Clock()
    stopper = BudgetStopper(Budget(time_budget="1m"), gpus_per_trial=0, clock=clock)
    clock.now_s += 500
    assert not stopper.stop_all()
    clock.now_s += 59
    assert not stopper.stop_all()
    assert stopper.ended_by is None
    clock.now_s += 1
    assert stopper.stop_all()
    assert stopper.stop_all()
    assert stopper.ended_by == "search.time_budget=1m"


def test_gpu_hours_are_those_of_all_trials() -> None:
    stopper = BudgetStopper(Budget(max_gpu_hours=1.5), gpus_per_trial=0.5, clock=Clock())
    assert stopper("a", report(1, 3600)) is False
    stopper("a", report(2, 3600, total_s=7200))
    stopper("a", report(2, 3600, total_s=7200))  # the same again, as Tune does when a trial has ended
    stopper("b", report(1, 3000))
    assert stopper.gpu_hours() == pytest.approx(0.5 * 10200 / 3600)
    assert not stopper.stop_all()
    stopper("b", report(2, 600, total_s=3600))
    assert stopper.stop_all()
    assert stopper.ended_by == "search.max_gpu_hours=1.5"


def test_gpu_hours_count_every_attempt_and_every_driver(tmp_path: Path) -> None:
    """Whether a trial goes on from its checkpoint, with its time so far or without, or begins anew."""
    ledger = SweepLedger.open(tmp_path, "a-sweep")
    budget = Budget(max_gpu_hours=3)
    first = BudgetStopper(budget, gpus_per_trial=1, note=ledger.write_spent, clock=Clock())
    first("a", report(1, 1800))
    first("a", report(2, 1800, total_s=3600))
    first("a", report(2, 900, total_s=2700))  # its process died; on from the first epoch's checkpoint
    first("a", report(1, 900))  # and again, of which Tune knew no checkpoint
    assert first.gpu_hours() == 1.5
    first.note_spent()

    second = BudgetStopper(budget, gpus_per_trial=1, spent=ledger.read_spent(), clock=Clock())
    assert second.gpu_hours() == 1.5
    second("a", report(1, 3600))
    assert not second.stop_all()
    second("a", report(2, 1800, total_s=5400))
    assert second.stop_all()


def test_trial_that_ends_without_a_report_has_taken_nothing() -> None:
    """Tune then shows what it knows of any trial."""
    stopper = BudgetStopper(Budget(max_gpu_hours=1), gpus_per_trial=1, clock=Clock())
    assert stopper("a", {"trial_id": "a", "done": True}) is False
    assert stopper.gpu_hours() == 0


def test_nothing_ends_without_a_budget() -> None:
    clock = Clock()
    stopper = BudgetStopper(Budget(), gpus_per_trial=8, clock=clock)
    stopper("a", report(1, 1e9))
    clock.now_s = 1e9
    assert not stopper.stop_all()


def test_a_copy_keeps_what_was_spent() -> None:
    clock = Clock()
    stopper = BudgetStopper(Budget(time_budget="1m", max_gpu_hours=2), gpus_per_trial=1, clock=clock)
    stopper.stop_all()
    clock.now_s += 40
    stopper("a", report(1, 3600))
    copy = pickle.loads(pickle.dumps(stopper))
    assert not copy.stop_all()
    assert copy.spent_s() == 40
    assert copy.gpu_hours() == 1


def test_time_goes_on_from_what_earlier_drivers_spent(tmp_path: Path) -> None:
    ledger = SweepLedger.open(tmp_path, "a-sweep")
    assert ledger.read_spent() == Spent()
    clock = Clock()
    first = BudgetStopper(Budget(time_budget="2m"), gpus_per_trial=0, note=ledger.write_spent, clock=clock)
    assert not first.stop_all()
    clock.now_s += NOTE_PERIOD_S
    assert not first.stop_all()
    clock.now_s += NOTE_PERIOD_S - 1  # not noted before the driver dies
    assert not first.stop_all()
    assert ledger.read_spent() == Spent(NOTE_PERIOD_S)

    spent = ledger.read_spent()
    second = BudgetStopper(
        Budget(time_budget="2m"), gpus_per_trial=0, spent=spent, note=ledger.write_spent, clock=clock
    )
    clock.now_s += 1000  # between the drivers, and until Tune asks
    assert not second.stop_all()
    clock.now_s += 7
    second.note_spent()  # an interrupt
    assert ledger.read_spent() == Spent(spent.time_s + 7)
    clock.now_s += 120 - spent.time_s - 7
    assert second.stop_all()
    assert second.ended_by == "search.time_budget=2m"


def test_nothing_is_noted_where_nothing_is_limited() -> None:
    clock = Clock()
    noted: list[Spent] = []
    stopper = BudgetStopper(Budget(max_trials=3), gpus_per_trial=1, note=noted.append, clock=clock)
    stopper.stop_all()
    clock.now_s += 1000
    stopper.stop_all()
    stopper.note_spent()
    assert noted == []


# The search.

EPOCHS = 9


def searcher(names: str = "ab", trials: int = 3, **options: Any) -> MultiplexSearcher:
    base = flatten(Config().resolved()) | {"train.epochs": EPOCHS}
    space = {"synthesis.noise_sigma": FloatRange(1e-3, 0.3, log=True)}
    digests = {weights_key(Config().model): "weights"}
    return MultiplexSearcher(
        [CategorySearch(name, base, space, f"data of {name}", digests, 0) for name in names],
        sweep_id="sweep",
        trials_per_category=trials,
        **options,
    )


def complete(search: MultiplexSearcher, trial_id: str, objective: float = 0.5) -> None:
    search.on_trial_complete(trial_id, {"epoch": EPOCHS, "objective": objective})


def test_no_more_trials_than_allowed_are_started() -> None:
    search = searcher(max_trials=3)
    started = [search.suggest(f"t{i}") for i in range(3)]
    assert [s["category"] for s in started] == ["a", "b", "a"]
    assert search.suggest("t3") == "FINISHED"
    assert not search.done, "those that run go on"
    for i in range(3):
        complete(search, f"t{i}")
    assert search.done
    assert search.expected_trials("b") == 1
    assert search.notices == ["search.max_trials=3 ended the search after 3 of 6 trials"]
    assert search.suggest("t4") == "FINISHED"
    assert len(search.notices) == 1


@pytest.mark.parametrize("limit", [2, 9])
def test_a_limit_that_is_not_met_says_nothing(limit: int) -> None:
    search = searcher("a", trials=2, max_trials=limit)
    for i in range(2):
        search.suggest(f"t{i}")
        complete(search, f"t{i}")
    assert search.suggest("late") == "FINISHED"
    assert search.done
    assert search.notices == []


def test_trials_that_a_budget_stops_are_neither_complete_nor_pruned() -> None:
    search = searcher()
    for i in range(4):
        search.suggest(f"t{i}")
    complete(search, "t0", 0.4)
    search.on_trial_result("t2", {"epoch": 3, "objective": 0.9})
    search.end("search.time_budget=2h")
    assert [r.state for r in search.records()] == ["complete", "stopped", "stopped", "stopped"]
    assert search.done
    assert search.ended_by == "search.time_budget=2h ended the search after 4 of 6 trials and stopped 3 that still ran"
    assert search.notices == [search.ended_by]
    assert [t.state.name for t in search.study("a").trials] == ["COMPLETE", "FAIL"]
    assert select_winner(search.records("a")).index == 0
    with pytest.raises(SSNError, match=r"finished its 9 epochs \(2 stopped\); raise the budget that ended the search"):
        select_winner(search.records("b"))
    restored = pickle.loads(pickle.dumps(search))
    assert restored.done
    assert restored.suggest("late") == "FINISHED"


def test_gpu_hours_without_a_gpu_are_refused() -> None:
    settings = load_config(SweepSettings, sets=["search.max_gpu_hours=2"])
    check_budget(settings, Placement(num_workers=1, use_gpu=True, cpus=1.0, gpus=0.5))
    with pytest.raises(SSNError, match=r"trials run on CPUs here; limit search\.time_budget instead"):
        check_budget(settings, Placement(num_workers=0, use_gpu=False, cpus=1.0, gpus=0.0))


@pytest.mark.parametrize(("workers", "gpus"), [(0, 0.5), (1, 0.5), (2, 1.0)])
def test_gpus_of_a_trial(workers: int, gpus: float) -> None:
    assert Placement(num_workers=workers, use_gpu=True, cpus=1.0, gpus=0.5).gpus_per_trial == gpus
    assert Placement(num_workers=workers, use_gpu=False, cpus=1.0, gpus=0.5).gpus_per_trial == 0
