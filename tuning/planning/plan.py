"""What a sweep would do and take, before it is started: trials, epochs, features, memory, hours and their price."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ssn.config import Config
from ssn.data.reader import CategoryInfo, SearchData
from tuning.budget import Budget, share_trials
from tuning.execution.capacity import Capacity, NodeShape, max_concurrent
from tuning.execution.feature_sizes import FeatureGroup, MapSizes, size_feature_groups
from tuning.search.costs import check_against
from tuning.search.feature_groups import FEATURE_KEYS, category_spaces, enumerate_configs
from tuning.search.rungs import Rungs
from tuning.search.space import CategorySpace, Choice, Follows, describe_axis
from tuning.settings import SweepSettings

if TYPE_CHECKING:
    from tuning.execution.train_worker import Placement
    from tuning.planning.calibrate import Calibration

NUM_SIMULATIONS = 200
OBJECT_STORE_SHARE = 0.3
"""Of a node's free memory, what Ray gives its object store unless told otherwise."""
MEMORY_MARGIN = 1.2
"""What is advised to be reserved, to what was measured: the allocator's fragments, and images larger than the few."""


@dataclass(frozen=True)
class Hours:
    """Expected with pruning, and at worst."""

    expected: float
    worst: float


@dataclass(frozen=True)
class CategoryPlan:
    """One category's part."""

    category: str
    trials: int
    """Of the search; of a shared one, its configurations."""
    finalist_runs: int
    """Further runs of the search's best, with other seeds."""
    epochs_expected: float
    """Over all trials, with pruning, for objectives whose ranks do not change from rung to rung; and of finalists."""
    epochs_worst: int
    """Nothing is pruned, and every trial and finalist has the largest number of epochs."""
    space: Mapping[str, str]
    """Dotted key -> axis, in words."""
    groups: Sequence[FeatureGroup]
    hours: Hours | None
    """Of one trial after the other; None: not measured."""

    @property
    def feature_bytes(self) -> int:
        """Of all groups together."""
        return sum(group.num_bytes for group in self.groups)


@dataclass(frozen=True)
class Packing:
    """How many trials measured memory lets run at once."""

    node_memory_bytes: float
    per_node: int
    """By memory alone, beside the features."""
    per_gpu: int | None
    """By the GPU's memory alone; None without one."""


