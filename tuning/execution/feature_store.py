"""Backbone features of each category, computed once per sweep and shared by all trials through Ray's object store.

The store is an actor that needs no CPU. The first trial that asks for a category's features computes them, in its own
process and on its own device, and hands them over; the others wait and then read them without a copy. Whoever computes
holds a lease that ends when it stops reporting progress, so that a trial that dies does not hold up the rest. It hears
how many others wait on its node, whose CPUs it may use meanwhile. Where a category's features exceed the budget, what
is shared is its images.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import ray
from ray.exceptions import OwnerDiedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ssn.features import CategoryFeatures

LEASE_S = 120.0
"""A builder that is silent for this long is taken for dead. Loading a backbone from the hub is silent."""
POLL_S = 0.5
WAITING_S = 10 * POLL_S
"""Who has not asked for so long does not wait any more."""


class Asker(NamedTuple):
    """Which process wants features, or computes them."""

    node: str
    """Its host's name."""
    pid: int


@dataclass
class _Entry:
    refs: list[ray.ObjectRef] | None = None
    num_bytes: int = 0
    lease_ends_s: float = 0.0
    asked_s: dict[Asker, float] = field(default_factory=dict)
    """When those who wait have last asked."""


class FeatureStore:
    """Holds references to features; run it as a Ray actor (:func:`start_feature_store`).

    Args:
        budget_bytes: Least-recently-used categories are dropped beyond it; trials that still use them keep them alive.
        clock: For tests; seconds that only grow.
    """

    def __init__(self, budget_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def budget_bytes(self) -> int:
        """Memory for all features together."""
        return self._budget_bytes

    def acquire(self, key: str, asker: Asker) -> list[ray.ObjectRef] | bool:
        """References to the features; True: the caller is to compute them and :meth:`put` them; False: ask again."""
        entry = self._entries.setdefault(key, _Entry())
        if entry.refs is not None:
            self._entries.move_to_end(key)
            return entry.refs
        if entry.lease_ends_s > self._clock():
            entry.asked_s[asker] = self._clock()
            return False
        entry.asked_s.pop(asker, None)
        entry.lease_ends_s = self._clock() + LEASE_S
        return True

    def renew(self, key: str, asker: Asker) -> int:
        """The builder is alive; returns how many others wait on its node."""
        entry, now_s = self._entries.setdefault(key, _Entry()), self._clock()
        entry.lease_ends_s = now_s + LEASE_S
        return sum(other.node == asker.node and now_s - at_s < WAITING_S for other, at_s in entry.asked_s.items())

    def release(self, key: str) -> None:
        """The builder gave up; the next one to ask may try."""
        self._entries.setdefault(key, _Entry()).lease_ends_s = 0.0

    def put(self, key: str, features: Any, num_bytes: int) -> list[ray.ObjectRef]:
        """Take over computed features; the store owns them from now on."""
        entry = self._entries.setdefault(key, _Entry())
        if entry.refs is None:
            entry.refs, entry.num_bytes = [ray.put(features)], num_bytes
            entry.asked_s.clear()
        self._entries.move_to_end(key)
        while sum(e.num_bytes for e in self._entries.values()) > self._budget_bytes:
            oldest = next((k for k, e in self._entries.items() if e.refs is not None and k != key), None)
            if oldest is None:
                break
            del self._entries[oldest]
        return entry.refs


def start_feature_store(budget_bytes: int, *, name: str) -> Any:
    """Start the store under a name that trials find it by; it lives as long as the driver, and on its node.

    On any other, a spot instance that is taken back would take every category's features with it. If its process dies
    all the same, it starts anew and empty, and features are computed again.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"name": name, "num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(FeatureStore).options(**options, max_restarts=-1, max_task_retries=-1).remote(budget_bytes)


def get_features(store: Any, key: str, build: Callable[[int, Callable[[], int]], CategoryFeatures]) -> CategoryFeatures:
    """Features from the store, computed here if nobody has.

    Args:
        store: Handle of the actor.
        key: From :func:`ssn.features.feature_key`.
        build: Computes them, given the memory budget in bytes and a callable that tells the store it is alive, and
            returns how many others on this node wait for it.
    """
    asker = Asker(os.uname().nodename, os.getpid())
    while True:
        answer = ray.get(store.acquire.remote(key, asker))
        if answer is True:
            try:
                features = build(
                    ray.get(store.budget_bytes.remote()), lambda: cast(int, ray.get(store.renew.remote(key, asker)))
                )
            except BaseException:
                ray.get(store.release.remote(key))
                raise
            answer = ray.get(store.put.remote(key, features, features.num_bytes))
            del features  # not our own copy: all trials of a node share the store's
        if isinstance(answer, list):
            try:
                return cast(CategoryFeatures, ray.get(answer[0]))
            except OwnerDiedError:
                continue  # the store's process died after it had answered; ask the one that takes its place
        time.sleep(POLL_S)
