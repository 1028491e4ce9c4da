"""The end of a sweep without Ray: what is scored, registered and written down, and when the old champion stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError
from rich.console import Console

from ssn.config import Config, flatten
from ssn.data.reader import SearchData, open_search_data
from ssn.engine import Trainer
from ssn.features import extract, prepare_backbone
from tuning.champions.category_result import CategoryResult
from tuning.champions.crown import Crowning, _outcome
from tuning.champions.finalists import Finalist, Selection
from tuning.champions.registry import ALIAS
from tuning.champions.winner import TrialRecord
from tuning.execution.train_worker import Placement
from tuning.persistence.ledger import SweepLedger
from tuning.settings import ObjectiveSettings, SweepSettings
from tuning.tracking import MLflowTracker, Sweep, TrialInfo
from tuning.tracking.mlflow_tracker import default_tracking_uri
from tuning.tracking.protocol import RunRecord


class Factory:
    """Sweeps whose trials are one and the same trained model, with objectives that tests choose."""

    def __init__(self, tracker: MLflowTracker, data: SearchData, model: Path, config: Config) -> None:
        self.tracker, self.data, self.model, self.config = tracker, data, model, config
        self.settings = SweepSettings(
            model=config.model, data=config.data, synthesis=config.synthesis, train=config.train, eval=config.eval
        )

    def crown(self, sweep_id: str, *objectives: float, data: SearchData | None = None) -> CategoryResult:
        """A search of one trial, repeated with other seeds as often as there are further objectives."""
        data = data or self.data
        info = data.info
        tags = {"search_fingerprint": info.search_fingerprint, "test_fingerprint": info.test_fingerprint}
        sweep = Sweep(sweep_id, "tiny", {"widget": tags})
        self.tracker.start_sweep(sweep)
        runs = tuple(self._run(sweep, seed, objective) for seed, objective in enumerate(objectives))
        finalist = Finalist(runs[0], runs)
        crowning = Crowning(
            settings=self.settings,
            dataset="tiny",
            data_uri=str(Path(data._shards["train"].folder_uri.removeprefix("file://")).parents[1]),
            data={"widget": data},
            placement=Placement(num_workers=0, use_gpu=False, cpus=1, gpus=0),
            ledger=SweepLedger.open(self.model.parent / "runs", sweep_id),
            tracker=self.tracker,
            console=Console(quiet=True),
        )
        select: Callable[[str], Selection] = lambda name: Selection(finalist, (finalist,))  # noqa: E731
        (result,) = crowning.crown({"widget": [runs[0]]}, {"widget": runs[1:]}, select)
        return result

    def _run(self, sweep: Sweep, seed: int, objective: float) -> TrialRecord:
        config, key = flatten(self.config) | {"train.train_seed": seed}, f"{sweep.sweep_id} key {seed}"
        stage = "finalist" if seed else "search"
        run_id = self.tracker.start_trial(sweep, TrialInfo("widget", key, 0 if seed == 0 else seed - 1, config, stage))
        self.tracker.log_epoch(run_id, 2, {"objective": objective})
        self.tracker.finish_trial(run_id, "COMPLETE", artifact_dir=self.model)
        metrics = {"masks_used": 6, "weak_labels_used": 0}
        return TrialRecord(key, key, "widget", 0, 0, 2, config, {}, "complete", 2, {2: objective}, metrics)

    def scored(self, sweep_id: str) -> list[RunRecord]:
        """Runs of a sweep that the test split has been asked about, oldest first."""
        runs = self.tracker.find_runs("tiny", sweep_id=sweep_id)
        return [run for run in runs if any(metric.startswith("test_") for metric in run.metrics)]


@pytest.fixture
def factory(tiny_data: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Factory:
    def at_once(self: Crowning, function: Callable[..., Any], cpus: float) -> Any:
        return SimpleNamespace(remote=function)

    monkeypatch.setattr(Crowning, "_remote", at_once)
    monkeypatch.setattr("ray.get", lambda found: found)
    monkeypatch.setattr("ray.nodes", lambda: [])
    data, heads = open_search_data(str(tiny_data), "tiny", "widget"), tmp_path / "heads"
    features = extract(tiny_config, data, prepare_backbone(tiny_config, data))
    Trainer(tiny_config, features).save(heads, resumable=False)  # as good as trained, for what is asked here
    tracker = MLflowTracker(default_tracking_uri(tmp_path))
    tracker.check()
    return Factory(tracker, data, heads, tiny_config)


def test_old_champion_stays_unless_it_is_beaten(factory: Factory) -> None:
    first = factory.crown("s1", 0.80, 0.90, 0.70)
    assert first.champion is not None
    assert (first.champion.version, first.champion.created) == ("1", True)
    scored = factory.scored("s1")
    assert [run.tags["test_split_scored_times"] for run in scored] == ["1", "2", "3"]
    assert first.run_id == scored[0].run_id, "the median run"
    pictures = [factory.tracker.list_artifacts(run.run_id, "pictures") for run in scored]
    assert pictures == [["pictures/test_cases.png"], [], []]
    version = factory.tracker.client.get_model_version("tiny.widget", "1")
    told = {name: version.tags[name] for name in ("validation_objective", "validation_objective_std", "seeds")}
    assert told == {"validation_objective": "0.8", "validation_objective_std": "0.1", "seeds": "3"}
    assert version.tags["finalists"] == "trial 0: 0.800 ± 0.100 (n=3)"
    assert version.tags["decision_against"] == "no registered champion"
    assert version.tags["test_image_auroc_std"] == "0", "one and the same model, three times"

    # the same data: what was recorded decides, and nobody looks at the test split
    second = factory.crown("s2", 0.79)
    assert second.verdict is not None
    assert (second.verdict.way, second.verdict.promoted) == ("recorded", False)
    assert second.champion == replace(first.champion, created=False)
    assert factory.scored("s2") == []
    kept = factory.tracker.client.get_model_version("tiny.widget", "1").tags
    assert kept["kept_by_sweep"] == "s2"
    assert kept["kept_because"] == second.verdict.reason

    # other data: both are scored again; they are one and the same model, and of equals the old one stays
    grown = SearchData(replace(factory.data.info, search_fingerprint="of more images"), factory.data._shards)
    third = factory.crown("s3", 0.99, data=grown)
    assert third.verdict is not None
    assert (third.verdict.way, third.verdict.promoted, third.verdict.num_left_out) == ("rescored", False, 0)
    assert third.verdict.candidate_objective == third.verdict.incumbent_objective

    fourth = factory.crown("s4", 0.81)
    assert fourth.champion is not None
    assert (fourth.champion.version, fourth.champion.created) == ("2", True)
    assert [run.tags["test_split_scored_times"] for run in factory.scored("s4")] == ["4"]
    assert factory.tracker.client.get_model_version_by_alias("tiny.widget", ALIAS).run_id == fourth.run_id
    assert "takes its place" in fourth.notices()[0]

    # its six masks are more than this sweep would have
    factory.settings = replace(factory.settings, objective=ObjectiveSettings(max_masks=5))
    fifth = factory.crown("s5", 0.5)
    assert fifth.verdict is not None
    assert (fifth.verdict.way, fifth.verdict.promoted) == ("out of bounds", True)


def test_champion_is_not_replaced_because_the_process_that_compares_died(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuning.champions import crown

    def die(found: Any) -> Any:
        if found == "pending":
            raise WorkerCrashedError
        return found

    first = factory.crown("s1", 0.80)
    with monkeypatch.context() as dying:
        dying.setattr(crown, "rescore", lambda *arguments: "pending")
        dying.setattr("ray.get", die)
        grown = SearchData(replace(factory.data.info, search_fingerprint="of more images"), factory.data._shards)
        second = factory.crown("s2", 0.99, data=grown)
    assert second.champion is None
    assert second.failure is not None
    assert second.failure.startswith("the process that scores its model died (WorkerCrashedError")
    assert factory.tracker.client.get_model_version_by_alias("tiny.widget", ALIAS).run_id == first.run_id


def test_sweep_that_goes_on_scores_and_registers_nothing_twice(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the test split was asked, then again after the champion was registered."""
    from tuning.champions import crown

    asked: list[bool] = []
    score = crown.score_champion

    def count(*arguments: Any, **options: Any) -> Any:
        asked.append(True)
        return score(*arguments, **options)

    monkeypatch.setattr(crown, "score_champion", count)
    with monkeypatch.context() as dying:
        dying.setattr(Crowning, "_register", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            factory.crown("s1", 0.8, 0.9)
    assert len(asked) == 2
    first, second = factory.crown("s1", 0.8, 0.9), factory.crown("s1", 0.8, 0.9)
    assert len(asked) == 2
    assert first.champion == second.champion
    assert first.champion is not None
    assert first.score == second.score
    assert len(factory.tracker.client.search_model_versions("name = 'tiny.widget'")) == 1
    assert [run.tags["test_split_scored_times"] for run in factory.scored("s1")] == ["1", "2"]


@pytest.mark.parametrize(
    ("nodes", "tasks", "expected"),
    [
        ((), 1, 2),  # as a trial has
        ((2,), 1, 2),
        ((16,), 1, 16),
        ((16,), 3, 5),
        ((16,), 40, 2),
        ((16, 4, 0), 1, 4),  # any node will do, but for one without CPUs
        ((16, 16), 8, 4),
    ],
)
def test_scoring_uses_the_cpus_that_no_trial_needs_any_more(
    nodes: tuple[int, ...], tasks: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = [{"Alive": True, "Resources": {"CPU": float(cpus)} if cpus else {}} for cpus in nodes]
    monkeypatch.setattr("ray.nodes", lambda: [*alive, {"Alive": False, "Resources": {}}])
    crowning: Any = SimpleNamespace(placement=Placement(num_workers=0, use_gpu=False, cpus=2, gpus=0))
    assert Crowning._cpus(crowning, tasks) == expected


def test_scoring_on_a_gpu_asks_for_what_a_node_with_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    head, worker = {"CPU": 16.0}, {"CPU": 4.0, "GPU": 1.0}
    nodes = [{"Alive": True, "Resources": head}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    crowning: Any = SimpleNamespace(placement=Placement(num_workers=0, use_gpu=True, cpus=2, gpus=1))
    assert Crowning._cpus(crowning, 1) == 2, "of a kind that has yet to start"
    nodes.append({"Alive": True, "Resources": worker})
    assert Crowning._cpus(crowning, 1) == 4


def test_a_scoring_process_that_dies_costs_its_category_alone() -> None:
    def die() -> None:
        raise OutOfMemoryError("Task was killed due to the node running low on memory.\nMore of it.")

    def fail() -> None:
        raise RayTaskError("score_champion", "Traceback", ValueError("a bug"))

    assert _outcome(die) == (
        "the process that scores its model died (OutOfMemoryError: Task was killed due to the node running low on "
        "memory.); --resume scores it again"
    )
    with pytest.raises(RayTaskError):
        _outcome(fail)
