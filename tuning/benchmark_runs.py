"""The runs of a benchmark on Ray Tune: a fixed list, of which nothing is pruned.

A run's last report brings its score on the test split along with the model. The driver writes it to the tracker and,
last of all, to its result file: what has a file is finished.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from tuning.benchmark_plan import PlannedRun
from tuning.benchmark_results import ResultStore, RunResult
from tuning.tracking.callback import TrackerCallback, reached_last_epoch
from tuning.tracking.protocol import BENCHMARK_STAGE
from tuning.train_worker import Placement
from tuning.winner import TrialRecord

if TYPE_CHECKING:
    from ray.tune.experiment import Trial


class FixedRuns(Searcher):
    """Suggests every run once, each to a category with the fewest running.

    So, as far as there are as many categories as places, each is worked on by one run at a time, and none waits for
    features that another run of its category still computes.

    Args:
        runs: In order; none of them finished yet.
        tags: Of a run, for the tracker.
    """

    def __init__(self, runs: Sequence[PlannedRun], tags: Callable[[PlannedRun], Mapping[str, str]]) -> None:
        super().__init__()
        self._runs = list(runs)
        self._tags = [dict(tags(run)) for run in runs]
        self._started = [False] * len(runs)
        self._records: dict[str, TrialRecord] = {}
        self._max_concurrent: int | None = None

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories that have runs to do."""
        return tuple(dict.fromkeys(run.category for run in self._runs))

    @property
    def max_concurrent(self) -> int | None:
        """How many runs may be under way at once; None: no limit."""
        return self._max_concurrent

    @property
    def done(self) -> bool:
        """Whether every run has ended; false after an interrupt."""
        return all(self._started) and not any(r.state == "running" for r in self._records.values())

    def records(self, category: str | None = None) -> list[TrialRecord]:
        """Runs in the order they were started; those of one category, or all."""
        return [r for r in self._records.values() if category in (None, r.category)]

    def expected_trials(self, category: str) -> int:
        """Runs of the category."""
        return sum(run.category == category for run in self._runs)

    def failures(self) -> list[tuple[PlannedRun, str]]:
        """Runs that failed, and why."""
        by_name = {(run.category, run.identity): run for run in self._runs}
        failed = [r for r in self._records.values() if r.state == "failed"]
        return [(by_name[r.category, r.trial_key], r.failure or "it raised an error") for r in failed]

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Take over the limit that ``TuneConfig.max_concurrent_trials`` states."""
        self._max_concurrent = max_concurrent
        return True

    # Ray's annotation leaves out FINISHED, which is a string.
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next run; None while the concurrency limit is reached; ``FINISHED`` once all are started."""
        waiting = [i for i, started in enumerate(self._started) if not started]
        if not waiting:
            return str(Searcher.FINISHED)
        running = Counter(r.category for r in self._records.values() if r.state == "running")
        if self._max_concurrent is not None and running.total() >= self._max_concurrent:
            return None
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
            "stage": BENCHMARK_STAGE,
            "label": f"{run.labels[0]}, repetition {run.seed}",
            "tags": self._tags[index],
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note how far a run is."""
        record = self._records[trial_id]
        record.epoch, record.metrics = int(result.get("epoch", record.epoch)), dict(result)
        record.failure = result.get("failure", record.failure)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note how a run ended. Tune does not call this for runs that an interrupt cuts short."""
        record = self._records[trial_id]
        if result is not None:
            self.on_trial_result(trial_id, result)
        cut_short = not error and record.epoch < record.max_epochs
        if cut_short and record.failure is None:
            record.failure = f"it ended after {record.epoch} of {record.max_epochs} epochs"
        record.state = "failed" if error or cut_short else "complete"

    def note_failure(self, trial_id: str, reason: str) -> None:
        """Keep why a run failed, in one line; Tune tells a searcher only that it did."""
        self._records[trial_id].failure = reason

    def save(self, checkpoint_path: str) -> None:
        """Tune keeps its searcher's state; a benchmark goes by its result files."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        """The counterpart of :meth:`save`."""
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))


class BenchmarkCallback(TrackerCallback):
    """Tracks runs as trials are, and keeps each one's result as it ends.

    Args:
        arguments: Of :class:`~tuning.tracking.callback.TrackerCallback`.
        runs: All that are to be done.
        store: Where results go.
        placement: What a run holds.
        code: See :class:`tuning.benchmark_results.RunResult`.
        times_scored: Per category, how often its test split had been scored before.
        options: Of :class:`~tuning.tracking.callback.TrackerCallback`.
    """

    def __init__(
        self,
        *arguments: Any,
        runs: Sequence[PlannedRun],
        store: ResultStore,
        placement: Placement,
        code: str,
        times_scored: Mapping[str, int],
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.runs = {(run.category, run.identity): run for run in runs}
        self.store = store
        self.placement = placement
        self.code = code
        self.times_scored = dict(times_scored)

    def _finish(self, trial: Trial, *, failed: bool) -> None:
        run_id = self._run_id(trial)
        super()._finish(trial, failed=failed)
        if failed or not reached_last_epoch(trial):
            return
        run = self.runs[trial.config["category"], trial.config["trial_key"]]
        result = make_result(run, trial.last_result, self.sweep.dataset, self.placement, self.code)
        self.times_scored[run.category] += 1
        intervals = result.test_intervals.items()
        self.tracker.log_summary(
            run_id,
            metrics={f"test_{name}": value for name, value in result.test.items()},
            tags={
                "test_fingerprint": self.sweep.categories[run.category]["test_fingerprint"],
                "test_split_scored_times": str(self.times_scored[run.category]),
                **{f"undefined_test_{name}": reason for name, reason in result.test_undefined.items()},
                **{f"test_{name}_95": f"{low:.4f} to {high:.4f}" for name, (low, high) in intervals},
            },
        )
        self.store.write(result)


def make_result(
    run: PlannedRun, reported: Mapping[str, Any], dataset: str, placement: Placement, code: str
) -> RunResult:
    """A finished run's result, from its last report."""
    test = reported["test"]
    workers = max(1, placement.num_workers)
    return RunResult(
        key=run.key,
        identity=run.identity,
        dataset=dataset,
        category=run.category,
        seed=run.seed,
        config=dict(run.config),
        train_labels=run.train_labels,
        train_masks=run.train_masks,
        test=dict(test["metrics"]),
        test_undefined=dict(test["undefined"]),
        test_intervals={name: (low, high) for name, (low, high) in test["intervals_95"].items()},
        test_images=int(test["num_images"]),
        test_defective=int(test["num_defective"]),
        test_masks=int(test["num_masks"]),
        validation={
            name.removeprefix("val_"): float(value)
            for name, value in reported.items()
            if name.startswith("val_") and math.isfinite(value)
        },
        train_loss=float(reported["train_loss"]),
        duration_s=float(reported["duration_s"]),
        elapsed_s=float(reported["time_total_s"]),
        cores=workers * placement.cpus,
        gpus=workers * placement.gpus if placement.use_gpu else 0.0,
        hardware=reported["hardware"],
        hostname=reported["hostname"],
        feature_source=reported["feature_source"],
        code=code,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
