"""Studies in a database: the same as in memory, whoever wrote them first, and a locked file holds nobody up."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from ssn.errors import SSNError
from tests.searches import EPOCHS, RATIO, SIGMA, WEAK, cut_short, make_search, play
from tuning.champions.winner import TrialRecord
from tuning.persistence import study_database
from tuning.persistence.study_database import StudyDatabase


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'sweep' / 'studies.db'}"


def search_until(
    url: str, stop: int, earlier: list[TrialRecord] | None = None
) -> tuple[list[TrialRecord], list[optuna.trial.FrozenTrial]]:
    """Trials of one category, the last of which is cut short at its first rung; records, and what the database has."""
    said: list[str] = []
    database = StudyDatabase(url, notify=said.append)
    search = make_search("a", trials=8, earlier=earlier or (), database=database)
    play(search, stop)
    records = cut_short(search, f"last-{stop}")
    database.close()
    assert said == []
    return records, optuna.load_study(study_name="sweep.a", storage=url).trials


def test_database_has_what_memory_has(url: str) -> None:
    database = StudyDatabase(url)
    search = make_search("ab", trials=6, database=database)
    play(search, 12)
    database.close()
    for category in "ab":
        there = optuna.load_study(study_name=f"sweep.{category}", storage=url).trials
        mine = search.study(category).trials
        assert len(there) == len(mine) == 6
        for one, other in zip(there, mine, strict=True):
            assert one.state == other.state
            assert one.values == other.values
            assert one.params == other.params
            assert one.distributions == other.distributions
            assert one.intermediate_values == other.intermediate_values
            assert one.user_attrs == other.user_attrs
        assert {t.state for t in there} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_running_trials_can_be_watched(url: str) -> None:
    database = StudyDatabase(url)
    search = make_search("a", trials=3, database=database)
    search.suggest("t")
    database.close()
    (trial,) = optuna.load_study(study_name="sweep.a", storage=url).trials
    assert (trial.state, set(trial.params)) == (TrialState.RUNNING, {SIGMA, f"{RATIO}[index]", f"{WEAK}[index]"})


def test_orphans_of_a_killed_driver_fail_and_are_asked_again(url: str) -> None:
    records, there = search_until(url, 3)
    assert [t.state for t in there][3] == TrialState.RUNNING
    again, there = search_until(url, 5, earlier=records)
    states = [t.state for t in there]
    assert states[3] == TrialState.FAIL, "nobody runs it any more"
    assert states.count(TrialState.RUNNING) == 1
    repeated = [t for t in there if t.user_attrs["trial_key"] == records[3].trial_key]
    assert [t.state for t in repeated] == [TrialState.FAIL, repeated[1].state]
    assert repeated[1].state in (TrialState.COMPLETE, TrialState.PRUNED)
    # nothing that had ended is there twice
    ended = [t.user_attrs["trial_key"] for t in there if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(ended) == len(set(ended)) == 5
    assert len(again) == 6


def test_lost_database_is_made_again(url: str) -> None:
    records, _ = search_until(url, 3)
    Path(url.removeprefix("sqlite:///")).unlink()
    _, there = search_until(url, 5, earlier=records)
    assert [t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in there] == [True] * 5 + [False]


def test_database_that_lagged_behind_the_ledger_catches_up(url: str) -> None:
    """The driver was killed between a trial's file and its last transaction."""
    records, _ = search_until(url, 2)
    behind = records[2]
    behind.state, behind.epoch, behind.objectives = "complete", EPOCHS, {1: 0.1, 3: 0.2, EPOCHS: 0.3}
    _, there = search_until(url, 3, earlier=records)
    mine = [t for t in there if t.user_attrs["trial_key"] == behind.trial_key]
    assert [(t.state, t.value) for t in mine] == [(TrialState.FAIL, None), (TrialState.COMPLETE, 0.3)]


def test_search_goes_on_while_the_database_is_locked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_database, "LOCK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(study_database, "RETRY_DELAY_S", 0.05)
    monkeypatch.setattr(study_database, "ATTEMPTS", 10_000)
    said: list[str] = []
    database = StudyDatabase(url, notify=said.append)
    search = make_search("a", trials=8, database=database)
    while not optuna.get_all_study_names(url):
        time.sleep(0.01)
    locked = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False)
    locked.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.5, locked.rollback).start()
    play(search, 8)
    assert search.done
    database.close()
    assert said == []
    locked.close()
    assert len(optuna.load_study(study_name="sweep.a", storage=url).trials) == 8


def test_database_that_stays_out_of_reach_is_told_of(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_database, "LOCK_TIMEOUT_S", 0.01)
    monkeypatch.setattr(study_database, "RETRY_DELAY_S", 0.01)
    monkeypatch.setattr(study_database, "ATTEMPTS", 2)
    said: list[str] = []
    database = StudyDatabase(url, notify=said.append)
    locked = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    search = make_search("a", trials=1, database=database)
    play(search, 1)
    database.close()
    locked.close()
    assert search.done
    (line,) = said
    assert line.startswith(f"warning: the studies at {url} are incomplete (")
    assert "\n" not in line


def test_unusable_url_is_named() -> None:
    with pytest.raises(SSNError, match=r"^search.storage nonsense://x cannot be opened: "):
        StudyDatabase("nonsense://x")
