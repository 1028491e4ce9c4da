"""One Ray Tune run over trials of many categories: placed alike, features shared, stopped in good order.

Which trials there are and which of them go on is for the searcher and the scheduler to say; a sweep brings its own, and
so does a benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuning.execution.capacity import DRIVER_CPU, cluster_capacity, max_concurrent
from tuning.execution.interrupt import StopFlag, stop_tune_in_order
from tuning.execution.objective import TrialContext
from tuning.execution.train_worker import Finish, Placement, WorkerSetup, train_in_trial, train_in_worker_group

if TYPE_CHECKING:
    import pyarrow.fs
    from ray.tune import Callback, Stopper, Tuner
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher

FEATURE_SHARE = 0.8
"""Of the object store's memory, what features may take."""

MAX_FAILURES = 2
"""How often a trial is tried again after its process died."""


@dataclass(frozen=True)
class SharedFeatures:
    """A feature store that several Tune runs use one after the other; it ends with the last reference to it."""

    name: str
    store: Any

    def end(self) -> None:
        """Free its memory now."""
        import ray

        ray.kill(self.store)


def feature_budget_bytes() -> int:
    """Memory of the connected cluster for features of all categories together."""
    import ray

    return int(FEATURE_SHARE * ray.cluster_resources().get("object_store_memory", 0))


def share_features(name: str) -> SharedFeatures:
    """Start a feature store with its share of the object store's memory."""
    import ray

    from tuning.execution.feature_store import start_feature_store

    store = start_feature_store(feature_budget_bytes(), name=f"features-{name}")
    ray.get(store.budget_bytes.remote())
    return SharedFeatures(f"features-{name}", store)


def run_tune(
    searcher: Searcher,
    scheduler: TrialScheduler,
    callbacks: Sequence[Callback],
    contexts: Mapping[str, TrialContext],
    *,
    name: str,
    data_uri: str,
    weights_digests: Mapping[str, str],
    placement: Placement,
    storage: tuple[str, pyarrow.fs.FileSystem | None],
    concurrency: int | None,
    stop: StopFlag,
    stopper: Stopper | None = None,
    finish: Finish | None = None,
    num_to_keep: int | None = 1,
    features: SharedFeatures | None = None,
) -> Tuner:
    """Run all trials to their end, or until an interrupt sets ``stop`` or ``stopper`` says so.

    Args:
        searcher: Suggests trials.
        scheduler: Decides which go on.
        callbacks: Told of every step.
        contexts: By category.
        name: Folder of Tune's state below ``storage``.
        data_uri: Where the shards are; absolute.
        weights_digests: See :class:`tuning.execution.train_worker.WorkerSetup`.
        placement: Where trials run.
        storage: From :func:`open_storage`.
        concurrency: Most trials at once; None: as many as the cluster holds.
        stop: Shared with the callbacks.
        stopper: Ends the run when a budget is spent; None: there is none.
        finish: See :class:`tuning.execution.train_worker.WorkerSetup`.
        num_to_keep: Checkpoints of a trial that Tune keeps; None: all, for one of the callbacks to remove. Otherwise,
            Tune writes down the state of every trial there has been whenever one of them leaves a checkpoint.
        features: The caller's, from :func:`share_features`; None: the run has its own.
    """
    import ray
    from ray import tune

    from tuning.execution.worker_group import reservation

    storage_path, storage_filesystem = storage
    used = features or share_features(name)
    setup = WorkerSetup(
        contexts=contexts,
        data_uri=data_uri,
        weights_digests=weights_digests,
        store_name=used.name,
        namespace=ray.get_runtime_context().namespace,
        placement=placement,
        storage_path=f"{storage_path}/{name}/workers",
        storage_filesystem=storage_filesystem,
        finish=finish,
    )
    fits = max_concurrent(cluster_capacity(), num_workers=placement.num_workers, per_worker=placement.per_worker)
    if placement.num_workers == 0:
        trainable = tune.with_resources(
            tune.with_parameters(train_in_trial, setup=setup),
            {name.lower(): amount for name, amount in placement.per_worker.items()},
        )
    else:
        trainable = tune.with_resources(
            tune.with_parameters(train_in_worker_group, setup=setup),
            reservation({"CPU": DRIVER_CPU}, placement.per_worker, placement.num_workers),
        )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=min(fits, concurrency or fits),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            verbose=0,
            stop=stopper,
            callbacks=list(callbacks),
            # a worker that dies is tried again from its checkpoint; an error of the training itself is final, because
            # trials report it and do not raise it
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=num_to_keep),
        ),
    )
    with stop_tune_in_order(stop):
        tuner.fit()
    if features is None:
        used.end()
    return tuner


def open_storage(out: Path | str) -> tuple[str, Any]:
    """Tune's storage path and file system; None: the local one."""
    from ssn.data.storage import open_filesystem

    if "://" not in str(out):
        return str(Path(out).absolute()), None
    filesystem, path = open_filesystem(str(out))
    return path, filesystem
