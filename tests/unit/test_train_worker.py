"""What a trial trains on: features from the store, or images from it where features exceed the budget. Without Ray."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.tune.trainable import function_trainable

from ssn import features as features_module
from ssn.config import Config, flatten
from ssn.data.reader import open_search_data
from ssn.features import CachedSplit, CategoryFeatures
from tests.tolerances import TRAINED_RTOL
from tuning.execution import objective, train_worker
from tuning.execution.feature_store import FeatureStore
from tuning.execution.objective import TrialContext, run_trial
from tuning.execution.train_worker import Placement, WorkerSetup
from tuning.execution.weights import load_weights_digests
from tuning.settings import ObjectiveSettings


class Actor:
    """A store behind an actor's calls, each carried out at once."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(getattr(self._store, name))})


class FakeRay:
    """One actor, and an object store that gives out read-only arrays."""

    def __init__(self, store: FeatureStore) -> None:
        self._actor = Actor(store)

    def get_actor(self, name: str, namespace: str) -> Actor:
        return self._actor

    def put(self, value: Any) -> Any:
        buffers: list[pickle.PickleBuffer] = []
        body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        return ("ref", body, [bytes(buffer.raw()) for buffer in buffers])

    def get(self, answer: Any) -> Any:
        if isinstance(answer, tuple) and answer[0] == "ref":
            return pickle.loads(answer[1], buffers=answer[2])
        return answer


def set_up(tiny_data: Path, configs: Sequence[Config]) -> WorkerSetup:
    """Of trials on one CPU each."""
    context = TrialContext(
        data=open_search_data(str(tiny_data), "tiny", "widget"), objective=ObjectiveSettings(), rungs=None
    )
    return WorkerSetup(
        contexts={"widget": context},
        data_uri=str(tiny_data),
        weights_digests=load_weights_digests(config.model for config in configs),
        store_name="features",
        namespace="sweep",
        placement=Placement(num_workers=0, use_gpu=False, cpus=1.0, gpus=0.0),
        storage_path="",
        storage_filesystem=None,
    )


def run(
    tiny_data: Path, config: Config, monkeypatch: pytest.MonkeyPatch, *, budget_bytes: int
) -> tuple[CategoryFeatures, list[dict[str, Any]]]:
    """Load features as two trials do, and train the second."""
    import ray

    fake = FakeRay(FeatureStore(budget_bytes))
    for name in ("get_actor", "put", "get"):
        monkeypatch.setattr(ray, name, getattr(fake, name))
    setup = set_up(tiny_data, [config])
    trial = {"trial_key": "k", "category": "widget", "index": 0, "config": flatten(config)}
    first = train_worker._load_features(trial, setup, setup.contexts["widget"], "cpu")
    with monkeypatch.context() as second:
        second.setattr(objective, "prepare_features", lambda *a, **k: pytest.fail("built twice"))
        features = train_worker._load_features(trial, setup, setup.contexts["widget"], "cpu")
    assert features.source == first.source
    results: list[dict[str, Any]] = []
    run_trial(
        trial,
        setup.contexts["widget"],
        features,
        report=lambda result, save: results.append(result),
        resume_from=None,
        device="cpu",
    )
    return features, results


def test_trial_without_room_for_features_streams_and_says_so(
    tiny_data: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, expected = run(tiny_data, tiny_config, monkeypatch, budget_bytes=10**9)
    made, results = run(tiny_data, tiny_config, monkeypatch, budget_bytes=kept.num_bytes - 1)
    assert (kept.source, made.source) == ("cached", "streamed")
    assert {r["feature_source"] for r in expected} == {"cached"}
    assert {r["feature_source"] for r in results} == {"streamed"}
    for before, after in zip(expected, results, strict=True):
        for name in ("train_loss", "val_loss", "val_image_auroc"):
            assert after[name] == pytest.approx(before[name], rel=TRAINED_RTOL)


def test_trials_of_one_category_with_other_backbones_have_other_features(
    tiny_data: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    fake = FakeRay(FeatureStore(10**9))
    for name in ("get_actor", "put", "get"):
        monkeypatch.setattr(ray, name, getattr(fake, name))
    configs = [
        replace(tiny_config, model=replace(tiny_config.model, layers=layers), data=replace(tiny_config.data, **data))
        for layers, data in (((1, 2), {}), ((2, 3), {}), ((2, 3), {"image_size": (32, 32)}), ((1, 2), {}))
    ]
    setup = set_up(tiny_data, configs)
    assert len(setup.weights_digests) == 2
    built: list[Any] = []
    build = objective.prepare_features
    monkeypatch.setattr(objective, "prepare_features", lambda *a, **k: built.append(a) or build(*a, **k))
    shapes = []
    for config in configs:
        trial = {"trial_key": "k", "category": "widget", "index": 0, "config": flatten(config)}
        features = train_worker._load_features(trial, setup, setup.contexts["widget"], "cpu")
        assert isinstance(features.train, CachedSplit)
        shapes.append([m.shape[1:] for m in features.train.maps_VhwC])
    assert shapes == [
        [(8, 12, 64), (4, 6, 128)],
        [(4, 6, 128), (2, 3, 256)],
        [(4, 4, 128), (2, 2, 256)],
        [(8, 12, 64), (4, 6, 128)],
    ]
    assert len(built) == 3


def test_tune_waits_for_a_stopped_trials_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a setting that Tune reads where trials run; else, it drops the next trial after 2 s."""
    waited: list[float] = []
    session = SimpleNamespace(
        finish=lambda timeout: waited.append(timeout),
        training_thread=SimpleNamespace(is_alive=lambda: True),
    )
    monkeypatch.setattr(function_trainable, "get_session", lambda: session)
    monkeypatch.setenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", "1")  # so that it is put back
    monkeypatch.delenv("TUNE_FUNCTION_THREAD_TIMEOUT_S")
    train_worker._wait_for_ends()
    trainable: Any = SimpleNamespace()
    assert function_trainable.FunctionTrainable.reset_config(trainable, {}) is False
    assert waited == [600]


def test_features_are_computed_on_the_cpus_of_those_who_wait(
    tiny_data: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    store = FeatureStore(10**9)
    monkeypatch.setattr(store, "renew", lambda key, asker: 2)
    fake = FakeRay(store)
    for name in ("get_actor", "put", "get"):
        monkeypatch.setattr(ray, name, getattr(fake, name))
    setup = set_up(tiny_data, [tiny_config])
    threads: list[int] = []
    run_backbone = features_module.run_backbone

    def noting(*arguments: Any) -> Any:
        threads.append(torch.get_num_threads())
        return run_backbone(*arguments)

    monkeypatch.setattr(features_module, "run_backbone", noting)
    trial = {"trial_key": "k", "category": "widget", "index": 0, "config": flatten(tiny_config)}
    train_worker._load_features(trial, setup, setup.contexts["widget"], "cpu")
    assert threads[-1] == 3
    assert torch.get_num_threads() == 1
