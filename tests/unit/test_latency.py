"""How long a network takes for one image, and what a trial reports of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssn.backbone import load_backbone
from ssn.config import Config, flatten
from ssn.data.reader import SearchData, open_search_data
from tests.planted_features import CONFIG, plant_features, with_train
from tuning.execution import latency
from tuning.execution.latency import MAX_RUNS, MIN_RUNS, WARM_UP_RUNS, measure_latency_ms
from tuning.execution.objective import TrialContext, run_trial
from tuning.execution.train_worker import _latency_ms
from tuning.search.rungs import Rungs
from tuning.settings import ObjectiveSettings


class Clock:
    """Hands out the seconds at which runs start and end."""

    def __init__(self, durations_s: list[float]) -> None:
        self.durations_s, self.now_s, self.started = durations_s, 0.0, 0

    def perf_counter(self) -> float:
        if self.started % 2:
            self.now_s += self.durations_s[self.started // 2]
        self.started += 1
        return self.now_s


@pytest.mark.parametrize(
    ("durations_s", "runs", "expected_ms"),
    [
        ([0.01] * 20 + [0.05] * 10, MAX_RUNS, 10.0),  # interruptions do not count
        ([2.0, 1.0, 3.0, 1.5, 1.2], MIN_RUNS, 1500.0),  # a slow network is not measured for minutes
    ],
)
def test_median_of_bounded_runs(
    durations_s: list[float], runs: int, expected_ms: float, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(durations_s)
    monkeypatch.setattr(latency, "time", clock)
    scored: list[tuple[int, ...]] = []
    inner = latency.Predictor.score_raw
    monkeypatch.setattr(latency.Predictor, "score_raw", lambda self, x: scored.append(tuple(x.shape)) or inner(self, x))
    found = measure_latency_ms(tiny_config, load_backbone(tiny_config.model), device="cpu")
    assert found == pytest.approx(expected_ms)
    assert scored == [(1, 3, 32, 48)] * (WARM_UP_RUNS + runs)


def test_real_network_takes_time(tiny_config: Config) -> None:
    assert measure_latency_ms(tiny_config, load_backbone(tiny_config.model), device="cpu") > 0


def context(data: SearchData, **objective: Any) -> TrialContext:
    return TrialContext(data=data, objective=ObjectiveSettings(**objective), rungs=Rungs())


def test_trial_measures_only_where_it_is_asked_and_nobody_has(
    tiny_data: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_search_data(str(tiny_data), "tiny", "widget")
    trial = {"trial_key": "k", "category": "widget", "index": 0, "config": flatten(tiny_config)}
    assert _latency_ms(trial, context(data), "cpu") is None
    assert _latency_ms(trial, replace(context(data), objective=None), "cpu") is None
    monkeypatch.setattr(latency, "measure_latency_ms", lambda config, backbone, *, device: 12.5)
    assert _latency_ms(trial, context(data, against="latency"), "cpu") == 12.5
    assert _latency_ms(trial, context(data, max_latency_ms=5.0), "cpu") == 12.5
    assert _latency_ms({**trial, "latency_ms": 7.5}, context(data, against="latency"), "cpu") == 7.5


def test_trial_reports_costs_and_excess_with_every_epoch() -> None:
    features = plant_features(pool=4)
    config = with_train(CONFIG, epochs=2, supervision_ratio=0.5)
    reports: list[dict[str, Any]] = []

    def report(result: dict[str, Any], save: Callable[[Path], None] | None) -> None:
        reports.append(result)

    run_trial(
        {"trial_key": "k", "category": "plate", "index": 0, "config": flatten(config)},
        context(SearchData(features.info, {}), max_masks=4, max_latency_ms=10.0),
        features,
        report=report,
        resume_from=None,
        device="cpu",
        latency_ms=12.0,
    )
    assert [r["epoch"] for r in reports] == [1, 2]
    for result in reports:
        assert (result["masks_used"], result["latency_ms"]) == (2, 12.0)
        assert result["excess_max_masks"] == -0.5
        assert result["excess_max_latency_ms"] == pytest.approx(0.2)
