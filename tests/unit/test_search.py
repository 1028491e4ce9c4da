"""The search space, the multiplexing searcher and the winner rule; no Ray runtime."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from ssn.config import Config, flatten, trial_identity, unflatten
from ssn.data.sampling import attainable_ratios
from ssn.errors import SSNError
from tuning.champions.winner import TrialRecord, select_winner
from tuning.execution.weights import weights_key
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import (
    AttainableRatio,
    Axis,
    Choice,
    Condition,
    FloatRange,
    IntRange,
    order_axes,
    resolve_space,
    validate_space,
)
from tuning.settings import SearchSettings, SweepSettings

EPOCHS = 9
SIGMA, THRESHOLD, RATIO = "synthesis.noise_sigma", "synthesis.perlin_threshold", "train.supervision_ratio"
WEAK = "train.weak_labels"
WEIGHTS = {weights_key(Config().model): "weights"}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def base(**changes: Any) -> dict[str, Any]:
    return flatten(Config().resolved()) | {"train.epochs": EPOCHS} | changes


def category(name: str, space: dict[str, Axis] | None = None) -> CategorySearch:
    if space is None:
        space = {SIGMA: FloatRange(1e-3, 0.3, log=True), THRESHOLD: FloatRange(0.0, 0.7)}
    return CategorySearch(name, base(), space, f"data of {name}", WEIGHTS, 0)


def searcher(names: str = "abc", trials: int = 4, **options: Any) -> MultiplexSearcher:
    space = options.pop("space", None)
    return MultiplexSearcher(
        [category(n, space) for n in names], sweep_id="sweep", trials_per_category=trials, **options
    )


def complete(search: MultiplexSearcher, trial_id: str, objective: float) -> None:
    for epoch in (1, 3):
        search.on_trial_result(trial_id, {"epoch": epoch, "objective": objective / 2})
    search.on_trial_complete(trial_id, {"epoch": EPOCHS, "objective": objective, "duration_s": 2.0})


def only(search: MultiplexSearcher, category: str) -> optuna.trial.FrozenTrial:
    (trial,) = search.study(category).trials
    return trial


# The space.


SPACE = {SIGMA: FloatRange(1e-3, 0.3, log=True), THRESHOLD: FloatRange(0.0, 0.7), RATIO: AttainableRatio()}


def resolve(
    space: Any, num_masks: int, num_defective: int | None = None, **changes: Any
) -> tuple[dict[str, Axis], list[str]]:
    resolved = resolve_space(
        space,
        category="screw",
        base=base(**changes),
        attainable=attainable_ratios(num_masks),
        num_defective=num_masks if num_defective is None else num_defective,
    )
    return dict(resolved.axes), list(resolved.notices)


def test_ratio_is_a_choice_among_attainable_counts() -> None:
    axes, notices = resolve(SPACE, 4)
    assert axes == {
        SIGMA: FloatRange(1e-3, 0.3, log=True),
        THRESHOLD: FloatRange(0.0, 0.7),
        RATIO: Choice((0.0, 0.25, 0.5, 0.75, 1.0)),
    }
    assert notices == []


def test_ratio_is_fixed_with_a_notice_where_there_are_no_masks() -> None:
    axes, notices = resolve(SPACE, 0)
    assert set(axes) == {SIGMA, THRESHOLD}
    assert notices == ["screw: the pool has no masks, so train.supervision_ratio is fixed at 0"]


def test_ratio_cannot_be_demanded_where_there_are_no_masks() -> None:
    with pytest.raises(SSNError, match=r"^screw: train.supervision_ratio is 1.0, but its pool has no masks"):
        resolve(SPACE, 0, **{RATIO: 1.0})


def test_default_outside_of_the_space_is_refused() -> None:
    with pytest.raises(SSNError, match=r"^screw: the default synthesis.noise_sigma=0.015 is not in the search space"):
        resolve({SIGMA: FloatRange(0.1, 0.3)}, 0)


def test_attainable_range_without_any_count_is_refused() -> None:
    with pytest.raises(SSNError, match="none of the attainable ratios"):
        resolve({RATIO: AttainableRatio(0.3, 0.4)}, 2)


def test_nothing_searched_is_an_empty_space() -> None:
    assert resolve({}, 4) == ({}, [])


WEAK_AXIS = Choice(("drop", "use"))


@pytest.mark.parametrize(
    ("num_masks", "num_defective", "below"),
    [
        (4, 4, 0.875),  # from 3.5 masks on, all four are used
        (1, 1, 0.5),
        (4, 5, math.inf),  # an image without a mask is left in every trial
        (0, 5, math.inf),
    ],
)
def test_weak_labels_are_searched_where_an_image_is_left(num_masks: int, num_defective: int, below: float) -> None:
    axes, _ = resolve({WEAK: WEAK_AXIS, **SPACE}, num_masks, num_defective)
    when = () if math.isinf(below) else (Condition(RATIO, "<", (below,)),)
    assert axes[WEAK] == Choice(("drop", "use"), when)
    assert list(axes)[-1] == WEAK, "after the ratio that it depends on"


@pytest.mark.parametrize(
    ("space", "num_masks", "changes", "notice"),
    [
        ({}, 0, {}, "the pool has no defective images"),
        ({}, 3, {RATIO: 1.0}, "every image of the pool is used with its mask"),
        ({RATIO: AttainableRatio(1.0, 1.0)}, 3, {RATIO: 1.0}, "every image of the pool is used with its mask"),
    ],
)
def test_weak_labels_are_not_searched_where_none_are_ever_left(
    space: dict[str, Any], num_masks: int, changes: dict[str, Any], notice: str
) -> None:
    axes, notices = resolve({WEAK: WEAK_AXIS, **space}, num_masks, **changes)
    assert WEAK not in axes
    assert notices == [f"screw: {notice}, so train.weak_labels is not searched"]


@pytest.mark.parametrize(
    ("num_masks", "num_defective", "changes", "notices"),
    [
        (0, 0, {WEAK: "use"}, ["screw: the pool has no defective images, so train.weak_labels=use adds none"]),
        (0, 2, {WEAK: "use"}, []),
        (0, 2, {RATIO: 0.5}, ["screw: the pool has no masks, so train.supervision_ratio is taken as 0"]),
        (2, 2, {RATIO: 0.5, WEAK: "use"}, []),
    ],
)
def test_settings_that_have_nothing_to_act_on_are_noticed(
    num_masks: int, num_defective: int, changes: dict[str, Any], notices: list[str]
) -> None:
    assert resolve({SIGMA: SPACE[SIGMA]}, num_masks, num_defective, **changes)[1] == notices


def test_weak_labels_are_searched_when_asked_for() -> None:
    assert WEAK not in SweepSettings().space()
    space = SweepSettings(search=SearchSettings(space={WEAK: ["drop", "use"], RATIO: "attainable"})).space()
    assert space[WEAK] == WEAK_AXIS
    assert order_axes(space) == [RATIO, WEAK]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "it is empty"),
        ({"synthesis.noise_sgima": FloatRange(0.1, 0.2)}, "did you mean synthesis.noise_sigma"),
        ({THRESHOLD: FloatRange(0.0, 1.2)}, r"synthesis.perlin_threshold is 1.2, but must be in \[0, 1\)"),
        ({SIGMA: FloatRange(0.0, 0.3)}, "synthesis.noise_sigma is 0.0, but must be in"),
        ({SIGMA: FloatRange(0.3, 0.1)}, "low must be less than high"),
        ({SIGMA: FloatRange(0.1, math.inf)}, "low must be less than high"),
        ({THRESHOLD: FloatRange(0.0, 0.7, log=True)}, "a log scale needs it to be positive"),
        ({"train.batch_size": FloatRange(1, 8)}, "not a continuous setting"),
        ({"train.epochs": IntRange(3, 9)}, "trials compare only with trials as long; give a list of values"),
        ({"train.batch_size": IntRange(9, 3)}, "low must be less than high"),
        ({"train.batch_size": IntRange(4, 9, step=0)}, "step is 0, but must be at least 1"),
        ({"train.batch_size": IntRange(4, 9, log=True, step=2)}, "step is 2, but must be at least 1, and 1 on a log"),
        ({SIGMA: IntRange(1, 3)}, "not a whole number"),
        ({"train.train_seed": Choice((0, 1))}, "the same for all trials"),
        ({"eval.aupro_fpr_limit": FloatRange(0.1, 0.3)}, "the same for all trials"),
        ({"train.lr_heads": Choice(("1e-4",))}, "must be of type float"),
        ({"train.batch_size": Choice((8, 16.5))}, "must be of type int"),
        ({"model.variant": Choice(("icpr", "cvpr"))}, "must be icpr or jims"),
        ({SIGMA: Choice(())}, "has no values"),
        ({SIGMA: Choice((0.1, 0.1))}, "names a value twice"),
        ({SIGMA: AttainableRatio()}, "cannot be 'attainable'"),
        ({RATIO: AttainableRatio(0.5, 2.0)}, "must lie within 0..1"),
    ],
)
def test_meaningless_spaces_are_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(SSNError, match=f"^search.space: .*{message}"):
        validate_space(space)


# Suggestions.


def test_first_trial_of_each_category_is_the_base_configuration() -> None:
    search = searcher()
    suggestions = [search.suggest(f"t{i}") for i in range(3)]
    assert [s["category"] for s in suggestions] == ["a", "b", "c"]
    for s in suggestions:
        assert s["index"] == 0
        assert s["config"] == base()
        assert s["trial_key"] == trial_identity(
            unflatten(base()), search_fingerprint=f"data of {s['category']}", weights_digest="weights", split_seed=0
        )


def test_all_values_lie_in_the_space_and_only_searched_keys_move() -> None:
    search = searcher("a", trials=30)
    for i in range(30):
        config = search.suggest(f"t{i}")["config"]
        assert 1e-3 <= config[SIGMA] <= 0.3
        assert 0 <= config[THRESHOLD] <= 0.7
        assert {k for k, v in config.items() if v != base()[k]} <= {SIGMA, THRESHOLD}
        complete(search, f"t{i}", config[SIGMA])


def test_budget_is_never_exceeded_and_served_round_robin() -> None:
    search = searcher("abc", trials=4)
    started = []
    while (suggestion := search.suggest(f"t{len(started)}")) != "FINISHED":
        started.append(suggestion["category"])
    assert started == ["a", "b", "c"] * 4
    assert search.suggest("late") == "FINISHED"


def test_what_was_served_last_is_served_first_where_features_do_not_fit() -> None:
    search = searcher("abc", trials=3, reuse_features=True)
    assert [search.suggest(f"t{i}")["category"] for i in range(9)] == list("abccbaabc")
    assert search.suggest("late") == "FINISHED"


def test_the_least_started_category_is_next_whatever_has_ended() -> None:
    search = searcher("ab", trials=3)
    assert [search.suggest("0")["category"], search.suggest("1")["category"]] == ["a", "b"]
    complete(search, "1", 0.5)
    assert [search.suggest("2")["category"], search.suggest("3")["category"]] == ["a", "b"]


def test_concurrency_limit_counts_running_trials() -> None:
    search = searcher()
    assert search.set_max_concurrency(2)
    assert search.suggest("0") is not None
    assert search.suggest("1") is not None
    assert search.suggest("2") is None
    search.on_trial_complete("0", error=True)
    assert search.suggest("3") is not None
    assert search.suggest("4") is None


def test_suggestions_depend_on_the_seed_and_the_category_alone() -> None:
    def sigmas(names: str, **options: Any) -> dict[str, list[float]]:
        search = searcher(names, trials=6, **options)
        found: dict[str, list[float]] = {n: [] for n in names}
        i = 0
        while (s := search.suggest(f"t{i}")) != "FINISHED":
            found[s["category"]].append(s["config"][SIGMA])
            complete(search, f"t{i}", -abs(math.log(s["config"][SIGMA] / 0.02)))
            i += 1
        return found

    together, alone = sigmas("ab"), sigmas("b")
    assert together["b"] == alone["b"]
    assert together["a"][1:] != together["b"][1:]
    assert sigmas("b", search_seed=1)["b"][1:] != alone["b"][1:]


def test_search_beats_its_first_random_trials() -> None:
    search = searcher("a", trials=40)
    values = []
    for i in range(40):
        s = search.suggest(f"t{i}")
        values.append(-abs(math.log(s["config"][SIGMA] / 0.05)))
        complete(search, f"t{i}", values[-1])
    assert sum(values[-15:]) / 15 > sum(values[1:11]) / 10


def test_ordered_choices_are_searched_as_positions_and_given_as_values() -> None:
    space: dict[str, Axis] = {
        RATIO: Choice((0.0, 0.25, 0.5, 1.0)),
        "model.variant": Choice(("icpr", "jims")),
        "data.image_size": Choice(((256, 256), (128, 128))),
    }
    search = searcher("a", trials=8, space=space)
    configs = [search.suggest(f"t{i}")["config"] for i in range(8)]
    assert configs[0] == base()
    for config in configs:
        assert config[RATIO] in (0.0, 0.25, 0.5, 1.0)
        assert config["data.image_size"] in ([256, 256], [128, 128])
        unflatten(config)
    assert isinstance(
        search.study("a").trials[0].distributions[f"{RATIO}[index]"], optuna.distributions.IntDistribution
    )
    assert len({tuple(map(str, c.values())) for c in configs}) == 8


@pytest.mark.parametrize("weak", ["drop", "use"])
def test_weak_labels_are_suggested_only_where_the_ratio_leaves_an_image(weak: str) -> None:
    """Elsewhere the base's value stands, so that no two trials differ in a setting that does nothing."""
    start = base(**{WEAK: weak, RATIO: 1.0})
    space, _ = resolve({RATIO: AttainableRatio(), WEAK: WEAK_AXIS}, 3, **{WEAK: weak, RATIO: 1.0})
    search = MultiplexSearcher(
        [CategorySearch("a", start, space, "data", WEIGHTS, 0)], sweep_id="sweep", trials_per_category=20
    )
    tried = []
    while (s := search.suggest(f"t{len(tried)}")) != "FINISHED":
        tried.append((s["config"][RATIO], s["config"][WEAK]))
        complete(search, f"t{len(tried) - 1}", s["config"][RATIO] + (s["config"][WEAK] == "use") / 10)
    assert tried[0] == (1.0, weak), "the base configuration comes first"
    assert sorted(tried) == sorted([(1.0, weak), *((r, w) for r in (0.0, 1 / 3, 2 / 3) for w in ("drop", "use"))])
    for trial in search.study("a").trials:
        left = trial.params[f"{RATIO}[index]"] < 3
        assert (f"{WEAK}[index]" in trial.params) == left
        assert set(trial.user_attrs["params"]) == ({RATIO, WEAK} if left else {RATIO})