@dataclass(frozen=True)
class SweepPlan:
    """What :func:`make_plan` finds."""

    dataset: str
    categories: Sequence[CategoryPlan]
    notices: Sequence[str]
    cluster: str
    """What it is reckoned for, in words."""
    num_nodes: int
    concurrency: int
    cpus_per_trial: float
    gpus_per_trial: float
    feature_budget_bytes: int
    budget: Budget
    calibration: Calibration | None
    packing: Packing | None
    price_per_hour: float | None

    @property
    def trials(self) -> int:
        return sum(category.trials for category in self.categories)

    @property
    def trial_hours(self) -> Hours | None:
        """Of all trials, one after the other."""
        hours = [category.hours for category in self.categories]
        if any(each is None for each in hours):
            return None
        return Hours(*(sum(getattr(h, name) for h in hours) for name in ("expected", "worst")))

    @property
    def wall_hours(self) -> Hours | None:
        """Until the search ends, if all places are always taken; at most the time budget."""
        if self.trial_hours is None:
            return None
        limit = math.inf if self.budget.time_s is None else self.budget.time_s / 3600
        if self.budget.max_gpu_hours is not None and self.gpus_per_trial:
            limit = min(limit, self.budget.max_gpu_hours / (self.gpus_per_trial * self.concurrency))
        return Hours(*(min(limit, h / self.concurrency) for h in (self.trial_hours.expected, self.trial_hours.worst)))

    def held_hours(self, per_trial: float) -> Hours | None:
        """Core- or GPU-hours of the search, where a trial holds so many."""
        if self.wall_hours is None:
            return None
        held = per_trial * self.concurrency
        return Hours(held * self.wall_hours.expected, held * self.wall_hours.worst)

    @property
    def cost(self) -> Hours | None:
        """In the price's currency; None: no price, or no durations."""
        if self.price_per_hour is None or self.wall_hours is None:
            return None
        rate = self.price_per_hour * self.num_nodes
        return Hours(rate * self.wall_hours.expected, rate * self.wall_hours.worst)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``; None where something is not known."""
        calibration = self.calibration
        return {
            "dataset": self.dataset,
            "cluster": self.cluster,
            "num_nodes": self.num_nodes,
            "concurrency": self.concurrency,
            "trials": self.trials,
            "epochs": {
                "expected": sum(c.epochs_expected for c in self.categories),
                "worst": sum(c.epochs_worst for c in self.categories),
            },
            "feature_bytes": sum(c.feature_bytes for c in self.categories),
            "feature_budget_bytes": self.feature_budget_bytes,
            "budget": asdict(self.budget),
            "wall_hours": _as_dict(self.wall_hours),
            "core_hours": _as_dict(self.held_hours(self.cpus_per_trial)),
            "gpu_hours": _as_dict(self.held_hours(self.gpus_per_trial)),
            "price_per_hour": self.price_per_hour,
            "cost": _as_dict(self.cost),
            "packing": _as_dict(self.packing),
            "calibration": None
            if calibration is None
            else {
                **{k: v for k, v in vars(calibration).items() if k != "timings"},
                "timings": [
                    {"backbone": backbone, "layers": list(layers), "image_size": list(size), **asdict(timing)}
                    for (backbone, layers, size), timing in calibration.timings.items()
                ],
            },
            "notices": list(self.notices),
            "categories": {
                c.category: {
                    "trials": c.trials,
                    "finalist_runs": c.finalist_runs,
                    "epochs": {"expected": c.epochs_expected, "worst": c.epochs_worst},
                    "space": dict(c.space),
                    "feature_bytes": c.feature_bytes,
                    "groups": [{k: v for k, v in vars(group).items() if k != "config"} for group in c.groups],
                    "trial_hours": _as_dict(c.hours),
                }
                for c in self.categories
            },
        }


def plan(
    settings: SweepSettings,
    *,
    dataset: str,
    data_uri: str,
    categories: Sequence[str] | None,
    calibrate: bool,
    price_per_hour: float | None,
) -> SweepPlan:
    """Plan a sweep for the cluster that ``RAY_ADDRESS`` names, or for this machine.

    Args:
        settings: As the sweep would have them.
        dataset: Name under which the data was ingested.
        data_uri: Where.
        categories: None: all that are there.
        calibrate: Whether to measure, on the first category, where a trial would run.
        price_per_hour: Of one node.

    Raises:
        SSNError: what would stop the sweep before it starts, but for weights that cannot be fetched.
    """
    from tuning.execution.objective import check_objective, check_protocol
    from tuning.planning.calibrate import calibrate as run_calibration
    from tuning.sweep import check_budget, check_overrides, open_categories, place

    data = open_categories(data_uri, dataset, categories)
    for each in data.values():
        check_protocol(each.info)
        check_objective(settings.objective, each.info)
    check_overrides(settings, data_uri, dataset)
    spaces = category_spaces(settings, {name: each.info for name, each in data.items()})
    check_against(settings.objective, {key for space in spaces.values() for key in space.axes})
    capacity, feature_budget_bytes = look_around()
    placement = place(settings, capacity)
    check_budget(settings, placement)
    device = "cuda" if placement.use_gpu else "cpu"
    calibration = None
    if calibrate:
        first = next(iter(data.values()))
        configs = [config for space in spaces.values() for config in enumerate_configs(space, FEATURE_KEYS)]
        if "RAY_ADDRESS" in os.environ:
            import ray

            remote: Any = ray.remote(run_calibration)  # type: ignore[arg-type]
            placed = remote.options(num_cpus=placement.cpus, num_gpus=placement.gpus)
            calibration = ray.get(placed.remote(configs, first, device=device, cpus=placement.cpus))
        else:
            calibration = run_calibration(configs, first, device=device, cpus=placement.cpus)
    return make_plan(
        settings,
        data,
        capacity=capacity,
        placement=placement,
        feature_budget_bytes=feature_budget_bytes,
        calibration=calibration,
        price_per_hour=price_per_hour,
    )


def look_around() -> tuple[Capacity, int]:
    """The cluster's capacity and its memory for features: as Ray says where there is one, else of this machine."""
    from tuning.execution.capacity import cluster_capacity
    from tuning.execution.tune_run import FEATURE_SHARE, feature_budget_bytes
    from tuning.sweep import connect_ray

    if "RAY_ADDRESS" in os.environ:
        connect_ray()
        return cluster_capacity(), feature_budget_bytes()
    import psutil
    import torch

    from ssn.streaming import default_budget_bytes

    memory = 2 * default_budget_bytes()
    resources = {
        "CPU": float(len(os.sched_getaffinity(0))),
        "GPU": float(torch.cuda.device_count()),
        "memory": float(memory),
    }
    free = min(memory, psutil.virtual_memory().available)
    return Capacity((NodeShape(resources, 1),), "this machine"), int(FEATURE_SHARE * OBJECT_STORE_SHARE * free)


