"""A search as a chain of Tune runs; no Ray runtime."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from ssn.config import Config, flatten
from tuning import sweep
from tuning.execution.weights import weights_key
from tuning.persistence.ledger import SweepLedger
from tuning.search import portion as portion_module
from tuning.search.portion import MAX_RETURNS, Portion
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import Choice, FloatRange
from tuning.settings import SweepSettings

BASE = flatten(Config().resolved()) | {"train.epochs": 3}
WEIGHTS = {weights_key(Config().model): "weights"}


def make_searcher(trials: int, axis: Any = None) -> MultiplexSearcher:
    space = {"synthesis.noise_sigma": axis or FloatRange(1e-3, 0.3, log=True)}
    categories = [CategorySearch(name, BASE, space, f"data of {name}", WEIGHTS, 0) for name in "ab"]
    return MultiplexSearcher(categories, sweep_id="s", trials_per_category=trials)


def take(searcher: Searcher, trial_id: str) -> Any:
    """Have a suggested trial run to its end."""
    suggested: Any = searcher.suggest(trial_id)
    if isinstance(suggested, dict):
        searcher.on_trial_result(trial_id, {"epoch": 1, "training_iteration": 1})
        searcher.on_trial_complete(trial_id, {"epoch": 3, "objective": 0.5, "training_iteration": 3})
    return suggested


def test_portion_ends_after_its_trials_and_passes_on_what_they_report() -> None:
    searcher = make_searcher(4)
    portion = Portion(searcher, lambda trial_id: True, 3)
    assert portion.set_max_concurrency(5)
    assert searcher.max_concurrent == 5
    assert [isinstance(take(portion, f"t{i}"), dict) for i in range(3)] == [True] * 3
    assert take(portion, "t3") == Searcher.FINISHED
    assert portion.has_more
    assert [(r.state, r.objective) for r in searcher.records()] == [("complete", 0.5)] * 3
    assert not searcher.done


def test_waiting_for_the_limit_uses_nothing_up() -> None:
    searcher = make_searcher(4)
    portion = Portion(searcher, lambda trial_id: True, 2)
    portion.set_max_concurrency(1)
    assert isinstance(portion.suggest("t0"), dict)
    assert [portion.suggest("t1") for _ in range(5)] == [None] * 5
    assert not portion.has_more


def test_what_tune_gives_up_before_it_began_is_suggested_again_and_nothing_else_is() -> None:
    searcher = make_searcher(2)
    portion = Portion(searcher, {"begun"}.__contains__, 3)
    first: Any = portion.suggest("lost")
    portion.on_trial_complete("lost", error=True)
    assert searcher.record("lost").state == "running"
    again: Any = portion.suggest("begun")
    assert again == first
    assert searcher.record("begun").name == ("search", first["category"], first["index"])
    assert len(searcher.records()) == 1
    portion.on_trial_complete("begun", error=True)
    assert searcher.record("begun").state == "failed"
    portion.on_trial_complete("begun", error=True)  # Tune may say it again
    assert portion.suggest("next") != first


def test_what_never_begins_fails_in_the_end() -> None:
    searcher = make_searcher(1)
    portion = Portion(searcher, lambda trial_id: False)
    names = []
    for attempt in range(MAX_RETURNS + 1):
        suggested: Any = portion.suggest(f"t{attempt}")
        names.append((suggested["category"], suggested["index"]))
        assert searcher.record(f"t{attempt}").state == "running"
        portion.on_trial_complete(f"t{attempt}", error=True)
    assert len(set(names)) == 1
    assert [r.state for r in searcher.records(names[0][0])] == ["failed"]
    assert not portion.has_more


def test_what_is_given_up_as_a_tune_run_ends_is_for_the_next() -> None:
    searcher = make_searcher(1)
    portion = Portion(searcher, lambda trial_id: False)
    portion.suggest("t0")
    portion.suggest("t1")
    assert portion.suggest("t2") == Searcher.FINISHED
    portion.on_trial_complete("t1", error=True)
    assert portion.has_more
    portion.refill()
    assert isinstance(portion.suggest("t3"), dict)
    assert not portion.has_more


def test_tune_stores_no_search() -> None:
    stored = pickle.loads(pickle.dumps(Portion(make_searcher(4), lambda trial_id: True, 2)))
    assert stored._whole is None


class Play:
    """Stands for ``run_tune``: runs what the portion suggests, one trial after another, until ``interrupt`` of them."""

    def __init__(self, interrupt: int | None = None, ended_by: str | None = None) -> None:
        self.taken: list[list[str]] = []
        self.interrupt = interrupt
        self.ended_by = ended_by

    def __call__(self, searcher: Any, scheduler: Any, callbacks: Any, contexts: Any, **options: Any) -> None:
        self.taken.append([])
        while True:
            trial_id = f"t{len(self.taken)}-{len(self.taken[-1])}"
            if self.interrupt == sum(map(len, self.taken)):
                options["stop"].set()
                options["stopper"].ended_by = self.ended_by
                return
            if take(searcher, trial_id) == Searcher.FINISHED:
                return
            self.taken[-1].append(trial_id)


def run(searcher: MultiplexSearcher, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many trials each Tune run had."""
    monkeypatch.setattr(portion_module.Portion.__init__, "__defaults__", (3,))
    monkeypatch.setattr(sweep, "run_tune", play)
    stopper = SimpleNamespace(ended_by=None, note_spent=lambda: None)
    of_sweep: Any = SimpleNamespace(
        ledger=SweepLedger.open(tmp_path, "s"),
        settings=SweepSettings(),
        sweep_id="s",
        data={},
        data_uri="",
        weights_digests={},
        placement=None,
        stopper=stopper,
    )
    sweep._Run.tune(of_sweep, searcher, None, None, None, None, None)  # type: ignore[arg-type]
    return [len(taken) for taken in play.taken]


@pytest.mark.parametrize(("trials", "expected"), [(1, [2]), (3, [3, 3]), (4, [3, 3, 2])])
def test_search_takes_as_many_tune_runs_as_it_needs(
    trials: int, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = make_searcher(trials)
    assert run(searcher, Play(), tmp_path, monkeypatch) == expected
    assert searcher.done
    assert len({record.name for record in searcher.records()}) == 2 * trials


def test_exhausted_space_ends_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = make_searcher(5, Choice((BASE["synthesis.noise_sigma"], 0.02, 0.03)))
    assert sum(run(searcher, Play(), tmp_path, monkeypatch)) < 10
    assert searcher.done


@pytest.mark.parametrize("ended_by", [None, "search.time_budget=1m"])
def test_interrupt_and_spent_budget_end_the_chain(
    ended_by: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = make_searcher(6)
    assert run(searcher, Play(interrupt=3, ended_by=ended_by), tmp_path, monkeypatch) == [3]
    assert not searcher.done
