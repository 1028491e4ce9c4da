"""What a category tries before the sampler is asked, and what one category learns from others; no Ray runtime."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import pytest

from ssn.config import Config, ModelConfig, SynthesisConfig, TrainConfig, flatten, unflatten
from ssn.data.reader import CategoryInfo
from ssn.errors import SSNError
from tests.planted_features import plant_features
from tuning.champions.registry import ChampionOrigin, NoChampionError
from tuning.execution.weights import weights_key
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import Axis, CategorySpace, Choice, Condition, FloatRange, Follows, IntRange
from tuning.search.warm_start import (
    MAX_TRANSFERS,
    Start,
    Transfers,
    champion_start,
    max_transfers,
    plan_starts,
    project,
    read_transfers,
    transfer_is_due,
)
from tuning.tracking import RunRecord

EPOCHS = 9
SIGMA, THRESHOLD, RATIO = "synthesis.noise_sigma", "synthesis.perlin_threshold", "train.supervision_ratio"
WEAK = "train.weak_labels"
AXES: dict[str, Axis] = {
    SIGMA: FloatRange(1e-3, 0.3, log=True),
    THRESHOLD: FloatRange(0.0, 0.7),
    RATIO: Choice((0.0, 0.25, 0.5, 0.75, 1.0)),
    WEAK: Choice(("drop", "use"), when=(Condition(RATIO, "<", (0.875,)),)),
}
BASE = flatten(Config().resolved()) | {"train.epochs": EPOCHS}
SPACE = CategorySpace(BASE, AXES)
INFO: CategoryInfo = plant_features().info


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


# Fitting a configuration into a space.


@pytest.mark.parametrize(
    ("key", "value", "taken"),
    [
        (SIGMA, 0.02, 0.02),
        (SIGMA, 0.3, 0.3),
        (SIGMA, 0.31, None),
        (SIGMA, 1e-4, None),
        (RATIO, 0.5, 0.5),
        (RATIO, 4 / 9, 0.5),
        (RATIO, 1 / 9, 0.0),
        (WEAK, "use", "use"),
        (WEAK, "maybe", None),
    ],
)
def test_values_are_taken_as_the_space_allows(key: str, value: Any, taken: Any) -> None:
    found = project({key: value}, AXES, BASE)
    assert found.params == ({} if taken is None else {key: taken})
    assert found.outside == ({key: value} if taken is None else {})


def test_ratio_beyond_the_space_is_not_moved_to_its_bound() -> None:
    found = project({RATIO: 1.0}, {RATIO: Choice((0.0, 0.25, 0.5))}, BASE)
    assert (found.params, found.outside) == ({}, {RATIO: 1.0})


def test_axis_that_does_not_apply_is_left_alone() -> None:
    assert project({RATIO: 1.0, WEAK: "use"}, AXES, BASE).params == {RATIO: 1.0}
    assert project({RATIO: 0.5, WEAK: "use"}, AXES, BASE).params == {RATIO: 0.5, WEAK: "use"}


def test_lists_stay_lists() -> None:
    axes: dict[str, Axis] = {"data.image_size": Choice(((256, 256), (128, 128)))}
    assert project({"data.image_size": [128, 128]}, axes, BASE).params == {"data.image_size": [128, 128]}


def test_whole_numbers_and_settings_that_follow_others() -> None:
    axes: dict[str, Axis] = {
        "train.batch_size": IntRange(8, 32, step=8),
        "model.variant": Choice(("icpr", "jims")),
        "data.antialias": Follows("model.variant", (("icpr", False), ("jims", True))),
    }
    found = project({"train.batch_size": 16, "model.variant": "jims", "data.antialias": False}, axes, BASE)
    assert found.params == {"train.batch_size": 16, "model.variant": "jims", "data.antialias": True}
    assert project({"train.batch_size": 12}, axes, BASE).outside == {"train.batch_size": 12}


def test_projection_always_gives_a_configuration_of_the_space() -> None:
    """Whatever it is given, for many random configurations."""
    rng = random.Random(0)
    for _ in range(300):
        config = {
            SIGMA: 10 ** rng.uniform(-5, 1),
            THRESHOLD: rng.uniform(-0.5, 1.5),
            RATIO: rng.uniform(-0.5, 1.5),
            WEAK: rng.choice(("drop", "use", "other")),
        }
        found = project(config, AXES, BASE)
        unflatten({**BASE, **found.params})
        for key, value in found.params.items():
            assert value in AXES[key]
        assert not found.params.keys() & found.outside.keys()
        again = project(found.params, AXES, BASE)
        assert (again.params, again.outside) == (found.params, {})


# The champion.


def champion(config: Config, split_seed: str | None = "0") -> Callable[[], ChampionOrigin]:
    return lambda: ChampionOrigin(config, "run", "1", None, None, split_seed)


def test_champion_is_a_start() -> None:
    config = Config(synthesis=SynthesisConfig(noise_sigma=0.1), train=TrainConfig(epochs=EPOCHS, supervision_ratio=1.0))
    starts, notices = champion_start(champion(config), INFO, SPACE)
    assert starts == [Start({SIGMA: 0.1, THRESHOLD: 0.2, RATIO: 1.0}, "champion")]
    assert notices == []


def test_what_is_left_out_of_a_champion_is_said() -> None:
    config = Config(synthesis=SynthesisConfig(noise_sigma=0.5, perlin_threshold=0.6), train=TrainConfig(epochs=3))
    starts, notices = champion_start(champion(config), INFO, SPACE)
    assert starts == [Start({THRESHOLD: 0.6, RATIO: 0.0, WEAK: "drop"}, "champion")]
    assert notices == [
        "plate: of its champion, synthesis.noise_sigma=0.5 lies outside of the search space and is left out",
        "plate: of its champion, train.epochs=3 is not searched here; this sweep's setting stands",
    ]


def test_what_the_base_leaves_to_the_variant_is_no_difference() -> None:
    space = CategorySpace(flatten(Config(train=TrainConfig(epochs=EPOCHS))), AXES)
    assert space.base["data.antialias"] is None
    config = Config(model=ModelConfig(variant="jims"), train=TrainConfig(epochs=EPOCHS, supervision_ratio=1.0))
    starts, notices = champion_start(champion(config), INFO, space)
    assert starts[0].params[RATIO] == 1.0
    (notice,) = notices
    assert "model.variant=jims" in notice
    jims = CategorySpace(space.base, {**AXES, "model.variant": Choice(("icpr", "jims"))})
    assert champion_start(champion(config), INFO, jims)[1] == []


def test_champion_with_the_default_settings_is_no_start() -> None:
    assert champion_start(champion(Config(train=TrainConfig(epochs=EPOCHS))), INFO, SPACE) == ([], [])


def test_no_champion_is_nothing_to_speak_of_and_a_lost_one_is() -> None:
    def none() -> ChampionOrigin:
        raise NoChampionError("no champion")

    def lost() -> ChampionOrigin:
        raise SSNError("the champion has no configuration any more")

    assert champion_start(none, INFO, SPACE) == ([], [])
    assert champion_start(lost, INFO, SPACE) == (
        [],
        ["plate: not started from its champion: the champion has no configuration any more"],
    )


def test_champion_of_another_split_is_left_alone() -> None:
    config = Config(synthesis=SynthesisConfig(noise_sigma=0.1))
    starts, notices = champion_start(champion(config, split_seed="7"), INFO, SPACE)
    assert starts == []
    assert notices == ["plate: not started from its champion, which was tuned on another split (split_seed 7; here 0)"]


# What others found.


def transfers(groups: Mapping[str, list[tuple[float, float]]]) -> Transfers:
    """Groups of (sigma, objective), the default first."""
    found = Transfers()
    for group, trials in groups.items():
        for i, (sigma, objective) in enumerate(trials):
            found.note(group, {**BASE, SIGMA: sigma}, objective, is_default=i == 0)
    return found


def sigmas(ranked: list[dict[str, Any]]) -> list[float]:
    return [params[SIGMA] for params in ranked]


def test_best_of_each_group_by_wins_then_rank_then_trials() -> None:
    found = transfers(
        {
            "a": [(0.015, 0.5), (0.1, 0.6), (0.2, 0.55)],
            "b": [(0.015, 0.5), (0.1, 0.9), (0.05, 0.8)],
            "c": [(0.015, 0.5), (0.2, 0.7)],
            "d": [(0.015, 0.5), (0.05, 0.95), (0.03, 0.9)],
            "e": [(0.015, 0.5), (0.01, 0.6)],
        }
    )
    # 0.1 is best in two; 0.01 has rank 1; 0.05 and 0.2 have mean ranks 1.5, and 0.05 is the best of three, 0.2 of two
    assert sigmas(found.ranked(AXES, BASE)) == [0.1, 0.01, 0.05, 0.2]
    assert sigmas(found.ranked(AXES, BASE, besides="b")) == [0.1, 0.05, 0.01, 0.2]


def test_what_does_not_beat_the_default_is_not_carried() -> None:
    found = transfers({"a": [(0.015, 0.9), (0.1, 0.9), (0.2, 0.3)], "b": [(0.015, 0.5), (0.3, 0.4)]})
    assert found.ranked(AXES, BASE) == []


def test_scale_of_a_groups_objectives_does_not_matter() -> None:
    """A category in which everything is good has no louder voice than one in which little is."""
    rng = random.Random(1)
    seen = set()
    for _ in range(50):
        groups = {
            name: [(0.015, 0.2), *((rng.choice((0.02, 0.05, 0.1, 0.2)), rng.random()) for _ in range(6))]
            for name in "abcd"
        }
        scaled = {
            name: [(sigma, i + 10.0**-i * objective) for sigma, objective in trials]
            for i, (name, trials) in enumerate(groups.items())
        }
        order = sigmas(transfers(groups).ranked(AXES, BASE))
        assert sigmas(transfers(scaled).ranked(AXES, BASE)) == order
        seen.add(tuple(order))
    assert len(seen) > 10


@pytest.mark.parametrize("budget", range(1, 100))
def test_transfers_take_a_quarter_of_the_budget_at_most_and_come_late(budget: int) -> None:
    taken, at = 0, []
    for started in range(2, budget):
        if transfer_is_due(budget, started=started, transferred=taken):
            taken += 1
            at.append(started)
    assert taken == max_transfers(budget) <= min(MAX_TRANSFERS, budget / 4)
    assert all(started >= (i + 1) * budget / (taken + 1) for i, started in enumerate(at))


def earlier_runs() -> list[RunRecord]:
    """One earlier sweep over one category: its default, its best, one that was stopped, one that shines on test."""
    trials = [(0.015, 0.5, "COMPLETE"), (0.1, 0.8, "COMPLETE"), (0.2, 0.99, "PRUNED"), (0.05, 0.7, "COMPLETE")]
    common = {"sweep_id": "s0", "category": "bolt", "split_seed": "0"}
    runs = [RunRecord("parent", "s0", "bolt", None, "FINISHED", {}, {"objective": 1.0}, {**common, "stage": "sweep"})]
    for index, (sigma, objective, state) in enumerate(trials):
        params = {key: str(value) for key, value in {**BASE, SIGMA: sigma}.items()}
        metrics = {"objective": objective, "test_image_auroc": 1.0 if sigma == 0.05 else 0.0}
        tags = {**common, "stage": "search", "trial_index": str(index), "trial_state": state}
        runs.append(RunRecord(f"r{index}", f"k{index}", "bolt", "parent", "FINISHED", params, metrics, tags))
    return runs


def test_earlier_sweeps_count_by_validation_alone() -> None:
    found = read_transfers(earlier_runs(), {"bolt": 0})
    assert sigmas(found.ranked(AXES, BASE)) == [0.1], "not the pruned one, nor the one with the best test score"


def test_earlier_sweeps_of_another_split_or_backbone_do_not_count() -> None:
    assert read_transfers(earlier_runs(), {"bolt": 1}).ranked(AXES, BASE) == []
    assert read_transfers(earlier_runs(), {"nut": 1}).ranked(AXES, BASE) != []
    other = {**BASE, "model.backbone": "resnet18"}
    assert read_transfers(earlier_runs(), {"bolt": 0}).ranked(AXES, other) == []
    space = {**AXES, "model.backbone": Choice(("resnet18", BASE["model.backbone"]))}
    assert read_transfers(earlier_runs(), {"bolt": 0}).ranked(space, other) != []


def test_starts_are_the_champion_then_what_others_found_each_once() -> None:
    earlier = transfers({"s/b": [(0.015, 0.5), (0.1, 0.6)], "s/c": [(0.015, 0.5), (0.2, 0.6)]})
    config = Config(synthesis=SynthesisConfig(noise_sigma=0.1), train=TrainConfig(epochs=EPOCHS))

    def planned(budget: int, *, find: Any, earlier: Transfers | None) -> list[tuple[Any, ...]]:
        starts, notices = plan_starts(INFO, SPACE, trials_per_category=budget, find=find, earlier=earlier)
        assert notices == []
        return [(s.suggested_by, s.params[SIGMA]) for s in starts]

    found = champion(config)
    assert planned(16, find=found, earlier=earlier) == [("champion", 0.1), ("transfer", 0.2)]
    assert planned(16, find=None, earlier=earlier) == [("transfer", 0.1), ("transfer", 0.2)]
    assert planned(4, find=None, earlier=earlier) == [("transfer", 0.1)]
    assert planned(3, find=None, earlier=earlier) == []
    assert planned(16, find=found, earlier=None) == [("champion", 0.1)]


# In the searcher.


WEIGHTS = {weights_key(unflatten(BASE).model): "weights"}


def searcher(names: str, trials: int, *, starts: tuple[Start, ...] = (), **options: Any) -> MultiplexSearcher:
    axes = {SIGMA: AXES[SIGMA], THRESHOLD: AXES[THRESHOLD]}
    return MultiplexSearcher(
        [CategorySearch(n, BASE, axes, f"data of {n}", WEIGHTS, 0, starts) for n in names],
        sweep_id="sweep",
        trials_per_category=trials,
        **options,
    )


def drive(search: MultiplexSearcher, best: Mapping[str, float], first: int = 0) -> list[dict[str, Any]]:
    """Run every trial to its end; a category's objective peaks at its sigma."""
    suggestions: list[dict[str, Any]] = []
    while (s := search.suggest(f"t{first + len(suggestions)}")) != "FINISHED":
        objective = -abs(math.log(s["config"][SIGMA] / best[s["category"]]))
        search.on_trial_complete(f"t{first + len(suggestions)}", {"epoch": EPOCHS, "objective": objective})
        suggestions.append(s)
    return suggestions


