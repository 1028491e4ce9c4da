"""Ends a search whose time or GPU hours are spent: Tune asks at every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune import Stopper

from tuning.planning.budget import Budget

NOTE_PERIOD_S = 30.0
"""A driver that dies has noted all of the time it spent but this much."""


class BudgetStopper(Stopper):
    """Stops all trials at once, without a new one being started, when a budget is spent.

    Tune gives the trials' processes the time to clean up, and marks them as it does after an interrupt. Time counts
    from the first question, and goes on from what earlier drivers spent; GPU hours are up to date to each trial's last
    report.

    Args:
        budget: Of which the time and the GPU hours are watched.
        gpus_per_trial: GPUs that a trial holds.
        spent_s: What earlier drivers spent of the time budget.
        note: Called with the time spent, every now and then, if there is a time budget; None: nobody.
        clock: For tests; seconds that only grow.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        gpus_per_trial: float,
        spent_s: float = 0.0,
        note: Callable[[float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._gpus_per_trial = gpus_per_trial
        self._earlier_s = self._noted_s = spent_s
        self._note = note
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
        budget, spent_s = self._budget, self.spent_s()
        if budget.time_s is not None:
            if self._note is not None and spent_s - self._noted_s >= NOTE_PERIOD_S:
                self.note_spent()
            if spent_s >= budget.time_s:
                self.ended_by = self.ended_by or f"search.time_budget={budget.time_budget}"
        if budget.max_gpu_hours is not None and self.gpu_hours() >= budget.max_gpu_hours:
            self.ended_by = self.ended_by or f"search.max_gpu_hours={budget.max_gpu_hours:g}"
        return self.ended_by is not None

    def spent_s(self) -> float:
        """Of the time budget, by this driver and by earlier ones."""
        return self._earlier_s + (0.0 if self._begun_s is None else self._clock() - self._begun_s)

    def note_spent(self) -> None:
        """Tell ``note`` at once, as at the end of a search."""
        self._noted_s = self.spent_s()
        if self._note is not None and self._budget.time_s is not None:
            self._note(self._noted_s)

    def gpu_hours(self) -> float:
        """Spent so far."""
        return self._gpus_per_trial * sum(self._trial_s.values()) / 3600

    def __getstate__(self) -> dict[str, Any]:
        # a clock's seconds mean nothing in another process
        return {**self.__dict__, "_begun_s": None, "_earlier_s": self.spent_s()}
