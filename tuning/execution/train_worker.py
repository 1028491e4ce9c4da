"""Where a trial runs: in Tune's own trial process, or in a Ray Train worker group that the trial starts.

Both adapt the same :func:`tuning.execution.objective.run_trial`; the third way, without Ray, is ``ssn.train_job``. A
trial with a group does nothing but watch it, so it asks for next to no CPU; one that held a CPU would keep it from its
own workers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssn.checkpoint import META_FILE
from ssn.config import unflatten
from ssn.distributed import ALONE, TIMEOUT, ProcessGroup, Workers
from ssn.errors import SSNError
from tuning.execution.feature_store import get_features
from tuning.execution.objective import ReportResult, TrialContext, build_features, run_trial, use_threads
from tuning.execution.weights import weights_key
from tuning.search.costs import needs_latency

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow.fs

    from ssn.features import CategoryFeatures

MODEL_FOLDER = "model"
"""Folder of a Tune or Train checkpoint that holds ours."""

_END_TIMEOUT_S = 600
"""How long Tune waits for a stopped trial's thread, the end of its workers included, before the next trial takes over
its process. Tune's own 2 s are short on a busy machine, and it then forgets the next trial without a word."""

Finish = Callable[[Mapping[str, Any], Path, str], dict[str, Any]]
"""Takes the trial, the folder of its finished model and the device; gives what its last result is to hold besides."""


@dataclass(frozen=True)
class Placement:
    """How a trial is placed on the cluster."""

    num_workers: int
    """Ray Train workers; 0: the trial's own process trains."""
    use_gpu: bool
    cpus: float
    """Of each worker, or of the one process."""
    gpus: float
    """Likewise; 0 without GPUs."""
    memory_bytes: int = 0
    """Likewise; 0: Ray reserves none."""

    @property
    def gpus_per_trial(self) -> float:
        """GPUs that a trial holds."""
        return max(1, self.num_workers) * self.gpus if self.use_gpu else 0.0

    @property
    def per_worker(self) -> dict[str, float]:
        """Resources of each worker, or of the one process."""
        gpu = {"GPU": self.gpus} if self.use_gpu else {}
        return {"CPU": self.cpus, **gpu, **({"memory": self.memory_bytes} if self.memory_bytes else {})}


@dataclass(frozen=True)
class WorkerSetup:
    """What trials need beside their configuration; it is put into the object store once."""

    contexts: Mapping[str, TrialContext]
    """By category."""
    data_uri: str
    weights_digests: Mapping[str, str]
    """SHA-256 of the backbone's weights, by :func:`tuning.execution.weights.weights_key`."""
    store_name: str
    """Of the feature store's actor."""
    namespace: str
    placement: Placement
    storage_path: str
    """Where worker groups keep their checkpoints."""
    storage_filesystem: pyarrow.fs.FileSystem | None
    finish: Finish | None = None
    """Called with each finished model where it was trained; a search has none."""


def train_in_trial(trial: Mapping[str, Any], setup: WorkerSetup) -> None:
    """Tune trainable that trains in its own process.

    An :class:`~ssn.errors.SSNError` is reported, as the ``failure`` of a last result, and not raised: another attempt
    would come to the same, and whatever else is raised, or kills the process, is tried again.
    """
    from ray import tune

    _wait_for_ends()
    device = "cuda" if setup.placement.use_gpu else "cpu"
    _train(trial, setup, report=_reporter(tune), checkpoint=tune.get_checkpoint(), device=device, workers=ALONE)


