"""How much a Ray cluster can hold, now or once its autoscaler has grown it, and how many trials fit at once.

A cluster that scales from zero has no GPU when a sweep starts, so what is present says little. Ray's public API does
not tell an autoscaler's maximum; it is looked for, in this order, in

1. what the caller declares,
2. the cluster configuration in Ray's own store, which some managed platforms report,
3. the RayCluster resource, where the head runs under KubeRay with in-tree autoscaling: its account may read it,
4. the file that the head's autoscaler was started with (``ray start --autoscaling-config``), which is how the cluster
   launcher works.

The last two are found on the head node only. ``ray job submit`` runs its driver there; for any other driver a task that
needs no resources goes and looks. Where nothing is found, what is present counts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ssn.errors import SSNError

DRIVER_CPU = 0.01
"""What the driver of a trial with Ray Train workers asks for: it only waits, and Ray refuses zero. A driver that held a
whole CPU would keep it from its own workers, and all would wait for ever."""

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class NodeShape:
    """Nodes that are alike."""

    resources: Mapping[str, float]
    """Of one node, by Ray's names (``CPU``, ``GPU``)."""
    count: int


@dataclass(frozen=True)
class Capacity:
    """What a cluster holds at its largest."""

    shapes: tuple[NodeShape, ...]
    source: str
    """Where that is known from, for messages."""
    max_workers: int | None = None
    """Most nodes beside the head that there may be at once, over all shapes; None: as the counts say."""
    head: Mapping[str, float] = field(default_factory=dict)
    """The head node's resources, if it is not among the shapes."""

    def total(self, resource: str) -> float:
        """All of one resource that there can ever be, with the most generous choice of nodes."""
        amounts = [float(s.resources.get(resource, 0.0)) for s in self.shapes for _ in range(s.count)]
        amounts.sort(reverse=True)
        return float(self.head.get(resource, 0.0)) + sum(amounts[: self.max_workers])

    def nodes(self, request: Mapping[str, float]) -> list[Mapping[str, float]]:
        """The nodes of the largest cluster, where a choice must be made those that hold most of ``request`` each."""
        workers = [s.resources for s in self.shapes for _ in range(s.count)]
        workers.sort(key=lambda node: slots(node, request), reverse=True)
        return ([self.head] if self.head else []) + workers[: self.max_workers]

    def describe(self) -> str:
        """Such as ``8 CPU, 2 GPU (the cluster as it is)``."""
        amounts = ", ".join(f"{self.total(r):g} {r}" for r in ("CPU", "GPU") if r == "CPU" or self.total(r))
        return f"{amounts} ({self.source})"


def slots(node: Mapping[str, float], request: Mapping[str, float]) -> int:
    """How many times a node of these resources holds ``request``; memory counts where a node says how much it has."""
    needed = {name: amount for name, amount in request.items() if amount > 0 and (name != "memory" or name in node)}
    if not needed:
        raise SSNError("a worker must ask for some CPU or GPU; it asks for nothing")
    # The small allowance is for fractions such as 0.1 that do not add up in binary.
    return min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in needed.items())


def cluster_capacity(declared: Mapping[str, Any] | None = None) -> Capacity:
    """The larger of what the connected cluster has and what its autoscaler may make of it.

    Args:
        declared: An autoscaler configuration with ``available_node_types`` (as in a cluster-launcher file), for
            clusters whose maximum cannot be found out; None: find out.

    Raises:
        SSNError: ``declared`` has no usable node types.
    """
    import ray

    present = Capacity(
        tuple(NodeShape(_plain(n["Resources"]), 1) for n in ray.nodes() if n["Alive"]), "the cluster as it is"
    )
    if declared is not None:
        configured: Capacity | None = from_autoscaling_config(declared, "as declared")
        if configured is None:
            raise SSNError("the declared cluster has no available_node_types; copy them from its cluster file")
    else:
        configured = _reported_capacity() or _capacity_from_head()
    return larger(present, configured)


def larger(present: Capacity, configured: Capacity | None) -> Capacity:
    """The one with more GPUs, or with more CPUs where GPUs are equal; ``present`` where they are the same."""
    if configured is None:
        return present
    sizes = [(c.total("GPU"), c.total("CPU")) for c in (present, configured)]
    return configured if sizes[1] > sizes[0] else present