def make_plan(
    settings: SweepSettings,
    data: Mapping[str, SearchData],
    *,
    capacity: Capacity,
    placement: Placement,
    feature_budget_bytes: int,
    calibration: Calibration | None = None,
    price_per_hour: float | None = None,
) -> SweepPlan:
    """Reckon a sweep up.

    Args:
        settings: As the sweep would have them.
        data: By category; no image is read.
        capacity: Of the cluster.
        placement: Where trials run.
        feature_budget_bytes: Memory for features.
        calibration: Measured; None: hours are unknown.
        price_per_hour: Of one node.

    Raises:
        SSNError: a category cannot be searched so, or a backbone cannot be built.
    """
    measure = MapSizes()
    shared = settings.search.shared
    spaces = category_spaces(settings, {name: each.info for name, each in data.items()})
    shares = share_trials(len(data), settings.search.trials, None if shared else settings.search.max_trials)
    plans = [
        _plan_category(settings, data[name].info, spaces[name], step, share, measure, feature_budget_bytes, calibration)
        for step, (name, share) in enumerate(zip(data, shares, strict=True))
    ]
    trials = sum(p.trials for p in plans)
    fits = max_concurrent(capacity, num_workers=placement.num_workers, per_worker=placement.per_worker)
    concurrency = min(fits, settings.search.max_concurrent or fits, max(trials, 1))
    workers = max(1, placement.num_workers)
    nodes = capacity.nodes(placement.per_worker)
    found = SweepPlan(
        dataset=next(iter(data.values())).info.dataset,
        categories=plans,
        notices=(),
        cluster=capacity.describe(),
        num_nodes=len(nodes),
        concurrency=concurrency,
        cpus_per_trial=workers * placement.cpus,
        gpus_per_trial=placement.gpus_per_trial,
        feature_budget_bytes=feature_budget_bytes,
        budget=settings.budget(),
        calibration=calibration,
        packing=_pack(calibration, nodes, feature_budget_bytes),
        price_per_hour=price_per_hour,
    )
    spoken = dict.fromkeys(notice for space in spaces.values() for notice in space.notices)
    notices = [*spoken, *_notices(found)]
    return replace(found, notices=tuple(notices))


