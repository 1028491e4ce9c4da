"""Searchers whose runs all go to their last epoch; the one here searches nothing and serves a fixed list."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ray.tune.search import Searcher

from tuning.winner import TrialRecord


class FixedRun(Protocol):
    """One network to train."""

    @property
    def category(self) -> str: ...

    @property
    def identity(self) -> str:
        """See :func:`ssn.config.trial_identity`."""

    @property
    def index(self) -> int:
        """Position among the category's runs."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Flat, dotted keys."""


R = TypeVar("R", bound=FixedRun)


class UnprunedSearcher(Searcher):
    """Keeps the records of runs of which none is stopped early; what comes next is for subclasses to say."""

    def __init__(self) -> None:
        super().__init__()
        self._records: dict[str, TrialRecord] = {}
        self._max_concurrent: int | None = None
        self.ended_by: str | None = None
        """The budget that ended the runs before their end, in one line; None: none did."""

    @property
    def max_concurrent(self) -> int | None:
        """How many runs may be under way at once; None: no limit."""
        return self._max_concurrent

    @property
    def full(self) -> bool:
        """Whether as many runs are under way as may be."""
        running = sum(r.state == "running" for r in self._records.values())
        return self._max_concurrent is not None and running >= self._max_concurrent

    def records(self, category: str | None = None) -> list[TrialRecord]:
        """Runs in the order they were started; those of one category, or all."""
        return [r for r in self._records.values() if category in (None, r.category)]

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Take over the limit that ``TuneConfig.max_concurrent_trials`` states."""
        self._max_concurrent = max_concurrent
        return True

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note how far a run is."""
        record = self._records[trial_id]
        record.epoch, record.metrics = int(result.get("epoch", record.epoch)), dict(result)
        if result.get("objective") is not None:
            record.objectives[record.epoch] = float(result["objective"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note how a run ended. Tune does not call this for runs that an interrupt cuts short."""
        record = self._records[trial_id]
        if result is not None:
            self.on_trial_result(trial_id, result)
        cut_short = not error and record.epoch < record.max_epochs
        diverged = record.objective is not None and not math.isfinite(record.objective)
        if cut_short:
            record.failure = f"it ended after {record.epoch} of {record.max_epochs} epochs"
        elif diverged:
            record.failure = f"its objective was {record.objective} at epoch {record.epoch}"
        record.state = "failed" if error or cut_short or diverged else "complete"

    def end(self, reason: str) -> None:
        """Take note that a budget ended the runs, those that were still under way with them.

        Args:
            reason: What it was, in one line.
        """
        self.ended_by = reason
        for record in self._records.values():
            if record.state == "running":
                record.state = "stopped"
                record.failure = f"{reason}, after {record.epoch} of its {record.max_epochs} epochs"

    def note_failure(self, trial_id: str, reason: str) -> None:
        """Keep why a run failed, in one line; Tune tells a searcher only that it did."""
        self._records[trial_id].failure = reason

    def save(self, checkpoint_path: str) -> None:
        """Tune keeps its searcher's state."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        """The counterpart of :meth:`save`."""
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))


class FixedRuns(UnprunedSearcher, Generic[R]):
    """Suggests every run once, each to a category with the fewest running.

    So, as far as there are as many categories as places, each is worked on by one run at a time, and none waits for
    features that another run of its category still computes.

    Args:
        runs: In order; none of them finished yet.
        stage: Of all of them, for the tracker.
        label: What a person knows a run by.
        tags: Of a run, for the tracker.
    """

    def __init__(
        self,
        runs: Sequence[R],
        *,
        stage: str,
        label: Callable[[R], str],
        tags: Callable[[R], Mapping[str, str]],
    ) -> None:
        super().__init__()
        self._runs = list(runs)
        self._stage = stage
        self._labels = [label(run) for run in runs]
        self._tags = [dict(tags(run)) for run in runs]
        self._started = [False] * len(runs)

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories that have runs to do."""
        return tuple(dict.fromkeys(run.category for run in self._runs))

    @property
    def done(self) -> bool:
        """Whether every run has ended; false after an interrupt."""
        running = any(r.state == "running" for r in self._records.values())
        return self.ended_by is not None or (all(self._started) and not running)

    def expected_trials(self, category: str) -> int:
        """Runs of the category."""
        return sum(run.category == category for run in self._runs)

    def failures(self) -> list[tuple[R, str]]:
        """Runs that failed, and why."""
        by_name = {(run.category, run.identity): run for run in self._runs}
        failed = [r for r in self._records.values() if r.state == "failed"]
        return [(by_name[r.category, r.trial_key], r.failure or "it raised an error") for r in failed]

    # Ray's annotation leaves out FINISHED, which is a string.
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next run; None while the concurrency limit is reached; ``FINISHED`` once all are started."""
        waiting = [i for i, started in enumerate(self._started) if not started]
        if not waiting:
            return str(Searcher.FINISHED)
        if self.full:
            return None
        running = Counter(r.category for r in self._records.values() if r.state == "running")
        index = min(waiting, key=lambda i: running[self._runs[i].category])
        run = self._runs[index]
        self._started[index] = True
        self._records[trial_id] = TrialRecord(
            trial_id=trial_id,
            trial_key=run.identity,
            category=run.category,
            index=run.index,
            number=run.index,
            max_epochs=int(run.config["train.epochs"]),
            config=dict(run.config),
            params={},
        )
        return {
            "trial_key": run.identity,
            "category": run.category,
            "index": run.index,
            "config": dict(run.config),
            "stage": self._stage,
            "label": self._labels[index],
            "tags": self._tags[index],
        }
