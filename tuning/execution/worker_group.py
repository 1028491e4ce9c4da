"""A trial's Ray Train workers: watched from the trial's own process, on the trial's own reservation.

Train gives every run a controller, a guard of its placement group, a manager of its data sets and, under Tune, a queue
for reports: each a process that imports Ray Train for itself, seconds of CPU for a trial that may train for some. Here
the controller runs in the process of the trial, which Tune keeps for the next one, and reports to Tune at first hand.
What it does is Train's own code; the workers and their barrier remain processes. The workers are placed in bundles that
Tune reserves with the trial: it gives them back whatever dies, and no trial holds up others while it waits for workers.
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
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2.api.callback import UserCallback
from ray.util.placement_group import get_current_placement_group

POLL_S = 0.2
"""Between two looks at the workers, who wait meanwhile with the epoch after the one reported. Ray's own is 2 s."""

UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)
"""There are no Ray data sets, and the placement group is Tune's to remove."""


class _Reservation(DefaultPlacementGroupHandle):
    """The trial's placement group, which outlives the workers."""

    def shutdown(self) -> None:
        pass


class _TrialWorkerGroup(WorkerGroup):
    """Workers in the trial's placement group, whose first bundle is the trial's own."""

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> _Reservation:
        group = get_current_placement_group()
        assert group is not None, "a trial with workers reserves their bundles"
        return _Reservation(group)

    def _create_workers(  # type: ignore[override]
        self, num_workers: int, placement_group: Any, resources_per_worker: dict[str, float], **options: Any
    ) -> Any:
        options["placement_group_bundle_indices"] = list(range(1, num_workers + 1))
        return super()._create_workers(num_workers, placement_group, resources_per_worker, **options)


class _TrialController(TrainController):
    worker_group_cls = _TrialWorkerGroup


class TrialTrainer(TorchTrainer):
    """``TorchTrainer`` that runs its controller in the calling thread, which is a Tune trial's.

    The trial's reservation has the workers' bundles behind its own; see :func:`reservation`.
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
        controller = _TrialController(**arguments)
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


def reservation(own: dict[str, float], per_worker: dict[str, float], num_workers: int) -> tune.PlacementGroupFactory:
    """What Tune reserves for a trial and its workers, all or nothing."""
    return tune.PlacementGroupFactory([own, *[per_worker] * num_workers])