def expected_epochs(trials: int, max_epochs: int, rungs: Rungs) -> tuple[float, float]:
    """Epochs, and validations with pixel metrics, of trials as long as each other, one after the other.

    Successive halving is simulated on objectives in random order whose ranks stay the same from rung to rung.

    Args:
        trials: How many.
        max_epochs: Of each that is not stopped.
        rungs: When they are compared.
    """
    epochs, validations = 0, 0
    at = rungs.epochs(max_epochs)
    for simulation in range(NUM_SIMULATIONS):
        draw = random.Random(simulation)
        seen: dict[int, list[float]] = {rung: [] for rung in at}
        for _ in range(trials):
            objective, stopped_at = draw.random(), None
            for rung in at:
                validations += 1
                before = seen[rung]
                cutoff = _quantile(before, 1 - 1 / rungs.eta) if before else -math.inf
                before.append(objective)
                if objective < cutoff:
                    stopped_at = rung
                    break
            epochs += stopped_at or max_epochs
            validations += stopped_at is None
    return epochs / NUM_SIMULATIONS, validations / NUM_SIMULATIONS


@dataclass(frozen=True)
class _Work:
    """What a category's trials and finalists come to."""

    finalist_runs: int
    epochs: float
    epochs_worst: int
    validations: float
    """With pixel metrics."""
    validations_worst: int


