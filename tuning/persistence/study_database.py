"""A sweep's Optuna studies in a database, for those who look at them with Optuna's own tools.

The search works on studies in memory: asking a database costs a dozen transactions a trial, and one that is locked
would hold up every trial. This database is written behind, by a thread of its own, one transaction as a trial starts
and a few as it ends; it is not read back but to go on where an earlier driver of the same sweep left it. What is lost
of it, the ledger (:mod:`tuning.persistence.ledger`) has.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import sqlalchemy
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ssn.errors import SSNError
from tuning.tracking.mlflow_tracker import one_line

LOCK_TIMEOUT_S = 30.0
"""How long one statement waits for a locked SQLite file."""
ATTEMPTS = 20
"""Of one write, before it is given up; with the above, ten minutes."""
RETRY_DELAY_S = 1.0
CLOSE_TIMEOUT_S = 60.0
"""How long the end of a search waits for writes that are due."""
INTERRUPT_TIMEOUT_S = 2.0
"""Likewise, after an interrupt."""

TRIAL_KEY = "trial_key"
"""User attribute by which a trial is found again."""


class StudyDatabase:
    """Writes trials behind the search, in order.

    Args:
        url: Any Optuna RDB URL, such as ``sqlite:///studies.db``.
        notify: Takes a line for the user, should the database stay out of reach.

    Raises:
        SSNError: it cannot be opened.
    """

    def __init__(self, url: str, *, notify: Callable[[str], None] = lambda line: None) -> None:
        self.url = url
        self._notify = notify
        self._storage = open_storage(url)
        self._studies: dict[str, int] = {}
        self._trials: dict[tuple[str, int], int] = {}  # unfinished ones of this process
        self._earlier: set[tuple[str, str | None, TrialState]] = set()  # finished ones of earlier drivers
        self._failure: str | None = None
        self._due: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="study-database", daemon=True)
        self._thread.start()

    def start(self, study: str, directions: Collection[StudyDirection]) -> None:
        """Create a study, or take up what an earlier driver left: its unfinished trials have failed."""
        self._due.put(lambda: self._start(study, directions))

    def write(self, study: str, trial: FrozenTrial) -> None:
        """Bring a trial, just started or just ended, into its study. ``trial.number`` identifies it in this process."""
        self._due.put(lambda: self._write(study, trial))

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Wait for what is due, but not for ever."""
        self._due.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._failure = self._failure or "it is out of reach"
        if self._failure is not None:
            self._notify(
                f"warning: the studies at {self.url} are incomplete ({self._failure}); the sweep itself does not need "
                "them, and resuming it completes them"
            )

    def _work(self) -> None:
        while (action := self._due.get()) is not None:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    action()
                    break
                except StorageInternalError as error:  # locked, or out of reach; what it was to write is still here
                    if attempt == ATTEMPTS:
                        self._failure = one_line(error.__cause__ or error)
                    time.sleep(RETRY_DELAY_S)
                except Exception as error:  # of this trial alone; the search must not depend on who looks on
                    self._failure = one_line(error)
                    break

    def _start(self, study: str, directions: Collection[StudyDirection]) -> None:
        try:
            self._studies[study] = self._storage.create_new_study(list(directions), study)
            return
        except DuplicatedStudyError:
            self._studies[study] = self._storage.get_study_id_from_name(study)
        for trial in self._storage.get_all_trials(self._studies[study], deepcopy=False):
            if trial.state.is_finished():
                self._earlier.add((study, trial.user_attrs.get(TRIAL_KEY), trial.state))
            else:
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _write(self, study: str, trial: FrozenTrial) -> None:
        known = self._trials.get((study, trial.number))
        if known is None:
            if (study, trial.user_attrs.get(TRIAL_KEY), trial.state) not in self._earlier:
                created = self._storage.create_new_trial(self._studies[study], trial)
                if not trial.state.is_finished():
                    self._trials[study, trial.number] = created
            return
        there = self._storage.get_trial(known)
        if there.state.is_finished():  # by an attempt of ours whose answer was lost
            return
        for step, value in trial.intermediate_values.items():
            if there.intermediate_values.get(step) != value:
                self._storage.set_trial_intermediate_value(known, step, value)
        for key, attribute in trial.user_attrs.items():
            if there.user_attrs.get(key) != attribute:
                self._storage.set_trial_user_attr(known, key, attribute)
        for key, attribute in trial.system_attrs.items():
            if there.system_attrs.get(key) != attribute:
                self._storage.set_trial_system_attr(known, key, attribute)
        if trial.state.is_finished():
            self._storage.set_trial_state_values(known, trial.state, trial.values)
            del self._trials[study, trial.number]


def _do_not_wait_for_the_disk(connection: sqlite3.Connection, record: object) -> None:
    connection.execute("PRAGMA synchronous=OFF")


def open_storage(url: str) -> BaseStorage:
    """Open a database, or make a new one.

    Raises:
        SSNError: it cannot be opened.
    """
    sqlite = url.startswith("sqlite:")
    if sqlite and (path := url.removeprefix("sqlite:///")) not in ("", url):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT_S}} if sqlite else None)
        if sqlite:
            # A dozen transactions a trial, each waiting for the disk, fall behind a quick search. After a power cut the
            # file may be made again from the ledger.
            sqlalchemy.event.listen(storage.engine, "connect", _do_not_wait_for_the_disk)
            storage.engine.dispose()
        return storage
    except Exception as error:  # SQLAlchemy's and the drivers' exceptions have no common base
        raise SSNError(f"search.storage {url} cannot be opened: {error}".splitlines()[0]) from error
