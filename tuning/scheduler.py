"""Early stopping for many categories in one Ray Tune run: asynchronous successive halving (ASHA) for each."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from ssn.errors import SSNError

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

    from tuning.winner import TrialRecord

TIME_ATTR = "epoch"
METRIC = "objective"

# Stands for "worse than any objective" in a rung's records: infinities would turn the rung's percentiles into NaN.
_WORST = -1e30


class ObjectiveHistory(Protocol):
    """Who remembers what trials reported, across resumes; :class:`tuning.search.MultiplexSearcher` does."""

    def recorded_objectives(self, trial_id: str) -> dict[int, float]:
        """Objective by epoch; empty if the trial is unknown."""
        ...


def rung_epochs(max_epochs: int, grace: int, eta: int) -> tuple[int, ...]:
    """Epochs before the last at which a trial may be stopped: grace, grace*eta, grace*eta^2, ...

    Trials report an objective at these epochs and at ``max_epochs``, which is not one of them.

    Args:
        max_epochs: The full budget.
        grace: Epochs that every trial gets.
        eta: Of the trials that reach a rung, about one in ``eta`` goes on.

    Raises:
        SSNError: a value is out of range.
    """
    if max_epochs < 1:
        raise SSNError(f"max_epochs is {max_epochs}, but must be at least 1")
    if grace < 1:
        raise SSNError(f"the scheduler's grace is {grace} epochs, but must be at least 1")
    if eta < 2:
        raise SSNError(f"the scheduler's eta is {eta}, but must be at least 2")
    rungs: list[int] = []
    epoch = grace
    while epoch < max_epochs:
        rungs.append(epoch)
        epoch *= eta
    return tuple(rungs)


@dataclass(frozen=True)
class _EarlierTrial:
    """As much of a Tune trial as a scheduler looks at."""

    trial_id: str
    config: dict[str, Any]


class MultiplexScheduler(FIFOScheduler):
    """Compares a trial only with trials of its own category, at the same epoch.

    A report without an objective never stops a trial, nor does any report at the last epoch. A trial whose objective is
    not finite is stopped at once, whatever the epoch below the last, and counts as the worst of its rung.

    With a ``history``, the rungs know what trials reported before a resume: those that had ended
    (:meth:`enter_earlier`), and those that go on, as Tune adds them.

    Args:
        max_epochs: The full budget.
        grace: See :func:`rung_epochs`.
        eta: See :func:`rung_epochs`.
        history: Usually the searcher of the same run.

    Raises:
        SSNError: a value is out of range.
    """

    def __init__(self, *, max_epochs: int, grace: int, eta: int = 3, history: ObjectiveHistory | None = None) -> None:
        super().__init__()
        rung_epochs(max_epochs, grace, eta)  # refuses what is out of range
        self._max_epochs = max_epochs
        self._grace = grace
        self._eta = eta
        self._history = history
        self._by_category: dict[str, AsyncHyperBandScheduler] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Refuse another metric or mode in ``TuneConfig``; ours are fixed."""
        return metric is None and mode is None

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Enter a trial, with what it reported before a resume."""
        asha = self._asha(trial)
        asha.on_trial_add(tune_controller, trial)
        if self._history is not None:
            for epoch, objective in sorted(self._history.recorded_objectives(trial.trial_id).items()):
                if epoch < self._max_epochs:
                    asha.on_trial_result(tune_controller, trial, _as_result(epoch, objective))

    def enter_earlier(self, records: Iterable[TrialRecord]) -> None:
        """Compare what comes with trials that ended before a resume, which Tune never sees."""
        for record in records:
            if record.state != "running":
                trial: Any = _EarlierTrial(record.trial_id, {"category": record.category, "config": record.config})
                self.on_trial_add(None, trial)  # type: ignore[arg-type]

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """``STOP`` or ``CONTINUE``."""
        epoch, objective = result.get(TIME_ATTR), result.get(METRIC)
        if epoch is None or objective is None or epoch >= self._max_epochs:
            return str(self.CONTINUE)
        action = self._asha(trial).on_trial_result(tune_controller, trial, _as_result(epoch, objective))
        return str(action if math.isfinite(objective) else self.STOP)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Forget a trial that never ran; the records of its rungs stay."""
        self._asha(trial).on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        """One line per category."""
        return "\n".join(f"{category}: {asha.debug_string()}" for category, asha in self._by_category.items())

    def save(self, checkpoint_path: str) -> None:
        """Pickle the rungs' records."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self._by_category))

    def restore(self, checkpoint_path: str) -> None:
        """Take up records saved by :meth:`save`."""
        self._by_category = pickle.loads(Path(checkpoint_path).read_bytes())

    def _asha(self, trial: Trial) -> AsyncHyperBandScheduler:
        category = trial.config["category"]
        if category not in self._by_category:
            self._by_category[category] = AsyncHyperBandScheduler(
                time_attr=TIME_ATTR,
                metric=METRIC,
                mode="max",
                max_t=self._max_epochs,
                grace_period=min(self._grace, self._max_epochs),
                reduction_factor=self._eta,
                # Otherwise it stops a trial in the middle of its last report, before it has cleaned up.
                stop_last_trials=False,
            )
        return self._by_category[category]


def _as_result(epoch: int, objective: float) -> dict[str, Any]:
    return {TIME_ATTR: epoch, METRIC: objective if math.isfinite(objective) else _WORST}
