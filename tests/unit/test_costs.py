"""Costs, bounds on them, and what a search makes of trials that exceed one; no Ray runtime."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from ssn.config import Config, flatten, unflatten
from ssn.errors import SSNError
from tuning.champions.winner import TrialRecord, select_winner
from tuning.execution.weights import weights_key
from tuning.persistence.study_database import StudyDatabase
from tuning.reporting.progress import summarise
from tuning.search.costs import (
    check_against,
    excesses,
    is_feasible,
    limit_masks,
    measure_excess,
    needs_latency,
    shape_key,
    trial_cost,
)
from tuning.search.rungs import Rungs
from tuning.search.scheduler import MultiplexScheduler
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import Axis, CategorySpace, Choice, FloatRange
from tuning.settings import ObjectiveSettings, SweepSettings

EPOCHS = 9
SIGMA, RATIO = "synthesis.noise_sigma", "train.supervision_ratio"
BASE = flatten(Config().resolved()) | {"train.epochs": EPOCHS}
SPACE: dict[str, Axis] = {SIGMA: FloatRange(1e-3, 0.3, log=True), RATIO: Choice(tuple(i / 10 for i in range(11)))}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def test_costs() -> None:
    metrics = {"masks_used": 3, "weak_labels_used": 2, "latency_ms": 41.5}
    assert trial_cost(metrics, "none") == 0
    assert trial_cost(metrics, "labels") == 5
    assert trial_cost(metrics, "latency") == 41.5
    with pytest.raises(KeyError):
        trial_cost({"masks_used": 3, "weak_labels_used": 2}, "latency")


@pytest.mark.parametrize(
    ("masks", "latency_ms", "expected"),
    [
        (4, 50.0, {"excess_max_masks": 0.0, "excess_max_latency_ms": 0.0}),
        (6, 25.0, {"excess_max_masks": 0.5, "excess_max_latency_ms": -0.5}),
        (0, 75.0, {"excess_max_masks": -1.0, "excess_max_latency_ms": 0.5}),
    ],
)
def test_excess_is_a_share_of_the_bound(masks: int, latency_ms: float, expected: dict[str, float]) -> None:
    objective = ObjectiveSettings(max_masks=4, max_latency_ms=50.0)
    found = measure_excess(objective, {"masks_used": masks, "latency_ms": latency_ms})
    assert found == pytest.approx(expected)
    assert excesses({**found, "val_loss": 1.0}) == pytest.approx(
        {key.removeprefix("excess_"): value for key, value in expected.items()}
    )
    assert is_feasible(found) == all(value <= 0 for value in expected.values())


def test_no_bound_is_no_excess() -> None:
    assert measure_excess(ObjectiveSettings(), {"masks_used": 9}) == {}
    assert is_feasible({})
    assert measure_excess(ObjectiveSettings(max_masks=0), {"masks_used": 2}) == {"excess_max_masks": 2.0}


def test_latency_is_measured_only_where_it_counts() -> None:
    assert not needs_latency(ObjectiveSettings(max_masks=3, against="labels"))
    assert needs_latency(ObjectiveSettings(against="latency"))
    assert needs_latency(ObjectiveSettings(max_latency_ms=10.0))


def test_shape_is_what_changes_the_arithmetic() -> None:
    same = [{SIGMA: 0.1}, {"train.epochs": 3}, {"model.weights": "random"}, {"train.label_seed": 5}]
    other = [{"model.variant": "jims"}, {"data.image_size": [128, 128]}, {"model.layers": [2]}]
    assert {shape_key({**BASE, **change}) for change in same} == {shape_key(BASE)}
    assert len({shape_key({**BASE, **change}) for change in other} | {shape_key(BASE)}) == 4


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"against": "price"}, r"objective.against is 'price', but must be one of none, labels, latency"),
        ({"pick": "knee"}, r"objective.pick is 'knee', but must be best, unless objective.against is"),
        ({"pick": "first"}, r"objective.pick is 'first', but must be best or knee"),
        ({"against": "labels", "cost_per_mask": 0.1}, r"objective.cost_per_mask is 0.1, but must be 0 where"),
        ({"max_masks": -1}, r"objective.max_masks is -1, but must be at least 0"),
        ({"max_latency_ms": 0.0}, r"objective.max_latency_ms is 0.0, but must be positive"),
    ],
)
def test_meaningless_settings_are_refused(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(SSNError, match=f"^{message}"):
        SweepSettings(objective=ObjectiveSettings(**objective))


def test_latency_that_nothing_changes_is_refused() -> None:
    check_against(ObjectiveSettings(against="labels"), SPACE)
    check_against(ObjectiveSettings(against="latency"), {*SPACE, "model.variant"})
    with pytest.raises(SSNError, match=r"^objective.against is latency, but no searched setting changes the network's"):
        check_against(ObjectiveSettings(against="latency"), SPACE)


def test_progress_knows_no_best_while_all_are_infeasible() -> None:
    assert summarise("screw", 3, [record(0, 0.9, 0.1)]).best is None
    best = summarise("screw", 3, [record(0, 0.9, 0.1), record(1, 0.5, 0.0)]).best
    assert best is not None
    assert best.index == 1


# Ratios that are known to be too dear.


def test_ratios_beyond_the_bound_are_not_tried() -> None:
    space = CategorySpace(BASE, SPACE, ("said before",))
    assert limit_masks(space, "screw", 10, 3) == replace(space, axes={**SPACE, RATIO: Choice((0.0, 0.1, 0.2, 0.3))})
    assert limit_masks(space, "screw", 10, None) == space


def test_default_beyond_the_bound_is_tried_and_told_of() -> None:
    found = limit_masks(CategorySpace({**BASE, RATIO: 1.0}, SPACE), "screw", 10, 1)
    assert found.axes[RATIO] == Choice((0.0, 0.1, 1.0))
    assert found.notices == ("screw: the default uses 10 masks, more than objective.max_masks=1, and so cannot win",)


# Constraints in the studies.


WEIGHTS = {weights_key(unflatten(BASE).model): "weights"}


def searcher(trials: int, **options: Any) -> MultiplexSearcher:
    return MultiplexSearcher(
        [CategorySearch("a", BASE, SPACE, "data", WEIGHTS, 0)],
        sweep_id="sweep",
        trials_per_category=trials,
        **options,
    )


def drive(search: MultiplexSearcher, objective: ObjectiveSettings, trials: int) -> list[TrialRecord]:
    """More masks are always better; more than the bound are infeasible."""
    for i in range(trials):
        config = search.suggest(f"t{i}")["config"]  # type: ignore[index]
        costs = {"masks_used": round(10 * config[RATIO]), "weak_labels_used": 0}
        value = config[RATIO] - abs(math.log10(config[SIGMA] / 0.02)) / 10
        report = {"epoch": EPOCHS, "objective": value, **costs, **measure_excess(objective, costs)}
        search.on_trial_complete(f"t{i}", report)
    return search.records()


def test_studies_know_by_how_much_a_trial_is_infeasible() -> None:
    search = searcher(10)
    records = drive(search, ObjectiveSettings(max_masks=4), 10)
    for record, trial in zip(records, search.study("a").trials, strict=True):
        assert trial.constraints == {"max_masks": pytest.approx((record.metrics["masks_used"] - 4) / 4)}
        assert record.feasible == (record.metrics["masks_used"] <= 4)
    best = search.study("a").best_trial
    assert best.number == select_winner(records).number, "Optuna and we agree on what can win"


def test_sampler_learns_to_keep_the_bound() -> None:
    """The objective pulls towards more masks; feasible trials become the rule all the same."""
    bounded = drive(searcher(60), ObjectiveSettings(max_masks=4), 60)
    unbounded = drive(searcher(60), ObjectiveSettings(), 60)
    kept, kept_by_chance = (sum(r.metrics["masks_used"] <= 4 for r in found[30:]) for found in (bounded, unbounded))
    assert kept >= kept_by_chance + 10


def test_pruned_trials_have_constraints_too() -> None:
    search = searcher(2)
    search.suggest("t")
    search.on_trial_complete("t", {"epoch": 1, "excess_max_masks": 0.5})
    (trial,) = search.study("a").trials
    assert (trial.state, trial.constraints) == (TrialState.PRUNED, {"max_masks": 0.5})


def record(index: int, objective: float, excess: float) -> TrialRecord:
    metrics = {"excess_max_masks": excess}
    return TrialRecord(
        f"t{index}",
        f"k{index}",
        "screw",
        index,
        index,
        EPOCHS,
        {},
        {},
        "complete",
        EPOCHS,
        {EPOCHS: objective},
        metrics,
    )


def test_infeasible_trial_never_wins() -> None:
    assert select_winner([record(0, 0.9, 0.1), record(1, 0.5, 0.0), record(2, 0.4, -1.0)]).index == 1
    with pytest.raises(
        SSNError,
        match=r"^screw: no winner, because every complete trial exceeds max_masks \(2 complete\); raise objective.max",
    ):
        select_winner([record(0, 0.9, 0.1), record(1, 0.5, 0.2)])


# Constraints in the scheduler.


class FakeTrial:
    """What the scheduler looks at of a Tune trial."""

    def __init__(self, trial_id: str, index: int = 1) -> None:
        self.trial_id = trial_id
        self.config = {"category": "screw", "index": index, "config": {"train.epochs": EPOCHS}}


def report(sched: MultiplexScheduler, name: str, epoch: int, *, index: int = 1, **metrics: float) -> str:
    trial: Any = FakeTrial(name, index)
    return sched.on_trial_result(None, trial, {"epoch": epoch, **metrics})  # type: ignore[arg-type]


def test_infeasible_trial_is_stopped_at_once_but_for_the_default() -> None:
    sched = MultiplexScheduler(Rungs(3, 3))
    assert report(sched, "dear", 1, excess_max_masks=0.1) == TrialScheduler.STOP
    assert report(sched, "default", 1, index=0, excess_max_masks=0.1) == TrialScheduler.CONTINUE
    assert report(sched, "default", 3, index=0, objective=0.99, excess_max_masks=0.1) == TrialScheduler.CONTINUE
    assert report(sched, "dear", 9, excess_max_masks=0.1) == TrialScheduler.CONTINUE
    # it is nobody's rival
    assert report(sched, "poor", 3, objective=0.1, excess_max_masks=0.0) == TrialScheduler.CONTINUE
    assert report(sched, "poorer", 3, objective=0.05, excess_max_masks=0.0) == TrialScheduler.STOP


def test_cheaper_trials_are_not_held_against_dearer_ones_even_after_a_restore() -> None:
    labels = {"masks_used": 8, "weak_labels_used": 0}

    class History:
        def recorded_objectives(self, trial_id: str) -> dict[int, float]:
            return {1: 0.9} if trial_id == "dear" else {}

        def recorded_metrics(self, trial_id: str) -> dict[str, float]:
            return {**labels} if trial_id == "dear" else {}

    sched = MultiplexScheduler(Rungs(1, 3), against="labels", history=History())
    sched.on_trial_add(None, FakeTrial("dear"))  # type: ignore[arg-type]
    assert report(sched, "cheap", 1, objective=0.1, masks_used=3, weak_labels_used=4) == TrialScheduler.CONTINUE
    assert report(sched, "equal", 1, objective=0.2, masks_used=3, weak_labels_used=5) == TrialScheduler.STOP


# Studies with two directions.


def drive_pair(search: MultiplexSearcher, start: int, stop: int) -> list[tuple[float, float]]:
    """Labels help, and every third trial is stopped at the first rung."""
    tried = []
    for i in range(start, stop):
        config = search.suggest(f"t{i}")["config"]  # type: ignore[index]
        tried.append((config[RATIO], config[SIGMA]))
        value = 1 - math.exp(-3 * config[RATIO]) - abs(math.log10(config[SIGMA] / 0.02)) / 10
        costs = {"masks_used": round(10 * config[RATIO]), "weak_labels_used": 1}
        search.on_trial_result(f"t{i}", {"epoch": 1, "objective": value / 2, **costs})
        if i % 3 == 2:
            search.on_trial_complete(f"t{i}", {"epoch": 1, "objective": value / 2, **costs})
        else:
            search.on_trial_complete(f"t{i}", {"epoch": EPOCHS, "objective": value, **costs})
    return tried


@pytest.mark.parametrize("where", ["memory", "database"])
def test_study_against_labels_is_told_both_and_survives_pruned_trials(tmp_path: Path, where: str) -> None:
    """Optuna's TPE fails on a study with two directions whose pruned trials have intermediate values."""
    database = StudyDatabase(f"sqlite:///{tmp_path / 's.db'}")
    search = searcher(25, against="labels", database=database)
    drive_pair(search, 0, 25)
    database.close()
    study = search.study("a")
    if where == "database":
        study = optuna.load_study(study_name=study.study_name, storage=database.url)
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    for found, trial in zip(search.records(), study.trials, strict=True):
        assert trial.intermediate_values == {}
        assert trial.user_attrs["objective at epoch 1"] == found.objectives[1]
        if found.state == "complete":
            assert trial.values == [found.objective, found.metrics["masks_used"] + 1]
        else:
            assert (trial.state, trial.values) == (TrialState.PRUNED, None)
    assert len(study.best_trials) > 2