def test_conditional_trial_that_runs_again_keeps_its_settings() -> None:
    space, _ = resolve({RATIO: AttainableRatio(), WEAK: WEAK_AXIS}, 2)
    search = searcher("a", trials=5, space=space)
    configs = {f"t{i}": search.suggest(f"t{i}")["config"] for i in range(5)}
    assert len({(c[RATIO], c[WEAK]) for c in configs.values()}) == 5
    for trial_id, config in configs.items():
        search.on_trial_complete(trial_id, error=True)
        search.on_trial_result(trial_id, {"epoch": 1})
        again = search.study("a").trials[next(r.number for r in search.records("a") if r.trial_id == trial_id)]
        assert again.user_attrs["trial_key"] == search.records("a")[int(trial_id[1:])].trial_key
        assert space[RATIO].values[again.params[f"{RATIO}[index]"]] == config[RATIO]  # type: ignore[union-attr]
        if config[RATIO] < 1:
            assert WEAK_AXIS.values[again.params[f"{WEAK}[index]"]] == config[WEAK]


# How trials end.


def test_full_budget_is_complete() -> None:
    search = searcher("a")
    search.suggest("t")
    complete(search, "t", 0.8)
    trial = only(search, "a")
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.8)
    assert trial.intermediate_values == {1: 0.4, 3: 0.4, EPOCHS: 0.8}
    (record,) = search.records("a")
    assert (record.state, record.objective, record.duration_s) == ("complete", 0.8, 2.0)


