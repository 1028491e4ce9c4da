"""A search that goes on from a ledger, cut at any point: nothing lost, nothing doubled; no Ray runtime."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from tests.searches import EPOCHS, ETA, GRACE, RATIO, SIGMA, cut_short, make_search, play, quality, report
from tuning.champions.winner import TrialRecord, select_winner
from tuning.persistence.ledger import SweepLedger
from tuning.search.rungs import Rungs
from tuning.search.scheduler import MultiplexScheduler
from tuning.search.searcher import MultiplexSearcher

NAMES, TRIALS = "abc", 5


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def through_files(tmp_path: Path, records: list[TrialRecord]) -> list[TrialRecord]:
    """As a ledger keeps and gives them."""
    ledger = SweepLedger.open(tmp_path, "sweep")
    for record in records:
        ledger.write_trial(record)
    return ledger.read_trials()


@pytest.mark.parametrize("seed", range(8))
def test_search_that_is_killed_again_and_again_is_whole(tmp_path: Path, seed: int) -> None:
    """Several trials run at each kill; some of them have no checkpoint, and some never reached the ledger."""
    rng = random.Random(seed)
    ledger = SweepLedger.open(tmp_path, "sweep")
    ended: dict[tuple[str, str, int], TrialRecord] = {}
    for attempt in range(20):
        earlier = ledger.read_trials()
        for record in earlier:
            if record.state != "running":
                assert ended.get(record.name, record) == record, "what has ended stays as it is"
                ended[record.name] = record
        search = make_search(NAMES, TRIALS, earlier)
        if search.done:
            break
        interrupted = [r for r in earlier if r.state == "running"]
        for number, record in enumerate(interrupted):
            suggestion = search.suggest(f"{attempt}-{number}")
            assert isinstance(suggestion, dict)
            assert (suggestion["category"], suggestion["index"]) == (record.category, record.index)
            assert (suggestion["trial_key"], suggestion["config"]) == (record.trial_key, record.config)
            assert suggestion.get("resume_from") == record.checkpoint
            assert search.recorded_objectives(f"{attempt}-{number}") == record.objectives
            finish(search, f"{attempt}-{number}")
        play(search, len(search.records()) + rng.randrange(4))
        running = [f"{attempt}-run-{i}" for i in range(rng.randrange(4))]
        unwritten = set()
        for trial_id in running:
            suggestion = search.suggest(trial_id)
            if not isinstance(suggestion, dict):
                continue
            if rng.random() < 0.5:
                report(search, trial_id, 1, quality(suggestion["config"]))
            elif rng.random() < 0.5:
                unwritten.add(search.record(trial_id).name)
        for record in search.records():
            if record.name not in unwritten | ended.keys():
                ledger.write_trial(record)
    assert search.done
    records = search.records()
    assert sorted((r.category, r.index) for r in records) == [(c, i) for c in NAMES for i in range(TRIALS)]
    assert len({(r.category, r.trial_key) for r in records}) == len(records)
    for category in NAMES:
        of_category = search.records(category)
        default = next(r for r in of_category if r.index == 0)
        assert default.params[SIGMA] == 0.015, "the base configuration is one of them, whatever was lost"
        told = [t for t in search.study(category).trials if "duplicate_of" not in t.user_attrs]
        assert len(told) == TRIALS
        by_key = {t.user_attrs["trial_key"]: t for t in told}
        for record in of_category:
            trial = by_key[record.trial_key]
            assert trial.state == {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}[record.state]
            assert trial.intermediate_values == record.objectives
        assert select_winner(of_category).objective == max(r.objective or 0 for r in of_category)


def finish(search: MultiplexSearcher, trial_id: str) -> None:
    value = quality(search.record(trial_id).config)
    search.on_trial_complete(trial_id, {"epoch": EPOCHS, "objective": value})


def test_killed_before_any_trial_started_is_a_fresh_search(tmp_path: Path) -> None:
    assert play(make_search("a", 4, through_files(tmp_path, [])), 4) == play(make_search("a", 4), 4)


def test_later_suggestions_learn_from_what_was_there(tmp_path: Path) -> None:
    search = make_search("a", 40)
    play(search, 20)
    resumed = make_search("a", 40, through_files(tmp_path, search.records()))
    play(resumed, 40)
    values = [quality(r.config) for r in resumed.records("a")]
    assert sum(values[-15:]) / 15 > sum(values[1:6]) / 5
    assert len({r.trial_key for r in resumed.records()}) == 40
    repeated = [t for t in resumed.study("a").trials if "duplicate_of" in t.user_attrs]
    assert len(repeated) < 10, "its sampler does not begin as the first one's did"


def test_concurrency_limit_holds_for_what_is_suggested_again(tmp_path: Path) -> None:
    search = make_search("abc", 2)
    for name in ("x", "y", "z"):
        search.suggest(name)
    resumed = make_search("abc", 2, through_files(tmp_path, search.records()))
    resumed.set_max_concurrency(2)
    assert resumed.suggest("1") is not None
    assert resumed.suggest("2") is not None
    assert resumed.suggest("3") is None
    finish(resumed, "1")
    assert resumed.suggest("3")["index"] == 0
    assert not resumed.done


def test_trials_of_another_stage_are_not_the_searchs(tmp_path: Path) -> None:
    search = make_search("a", 2)
    play(search, 2)
    (first, second) = search.records()
    second.stage = "finalist"
    resumed = make_search("a", 2, [first, second])
    assert [r.index for r in resumed.records()] == [0]
    assert not resumed.done


def test_rungs_know_what_ended_before(tmp_path: Path) -> None:
    """A trial that is worse than all of the earlier ones at its rung is stopped, as it would have been before."""
    search = make_search("ab", 8)
    play(search, 12)
    resumed = make_search("ab", 8, through_files(tmp_path, cut_short(search, "cut")))

    def decide(history: MultiplexSearcher, category: str) -> str:
        scheduler = MultiplexScheduler(Rungs(GRACE, ETA), history=history)
        scheduler.enter_earlier(history.records())
        trial: Any = type(
            "Trial",
            (),
            {"trial_id": "new", "config": {"category": category, "index": 9, "config": {"train.epochs": EPOCHS}}},
        )
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        return scheduler.on_trial_result(None, trial, {"epoch": 1, "objective": 0.0})  # type: ignore[arg-type]

    assert decide(resumed, "a") == "STOP"
    assert decide(make_search("ab", 8), "a") == "CONTINUE"


def test_search_can_be_pickled_with_a_database(tmp_path: Path) -> None:
    """Tune does so as a run begins."""
    import pickle

    from tuning.persistence.study_database import StudyDatabase

    database = StudyDatabase(f"sqlite:///{tmp_path}/studies.db")
    search = make_search("a", 2, database=database)
    play(search, 1)
    assert [r.index for r in pickle.loads(pickle.dumps(search)).records()] == [0]
    database.close()


def test_settings_of_an_earlier_trial_survive_conditions(tmp_path: Path) -> None:
    search = make_search("a", 12)
    play(search, 12)
    resumed = make_search("a", 12, through_files(tmp_path, search.records()))
    before = {
        t.user_attrs["trial_key"]: t.params for t in search.study("a").trials if "duplicate_of" not in t.user_attrs
    }
    assert {t.user_attrs["trial_key"]: t.params for t in resumed.study("a").trials} == before
    assert {len(p) for p in before.values()} == {2, 3}, f"weak labels depend on {RATIO}"
