"""Ends a search whose time or GPU hours are spent: Tune asks at every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune import Stopper

from tuning.planning.budget import Budget


class BudgetStopper(Stopper):
    """Stops all trials at once, without a new one being started, when a budget is spent.

    Tune gives the trials' processes the time to clean up, and marks them as it does after an interrupt. Time counts
    from the first question; a copy that Tune's state of a sweep has kept starts its time anew, and knows the GPU hours
    that were spent before. Those are up to date to each trial's last report.

    Args:
        budget: Of which the time and the GPU hours are watched.
        gpus_per_trial: GPUs that a trial holds.
        clock: For tests; seconds that only grow.
    """

    def __init__(self, budget: Budget, *, gpus_per_trial: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget = budget
        self._gpus_per_trial = gpus_per_trial
        self._clock = clock
        self._begun_s: float | None = None
        self._trial_s: dict[str, float] = {}
        self.ended_by: str | None = None
        """The setting that ended the search, and its value."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Note how long a trial has taken; none is stopped on its own."""
        self._trial_s[trial_id] = float(result.get("time_total_s", 0.0))
        return False

    def stop_all(self) -> bool:
        """Whether a budget is spent."""
        if self._begun_s is None:
            self._begun_s = self._clock()
        budget = self._budget
        if budget.time_s is not None and self._clock() - self._begun_s >= budget.time_s:
            self.ended_by = self.ended_by or f"search.time_budget={budget.time_budget}"
        if budget.max_gpu_hours is not None and self.gpu_hours() >= budget.max_gpu_hours:
            self.ended_by = self.ended_by or f"search.max_gpu_hours={budget.max_gpu_hours:g}"
        return self.ended_by is not None

    def gpu_hours(self) -> float:
        """Spent so far."""
        return self._gpus_per_trial * sum(self._trial_s.values()) / 3600

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_begun_s": None}