def test_stopped_early_is_pruned_with_values_by_epoch() -> None:
    search = searcher("a")
    search.suggest("t")
    search.on_trial_result("t", {"epoch": 1, "objective": 0.3})
    search.on_trial_result("t", {"epoch": 2, "training_iteration": 7})
    search.on_trial_complete("t", {"epoch": 3, "training_iteration": 8, "objective": 0.4})
    trial = only(search, "a")
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {1: 0.3, 3: 0.4}
    assert search.records("a")[0].state == "pruned"


def test_error_is_fail() -> None:
    search = searcher("a")
    search.suggest("t")
    search.on_trial_result("t", {"epoch": 1, "objective": 0.3})
    search.on_trial_complete("t", error=True)
    assert only(search, "a").state == TrialState.FAIL
    assert search.records("a")[0].state == "failed"
    assert search.suggest("u")["index"] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("epoch", [3, EPOCHS])
def test_objective_that_is_no_number_fails_but_teaches_the_sampler(bad: float, epoch: int) -> None:
    search = searcher("a")
    search.suggest("t")
    search.on_trial_complete("t", {"epoch": epoch, "objective": bad})
    (record,) = search.records("a")
    assert record.state == "failed"
    assert record.failure == f"its objective was {bad} at epoch {epoch}"
    assert only(search, "a").state == TrialState.PRUNED
    assert math.isnan(only(search, "a").intermediate_values[epoch])


