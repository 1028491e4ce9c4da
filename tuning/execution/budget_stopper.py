"""Ends a search whose time or GPU hours are spent: Tune asks at every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune import Stopper

from tuning.budget import Budget, Spent

NOTE_PERIOD_S = 30.0
"""A driver that dies has noted all of the time it spent but this much."""


class BudgetStopper(Stopper):
    """Stops all trials at once, without a new one being started, when a budget is spent.

    Tune gives the trials' processes the time to clean up, and marks them as it does after an interrupt. Time counts
    from the first question; GPU hours are up to date to each trial's last report, and what a trial does again after its
    process died counts again. Both go on from what earlier drivers spent.

    Args:
        budget: Of which the time and the GPU hours are watched.
        gpus_per_trial: GPUs that a trial holds.
        spent: By earlier drivers.
        note: Called with what is spent, every now and then, if either is limited; None: nobody.
        clock: For tests; seconds that only grow.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        gpus_per_trial: float,
        spent: Spent = Spent(),  # noqa: B008, it is frozen
        note: Callable[[Spent], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._gpus_per_trial = gpus_per_trial
        self._earlier_s = self._noted_s = spent.time_s
        self._trials_s = spent.trials_s
        self._note = note
        self._clock = clock
        self._begun_s: float | None = None
        self._last: dict[str, tuple[int, float]] = {}  # by trial: its last report's iteration and time
        self.ended_by: str | None = None
        """The setting that ended the search, and its value."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Note how long a trial has taken since its last report; none is stopped on its own."""
        if "time_this_iter_s" not in result:  # Tune shows a trial that ends without a report, too
            return False
        report = result["training_iteration"], result["time_total_s"]
        if self._last.get(trial_id) != report:  # Tune shows the last one again as the trial ends
            self._trials_s += result["time_this_iter_s"]
        self._last[trial_id] = report
        return False

    def stop_all(self) -> bool:
        """Whether a budget is spent."""
        if self._begun_s is None:
            self._begun_s = self._clock()
        budget, spent_s = self._budget, self.spent_s()
        if spent_s - self._noted_s >= NOTE_PERIOD_S:
            self.note_spent()
        if budget.time_s is not None and spent_s >= budget.time_s:
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
        limited = self._budget.time_s is not None or self._budget.max_gpu_hours is not None
        if self._note is not None and limited:
            self._note(Spent(self._noted_s, self._trials_s))

    def gpu_hours(self) -> float:
        """Spent so far, by this driver and by earlier ones."""
        return self._gpus_per_trial * self._trials_s / 3600

    def __getstate__(self) -> dict[str, Any]:
        # a clock's seconds mean nothing in another process
        return {**self.__dict__, "_begun_s": None, "_earlier_s": self.spent_s()}
