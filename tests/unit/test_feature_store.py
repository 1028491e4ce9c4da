"""Leases, sharing and the memory budget of the feature store, without Ray and without waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import OwnerDiedError

from ssn.errors import SSNError
from tuning.execution import feature_store
from tuning.execution.feature_store import LEASE_S, WAITING_S, Asker, FeatureStore, get_features

HERE = Asker("here", 1)
THERE = Asker("there", 1)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    """Of 100 bytes; a reference to an object is a box around it."""
    monkeypatch.setattr(feature_store.ray, "put", lambda value: ("ref", value))
    return FeatureStore(100, clock)


def test_first_to_ask_builds_and_the_others_wait(store: FeatureStore) -> None:
    assert store.acquire("a", HERE) is True
    assert store.acquire("a", HERE) is False
    assert store.acquire("b", HERE) is True, "other features are another matter"
    refs = store.put("a", "features of a", 10)
    assert refs == [("ref", "features of a")]
    assert store.acquire("a", HERE) == refs
    assert store.acquire("b", HERE) is False


def test_silent_builder_loses_its_lease(store: FeatureStore, clock: Clock) -> None:
    assert store.acquire("a", HERE) is True
    clock.now_s += LEASE_S - 1
    assert store.acquire("a", HERE) is False
    clock.now_s += 2
    assert store.acquire("a", HERE) is True
    assert store.acquire("a", HERE) is False, "the second builder has a lease of its own"


def test_builder_that_reports_keeps_its_lease(store: FeatureStore, clock: Clock) -> None:
    store.acquire("a", HERE)
    for _ in range(5):
        clock.now_s += LEASE_S - 1
        store.renew("a", HERE)
        assert store.acquire("a", HERE) is False
    clock.now_s += LEASE_S + 1
    assert store.acquire("a", HERE) is True


def test_released_lease_is_free_at_once(store: FeatureStore) -> None:
    store.acquire("a", HERE)
    store.release("a")
    assert store.acquire("a", HERE) is True


def test_builder_hears_who_waits_on_its_node(store: FeatureStore, clock: Clock) -> None:
    store.acquire("a", HERE)
    assert store.renew("a", HERE) == 0
    for other in (Asker("here", 2), Asker("here", 2), Asker("here", 3), Asker("there", 2)):
        assert store.acquire("a", other) is False
    assert store.acquire("b", Asker("here", 4)) is True, "builds something else"
    assert store.renew("a", HERE) == 2
    assert store.renew("a", Asker("there", 1)) == 1
    clock.now_s += WAITING_S / 2
    store.acquire("a", Asker("here", 3))
    clock.now_s += WAITING_S / 2
    assert store.renew("a", HERE) == 1, "one has died"
    clock.now_s += LEASE_S
    assert store.acquire("a", Asker("here", 3)) is True
    assert store.renew("a", Asker("here", 3)) == 0, "who builds does not wait"


def test_late_builder_shares_what_another_has_put(store: FeatureStore, clock: Clock) -> None:
    """It was taken for dead; its copy is dropped, so that all trials read one."""
    store.acquire("a", HERE)
    clock.now_s += LEASE_S + 1
    store.acquire("a", HERE)
    first = store.put("a", "from the second builder", 10)
    assert store.put("a", "from the first builder", 10) is first
    assert store.acquire("a", HERE) == [("ref", "from the second builder")]


def test_least_recently_used_features_are_dropped_beyond_the_budget(store: FeatureStore) -> None:
    for key in "abc":
        store.acquire(key, HERE)
        store.put(key, key, 30)
    assert store.acquire("a", HERE) == [("ref", "a")]  # now b is the oldest
    store.acquire("d", HERE)
    store.put("d", "d", 30)
    assert [key for key in "acd" if isinstance(store.acquire(key, HERE), list)] == ["a", "c", "d"]
    assert store.acquire("b", HERE) is True, "to be computed again"


def test_features_that_fill_the_budget_push_out_all_others(store: FeatureStore) -> None:
    for key in "ab":
        store.acquire(key, HERE)
        store.put(key, key, 40)
    store.acquire("c", HERE)
    assert store.put("c", "c", 100) == [("ref", "c")]
    assert store.acquire("c", HERE) == [("ref", "c")]
    assert store.acquire("a", HERE) is True
    assert store.acquire("b", HERE) is True


def test_dropping_spares_builders_at_work(store: FeatureStore) -> None:
    store.acquire("building", HERE)
    for key in "ab":
        store.acquire(key, HERE)
        store.put(key, key, 60)
    assert store.acquire("building", HERE) is False
    store.renew("building", HERE)


class Actor:
    """A store behind an actor's calls, each carried out at once."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        return type("Method", (), {"remote": staticmethod(method)})


@pytest.fixture
def actor(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> Actor:
    monkeypatch.setattr(
        feature_store.ray,
        "get",
        lambda answer: answer[1] if isinstance(answer, tuple) and answer[0] == "ref" else answer,
    )
    return Actor(store)


class Built:
    """Stands for features of 10 bytes."""

    num_bytes = 10


def test_features_are_built_once(actor: Actor) -> None:
    built = Built()
    budgets: list[int] = []

    def build(budget_bytes: int, alive: Callable[[], int]) -> Any:
        budgets.append(budget_bytes)
        alive()
        return built

    assert get_features(actor, "a", build) is built
    assert get_features(actor, "a", build) is built
    assert budgets == [100]


def test_builder_that_fails_leaves_the_next_one_its_turn(actor: Actor) -> None:
    def fail(budget_bytes: int, alive: Callable[[], int]) -> Any:
        raise SSNError("no such image")

    with pytest.raises(SSNError, match="no such image"):
        get_features(actor, "a", fail)
    assert isinstance(get_features(actor, "a", lambda budget_bytes, alive: Built()), Built)  # type: ignore[arg-type,return-value]


def test_store_that_started_anew_hears_of_builders_it_does_not_know(store: FeatureStore) -> None:
    assert store.renew("a", HERE) == 0
    assert store.acquire("a", THERE) is False
    store.release("b")
    assert store.acquire("b", THERE) is True


def test_features_that_died_with_their_store_are_asked_for_again(
    actor: Actor, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a", "gone", 10)
    get, answers = feature_store.ray.get, []

    def lose_once(answer: Any) -> Any:
        if isinstance(answer, tuple) and not answers:
            answers.append(answer)
            del store._entries["a"]
            raise OwnerDiedError("id", None, "")
        return get(answer)

    monkeypatch.setattr(feature_store.ray, "get", lose_once)
    assert isinstance(get_features(actor, "a", lambda budget_bytes, alive: Built()), Built)  # type: ignore[arg-type,return-value]


def test_waiting_trial_asks_until_the_builder_is_done(
    actor: Actor, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.acquire("a", HERE)
    polls: list[float] = []

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 3:
            store.put("a", "theirs", 10)

    monkeypatch.setattr(feature_store.time, "sleep", sleep)
    assert get_features(actor, "a", lambda *_: pytest.fail("built twice")) == "theirs"
    assert len(polls) == 3


def test_waiting_trial_takes_over_from_a_dead_builder(
    actor: Actor, store: FeatureStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.acquire("a", HERE)

    def sleep(seconds: float) -> None:
        clock.now_s += LEASE_S / 2

    monkeypatch.setattr(feature_store.time, "sleep", sleep)
    assert isinstance(get_features(actor, "a", lambda budget_bytes, alive: Built()), Built)  # type: ignore[arg-type,return-value]