@pytest.mark.parametrize(
    ("result", "failure"),
    [
        ({"epoch": EPOCHS}, "it reported no objective at its last epoch"),
        ({"training_iteration": 1}, "it ended without reporting an epoch"),
        (None, "it ended without reporting an epoch"),
    ],
)
def test_ends_without_an_objective_fail(result: dict[str, Any] | None, failure: str) -> None:
    search = searcher("a")
    search.suggest("t")
    search.on_trial_complete("t", result)
    assert only(search, "a").state == TrialState.FAIL
    assert search.records("a")[0].failure == failure


def test_early_objective_is_not_taken_for_the_last() -> None:
    search = searcher("a")
    search.suggest("t")
    search.on_trial_result("t", {"epoch": 3, "objective": 0.9})
    search.on_trial_complete("t", {"epoch": EPOCHS})
    assert search.records("a")[0].state == "failed"


# Duplicates.


def test_duplicates_are_answered_without_a_run_and_end_the_category() -> None:
    search = searcher("ab", trials=5, space={THRESHOLD: Choice((0.2, 0.4, 0.6))})
    values = {0.2: 0.5, 0.4: 0.7, 0.6: 0.6}
    keys = []
    i = 0
    while (s := search.suggest(f"t{i}")) != "FINISHED":
        keys.append((s["category"], s["trial_key"]))
        complete(search, f"t{i}", values[s["config"][THRESHOLD]])
        i += 1
    assert len(keys) == len(set(keys)) == 6
    assert search.expected_trials("a") == 3
    assert search.done
    assert len(search.notices) == 2
    assert search.notices[0].startswith("a: ended after 3 of 5 trials")
    repeated = [t for t in search.study("a").trials if "duplicate_of" in t.user_attrs]
    assert len(repeated) >= 50
    for t in repeated:
        original = search.study("a").trials[t.user_attrs["duplicate_of"]]
        assert t.user_attrs["trial_key"] == original.user_attrs["trial_key"]
        assert (t.state, t.value, t.intermediate_values) == (
            original.state,
            original.value,
            original.intermediate_values,
        )