def test_starts_come_after_the_base_in_their_order() -> None:
    starts = (Start({SIGMA: 0.1}, "champion"), Start({SIGMA: 0.2, THRESHOLD: 0.5}, "transfer"))
    found = drive(searcher("ab", 5, starts=starts), {"a": 0.05, "b": 0.05})
    for name in "ab":
        own = [s for s in found if s["category"] == name]
        assert [s["tags"]["suggested_by"] for s in own] == ["default", "champion", "transfer", "sampler", "sampler"]
        assert [s["config"] for s in own[:3]] == [
            BASE,
            {**BASE, SIGMA: 0.1},
            {**BASE, SIGMA: 0.2, THRESHOLD: 0.5},
        ]
        assert [s["index"] for s in own] == list(range(5))


def test_start_that_repeats_the_base_costs_no_trial() -> None:
    found = drive(searcher("a", 4, starts=(Start({SIGMA: BASE[SIGMA]}, "champion"),)), {"a": 0.05})
    assert [s["tags"]["suggested_by"] for s in found] == ["default", "sampler", "sampler", "sampler"]


def test_budget_ends_before_the_starts_do() -> None:
    found = drive(searcher("a", 2, starts=(Start({SIGMA: 0.1}, "champion"), Start({SIGMA: 0.2}, "transfer"))), {"a": 1})
    assert [s["tags"]["suggested_by"] for s in found] == ["default", "champion"]


