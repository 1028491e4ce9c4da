"""Trials on a local Ray, as a sweep runs them, without searching, tracking or champions."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from ssn.config import Config, flatten
from ssn.data.reader import open_search_data
from tuning.execution.interrupt import StopFlag
from tuning.execution.objective import TrialContext
from tuning.execution.train_worker import Finish, Placement
from tuning.execution.tune_run import open_storage, run_tune
from tuning.execution.weights import load_weights_digests
from tuning.search.rungs import Rungs
from tuning.settings import ObjectiveSettings


class GivenTrials(Searcher):
    """Suggests given configurations one after the other."""

    def __init__(self, configs: Sequence[Config], category: str) -> None:
        super().__init__()
        self._trials = [
            {"trial_key": f"trial{i}", "category": category, "index": i, "config": flatten(config)}
            for i, config in enumerate(configs)
        ]

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        return self._trials.pop(0) if self._trials else str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


@dataclass
class Watched:
    """One trial as Tune's driver sees it."""

    results: list[dict[str, Any]] = field(default_factory=list)
    started_s: float = 0.0
    ended_s: float = 0.0
    failed: bool = False


class Watch(Callback):
    """Notes every trial's results; subclasses do harm."""

    def __init__(self) -> None:
        self.trials: dict[str, Watched] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.trials.setdefault(trial.trial_id, Watched(started_s=time.time()))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.trials[trial.trial_id].results.append(result | {"received_s": time.time()})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.trials[trial.trial_id].ended_s = time.time()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.trials[trial.trial_id].failed = True


def train_workers() -> list[psutil.Process]:
    """Ray Train's worker processes of the Ray that this process started."""
    return [p for p in psutil.Process(os.getpid()).children(recursive=True) if "RayTrainWorker" in "".join(p.cmdline())]


def run_trials(
    configs: Sequence[Config],
    *,
    data_uri: str,
    dataset: str,
    category: str,
    placement: Placement,
    out: Path,
    name: str,
    watch: Watch | None = None,
    rungs: Rungs | None = None,
    finish: Finish | None = None,
) -> list[Watched]:
    """Train configurations of one backbone and give what became of each, in order."""
    watch = watch or Watch()
    run_tune(
        GivenTrials(configs, category),
        FIFOScheduler(),
        [watch],
        {
            category: TrialContext(
                data=open_search_data(data_uri, dataset, category),
                objective=ObjectiveSettings(),
                rungs=rungs,
            )
        },
        name=name,
        data_uri=data_uri,
        weights_digests=load_weights_digests(config.model for config in configs),
        placement=placement,
        storage=open_storage(out),
        concurrency=1,
        stop=StopFlag(),
        finish=finish,
    )
    return list(watch.trials.values())
