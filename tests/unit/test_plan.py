"""Plans of sweeps: what they would do and take, by arithmetic; one calibration at a tiny shape."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from ssn.config import Config, flatten
from ssn.data.reader import SearchData, SplitCount, open_search_data
from ssn.data.records import SEARCH_SPLITS
from ssn.features import extract, prepare_backbone
from ssn.loader import load_config
from tests.made_up_benchmark import ONE_CORE, make_info
from tuning.execution.capacity import Capacity, NodeShape
from tuning.execution.feature_sizes import MapSizes
from tuning.execution.train_worker import Placement
from tuning.planning import plan as module
from tuning.planning.calibrate import Calibration, Timing, calibrate, shape_of
from tuning.planning.plan import SweepPlan, draws_in_epoch, expected_epochs, make_plan, plan
from tuning.planning.plan_text import plan_lines, plan_table
from tuning.search.rungs import Rungs
from tuning.search.scheduler import MultiplexScheduler
from tuning.settings import SweepSettings

GB = 10**9
TWO_CORES = Capacity((NodeShape({"CPU": 2.0, "memory": 16e9}, 1),), "this machine")
TIMING = Timing(feature_s=0.1, draw_s=0.5, validate_s=0.2, pixel_s=0.3)


def load(*sets: str, tiny: Config | None = None) -> SweepSettings:
    flat = {} if tiny is None else flatten(tiny)
    return load_config(
        SweepSettings, defaults=flat, sets=["search.trials=6", "train.epochs=9", "finalists.count=1", *sets]
    )


@pytest.fixture(autouse=True)
def map_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backbone is built: each layer halves the map, and has 100 channels."""

    def sizes(self: object, config: Config) -> list[tuple[int, tuple[int, int]]]:
        height, width = config.data.image_size
        return [(100, (height // 2**layer, width // 2**layer)) for layer in config.model.layers]

    monkeypatch.setattr(MapSizes, "__call__", sizes)


def planned(settings: SweepSettings, *infos: Any, **options: Any) -> SweepPlan:
    data = {info.category: SearchData(info, {}) for info in infos or (make_info("bolt"), make_info("nut", masks=0))}
    options = {
        "capacity": TWO_CORES,
        "placement": ONE_CORE,
        "feature_budget_bytes": 10 * GB,
    } | options
    return make_plan(settings, data, **options)


def measured(settings: SweepSettings, **changes: Any) -> Calibration:
    values: dict[str, Any] = {
        "category": "bolt",
        "timings": {shape_of(settings.config()): TIMING},
        "peak_memory_bytes": 2 * GB,
        "peak_gpu_bytes": 0,
        "gpu_memory_bytes": 0,
        "device": "cpu",
        "hardware": "an abacus",
        "duration_s": 65.0,
    }
    return Calibration(**(values | changes))


# Epochs.


@pytest.mark.parametrize(("trials", "epochs", "rungs"), [(1, 9, Rungs()), (16, 9, Rungs(1)), (40, 27, Rungs(2, 4))])
def test_expected_epochs_are_those_of_the_scheduler(
    trials: int, epochs: int, rungs: Rungs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NUM_SIMULATIONS", 20)
    total = 0
    for simulation in range(module.NUM_SIMULATIONS):
        draw, scheduler = random.Random(simulation), MultiplexScheduler(rungs)
        for index in range(trials):
            trial: Any = type("T", (), {})()
            trial.trial_id, trial.config = f"t{index}", {"category": "bolt", "config": {"train.epochs": epochs}}
            scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
            objective, ran = draw.random(), epochs
            for rung in rungs.epochs(epochs):
                answer = scheduler.on_trial_result(None, trial, {"epoch": rung, "objective": objective})  # type: ignore[arg-type]
                if answer == TrialScheduler.STOP:
                    ran = rung
                    break
            total += ran
    expected, validations = expected_epochs(trials, epochs, rungs)
    assert expected == pytest.approx(total / module.NUM_SIMULATIONS)
    assert trials <= validations <= trials * (1 + len(rungs.epochs(epochs)))


def test_without_rungs_nothing_is_saved() -> None:
    assert expected_epochs(5, 9, Rungs(9)) == (45, 5)
    assert expected_epochs(0, 9, Rungs()) == (0, 0)


def test_trials_and_epochs_of_each_category() -> None:
    found = planned(load("search.space.train.epochs=[3,9]"))
    assert [c.trials for c in found.categories] == [6, 6]
    for each in found.categories:
        assert each.epochs_worst == 6 * 9
        assert 3 * 3 * 0.4 < each.epochs_expected < 3 * 3 + 3 * 9
        assert each.hours is None
    found = planned(load("search.max_trials=7", "search.categories.nut.train.epochs=4"))
    assert [(c.trials, c.epochs_worst) for c in found.categories] == [(4, 36), (3, 12)]
    assert found.trials == 7


def test_finalists_count_with_all_their_epochs() -> None:
    without = planned(load()).categories[0]
    found = planned(load("finalists.count=3", "finalists.seeds=4")).categories[0]
    assert (without.finalist_runs, found.finalist_runs) == (0, 9)
    assert found.epochs_worst == without.epochs_worst + 9 * 9
    assert found.epochs_expected == pytest.approx(without.epochs_expected + 9 * 9)
    assert planned(load("search.trials=2", "finalists.count=3", "finalists.seeds=4")).categories[0].finalist_runs == 6


def test_configurations_of_a_shared_search_are_dropped_between_categories() -> None:
    infos = [make_info(name) for name in "abcd"]
    found = planned(load("search.shared=true", "search.trials=9"), *infos)
    reached = [category.epochs_expected / 9 for category in found.categories]
    assert reached[0] == 9
    assert reached[1] == reached[2] < 9, "rungs after one category and after three"
    assert reached[3] < reached[2]
    assert sum(reached) == pytest.approx(expected_epochs(9, 4, Rungs(1))[0])
    assert [category.epochs_worst for category in found.categories] == [81] * 4
    assert len([notice for notice in found.notices if "one train.supervision_ratio" in notice]) == 1
    limited = planned(load("search.shared=true", "search.max_trials=10"), *infos)
    assert "search.max_trials=10 is expected to end this shared search before that" in limited.notices


def test_a_category_without_a_trial_is_said() -> None:
    found = planned(load("search.max_trials=1"))
    assert "search.max_trials=1 leaves no trial to nut" in found.notices


def test_a_small_space_ends_early() -> None:
    off = [f"search.space.{key}=null" for key in ("synthesis.noise_sigma", "synthesis.perlin_threshold")]
    found = planned(load(*off, "search.space.train.weak_labels=[drop,use]"), make_info(masks=1))
    assert [c.trials for c in found.categories] == [3], "with no mask: drop or use; with it: nothing is left"


def test_what_is_searched_is_said_by_category_with_its_notices() -> None:
    found = planned(load("search.categories.bolt.train.lr_heads={low: 1e-4, high: 1e-3, log: true}"))
    bolt, nut = found.categories
    assert bolt.space["train.lr_heads"] == "0.0001 to 0.001, log"
    assert bolt.space["train.supervision_ratio"] == "9 values from 0 to 1"
    assert set(nut.space) == {"synthesis.noise_sigma", "synthesis.perlin_threshold"}
    assert "nut: the pool has no masks, so train.supervision_ratio is fixed at 0" in found.notices


# Features.


def test_every_value_that_changes_features_has_a_group_with_its_size() -> None:
    found = planned(
        load("search.space.model.layers=[[2,3],[1,2]]", "search.space.data.image_size={values: [64, 256]}"),
        make_info(masks=8),
    )
    (bolt,) = found.categories
    views = 20 + 8 * 4 + 10
    sizes = {}
    for group in bolt.groups:
        assert set(group.settings) == {"model.layers", "data.image_size"}
        layers, side = group.settings["model.layers"], group.settings["data.image_size"][0]
        maps = sum(100 * (side // 2**layer) ** 2 * 2 for layer in layers)
        assert group.num_bytes > views * maps
        assert group.source == "cached"
        sizes[layers[0], side] = group.num_bytes
    assert len(sizes) == 4
    assert sizes[1, 64] > sizes[2, 64]
    assert bolt.feature_bytes == sum(sizes.values())
    assert not [notice for notice in found.notices if "features" in notice]


def test_features_beyond_the_budget_are_said() -> None:
    one = planned(load(), make_info()).categories[0].feature_bytes
    found = planned(load(), feature_budget_bytes=one)
    assert [g.source for c in found.categories for g in c.groups] == ["cached", "cached"]
    assert any("not all features fit into their memory at once" in notice for notice in found.notices)
    (streamed,) = planned(load(), make_info(), feature_budget_bytes=one - 1).categories[0].groups
    assert streamed.source == "streamed"
    assert streamed.num_bytes >= (20 + 8 + 10) * 3 * 256 * 256 * 4


def test_weak_labels_make_a_group_only_where_images_lack_masks() -> None:
    settings = load("search.space.train.weak_labels=[drop,use]")
    groups = [len(c.groups) for c in planned(settings, make_info("a"), make_info("b", masks=2, defective=4)).categories]
    assert groups == [1, 2]


# Hours and cost.


def test_hours_are_of_draws_validations_and_features() -> None:
    settings = load("search.grace_epochs=9")
    info = make_info(masks=8)
    found = planned(settings, info, calibration=measured(settings), price_per_hour=3.0)
    (bolt,) = found.categories
    draws, scored, views = 8 * 8, 10, 20 + 8 * 4 + 10
    assert draws_in_epoch(settings.config(), info) == draws
    seconds = views * 0.1 + 6 * 9 * (draws * 0.5 + scored * 0.2) + 6 * scored * 0.3
    assert bolt.hours is not None
    assert (bolt.hours.expected, bolt.hours.worst) == pytest.approx((seconds / 3600, seconds / 3600))
    wall, cores, cost = found.wall_hours, found.held_hours(found.cpus_per_trial), found.cost
    assert wall is not None
    assert cores is not None
    assert cost is not None
    assert (found.concurrency, found.num_nodes) == (2, 1)
    assert wall.expected == pytest.approx(seconds / 3600 / 2)
    assert cores.expected == pytest.approx(seconds / 3600)
    assert cost.expected == pytest.approx(3 * seconds / 3600 / 2)


def test_streamed_trials_pay_for_the_backbone_in_every_step() -> None:
    settings = load("search.grace_epochs=9")
    (bolt,) = planned(settings, make_info(), calibration=measured(settings), feature_budget_bytes=1000).categories
    draws, scored = 64, 10
    seconds = 6 * 9 * (draws * 0.6 + scored * 0.3) + 6 * scored * 0.3
    assert bolt.hours is not None
    assert bolt.hours.expected == pytest.approx(seconds / 3600)


def test_pruning_makes_expected_less_than_worst() -> None:
    settings = load()
    found = planned(settings, calibration=measured(settings))
    assert found.trial_hours is not None
    assert found.trial_hours.expected < found.trial_hours.worst


@pytest.mark.parametrize(
    ("budget", "placement", "hours"),
    [
        ("search.time_budget=90s", ONE_CORE, 90 / 3600),
        ("search.max_gpu_hours=0.02", Placement(num_workers=0, use_gpu=True, cpus=1.0, gpus=0.5), 0.02 / (0.5 * 2)),
    ],
)
def test_a_budget_limits_hours_and_says_what_it_is_worth(budget: str, placement: Placement, hours: float) -> None:
    settings = load(budget)
    capacity = Capacity((NodeShape({"CPU": 2.0, "GPU": 1.0}, 1),), "this machine")
    found = planned(settings, calibration=measured(settings), placement=placement, capacity=capacity)
    assert found.wall_hours is not None
    assert found.wall_hours.worst == pytest.approx(hours)
    assert any("a budget is expected to end the search after about" in notice for notice in found.notices)


def test_official_epochs_are_of_the_images_used() -> None:
    info = make_info(masks=8)
    config = load("train.sampling=official", "train.supervision_ratio=0.5").config()
    assert draws_in_epoch(config, info) == 8 * 4
    unflipped = load("train.sampling=official", "train.supervision_ratio=0.5", "train.flip_defects=false").config()
    assert draws_in_epoch(unflipped, info) == 2 * 4
    assert draws_in_epoch(load("train.sampling=official").config(), info) == 20
    assert draws_in_epoch(load("train.draws_per_epoch=7").config(), info) == 7


def test_memory_decides_what_a_node_and_a_gpu_hold() -> None:
    settings = load()
    found = planned(settings, calibration=measured(settings), feature_budget_bytes=4 * GB)
    assert found.packing is not None
    assert (found.packing.per_node, found.packing.per_gpu) == (6, None)
    large = measured(settings, peak_memory_bytes=7 * GB)
    found = planned(settings, calibration=large, feature_budget_bytes=4 * GB)
    assert any("--set resources.memory_gb_per_worker=8.4" in notice for notice in found.notices)
    gpu = measured(settings, peak_gpu_bytes=3 * GB, gpu_memory_bytes=16 * GB)
    placement = Placement(num_workers=1, use_gpu=True, cpus=1.0, gpus=1.0)
    capacity = Capacity((NodeShape({"CPU": 8.0, "GPU": 2.0, "memory": 64e9}, 1),), "the cluster as it is")
    found = planned(settings, calibration=gpu, placement=placement, capacity=capacity)
    assert found.packing is not None
    assert found.packing.per_gpu == 5
    assert any(notice.endswith("--set resources.gpus_per_worker=0.2") for notice in found.notices)


# What a person reads.


def test_unknown_durations_are_said_to_be() -> None:
    found = planned(load())
    text = "\n".join(plan_lines(found))
    assert "durations: unknown; --calibrate measures them on one category" in text
    assert "memory of a trial: unknown; --calibrate measures it" in text
    assert "durations and cost: unknown" in "\n".join(plan_lines(replace(found, price_per_hour=1.0)))
    said = found.to_dict()
    assert (said["wall_hours"], said["cost"], said["calibration"]) == (None, None, None)


def test_a_plan_is_shown_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from ssn.console import print_whole, write_json

    settings = load("search.space.model.layers=[[2,3],[1,2]]", "search.time_budget=2h")
    timings = {shape_of(settings.config()): TIMING, ("wide_resnet50_2.tv_in1k", (1, 2), (256, 256)): TIMING}
    found = planned(settings, calibration=measured(settings, timings=timings), price_per_hour=0.5)
    print_whole(plan_table(found))
    table = capsys.readouterr().out
    assert "made_up: plan of a sweep on 2 CPU (this machine)" in table
    assert [line.split()[:2] for line in table.splitlines() if line.split()[:1] in (["bolt"], ["nut"], ["all"])] == [
        ["bolt", "6,"],
        ["nut", "6,"],
        ["all", "12,"],
    ]
    text = "\n".join(plan_lines(found))
    for words in (
        "searched in bolt:\n  synthesis.noise_sigma: 0.001 to 0.3, log\n",
        "features of bolt:\n  model.layers=[2, 3]: ",
        "at once: 2 trials of 1 CPU each, on 1 node",
        "budget: search.time_budget=2h",
        "memory of a trial: 2.0 GB at its peak, measured",
        "measured on bolt in 1 min 05 s, on an abacus:",
        "wide_resnet50_2.tv_in1k, layers [2, 3], 256 x 256, per image: features 100.0 ms, training 500.0 ms",
        "core-hours: ",
        "at 0.5 an hour for each of 1 node",
        "note: nut: the pool has no masks",
    ):
        assert words in text
    write_json(tmp_path / "plan.json", found.to_dict())
    read = json.loads((tmp_path / "plan.json").read_text())
    assert read["categories"]["bolt"]["groups"][0]["settings"] == {"model.layers": [2, 3]}
    assert read["calibration"]["timings"][1]["layers"] == [1, 2]


# Measuring.


def test_calibration_trains_at_the_real_shape_on_a_few_images(tiny_data: Path, tiny_config: Config) -> None:
    data = open_search_data(str(tiny_data), "tiny", "widget")
    other = replace(tiny_config, model=replace(tiny_config.model, layers=(2, 3)))
    found = calibrate([tiny_config, other, tiny_config], data, device="cpu", cpus=1.0)
    assert list(found.timings) == [shape_of(tiny_config), shape_of(other)]
    for timing in found.timings.values():
        assert min(timing.feature_s, timing.draw_s, timing.validate_s) > 0
        assert timing.pixel_s >= 0
    assert found.peak_memory_bytes > 10**8
    assert (found.category, found.device, found.peak_gpu_bytes) == ("widget", "cpu", 0)


def test_the_few_images_are_of_both_labels_and_counted(tiny_data: Path, tiny_config: Config) -> None:
    from tuning.planning.calibrate import NUM_IMAGES, _FewImages

    data = open_search_data(str(tiny_data), "tiny", "widget")
    few = _FewImages(data)
    assert few.info.counts["pool"] == SplitCount(0, NUM_IMAGES["pool"], NUM_IMAGES["pool"])
    validation = few.info.counts["validation"]
    assert validation.normal + validation.defective <= NUM_IMAGES["validation"]
    assert min(validation.normal, validation.defective) > 0
    for split in SEARCH_SPLITS:
        counts = few.info.counts[split]
        assert len(list(few.stream(split))) == counts.normal + counts.defective
    config = few.adapt(tiny_config)
    assert (config.train.draws_per_epoch, config.train.supervision_ratio) == (config.train.batch_size, 1.0)
    features = extract(config, few, prepare_backbone(config, few))
    assert len(features.pool.ids) == NUM_IMAGES["pool"]


def test_a_plan_of_real_shards(tiny_data: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # real map sizes
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = plan(
        load("train.epochs=2", "resources.use_gpu=false", tiny=tiny_config),
        dataset="tiny",
        data_uri=str(tiny_data),
        categories=None,
        calibrate=True,
        price_per_hour=1.0,
    )
    assert [c.category for c in found.categories] == ["gadget", "widget"]
    data = open_search_data(str(tiny_data), "tiny", "widget")
    features = extract(tiny_config, data, prepare_backbone(tiny_config, data))
    assert found.categories[1].feature_bytes == features.num_bytes
    assert found.cost is not None
    assert found.cost.expected > 0
    assert found.packing is not None