@pytest.mark.parametrize("budget", [4, 8, 16, 20])
def test_categories_try_what_did_best_in_others(budget: int) -> None:
    search = searcher("abc", budget, transfer=True)
    found = drive(search, {"a": 0.05, "b": 0.05, "c": 0.05})
    for name in "abc":
        own = [s for s in found if s["category"] == name]
        carried = [s for s in own if s["tags"]["suggested_by"] == "transfer"]
        assert 1 <= len(carried) <= max_transfers(budget)
        elsewhere = {(s["config"][SIGMA], s["config"][THRESHOLD]) for s in found if s["category"] != name}
        assert {(s["config"][SIGMA], s["config"][THRESHOLD]) for s in carried} <= elsewhere
        assert len({s["trial_key"] for s in own}) == budget, "nothing is tried twice"


def test_nothing_is_carried_unless_asked_for() -> None:
    found = drive(searcher("abc", 16), {"a": 0.05, "b": 0.05, "c": 0.05})
    assert {s["tags"]["suggested_by"] for s in found} == {"default", "sampler"}


def test_starts_and_transfers_survive_a_resume() -> None:
    starts, best = (Start({SIGMA: 0.1}, "champion"),), {"a": 0.05, "b": 0.05}
    first = searcher("ab", 16, starts=starts, transfer=True)
    for i in range(3):
        s = first.suggest(f"t{i}")
        objective = -abs(math.log(s["config"][SIGMA] / best[s["category"]]))
        first.on_trial_complete(f"t{i}", {"epoch": EPOCHS, "objective": objective})
    second = searcher("ab", 16, starts=starts, transfer=True, earlier=first.records())
    found = drive(second, best, first=3)
    assert [s["tags"]["suggested_by"] for s in found if s["index"] < 2] == ["champion"]
    assert any(r.suggested_by == "transfer" for r in second.records())
    for name in "ab":
        origins = [r.suggested_by for r in sorted(second.records(name), key=lambda r: r.index)]
        assert origins[:2] == ["default", "champion"]
        assert origins.count("transfer") <= max_transfers(16)
        assert len({r.trial_key for r in second.records(name)}) == 16


def test_trial_that_runs_again_keeps_its_origin() -> None:
    search = searcher("a", 2, starts=(Start({SIGMA: 0.1}, "champion"),))
    search.suggest("t0")
    search.suggest("t1")
    search.on_trial_complete("t1", error=True)
    search.on_trial_complete("t1", {"epoch": EPOCHS, "objective": 0.5})
    assert search.records("a")[1].suggested_by == "champion"
    assert search.study("a").trials[-1].user_attrs["suggested_by"] == "champion"


def test_start_that_a_killed_driver_had_begun_is_begun_again() -> None:
    """Its record never reached the ledger, though that of a later trial did."""
    starts = (Start({SIGMA: 0.1}, "champion"),)
    first = searcher("a", 4, starts=starts)
    for name in ("t0", "lost", "t2"):
        first.suggest(name)
    kept = [r for r in first.records() if r.trial_id != "lost"]
    found = drive(searcher("a", 4, starts=starts, earlier=kept), {"a": 0.05})
    assert [(s["index"], s["tags"]["suggested_by"]) for s in found] == [
        (0, "default"),
        (2, "sampler"),
        (1, "champion"),
        (3, "sampler"),
    ]
    assert found[2]["config"][SIGMA] == 0.1
