"""Asynchronous successive halving (ASHA, Li et al. 2020) over trials of unequal cost: pure bookkeeping, no Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Stands for "worse than any objective" in a rung's records: infinities would turn the rung's percentiles into NaN.
_WORST = -1e30


class Halving:
    """Decides which trials of one category go on.

    A trial is held against the trials that reached the same epoch before it *and cost no more*; it goes on if it is
    among the best 1/eta of those. So a cheaper trial is never stopped because of a dearer one, and a trial that no
    other beats at its own cost or below always goes on: the front of accuracy against cost survives every rung. Where
    costs are equal, this is ASHA.

    Args:
        epochs: The rungs.
        eta: Reduction factor.
    """

    def __init__(self, epochs: Sequence[int], eta: int) -> None:
        self._eta = eta
        self._rungs: dict[int, dict[str, tuple[float, float]]] = {epoch: {} for epoch in epochs}

    def goes_on(self, trial_id: str, epoch: int, objective: float, cost: float = 0.0) -> bool:
        """Enter a trial's report, and say whether the trial may go on.

        A report that is not at a rung, or is made again after a restore, stops nothing.

        Args:
            trial_id: Any name.
            epoch: Of the report.
            objective: Higher is better; one that is not finite counts as the worst of its rung.
            cost: Lower is better.
        """
        reached = self._rungs.get(epoch)
        if reached is None or trial_id in reached:
            return True
        own = objective if math.isfinite(objective) else _WORST
        rivals = [other for other, other_cost in reached.values() if other_cost <= cost]
        reached[trial_id] = (own, cost)
        return not rivals or own >= float(np.percentile(rivals, 100 * (1 - 1 / self._eta)))

    def __str__(self) -> str:
        return ", ".join(f"{len(reached)} trials at epoch {epoch}" for epoch, reached in self._rungs.items())
