"""What becomes of a benchmark's runs.

A run's last report brings its score on the test split along with the model. The driver writes it to the tracker and,
last of all, to its result file: what has a file is finished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tuning.benchmarking.plan import PlannedRun
from tuning.benchmarking.results import ResultStore, RunResult
from tuning.execution.train_worker import Placement
from tuning.tracking.callback import TrackerCallback, reached_last_epoch

if TYPE_CHECKING:
    from ray.tune.experiment import Trial


class BenchmarkCallback(TrackerCallback):
    """Tracks runs as trials are, and keeps each one's result as it ends.

    Args:
        arguments: Of :class:`~tuning.tracking.callback.TrackerCallback`.
        runs: All that are to be done.
        store: Where results go.
        placement: What a run holds.
        code: See :class:`tuning.benchmarking.results.RunResult`.
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
