"""One configuration for all categories: what is issued when, what is dropped, what the study learns. No Ray."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest

from ssn.config import Config, TrainConfig, flatten
from ssn.errors import SSNError
from tests.made_up_benchmark import make_info
from tuning.champions.category_result import SHARED, CategoryResult
from tuning.champions.finalists import Finalist, FinalistRun, Selection
from tuning.champions.incumbent import Incumbent, Rescored, Verdict, compare_recorded, compare_rescored, yardstick
from tuning.champions.winner import TrialRecord
from tuning.execution.weights import weights_key
from tuning.reporting.shared_report import SharedComparison, SharedRow, compare_with_tuned
from tuning.search.feature_groups import shared_space
from tuning.search.fixed_runs import FixedRuns
from tuning.search.searcher import CategorySearch
from tuning.search.shared import (
    ALL,
    SharedSearcher,
    goes_on,
    make_shared_searcher,
    plan_shared_finalists,
    select_shared,
)
from tuning.settings import FinalistSettings, ObjectiveSettings, SearchSettings, SweepSettings
from tuning.tracking import MemoryTracker, Sweep
from tuning.tracking.protocol import FINALIST_STAGE

EPOCHS = 2
RATIO, SIGMA = "train.supervision_ratio", "synthesis.noise_sigma"
BASE = flatten(Config()) | {"train.epochs": EPOCHS, RATIO: 0.5}
MASKS = {"bolt": 4, "nut": 2, "pin": 0, "rod": 8}


def make(
    trials: int = 4,
    masks: dict[str, int] | None = None,
    eta: int = 3,
    limit: int | None = None,
    space: dict[str, object] | None = None,
    max_trials: int | None = None,
    earlier: Sequence[TrialRecord] = (),
) -> SharedSearcher:
    infos = {name: make_info(name, masks=count) for name, count in (masks or MASKS).items()}
    search = SearchSettings(trials=trials, **({} if space is None else {"space": space}))
    settings = SweepSettings(train=TrainConfig(epochs=EPOCHS, supervision_ratio=0.5), search=search)
    shared = shared_space(settings, infos)
    digests = {weights_key(settings.model): "weights"}
    searcher = make_shared_searcher(
        [
            CategorySearch(name, shared.base, shared.axes, info.search_fingerprint, digests, 0)
            for name, info in infos.items()
        ],
        pools={name: info.counts["pool"] for name, info in infos.items()},
        sweep_id="s1",
        num_configurations=trials,
        search_seed=0,
        eta=eta,
        max_trials=max_trials,
        earlier=earlier,
    )
    if limit is not None:
        searcher.set_max_concurrency(limit)
    return searcher


def finish(searcher: SharedSearcher, trial_id: str, objective: float, **metrics: float) -> None:
    searcher.on_trial_result(trial_id, {"epoch": 1})
    searcher.on_trial_complete(trial_id, {"epoch": EPOCHS, "objective": objective, **metrics})


def run(searcher: SharedSearcher, outcomes: Any) -> list[tuple[int, str]]:
    """Run one trial after another to the end; what was run, in order."""
    order: list[tuple[int, str]] = []
    while True:
        name = f"t{len(order)}"
        suggested = searcher.suggest(name)
        if suggested == "FINISHED":
            return order
        assert isinstance(suggested, dict)
        order.append((suggested["index"], suggested["category"]))
        outcome = outcomes(suggested["index"], suggested["category"])
        if isinstance(outcome, str):
            searcher.note_failure(name, outcome)
            searcher.on_trial_complete(name, None, error=True)
        else:
            finish(searcher, name, outcome)


def states(searcher: SharedSearcher) -> list[str]:
    return [c.state for c in searcher.configurations]


@pytest.mark.parametrize("cut", [1, 2, 5, 7])
def test_search_goes_on_from_its_ledger(cut: int) -> None:
    """What has ended is not run again, what was cut short goes on, and configurations stay what they were."""

    def outcome(index: int, category: str) -> float:
        return 0.5 + 0.01 * index + 0.1 * (category == "nut")

    first, kept = make(trials=3, eta=2, limit=1), {}
    for i in range(cut):
        suggested = first.suggest(f"t{i}")
        assert isinstance(suggested, dict)
        for record in (first.origin(f"t{i}"), first.record(f"t{i}")):
            kept[record.name] = record
        if i < cut - 1:
            finish(first, f"t{i}", outcome(suggested["index"], suggested["category"]))
    first.record(f"t{cut - 1}").checkpoint = "/checkpoint"
    running = first.record(f"t{cut - 1}")
    second = make(trials=3, eta=2, limit=1, earlier=copy.deepcopy(list(kept.values())))
    suggested = second.suggest("again")
    assert isinstance(suggested, dict)
    assert (suggested["category"], suggested["trial_key"]) == (running.category, running.trial_key)
    assert (suggested["index"], suggested["resume_from"]) == (running.index, "/checkpoint")
    finish(second, "again", outcome(suggested["index"], suggested["category"]))
    order = run(second, outcome)
    ended = {(r.index, r.category) for r in kept.values() if r.stage == "search"}
    assert not ended & set(order)
    assert second.done
    assert len(second.configurations) == 3
    for mine, theirs in zip(second.configurations, first.configurations, strict=False):
        assert (mine.index, mine.config) == (theirs.index, theirs.config)
    assert len({(r.category, r.trial_key) for r in second.records()}) == len(second.records())


@pytest.mark.parametrize(
    ("mean", "others", "eta", "expected"),
    [
        (0.1, [], 3, True),
        (0.5, [0.4], 3, True),
        (0.3, [0.4], 3, False),
        (0.4, [0.4], 3, True),
        (0.5, [0.1, 0.2, 0.9], 3, True),
        (0.3, [0.1, 0.2, 0.3, 0.9, 0.9, 0.9], 2, False),
    ],
)
def test_best_share_of_those_at_a_rung_goes_on(mean: float, others: list[float], eta: int, expected: bool) -> None:
    assert goes_on(mean, others, eta) is expected


def test_configuration_is_trained_on_every_category_in_order() -> None:
    searcher = make(trials=1)
    assert run(searcher, lambda index, category: 0.5) == [(0, name) for name in MASKS]
    assert searcher.done
    (configuration,) = searcher.configurations
    assert (configuration.state, configuration.num_told) == ("complete", 4)
    assert [searcher.records(name)[0].state for name in MASKS] == ["complete"] * 4


def test_each_category_has_its_nearest_attainable_ratio() -> None:
    searcher = make(trials=1)
    run(searcher, lambda index, category: 0.5)
    assert {name: searcher.records(name)[0].config[RATIO] for name in MASKS} == {
        "bolt": 0.5,
        "nut": 0.5,
        "pin": 0.0,
        "rod": 0.5,
    }
    searcher = make(trials=3)
    run(searcher, lambda index, category: 0.5 + index)
    for configuration in searcher.configurations:
        for name, record in configuration.records.items():
            asked, taken, masks = configuration.config[RATIO], record.config[RATIO], MASKS[name]
            assert taken == (int(asked * masks + 0.5) / masks if masks else 0.0)
            assert record.trial_key == searcher.identity(name, record.config)
            assert record.params[RATIO] == taken
            assert record.config[SIGMA] == configuration.config[SIGMA]
    assert len({c.config[RATIO] for c in searcher.configurations}) == 3


def test_study_learns_running_means_by_number_of_categories() -> None:
    searcher = make(trials=1)
    objectives = {"bolt": 0.8, "nut": 0.4, "pin": 0.6, "rod": 0.2}
    run(searcher, lambda index, category: objectives[category])
    (trial,) = searcher._study.study(ALL).trials
    assert trial.state.name == "COMPLETE"
    assert trial.intermediate_values == pytest.approx({1: 0.8, 2: 0.6, 3: 0.6, 4: 0.5})
    assert trial.value == pytest.approx(0.5)


def test_configuration_that_is_behind_is_dropped_before_it_costs_all_categories() -> None:
    """Four categories, eta 3: rungs after one and three."""
    first = {0: 0.5, 1: 0.4, 2: 0.6, 3: 0.7}

    def outcome(index: int, category: str) -> float:
        return 0.1 if (index, category) == (2, "pin") else first[index]

    searcher = make(trials=4)
    order = run(searcher, outcome)
    assert [sum(index == i for i, _ in order) for index in range(4)] == [4, 1, 3, 4]
    assert states(searcher) == ["complete", "pruned", "pruned", "complete"]
    study = searcher._study.study(ALL)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "PRUNED", "COMPLETE"]
    assert study.trials[1].intermediate_values == {1: 0.4}
    assert [c.index for c in searcher.ranked()] == [3, 0], "only those that were trained on every category can win"
    assert [searcher.expected_trials(name) for name in MASKS] == [4, 3, 3, 2]


def test_places_are_filled_without_running_ahead_of_a_rung() -> None:
    searcher = make(trials=3, limit=4)
    suggested: list[Any] = [searcher.suggest(f"t{at}") for at in range(4)]
    assert [(s["index"], s["category"]) for s in suggested[:3]] == [(0, "bolt"), (1, "bolt"), (2, "bolt")]
    assert suggested[3] is None, "what comes next depends on how these end"
    finish(searcher, "t1", 0.5)
    # between two rungs a configuration's categories run at once
    ahead: list[Any] = [searcher.suggest(f"u{at}") for at in range(3)]
    assert [(s["index"], s["category"]) for s in ahead[:2]] == [(1, "nut"), (1, "pin")]
    assert ahead[2] is None, "four places are taken"
    finish(searcher, "u1", 0.9)
    assert searcher.configurations[1].num_told == 1, "its second category is still running"
    finish(searcher, "u0", 0.7)
    assert searcher.configurations[1].num_told == 3
    assert searcher.suggest("v0")["category"] == "rod"  # type: ignore[index]
    assert not searcher.done


def test_failure_on_one_category_ends_the_configuration() -> None:
    searcher = make(trials=2)
    order = run(searcher, lambda index, category: "the loss became nan" if (index, category) == (0, "nut") else 0.5)
    assert order[:2] == [(0, "bolt"), (0, "nut")]
    assert states(searcher) == ["failed", "complete"]
    study = searcher._study.study(ALL)
    assert study.trials[0].state.name == "PRUNED" or study.trials[0].state.name == "FAIL"
    assert searcher._study.records(ALL)[0].failure == "nut: the loss became nan"
    assert searcher.records("nut")[0].state == "failed"


def test_same_masks_are_not_trained_on_twice() -> None:
    """With the ratio alone searched, and one mask, most ratios come to the same run."""
    searcher = make(trials=6, masks={"bolt": 1, "rod": 1}, space={RATIO: {"low": 0.0, "high": 1.0}})
    order = run(searcher, lambda index, category: 0.5)
    assert len(order) <= 4
    assert len(searcher.configurations) == 6
    assert searcher.done
    keys = [(record.category, record.trial_key) for record in searcher.records()]
    assert len(set(keys)) == len(keys)
    assert [searcher.expected_trials(name) for name in ("bolt", "rod")] == [len(order) // 2] * 2


def test_budget_of_runs_ends_the_search_once_those_under_way_have_ended() -> None:
    searcher = make(max_trials=6)
    order = run(searcher, lambda index, category: 0.5)
    assert [index for index, _ in order] == [0, 0, 0, 0, 1, 1]
    assert searcher.done
    assert states(searcher) == ["complete", "stopped"]
    ended = "search.max_trials=6 ended the search after 2 of 4 trials and stopped 1 that still ran"
    assert searcher.ended_by == ended
    assert searcher.notices[-1] == ended
    assert [c.index for c in searcher.ranked()] == [0]
    whole = make(trials=2, max_trials=100)
    run(whole, lambda index, category: 0.5)
    assert whole.ended_by is None


def test_budget_of_time_stops_what_is_under_way() -> None:
    searcher = make(limit=2)
    for name in ("t0", "t1"):
        assert isinstance(searcher.suggest(name), dict)
    searcher.on_trial_result("t0", {"epoch": 1})
    searcher.end("search.time_budget=2h")
    assert searcher.done
    assert [r.state for r in searcher.records()] == ["stopped", "stopped"]
    assert set(states(searcher)) == {"stopped"}
    assert searcher.suggest("late") == "FINISHED"
    with pytest.raises(SSNError, match=r"stopped\); raise the budget that ended the search"):
        select_shared(searcher, FinalistSettings(), {}, {})


def test_one_category_cannot_share() -> None:
    with pytest.raises(SSNError, match="there is only bolt; do without"):
        make(masks={"bolt": 4})


@pytest.mark.parametrize(
    ("search", "objective", "key"),
    [
        ({}, {"against": "labels"}, "objective.against"),
        ({}, {"max_masks": 4}, "objective.max_masks"),
        ({}, {"max_latency_ms": 9.0}, "objective.max_latency_ms"),
        ({"transfer": True}, {}, "search.transfer"),
    ],
)
def test_what_a_shared_search_cannot_weigh_is_refused(
    search: dict[str, bool], objective: dict[str, Any], key: str
) -> None:
    with pytest.raises(SSNError, match=f"{key} is .* with search.shared"):
        SweepSettings(search=SearchSettings(shared=True, **search), objective=ObjectiveSettings(**objective))


def test_categories_cannot_share_and_differ() -> None:
    search = SearchSettings(shared=True, categories={"bolt": {SIGMA: 0.1}})
    infos = {name: make_info(name) for name in ("bolt", "nut")}
    with pytest.raises(SSNError, match=r"but search\.categories\.bolt is given; leave one of the two out"):
        shared_space(SweepSettings(search=search), infos)


def test_user_is_told_of_the_ratio() -> None:
    infos = {name: make_info(name, masks=count) for name, count in MASKS.items()}
    assert shared_space(SweepSettings(), infos).notices == (
        f"one {RATIO} is searched for all categories; each takes the nearest that its masks allow",
        f"pin: the pool has no masks, so {RATIO} is taken as 0",
    )


# The winner.


def finals(searcher: SharedSearcher, outcomes: Any, settings: FinalistSettings) -> dict[str, Selection]:
    planned = plan_shared_finalists(searcher, settings)
    todo = [run for runs in planned.values() for run in runs]
    fixed = FixedRuns(todo, stage=FINALIST_STAGE, label=lambda run: run.label, tags=FinalistRun.tags)
    while isinstance(suggested := fixed.suggest(f"f{len(fixed.records())}"), dict):
        record = fixed.records()[-1]
        outcome = outcomes(int(suggested["tags"]["finalist_of"]), record.category)
        if isinstance(outcome, str):
            fixed.note_failure(record.trial_id, outcome)
            fixed.on_trial_complete(record.trial_id, None, error=True)
        else:
            fixed.on_trial_complete(record.trial_id, {"epoch": EPOCHS, "objective": outcome})
    return select_shared(searcher, settings, planned, {name: fixed.records(name) for name in MASKS})


def test_best_mean_over_categories_wins_for_all_of_them() -> None:
    searcher = make(trials=2, eta=9)
    run(searcher, lambda index, category: {0: 0.5, 1: 0.9 if category == "bolt" else 0.45}[index])
    chosen = finals(searcher, None, FinalistSettings(count=1))
    assert {selection.winner.trial.index for selection in chosen.values()} == {1}
    assert chosen["bolt"].winner.mean == 0.9
    assert chosen["nut"].winner.mean == 0.45
    assert chosen["bolt"].as_dict()["rule"].startswith("of one configuration for all categories, the mean over them")


def test_finalists_are_configurations_on_all_categories() -> None:
    searcher = make(trials=2, eta=9)
    run(searcher, lambda index, category: 0.5 + 0.1 * index)
    settings = FinalistSettings(count=2, seeds=3)
    chosen = finals(searcher, lambda index, category: {0: 0.6, 1: 0.3}[index], settings)
    assert {s.winner.trial.index for s in chosen.values()} == {0}
    assert {len(s.winner.runs) for s in chosen.values()} == {3}
    assert [f.trial.index for f in chosen["rod"].finalists] == [0, 1]


def test_configuration_with_a_failed_run_anywhere_is_out() -> None:
    searcher = make(trials=2, eta=9)
    run(searcher, lambda index, category: 0.5 + 0.1 * index)
    settings = FinalistSettings(count=2, seeds=2)
    chosen = finals(searcher, lambda index, category: "boom" if (index, category) == (1, "pin") else 0.6, settings)
    assert {s.winner.trial.index for s in chosen.values()} == {0}
    chosen = finals(searcher, lambda index, category: "boom" if category == "pin" else 0.6, settings)
    assert {(s.winner.trial.index, len(s.winner.runs)) for s in chosen.values()} == {(1, 1)}
    assert [notice for s in chosen.values() for notice in s.notices] == [
        "every finalist had a run that failed on some category, so the search's own runs decide"
    ]


def test_no_whole_configuration_is_explained() -> None:
    searcher = make(trials=2)
    run(searcher, lambda index, category: "the loss became nan" if category == "nut" else 0.5)
    with pytest.raises(
        SSNError, match=r"trained on all categories \(2 failed\); mend what failed \(the loss became nan"
    ):
        select_shared(searcher, FinalistSettings(), {}, {})


# What tuning by category buys.

JUDGED_BY = yardstick(ObjectiveSettings(), Config().eval)


def result(category: str, shared: float, verdict: Verdict | None = None) -> CategoryResult:
    record = TrialRecord("t", "k", category, 0, 0, EPOCHS, dict(BASE), {}, "complete", EPOCHS, {EPOCHS: shared})
    finalist = Finalist(record, (record,))
    return CategoryResult(category, [record], selection=Selection(finalist, (finalist,)), verdict=verdict)


def test_shared_models_stand_beside_champions_and_earlier_sweeps() -> None:
    champion = Incumbent("widgets.bolt", "2", "run", {"searched": "each category by itself"})
    also_shared = Incumbent("widgets.nut", "1", "run", {"searched": SHARED})
    tracker = MemoryTracker()
    by_sweep = {"s1": ("f", 0.7), "s2": ("f", 0.8), "s3": ("other data", 0.99), "s4": ("f", 0.99)}
    for sweep_id, (fingerprint, objective) in by_sweep.items():
        (parent,) = tracker.start_sweep(
            Sweep(sweep_id, "widgets", {"nut": {"search_fingerprint": fingerprint}})
        ).values()
        searched = SHARED if sweep_id == "s4" else "each category by itself"
        tags = {**JUDGED_BY, "searched": searched}
        tracker.log_summary(parent, metrics={"validation_objective": objective}, tags=tags)
    comparison = compare_with_tuned(
        [
            result("bolt", 0.6, compare_recorded("bolt", champion, 0.6, 0.75)),
            result("nut", 0.5, compare_recorded("nut", also_shared, 0.5, 0.9)),
            result("pin", 0.4),
        ],
        tracker.find_runs("widgets"),
        dataset="widgets",
        fingerprints=dict.fromkeys(("bolt", "nut", "pin"), "f"),
        judged_by=JUDGED_BY,
    )
    assert comparison.rows == [
        SharedRow("bolt", 0.6, 0.75, "widgets.bolt/2"),
        SharedRow("nut", 0.5, 0.8, "sweep s2"),
        SharedRow("pin", 0.4),
    ]
    assert comparison.as_dict()["mean_difference"] == pytest.approx((0.15 + 0.3) / 2)
    assert "| mean (n=2) | 0.550 | 0.775 | +0.225 | — |" in comparison.markdown()
    assert "| pin | 0.400 | — | — | — |" in comparison.markdown()


def test_rescored_champion_is_compared_on_what_both_were_scored_on() -> None:
    champion = Incumbent("widgets.bolt", "2", "run", {})
    rescored = compare_rescored("bolt", champion, Rescored(0.55, 0.65, 10, 2))
    comparison = compare_with_tuned(
        [result("bolt", 0.6, rescored)], [], dataset="widgets", fingerprints={"bolt": "f"}, judged_by=JUDGED_BY
    )
    assert comparison.rows == [SharedRow("bolt", 0.55, 0.65, "widgets.bolt/2")]


def test_nothing_to_compare_with_has_no_mean() -> None:
    comparison = SharedComparison("widgets", [SharedRow("bolt", 0.6)])
    assert comparison.means() is None
    assert comparison.as_dict()["mean_difference"] is None
    assert comparison.table().row_count == 1
