"""A trial's Ray Train workers: started from the trial's own process, on the trial's own reservation, joined as a group.

Train would give every run a controller, a watchman for its placement group and a queue to Tune, each a process that
imports Train for itself: tens of seconds of CPU for a trial that may train for one. Here the controller runs in the
process of the trial, which Tune keeps for the next one, and reports to Tune at first hand. The workers are placed in
bundles that Tune reserves with the trial, so that Tune gives them back whatever dies, and no trial waits for workers
while it holds others up.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray import train, tune
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import get_current_placement_group

from ssn.distributed import ALONE, TIMEOUT, ProcessGroup, Workers

POLL_S = 0.2
"""Between two looks at the workers, who wait meanwhile with the epoch after the one reported. Ray's own is 2 s."""


def run_worker_group(
    train_worker: Callable[[dict[str, Any]], None],
    argument: Mapping[str, Any],
    *,
    scaling: train.ScalingConfig,
    run_config: train.RunConfig,
) -> None:
    """Run ``train_worker`` on every worker, and again from the last checkpoint if one is lost; report to Tune.

    To be called in a trial whose reservation has the workers' bundles behind its own. What the first worker reports is
    the trial's; the path of a checkpoint, which lies where Train put it, comes with it as ``checkpoint_path``.

    Args:
        train_worker: Called with ``argument``; it reports through ``ray.train``.
        argument: Anything that can be pickled.
        scaling: Number of workers and resources of each.
        run_config: Storage, name and how often to start again; ``callbacks`` are added.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
    if len(ray.nodes()) == 1:
        # a watchman for nodes that are about to be taken away, in a process of its own; the only node takes us with it
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    run_config.callbacks = [*(run_config.callbacks or []), _ReportToTune()]
    _TrialTrainer(
        train_worker,
        train_loop_config=dict(argument),
        backend_config=_GroupConfig(),
        scaling_config=scaling,
        run_config=run_config,
    ).fit()


class _ReportToTune(UserCallback):
    """Hands on what workers report. Where Tune has stopped the trial, reporting exits the thread."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        path = {} if checkpoint is None else {"checkpoint_path": checkpoint.path}
        tune.report({**metrics[0], **path})


class _Backend(Backend):
    """Nothing but that workers of a node see each other's GPUs, for nccl to copy between them; see
    :func:`joined_workers`. ``TorchConfig`` would set up torch for a single worker too, and import it here."""

    share_cuda_visible_devices = True


class _GroupConfig(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend


class _Reservation(DefaultPlacementGroupHandle):
    """The trial's placement group, which is not the workers' to remove."""

    def shutdown(self) -> None:
        pass


class _TrialWorkerGroup(WorkerGroup):
    """Workers in the trial's placement group, whose first bundle is the trial's own."""

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> _Reservation:
        group = get_current_placement_group()
        assert group is not None, "a trial with workers reserves their bundles"
        return _Reservation(group)

    def _create_workers(self, num_workers: int, *arguments: Any, **options: Any) -> Any:
        bundles = list(range(1, num_workers + 1))
        return super()._create_workers(num_workers, *arguments, placement_group_bundle_indices=bundles, **options)


class _TrialController(TrainController):
    worker_group_cls = _TrialWorkerGroup


class _TrialTrainer(DataParallelTrainer):
    """Runs the controller in this thread, and ends the workers however it ends: Tune stops a trial by an exception."""

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]

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


def group_device(*, use_gpu: bool) -> str:
    """Where this Train worker computes."""
    if not use_gpu:
        return "cpu"
    import torch
    from ray.train.torch import get_device

    device = get_device()
    torch.cuda.set_device(device)
    return str(device)


@contextmanager
def joined_workers(device: str) -> Iterator[Workers]:
    """This Train worker among the others, as :class:`ssn.engine.Trainer` takes it; all of them must enter.

    Args:
        device: Where this worker computes; nccl joins GPUs, gloo CPUs.
    """
    context = train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    if size == 1:
        yield ALONE
        return
    import torch.distributed as dist
    from ray.train.collective import broadcast_from_rank_zero

    store = None
    address = None
    if rank == 0:
        host = ray.util.get_node_ip_address()
        # the store finds a free port itself, so that no other process can take it in between
        store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        address = (host, store.port)
    host, port = broadcast_from_rank_zero(address)
    if store is None:
        store = dist.TCPStore(host, port, size, is_master=False, timeout=TIMEOUT)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    yield ProcessGroup(device)
    # not after an error: the others may be waiting in the middle of something, and Train ends this process anyway
    dist.destroy_process_group()