def test_study_against_labels_goes_on_from_its_records() -> None:
    first = searcher(20, against="labels")
    drive_pair(first, 0, 12)
    second = searcher(20, against="labels", earlier=copy.deepcopy(first.records()))
    assert [(t.state, t.values) for t in second.study("a").trials] == [
        (t.state, t.values) for t in first.study("a").trials if "duplicate_of" not in t.user_attrs
    ]
    tried = drive_pair(second, 12, 20)
    assert len({*tried, *((r.config[RATIO], r.config[SIGMA]) for r in first.records())}) == 20


def test_latencies_survive_a_resume() -> None:
    first = searcher(4, against="latency")
    first.suggest("t0")
    first.on_trial_complete("t0", {"epoch": EPOCHS, "objective": 0.5, "latency_ms": 20.0})
    second = searcher(4, against="latency", earlier=first.records())
    assert second.suggest("t1")["latency_ms"] == 20.0  # type: ignore[index]


def test_latency_of_a_shape_is_measured_once() -> None:
    search = searcher(4, against="latency")
    first, second = search.suggest("t0"), search.suggest("t1")
    assert "latency_ms" not in {*first, *second}  # type: ignore[misc]
    search.on_trial_complete("t0", {"epoch": EPOCHS, "objective": 0.5, "latency_ms": 20.0})
    search.on_trial_complete("t1", {"epoch": EPOCHS, "objective": 0.6, "latency_ms": 23.0})
    assert [t.values for t in search.study("a").trials] == [[0.5, 20.0], [0.6, 20.0]], "what was measured first counts"
    assert search.suggest("t2")["latency_ms"] == 20.0  # type: ignore[index]