def _reckon(settings: SweepSettings, category: str, trials: int, step: int) -> _Work:
    """The work of one category, which is the ``step``-th, from 0, that a shared search's configurations come to."""
    lengths, rungs, finalists = settings.epochs(category), settings.rungs(), settings.finalists
    most = 1 + max(len(rungs.epochs(length)) for length in lengths)
    mean_length = sum(lengths) / len(lengths)
    if settings.search.shared:
        over_categories = Rungs(1, settings.search.eta)
        before = expected_epochs(trials, step, over_categories)[0] if step else 0.0
        reached = expected_epochs(trials, step + 1, over_categories)[0] - before
        epochs, validations = reached * mean_length, reached * most
    else:
        shares = [trials // len(lengths) + (index < trials % len(lengths)) for index in range(len(lengths))]
        found = [expected_epochs(each, length, rungs) for each, length in zip(shares, lengths, strict=True)]
        epochs, validations = (sum(each[i] for each in found) for i in (0, 1))
    runs = 0 if finalists.count == 1 else min(finalists.count, trials) * (finalists.seeds - 1)
    return _Work(
        finalist_runs=runs,
        epochs=epochs + runs * mean_length,
        epochs_worst=(trials + runs) * lengths[-1],
        validations=validations + runs * most,
        validations_worst=(trials + runs) * most,
    )


def _plan_category(
    settings: SweepSettings,
    info: CategoryInfo,
    space: CategorySpace,
    step: int,
    share: int,
    measure: MapSizes,
    feature_budget_bytes: int,
    calibration: Calibration | None,
) -> CategoryPlan:
    trials = min(share, _count_configs(space, share))
    work = _reckon(settings, info.category, trials, step)
    groups = size_feature_groups(space, info, measure, budget_bytes=feature_budget_bytes)
    hours = None
    if calibration is not None:
        costs = [_costs(group, info, calibration) for group in groups]
        features_s = sum(features for features, _, _ in costs)
        epoch_s, pixel_s = (sum(c[i] for c in costs) / len(costs) for i in (1, 2))
        expected_s = features_s + work.epochs * epoch_s + work.validations * pixel_s
        worst_s = features_s + max(work.epochs_worst * e + work.validations_worst * p for _, e, p in costs)
        hours = Hours(expected_s / 3600, worst_s / 3600)
    return CategoryPlan(
        category=info.category,
        trials=trials,
        finalist_runs=work.finalist_runs,
        epochs_expected=work.epochs,
        epochs_worst=work.epochs_worst,
        space={key: describe_axis(axis) for key, axis in space.axes.items()},
        groups=groups,
        hours=hours,
    )


def _costs(group: FeatureGroup, info: CategoryInfo, calibration: Calibration) -> tuple[float, float, float]:
    """Seconds for the features, for an epoch, and for the pixel metrics of one validation."""
    from ssn.features import num_images, num_views
    from tuning.planning.calibrate import shape_of

    config = group.config
    timing = calibration.timings[shape_of(config)]
    scored, draws = num_images(config, info, "validation"), draws_in_epoch(config, info)
    streamed = group.source == "streamed"
    epoch_s = draws * timing.draw_s + scored * timing.validate_s + (draws + scored) * timing.feature_s * streamed
    return 0.0 if streamed else num_views(config, info) * timing.feature_s, epoch_s, scored * timing.pixel_s


def draws_in_epoch(config: Config, info: CategoryInfo) -> int:
    """Images of one training epoch; of the ratios that are searched, the base's."""
    from ssn.features import num_flips
    from tuning.benchmarking.plan import count_used

    normal, pool, train = info.counts["train"].normal, info.counts["pool"], config.train
    if train.sampling == "official":
        labels, _ = count_used(train, pool)
        return 2 * num_flips(config, "pool") * labels or normal
    return train.draws_per_epoch or max(normal, 8 * pool.masks)


def _count_configs(space: CategorySpace, enough: int) -> int:
    """Different trials that a space holds, as far as ``enough``."""
    if not all(isinstance(axis, Choice | Follows) for axis in space.axes.values()):
        return enough
    product = math.prod(len(axis.values) for axis in space.axes.values() if isinstance(axis, Choice))
    # conditions make fewer of them, never more
    return len(enumerate_configs(space, tuple(space.axes))) if product <= 100 * enough else enough


def _pack(
    calibration: Calibration | None, nodes: Sequence[Mapping[str, float]], feature_budget_bytes: int
) -> Packing | None:
    memory = min((float(node["memory"]) for node in nodes if "memory" in node), default=None)
    if calibration is None or memory is None:
        return None
    free = memory - feature_budget_bytes / len(nodes)
    per_gpu = calibration.gpu_memory_bytes // calibration.peak_gpu_bytes if calibration.peak_gpu_bytes else None
    return Packing(memory, max(0, math.floor(free / calibration.peak_memory_bytes)), per_gpu)


def _notices(found: SweepPlan) -> list[str]:
    notices = []
    limit = found.budget.max_trials
    if limit is not None and limit < found.trials:
        notices.append(f"search.max_trials={limit} is expected to end this shared search before that")
    idle = [c.category for c in found.categories if c.trials == 0]
    if idle:
        notices.append(f"search.max_trials={found.budget.max_trials} leaves no trial to {', '.join(idle)}")
    needed = sum(c.feature_bytes for c in found.categories)
    if needed > found.feature_budget_bytes:
        notices.append(
            "not all features fit into their memory at once: those that were not used for longest are dropped, and "
            "computed again when a trial wants them"
        )
    hours = found.trial_hours
    if hours is not None and found.wall_hours is not None:
        reached = found.wall_hours.expected * found.concurrency / hours.expected
        if reached < 1:
            notices.append(f"a budget is expected to end the search after about {reached:.0%} of its work")
    if found.packing is not None and found.calibration is not None:
        per_node = math.ceil(found.concurrency / found.num_nodes)
        advised_gb = math.ceil(MEMORY_MARGIN * found.calibration.peak_memory_bytes / 1e8) / 10
        if found.packing.per_node < per_node:
            notices.append(
                f"{per_node} trials at once on a node take more memory than it has beside the features; reserve it "
                f"(--set resources.memory_gb_per_worker={advised_gb}), so that Ray starts fewer"
            )
        if found.packing.per_gpu is not None and found.packing.per_gpu > 1 and found.gpus_per_trial >= 1:
            share = round(1 / found.packing.per_gpu, 3)
            notices.append(
                f"a GPU's memory holds {found.packing.per_gpu} trials; to let them share it, "
                f"--set resources.gpus_per_worker={share}"
            )
    return notices


def _quantile(values: Sequence[float], q: float) -> float:
    """As numpy's: linear between neighbours."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _as_dict(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