def from_autoscaling_config(config: Mapping[str, Any], source: str) -> Capacity | None:
    """Capacity of a cluster-launcher or KubeRay autoscaler configuration; None if it names no node types.

    A node type without ``resources`` is one whose size only its cloud knows; it counts as nothing.
    """
    types = config.get("available_node_types") or {}
    head_type = config.get("head_node_type")
    shapes = []
    for name, node_type in types.items():
        resources = _plain(node_type.get("resources") or {})
        # As the cluster launcher fills in what a file leaves out: none of the head's own type, else the cluster's
        # limit, which is 2 by default.
        count = int(node_type.get("max_workers", 0 if name == head_type else config.get("max_workers", 2)))
        if count > 0 and resources:
            shapes.append(NodeShape(resources, count))
    head = _plain((types.get(head_type) or {}).get("resources") or {})
    if not shapes and not head:
        return None
    limit = config.get("max_workers")
    return Capacity(tuple(shapes), source, None if limit is None else int(limit), head)


def read_head_autoscaling_config() -> dict[str, Any] | None:
    """The autoscaler's configuration, if this process runs on the head node of an autoscaling cluster.

    Under KubeRay this asks the Kubernetes API for the RayCluster; elsewhere it reads the file on the command line of
    Ray's monitor process. None if there is no autoscaler here.
    """
    cluster = os.environ.get("RAY_CLUSTER_NAME")
    if cluster and _NAMESPACE_FILE.exists():
        return _read_kuberay_config(cluster, _NAMESPACE_FILE.read_text().strip())
    path = _monitor_config_path()
    if path is None or not path.is_file():
        return None
    config = yaml.safe_load(path.read_text())
    return config if isinstance(config, dict) else None


def use_gpu(setting: bool | Literal["auto"], capacity: Capacity) -> bool:
    """Whether trials train on GPUs; ``auto``: if the cluster has or can have any.

    Raises:
        SSNError: GPUs are asked for where there can be none.
    """
    gpus = capacity.total("GPU")
    if setting is True and gpus == 0:
        raise SSNError(f"use_gpu is true, but the cluster has no GPU: {capacity.describe()}; set it to auto or false")
    return gpus > 0 if setting == "auto" else bool(setting)


def check_fits(capacity: Capacity, *, num_workers: int, per_worker: Mapping[str, float]) -> None:
    """Refuse at once a trial that could never be placed; Ray would wait for it without end.

    Args:
        capacity: Of the whole cluster at its largest.
        num_workers: Ray Train workers of a trial; 0: it trains in its own process.
        per_worker: Resources of each worker, or of the one process.

    Raises:
        SSNError: saying what is asked for and what there is.
    """
    if max_concurrent(capacity, num_workers=num_workers, per_worker=per_worker, allow_none=True) > 0:
        return
    one = " and ".join(_amount(name, amount) for name, amount in per_worker.items() if amount > 0)
    available = sum(slots(node, per_worker) for node in capacity.nodes(per_worker))
    if num_workers == 0:
        raise SSNError(
            f"a trial asks for {one}, but no node has as much: {capacity.describe()}"
            f"{_most_memory(capacity, per_worker)}; lower what it asks for"
        )
    if available >= num_workers:
        raise SSNError(
            f"a trial asks for {num_workers} workers of {one} and its driver for {DRIVER_CPU} CPU more, which "
            f"{capacity.describe()} cannot hold together; lower num_workers or the CPUs per worker"
        )
    raise SSNError(
        f"a trial asks for {num_workers} workers of {one}, but the cluster holds {available} at most: "
        f"{capacity.describe()}{_most_memory(capacity, per_worker)}; lower num_workers or what each asks for"
    )


def _amount(name: str, amount: float) -> str:
    return f"{amount / 1e9:g} GB memory" if name == "memory" else f"{amount:g} {name}"


def _most_memory(capacity: Capacity, request: Mapping[str, float]) -> str:
    """The largest node's memory, where a request has to do with it."""
    most = max((float(node.get("memory", 0.0)) for node in capacity.nodes(request)), default=0.0)
    return f", {_amount('memory', most)} on one node" if "memory" in request and most else ""


