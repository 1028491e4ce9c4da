"""Early stopping for many categories in one Ray Tune run: asynchronous successive halving (ASHA) for each."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ray.tune.schedulers import FIFOScheduler

from tuning.search.costs import is_feasible, trial_cost
from tuning.search.halving import Halving
from tuning.search.rungs import Rungs
from tuning.search.space import EPOCHS_KEY

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

    from tuning.champions.winner import TrialRecord
    from tuning.settings import Against

TIME_ATTR = "epoch"
METRIC = "objective"
_WAITING = ("PENDING", "PAUSED")
"""Statuses of Tune's trials that can be started, those that come first in front."""


class ObjectiveHistory(Protocol):
    """Who remembers what trials reported, across resumes; :class:`tuning.search.searcher.MultiplexSearcher` does."""

    def recorded_objectives(self, trial_id: str) -> dict[int, float]:
        """Objective by epoch; empty if the trial is unknown."""
        ...

    def recorded_metrics(self, trial_id: str) -> Mapping[str, Any]:
        """The last report, whole; empty if the trial is unknown."""
        ...


@dataclass(frozen=True)
class _EarlierTrial:
    """As much of a Tune trial as a scheduler looks at."""

    trial_id: str
    config: dict[str, Any]


class MultiplexScheduler(FIFOScheduler):
    """Compares a trial only with trials of its own category and of as many epochs that cost no more, at the same epoch.

    See :class:`tuning.search.halving.Halving`; without ``against``, all cost the same. Only ranks within a category
    count, so neither the scale of its objective nor the speed at which it learns decides how many of its trials go on.

    An infeasible trial is stopped at its first report, and is nobody's rival; trial 0 goes on, for others are read
    against it. A report without an objective never stops any other trial, nor does any report at the last epoch. A
    trial whose objective is not finite is stopped at once, whatever the epoch below the last, and counts as the worst
    of its rung.

    With a ``history``, the rungs know what trials reported before a resume: those that had ended
    (:meth:`enter_earlier`), and those that go on, as Tune adds them.

    Args:
        rungs: When trials are compared.
        against: What trials cost.
        history: Usually the searcher of the same run.
    """

    def __init__(self, rungs: Rungs, *, against: Against = "none", history: ObjectiveHistory | None = None) -> None:
        super().__init__()
        self._rungs = rungs
        self._against = against
        self._history = history
        self._by_group: dict[tuple[str, int], Halving] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Refuse another metric or mode in ``TuneConfig``; ours are fixed."""
        return metric is None and mode is None

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Enter a trial, with what it reported before a resume."""
        halving = self._halving(trial)
        if self._history is None:
            return
        metrics = self._history.recorded_metrics(trial.trial_id)
        if is_feasible(metrics):
            for epoch, objective in sorted(self._history.recorded_objectives(trial.trial_id).items()):
                halving.goes_on(trial.trial_id, epoch, objective, trial_cost(metrics, self._against))

    def enter_earlier(self, records: Iterable[TrialRecord]) -> None:
        """Compare what comes with trials that ended before a resume, which Tune never sees."""
        for record in records:
            if record.state != "running":
                trial: Any = _EarlierTrial(record.trial_id, {"category": record.category, "config": record.config})
                self.on_trial_add(None, trial)  # type: ignore[arg-type]

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """``STOP`` or ``CONTINUE``."""
        epoch, objective = result.get(TIME_ATTR), result.get(METRIC)
        if epoch is None or epoch >= max_epochs(trial):
            return str(self.CONTINUE)
        feasible = is_feasible(result)
        if not feasible and trial.config["index"] > 0:
            return str(self.STOP)
        if objective is None:
            return str(self.CONTINUE)
        goes_on = math.isfinite(objective)
        if feasible:
            cost = trial_cost(result, self._against)
            goes_on &= self._halving(trial).goes_on(trial.trial_id, epoch, objective, cost)
        return str(self.CONTINUE if goes_on else self.STOP)

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """A trial that waits for resources; Tune's own way looks at every trial that there has been, at every step."""
        live = tune_controller.get_live_trials()
        return next((trial for status in _WAITING for trial in live if trial.status == status), None)

    def debug_string(self) -> str:
        """One line per category and number of epochs."""
        return "\n".join(
            f"{category}, {epochs} epochs: {halving}" for (category, epochs), halving in self._by_group.items()
        )

    def save(self, checkpoint_path: str) -> None:
        """Pickle the rungs' records."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self._by_group))

    def restore(self, checkpoint_path: str) -> None:
        """Take up records saved by :meth:`save`."""
        self._by_group = pickle.loads(Path(checkpoint_path).read_bytes())

    def _halving(self, trial: Trial) -> Halving:
        epochs = max_epochs(trial)
        group = (trial.config["category"], epochs)
        if group not in self._by_group:
            self._by_group[group] = Halving(self._rungs.epochs(epochs), self._rungs.eta)
        return self._by_group[group]


def max_epochs(trial: Trial) -> int:
    """A trial's full budget."""
    return int(trial.config["config"][EPOCHS_KEY])