def train_in_worker_group(trial: Mapping[str, Any], setup: WorkerSetup) -> None:
    """Tune trainable that starts a Ray Train worker group and waits for it.

    The group's run is named after the trial, so that it resumes by itself from its own last checkpoint when the trial's
    process is started again. It keeps two: the driver, which notes where each is, hears of the last one later.
    """
    from ray import train, tune
    from ray.train.torch import TorchConfig

    from tuning.execution.worker_group import ReportToTune, TrialTrainer

    _wait_for_ends()
    placement = setup.placement
    TrialTrainer(
        _train_in_worker,
        train_loop_config={"trial": dict(trial), "setup": setup},
        scaling_config=train.ScalingConfig(
            num_workers=placement.num_workers, use_gpu=placement.use_gpu, resources_per_worker=placement.per_worker
        ),
        torch_config=TorchConfig(
            backend="nccl" if placement.use_gpu else "gloo", timeout_s=int(TIMEOUT.total_seconds())
        ),
        run_config=train.RunConfig(
            name=tune.get_context().get_trial_id(),
            storage_path=setup.storage_path,
            storage_filesystem=setup.storage_filesystem,
            # Train's second version, which ray.train is at run time and not yet for type checkers
            callbacks=[ReportToTune()],  # type: ignore[list-item]
            # a controller that may fail for ever never tells Tune that its trial has failed
            failure_config=train.FailureConfig(max_failures=1, controller_failure_limit=0),  # type: ignore[call-arg]
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def _wait_for_ends() -> None:
    # Tune reads it in this process, as the next trial comes
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(_END_TIMEOUT_S))


def _train_in_worker(config: dict[str, Any]) -> None:
    from ray import train
    from ray.train.torch import get_device

    device = str(get_device())
    # Train has made torch's process group
    workers = ProcessGroup(device) if train.get_context().get_world_size() > 1 else ALONE
    report = _reporter(train, keeps=workers.rank == 0)
    checkpoint = train.get_checkpoint()
    _train(config["trial"], config["setup"], report=report, checkpoint=checkpoint, device=device, workers=workers)


def _reporter(api: Any, *, keeps: bool = True) -> ReportResult:
    """Report through ``ray.tune`` or ``ray.train``, which take the same; with checkpoints where this worker ``keeps``
    them. Each worker of a group reports, for Train waits for all, and what the first reports is what counts."""

    def report(result: dict[str, Any], save: Callable[[Path], None] | None) -> None:
        if save is None or not keeps:
            api.report(result)
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
            save(Path(folder, MODEL_FOLDER))
            api.report(result, checkpoint=api.Checkpoint.from_directory(folder))

    return report


def _train(
    trial: Mapping[str, Any],
    setup: WorkerSetup,
    *,
    report: ReportResult,
    checkpoint: Any,
    device: str,
    workers: Workers,
) -> None:
    use_threads(setup.placement.cpus)
    context = setup.contexts[trial["category"]]
    if setup.finish is not None and workers.rank == 0:
        report = _finishing(report, setup.finish, trial, device)
    if checkpoint is None:
        checkpoint = _earlier_checkpoint(trial, setup)
    try:
        with _checkpoint_folder(checkpoint) as resume_from:
            run_trial(
                trial,
                context,
                _load_features(trial, setup, context, device),
                report=report,
                resume_from=resume_from,
                device=device,
                latency_ms=_latency_ms(trial, context, device),
                workers=workers,
            )
    except SSNError as error:
        if setup.placement.num_workers > 1:  # a report needs all workers, and others may not have failed
            raise
        report({"failure": " ".join(str(error).split()), "category": trial["category"]}, None)


def _earlier_checkpoint(trial: Mapping[str, Any], setup: WorkerSetup) -> Any:
    """Where a trial of a resumed sweep goes on; None: at its beginning, also if its checkpoint is gone."""
    from pyarrow.fs import LocalFileSystem
    from ray.tune import Checkpoint

    path = trial.get("resume_from")
    if path is None:
        return None
    filesystem = setup.storage_filesystem or LocalFileSystem()
    is_there = filesystem.get_file_info(f"{path}/{MODEL_FOLDER}/{META_FILE}").is_file
    return Checkpoint(path, filesystem) if is_there else None


def _latency_ms(trial: Mapping[str, Any], context: TrialContext, device: str) -> float | None:
    """As an earlier trial of the same shape measured it, else measured here; None where nobody asks."""
    from ssn.backbone import load_backbone
    from tuning.execution.latency import measure_latency_ms

    if context.objective is None or not needs_latency(context.objective):
        return None
    if "latency_ms" in trial:
        return float(trial["latency_ms"])
    config = unflatten(trial["config"])
    return measure_latency_ms(config, load_backbone(config.model), device=device)


def _finishing(report: ReportResult, finish: Finish, trial: Mapping[str, Any], device: str) -> ReportResult:
    """Have ``finish`` add to the last result, so that this and the model are reported as one."""

    def report_finished(result: dict[str, Any], save: Callable[[Path], None] | None) -> None:
        if result.get("epoch") == trial["config"]["train.epochs"]:
            assert save is not None, "a trial's last result comes with its model"
            with tempfile.TemporaryDirectory(prefix="finished-") as folder:
                save(Path(folder, MODEL_FOLDER))
                result = {**result, **finish(trial, Path(folder, MODEL_FOLDER), device)}
        report(result, save)

    return report_finished


def _load_features(
    trial: Mapping[str, Any], setup: WorkerSetup, context: TrialContext, device: str
) -> CategoryFeatures:
    import ray

    from ssn.features import feature_key
    from ssn.streaming import reload_backbone

    config = unflatten(trial["config"])
    key = feature_key(
        config,
        context.data.info,
        data_uri=setup.data_uri,
        weights_digest=setup.weights_digests[weights_key(config.model)],
        device=device,
    )
    cpus = setup.placement.cpus

    def build(budget_bytes: int, alive: Callable[[], int]) -> CategoryFeatures:
        def alive_on_idle_cpus() -> None:
            use_threads(cpus * (1 + alive()))

        try:
            return build_features(
                trial["config"], context.data, device=device, budget_bytes=budget_bytes, alive=alive_on_idle_cpus
            )
        finally:
            use_threads(cpus)

    features = get_features(ray.get_actor(setup.store_name, namespace=setup.namespace), key, build)
    if features.source == "cached":
        return features
    return features.with_backbone(reload_backbone(config, features), device=device)


@contextmanager
def _checkpoint_folder(checkpoint: Any) -> Iterator[Path | None]:
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder, MODEL_FOLDER)
