"""Searchers whose runs all go to their last epoch; the one here searches nothing and serves a fixed list."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ray.tune.search import Searcher

from tuning.champions.winner import TrialRecord


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
        record.failure = result.get("failure", record.failure)
        if "epoch" not in result:
            return
        record.epoch, record.metrics = int(result["epoch"]), dict(result)
        if result.get("objective") is not None:
            record.objectives[record.epoch] = float(result["objective"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note how a run ended. Tune does not call this for runs that an interrupt cuts short."""
        record = self._records[trial_id]
        if result is not None:
            self.on_trial_result(trial_id, result)
        cut_short = not error and record.epoch < record.max_epochs
        diverged = record.objective is not None and not math.isfinite(record.objective)
        if cut_short and record.failure is None:
            record.failure = f"it ended after {record.epoch} of {record.max_epochs} epochs"
        elif diverged:
            record.failure = f"its objective was {record.objective} at epoch {record.epoch}"
        record.state = "failed" if error or cut_short or diverged else "complete"

    def rename(self, trial_id: str, new_id: str) -> None:
        """A trial that has not begun comes under another of Tune's ids."""
        record = self._records.pop(trial_id)
        record.trial_id, self._records[new_id] = new_id, record

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

    def record(self, trial_id: str) -> TrialRecord:
        """One run, by Tune's id."""
        return self._records[trial_id]

    def origin(self, trial_id: str) -> TrialRecord | None:
        """See :class:`tuning.persistence.ledger_callback.RecordKeeper`."""
        return None

    def note_failure(self, trial_id: str, reason: str) -> None:
        """Keep why a run failed, in one line; Tune tells a searcher only that it did."""
        self._records[trial_id].failure = reason

    def save(self, checkpoint_path: str) -> None:
        """Tune keeps its searcher's state; a sweep goes by its ledger, a benchmark by its results."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Tune is never asked to restore a run."""
        raise NotImplementedError("a sweep goes on from its ledger, a benchmark from its results")

    def _enter_earlier(self, record: TrialRecord) -> None:
        """Take over a run that had ended, under an id that Tune gives to none."""
        record.trial_id = "-".join(map(str, record.name))
        self._records[record.trial_id] = record


class FixedRuns(UnprunedSearcher, Generic[R]):
    """Suggests every run once, each to a category with the fewest running.

    So, as far as there are as many categories as places, each is worked on by one run at a time, and none waits for
    features that another run of its category still computes.

    Args:
        runs: In order; none of them finished yet.
        stage: Of all of them, for the tracker.
        label: What a person knows a run by.
        tags: Of a run, for the tracker.
        earlier: What a ledger has of them: those that ended are not suggested, the others go on from their checkpoints.
    """

    def __init__(
        self,
        runs: Sequence[R],
        *,
        stage: str,
        label: Callable[[R], str],
        tags: Callable[[R], Mapping[str, str]],
        earlier: Sequence[TrialRecord] = (),
    ) -> None:
        super().__init__()
        self._runs = list(runs)
        self._stage = stage
        self._labels = [label(run) for run in runs]
        self._tags = [dict(tags(run)) for run in runs]
        self._started = [False] * len(runs)
        self._cut_short: dict[int, TrialRecord] = {}
        known = {(r.category, r.index, r.trial_key): r for r in earlier if r.stage == stage}
        for at, run in enumerate(self._runs):
            record = known.get((run.category, run.index, run.identity))
            if record is None:
                continue
            if record.state == "running":
                self._cut_short[at] = record
            else:
                self._started[at] = True
                self._enter_earlier(record)

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
        record = self._cut_short.get(index) or TrialRecord(
            trial_id=trial_id,
            trial_key=run.identity,
            category=run.category,
            index=run.index,
            number=run.index,
            max_epochs=int(run.config["train.epochs"]),
            config=dict(run.config),
            params={},
            stage=self._stage,
            tags=self._tags[index],
        )
        record.trial_id = trial_id
        self._records[trial_id] = record
        goes_on = {} if record.checkpoint is None else {"resume_from": record.checkpoint}
        return goes_on | {
            "trial_key": run.identity,
            "category": run.category,
            "index": run.index,
            "config": dict(run.config),
            "stage": self._stage,
            "label": self._labels[index],
            "tags": self._tags[index],
        }
