"""What is known of a trial, and which trial of a category wins."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ssn.errors import SSNError
from tuning.search.costs import excesses, is_feasible
from tuning.search.warm_start import SuggestedBy

RecordState = Literal["running", "complete", "pruned", "failed", "stopped"]
"""``pruned``: others were better at a rung; ``stopped``: a budget was spent before it had its epochs."""


@dataclass
class TrialRecord:
    """One trial of one category, as the search sees it: validation only, nothing of the test split."""

    trial_id: str
    """Ray Tune's id."""
    trial_key: str
    """Identity (:func:`ssn.config.trial_identity`): equal keys compute the same thing."""
    category: str
    index: int
    """Position within the category; 0 is the untouched default configuration."""
    number: int
    """Number of the trial in the category's Optuna study."""
    max_epochs: int
    """The full budget."""
    config: dict[str, Any]
    """Flat, dotted keys."""
    params: dict[str, Any]
    """The searched part of ``config``."""
    state: RecordState = "running"
    epoch: int = 0
    """Last epoch reported; the first is 1."""
    objectives: dict[int, float] = field(default_factory=dict)
    """Objective by epoch, at the epochs that reported one (the rungs and the last)."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The last result that was reported, whole."""
    failure: str | None = None
    """Why a failed trial failed."""
    suggested_by: SuggestedBy = "sampler"
    """Where the configuration came from."""
    stage: str = "search"
    """What it is part of: the search itself, or what follows it."""
    tags: dict[str, str] = field(default_factory=dict)
    """Of its run in the tracker."""
    checkpoint: str | None = None
    """Path, on the sweep's file system, of its last checkpoint: where it can go on, and at the last epoch its model."""
    checkpoint_epoch: int = 0
    """Epochs that the checkpoint has behind it."""

    @property
    def name(self) -> tuple[str, str, int]:
        """Stage, category and index: unique in a sweep, and the same after a resume, unlike Tune's id."""
        return self.stage, self.category, self.index

    @property
    def objective(self) -> float | None:
        """The objective at the last epoch that reported one; the last epoch counts, never the best."""
        return self.objectives[max(self.objectives)] if self.objectives else None

    @property
    def feasible(self) -> bool:
        """Whether it keeps the bounds on its costs, as far as it has reported any."""
        return is_feasible(self.metrics)

    @property
    def duration_s(self) -> float:
        """Seconds the trial trained and validated for, so far."""
        return float(self.metrics.get("duration_s", self.metrics.get("time_total_s", 0.0)))


def conclude(record: TrialRecord) -> tuple[RecordState, str | None]:
    """What became of a trial that ended without an error: its state and, if it failed, why."""
    if record.failure is not None:
        return "failed", record.failure
    if record.epoch == 0:
        return "failed", "it ended without reporting an epoch"
    if record.objective is not None and not math.isfinite(record.objective):
        return "failed", f"its objective was {record.objective} at epoch {max(record.objectives)}"
    if record.epoch < record.max_epochs:
        return "pruned", None
    if record.epoch in record.objectives:
        return "complete", None
    return "failed", "it reported no objective at its last epoch"


def select_winner(trials: Sequence[TrialRecord]) -> TrialRecord:
    """The trial of one category with the highest objective at full budget, among those that keep all bounds.

    Ties go to the higher validation image AP, then to the lower validation loss, then to the shorter duration; a trial
    that lacks one of these loses the tie. What is left is decided by the lower index, so that the choice does not
    depend on the order in which trials finished.

    Raises:
        SSNError: no trial qualifies; the message says what became of them.
    """
    ranked = rank_trials(trials)
    if not ranked:
        raise SSNError(_why_none(trials))
    return ranked[0]


def rank_trials(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The feasible trials that used their whole budget, best first, by the rule of :func:`select_winner`."""
    complete = [t for t in trials if t.state == "complete" and t.objective is not None and t.feasible]
    return sorted(complete, key=lambda trial: rank_key([trial], trial.index))


def rank_key(runs: Sequence[TrialRecord], index: int) -> tuple[float, float, float, float, float]:
    """What :func:`select_winner` sorts by, smaller is better: means over the runs of one configuration.

    Args:
        runs: Complete ones with an objective.
        index: Decides what is left.
    """

    def mean(name: str, otherwise: float) -> float:
        return statistics.fmean(_finite(run.metrics.get(name), otherwise) for run in runs)

    return (
        -statistics.fmean(run.objectives[max(run.objectives)] for run in runs),
        -mean("val_image_ap", -math.inf),
        mean("val_loss", math.inf),
        statistics.fmean(run.duration_s for run in runs),
        index,
    )


_STATES: tuple[RecordState, ...] = ("complete", "pruned", "failed", "stopped", "running")


def _finite(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else otherwise


def _why_none(trials: Sequence[TrialRecord]) -> str:
    if not trials:
        return "no winner: no trial was started"
    category = trials[0].category
    epochs = " or ".join(map(str, sorted({t.max_epochs for t in trials})))
    states = Counter(t.state for t in trials)
    counted = ", ".join(f"{states[s]} {s}" for s in _STATES if states[s])
    failures = [t for t in trials if t.failure]
    infeasible = sorted({bound for t in trials for bound, excess in excesses(t.metrics).items() if excess > 0})
    if states["complete"]:
        return (
            f"{category}: no winner, because every complete trial exceeds {' or '.join(infeasible)} ({counted}); raise "
            f"{' or '.join(f'objective.{bound}' for bound in infeasible)}"
        )
    if states["running"]:
        way_out = "let the sweep run to its end"
    elif states["stopped"]:
        way_out = "raise the budget that ended the search"
    elif failures:
        way_out = f"mend what failed (trial {failures[0].index}: {failures[0].failure}) and sweep again"
    else:
        way_out = "raise the number of trials or the epochs before the first rung"
    return f"{category}: no winner, because no trial has finished its {epochs} epochs ({counted}); {way_out}"