def test_same_settings_in_two_categories_are_no_duplicates() -> None:
    search = searcher("ab", trials=1)
    assert search.suggest("0")["trial_key"] != search.suggest("1")["trial_key"]


def test_nothing_to_search_is_one_trial() -> None:
    search = searcher("a", trials=3, space={})
    assert search.suggest("0")["config"] == base()
    assert search.suggest("1") == "FINISHED"


# Trials that run again.


def test_failed_trial_that_runs_again_counts_once_and_gets_a_new_number() -> None:
    search = searcher("a", trials=2)
    config = search.suggest("t")["config"]
    search.on_trial_complete("t", error=True)
    search.on_trial_result("t", {"epoch": 5})
    search.on_trial_complete("t", {"epoch": EPOCHS, "objective": 0.6})
    assert [t.state for t in search.study("a").trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert search.study("a").trials[1].params[SIGMA] == config[SIGMA]
    (record,) = search.records("a")
    assert (record.state, record.number, record.failure) == ("complete", 1, None)
    assert search.suggest("u")["index"] == 1
    assert search.suggest("v") == "FINISHED"


def test_trial_that_reports_its_failure_has_failed_with_its_reason() -> None:
    search = searcher("a")
    search.suggest("t")
    search.on_trial_result("t", {"epoch": 1, "objective": 0.3, "val_loss": 2.0})
    search.on_trial_result("t", {"failure": "the training loss became nan"})
    search.on_trial_complete("t", {"failure": "the training loss became nan"})
    (record,) = search.records("a")
    assert (record.state, record.failure) == ("failed", "the training loss became nan")
    assert (record.epoch, record.metrics["val_loss"]) == (1, 2.0)
    assert only(search, "a").state == TrialState.FAIL


@pytest.mark.parametrize(
    ("names", "trials", "message"),
    [("", 1, "no category"), ("aa", 1, "named twice"), ("a", 0, "trials per category is 0")],
)
def test_impossible_searches_are_refused(names: str, trials: int, message: str) -> None:
    with pytest.raises(SSNError, match=message):
        searcher(names, trials=trials)


# The winner.


def record(index: int, state: Any = "complete", objective: float = 0.5, **metrics: Any) -> TrialRecord:
    epoch = EPOCHS if state == "complete" else 3
    return TrialRecord(
        trial_id=f"t{index}",
        trial_key=f"k{index}",
        category="screw",
        index=index,
        number=index,
        max_epochs=EPOCHS,
        config={},
        params={},
        state=state,
        epoch=epoch,
        objectives={epoch: objective},
        metrics=metrics,
    )


def test_highest_objective_at_full_budget_wins() -> None:
    trials = [record(0, objective=0.5), record(1, "pruned", 0.9), record(2, objective=0.7), record(3, "failed", 0.8)]
    assert select_winner(trials).index == 2


def test_last_epoch_counts_and_not_the_best() -> None:
    early = record(0, objective=0.6)
    early.objectives[3] = 0.99
    assert select_winner([early, record(1, objective=0.7)]).index == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"val_image_ap": 0.8}, {"val_image_ap": 0.9, "val_loss": 9.0}),
        ({"val_image_ap": 0.9, "val_loss": 0.5}, {"val_image_ap": 0.9, "val_loss": 0.4, "duration_s": 99.0}),
        ({"val_image_ap": 0.9, "duration_s": 8.0}, {"val_image_ap": 0.9, "duration_s": 7.0}),
        ({}, {"val_image_ap": 0.1}),
        ({"val_loss": math.nan}, {"val_loss": 5.0}),
    ],
)
def test_ties_go_to_image_ap_then_loss_then_cost(first: dict[str, float], second: dict[str, float]) -> None:
    assert select_winner([record(0, **first), record(1, **second)]).index == 1
    assert select_winner([record(1, **second), record(0, **first)]).index == 1


def test_full_tie_does_not_depend_on_the_order() -> None:
    assert select_winner([record(3), record(1), record(2)]).index == 1


def test_no_winner_is_explained() -> None:
    failed = record(1, "failed")
    failed.failure = "it raised an error"
    with pytest.raises(
        SSNError, match=r"^screw: no winner, because no trial has finished its 9 epochs \(2 pruned, 1 fa"
    ):
        select_winner([record(0, "pruned"), failed, record(2, "pruned")])
    with pytest.raises(SSNError, match=r"trial 1: it raised an error"):
        select_winner([record(0, "pruned"), failed])
    with pytest.raises(SSNError, match=r"1 running\); let the sweep run to its end$"):
        select_winner([record(0, "running")])
    with pytest.raises(SSNError, match=r"raise the number of trials"):
        select_winner([record(0, "pruned")])
    with pytest.raises(SSNError, match=r"no trial was started"):
        select_winner([])