def max_concurrent(
    capacity: Capacity, *, num_workers: int, per_worker: Mapping[str, float], allow_none: bool = False
) -> int:
    """How many trials can run at once, each with all of its workers, wherever Ray puts their drivers.

    With Ray Train workers, a trial is a driver of :data:`DRIVER_CPU`, which may land on any node, and workers. A node
    whose CPUs the workers would fill exactly loses a worker to each driver that gets there first, so the count allows
    for the worst placement: further trials would be started only to wait for their reservation.

    Args:
        capacity: Of the whole cluster at its largest.
        num_workers: Ray Train workers of a trial; 0: it trains in its own process.
        per_worker: Resources of each worker, or of the one process.
        allow_none: Return 0 where not even one trial fits, instead of raising.

    Raises:
        SSNError: not even one trial fits.
    """
    nodes = capacity.nodes(per_worker)
    held = [slots(node, per_worker) for node in nodes]
    if num_workers == 0:
        trials = sum(held)
    else:
        spare = [
            float(node.get("CPU", 0.0)) - n * float(per_worker.get("CPU", 0.0))
            for node, n in zip(nodes, held, strict=True)
            if n > 0
        ]
        trials = sum(held) // num_workers
        while trials > 0 and sum(held) - _lost_to_drivers(trials, spare, per_worker) < trials * num_workers:
            trials -= 1
    if trials == 0 and not allow_none:
        check_fits(capacity, num_workers=num_workers, per_worker=per_worker)
    return trials


def _lost_to_drivers(drivers: int, spare_cpus: Sequence[float], per_worker: Mapping[str, float]) -> int:
    """Most worker slots that so many drivers can take, choosing the nodes with the least spare CPU first."""
    cpu = float(per_worker.get("CPU", 0.0))
    if cpu == 0:
        return 0
    left, lost = drivers, 0
    for spare in sorted(spare_cpus):
        needed = math.floor(max(0.0, spare) / DRIVER_CPU + 1e-9) + 1
        while left >= needed:
            # This many drivers do not fit beside the workers, so that one worker less does.
            left -= needed
            lost += 1
            needed = max(1, round(cpu / DRIVER_CPU))
    return lost


def _plain(resources: Mapping[str, Any]) -> dict[str, float]:
    """CPUs and GPUs and whatever else is a number, without Ray's ``node:...`` marks."""
    return {
        name: float(amount)
        for name, amount in resources.items()
        if isinstance(amount, int | float) and not name.startswith("node:")
    }


def _reported_capacity() -> Capacity | None:
    import ray._private.state

    config = ray._private.state.state.get_cluster_config()
    if config is None:
        return None
    # -1: without limit. No sweep is larger than this many nodes.
    shapes = tuple(
        NodeShape(_plain(dict(group.resources)), int(group.max_count) if group.max_count >= 0 else 10_000)
        for group in config.node_group_configs
        if group.max_count != 0 and group.resources
    )
    return Capacity(shapes, "as its autoscaler may grow it") if shapes else None


def _capacity_from_head() -> Capacity | None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    heads = [n["NodeID"] for n in ray.nodes() if n["Alive"] and "node:__internal_head__" in n["Resources"]]
    if not heads:
        return None
    if heads[0] == ray.get_runtime_context().get_node_id():
        config = read_head_autoscaling_config()
    else:
        strategy = NodeAffinitySchedulingStrategy(heads[0], soft=False)
        look = ray.remote(read_head_autoscaling_config).options(num_cpus=0, scheduling_strategy=strategy)
        config = ray.get(look.remote())
    return None if config is None else from_autoscaling_config(config, "as its autoscaler may grow it")


def _read_kuberay_config(cluster: str, namespace: str) -> dict[str, Any] | None:
    import requests
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

    try:
        resource = node_provider.KubernetesHttpApiClient(namespace).get(f"rayclusters/{cluster}")
    except requests.HTTPError as error:
        # Without in-tree autoscaling KubeRay gives the head no right to read it, and there is nothing to read.
        if error.response is not None and error.response.status_code in (401, 403):
            return None
        raise
    if not resource["spec"].get("enableInTreeAutoscaling"):
        return None
    return autoscaling_config._derive_autoscaling_config_from_ray_cr(resource)


def _monitor_config_path() -> Path | None:
    """Where the monitor of the Ray instance this process belongs to was told to find its configuration."""
    import psutil
    import ray

    address = ray.get_runtime_context().gcs_address
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if not any(word.endswith("monitor.py") for word in words):
            continue
        options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if options.get("--gcs-address") == address and options.get("--autoscaling-config"):
            return Path(options["--autoscaling-config"])
    return None
