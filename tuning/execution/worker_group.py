"""A trial's Ray Train workers, with Train's controller in the trial's own process.

Train gives every run a controller, a guard of its placement group, a manager of its data sets and, under Tune, a queue
for reports: each a process that imports Ray Train for itself, seconds of CPU for a trial that may train for some. Here
the controller runs in the process of the trial, which Tune keeps for the next one, and reports to Tune at first hand.
What it does is Train's own code; the workers and their barrier remain processes.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import ray
from ray import tune
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.callback import UserCallback

POLL_S = 0.2
"""Between two looks at the workers, who wait meanwhile with the epoch after the one reported. Ray's own is 2 s."""

UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)
"""There are no Ray data sets; and Ray itself removes the placement group of a trial whose process has died."""


class TrialTrainer(TorchTrainer):
    """``TorchTrainer`` that runs its controller in the calling thread; to be used in a Tune trial only.

    ``fit`` also ends, and so do the workers, when Tune stops the trial: reports then raise :class:`SystemExit`.
    """

    def fit(self) -> Any:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
        if len(ray.nodes()) == 1:
            # a process that watches for nodes about to be taken away: the only one takes us with it
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        return super().fit()

    def _create_default_callbacks(self) -> list[Any]:
        # Train's second version, which ray.train is at run time and not yet for type checkers
        made = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in made if not isinstance(callback, UNUSED_CALLBACKS)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        controller = TrainController(**arguments)
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(controller.run())
        finally:
            if controller.get_worker_group() is not None:
                controller._shutdown_worker_group()
            loop.close()
        return controller.get_result()


class ReportToTune(UserCallback):
    """Hands Tune what the first worker reports; a checkpoint lies where Train put it, and only its path is told."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        path = {} if checkpoint is None else {"checkpoint_path": checkpoint.path}
        tune.report({**metrics[0], **path})
