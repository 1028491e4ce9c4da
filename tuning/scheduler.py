"""Early stopping for many categories in one Ray Tune run: asynchronous successive halving (ASHA) for each."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from tuning.rungs import Rungs
from tuning.space import EPOCHS_KEY

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

TIME_ATTR = "epoch"
METRIC = "objective"

# Stands for "worse than any objective" in a rung's records: infinities would turn the rung's percentiles into NaN.
_WORST = -1e30


class ObjectiveHistory(Protocol):
    """Who remembers what trials reported, across restores; :class:`tuning.search.MultiplexSearcher` does."""

    def recorded_objectives(self, trial_id: str) -> dict[int, float]:
        """Objective by epoch; empty if the trial is unknown."""
        ...


class MultiplexScheduler(FIFOScheduler):
    """Compares a trial only with trials of its own category and of as many epochs, at the same epoch.

    A report without an objective never stops a trial, nor does any report at the last epoch. A trial whose objective is
    not finite is stopped at once, whatever the epoch below the last, and counts as the worst of its rung.

    Tune restores a scheduler empty; with a ``history``, the rungs are filled again as restored trials are added.

    Args:
        rungs: When trials are compared.
        history: Usually the searcher of the same run.
    """

    def __init__(self, rungs: Rungs, *, history: ObjectiveHistory | None = None) -> None:
        super().__init__()
        self._rungs = rungs
        self._history = history
        self._by_group: dict[tuple[str, int], AsyncHyperBandScheduler] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Refuse another metric or mode in ``TuneConfig``; ours are fixed."""
        return metric is None and mode is None

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Enter a trial, with what it reported before a restore."""
        asha = self._asha(trial)
        asha.on_trial_add(tune_controller, trial)
        if self._history is not None:
            for epoch, objective in sorted(self._history.recorded_objectives(trial.trial_id).items()):
                if epoch < max_epochs(trial):
                    asha.on_trial_result(tune_controller, trial, _as_result(epoch, objective))

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """``STOP`` or ``CONTINUE``."""
        epoch, objective = result.get(TIME_ATTR), result.get(METRIC)
        if epoch is None or objective is None or epoch >= max_epochs(trial):
            return str(self.CONTINUE)
        action = self._asha(trial).on_trial_result(tune_controller, trial, _as_result(epoch, objective))
        return str(action if math.isfinite(objective) else self.STOP)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Forget a trial that never ran; the records of its rungs stay."""
        self._asha(trial).on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        """One line per category and number of epochs."""
        return "\n".join(
            f"{category}, {epochs} epochs: {asha.debug_string()}" for (category, epochs), asha in self._by_group.items()
        )

    def save(self, checkpoint_path: str) -> None:
        """Pickle the rungs' records."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self._by_group))

    def restore(self, checkpoint_path: str) -> None:
        """Take up records saved by :meth:`save`."""
        self._by_group = pickle.loads(Path(checkpoint_path).read_bytes())

    def _asha(self, trial: Trial) -> AsyncHyperBandScheduler:
        epochs = max_epochs(trial)
        group = (trial.config["category"], epochs)
        if group not in self._by_group:
            self._by_group[group] = AsyncHyperBandScheduler(
                time_attr=TIME_ATTR,
                metric=METRIC,
                mode="max",
                max_t=epochs,
                grace_period=min(self._rungs.grace(epochs), epochs),
                reduction_factor=self._rungs.eta,
                # Otherwise it stops a trial in the middle of its last report, before it has cleaned up.
                stop_last_trials=False,
            )
        return self._by_group[group]


def max_epochs(trial: Trial) -> int:
    """A trial's full budget."""
    return int(trial.config["config"][EPOCHS_KEY])


def _as_result(epoch: int, objective: float) -> dict[str, Any]:
    return {TIME_ATTR: epoch, METRIC: objective if math.isfinite(objective) else _WORST}
