"""Every setting of a sweep: a training run's sections, and how to search, judge and place trials.

Plain dataclasses, filled by ``ssn.loader`` from YAML files and ``--set`` options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ssn.config import Config, DataConfig, EvalConfig, ModelConfig, SynthesisConfig, TrainConfig, flatten
from ssn.errors import SSNError
from tuning.budget import Budget
from tuning.search.rungs import Rungs
from tuning.search.space import (
    EPOCHS_KEY,
    AttainableRatio,
    Axis,
    Choice,
    Fixed,
    Follows,
    check_combinations,
    validate_space,
)
from tuning.search.space_syntax import DEFAULT_SPACE, parse_space

Against = Literal["none", "labels", "latency"]
Pick = Literal["best", "knee"]
ObjectiveMetric = Literal["mean(image_auroc, pixel_ap)", "image_auroc", "image_ap", "pixel_ap", "aupro"]


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, and for how long."""

    trials: int = 16
    """Trials per category; the first is the configuration as it stands."""
    shared: bool = False
    """Whether one configuration is searched for all categories, by its mean objective; ``trials`` is then how many
    configurations are tried."""
    space: Mapping[str, object] = field(default_factory=lambda: dict(DEFAULT_SPACE))
    """What is searched: dotted config key -> axis, written as ``tuning.search.space_syntax`` says. A file or option
    that names one key changes that key and keeps the rest."""
    categories: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Category -> what differs from ``space`` there, key by key."""
    grace_epochs: int | None = None
    """Epochs that every trial gets before it may be stopped; None: its epochs / reduction factor squared, at least
    1."""
    eta: int = 3
    """Reduction factor: of the trials that reach a rung, about one in ``eta`` goes on. Only trials with the same
    ``train.epochs`` are compared at a rung."""
    seed: int = 0
    """Of the search; it draws suggestions, not weights or noise."""
    max_concurrent: int | None = None
    """Most trials at once; None: as many as the cluster holds."""
    warm_start: bool = True
    """Whether the second trial of a category is its registered champion's configuration, where there is one."""
    transfer: bool = False
    """Whether categories also try what did best in others, of this sweep and of earlier ones of the dataset: at most
    three trials of each category, and a quarter of its budget."""
    max_trials: int | None = None
    """Most trials of all categories together; None: ``trials`` of each."""
    time_budget: str | None = None
    """Of the search, such as ``2h`` or ``90m``: trials that still run are stopped then, and champions are chosen among
    the complete ones. A resumed sweep goes on with what is left of it."""
    max_gpu_hours: float | None = None
    """GPUs held times hours, over all trials; past it, as past the time budget."""
    storage: str | None = None
    """Optuna RDB URL of the studies, such as ``postgresql://...``, for Optuna's dashboard; None: a SQLite file in the
    sweep's folder, or none where that is an object store."""


@dataclass(frozen=True)
class FinalistSettings:
    """How the search's best are tried again before one of them becomes champion."""

    count: int = 3
    """Complete trials per category, best first, that are trained with more seeds; 1: the search's best wins as it
    is."""
    seeds: int = 3
    """Runs of each finalist, the search's own included; the others' ``train.train_seed`` and ``train.label_seed`` count
    up from the search's. 1: the search's best wins as it is."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a trial is judged by, on the validation split."""

    metric: ObjectiveMetric = "mean(image_auroc, pixel_ap)"
    """Image metrics alone are used for a category without masks."""
    cost_per_mask: float = 0.0
    """Subtracted from the objective for every labelled mask used; 0: labels are free."""
    against: Against = "none"
    """What the objective is weighed against, as a front of the trials that no other beats in both: ``labels``, the
    defective images used in training, or ``latency``, of one image, in ms."""
    pick: Pick = "best"
    """Which trial of the front becomes champion: the one with the highest objective, or the one at the front's knee."""
    max_masks: int | None = None
    """Most masks that a trial may use to become champion."""
    max_latency_ms: float | None = None
    """Longest that a trial's network may take for one image, in ms on the trial's device, to become champion."""


@dataclass(frozen=True)
class ResourceSettings:
    """What a trial asks of the cluster."""

    num_workers: int | None = None
    """Ray Train workers per trial; 0: the trial's own process trains; None: 0 on CPUs, 1 on GPUs."""
    use_gpu: Literal["auto"] | bool = "auto"
    """``auto``: where the cluster has or can start any."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 1.0
    """Below 1, trials share a GPU."""
    memory_gb_per_worker: float | None = None
    """Memory that Ray reserves for each worker, so that a node never holds more of them than fit; None: none."""


@dataclass(frozen=True)
class SweepSettings:
    """Everything that determines a sweep, but for the data and where its results go."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    search: SearchSettings = field(default_factory=SearchSettings)
    finalists: FinalistSettings = field(default_factory=FinalistSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)

    def __post_init__(self) -> None:
        self.config()
        s, o, r = self.search, self.objective, self.resources
        _require("search.trials", s.trials, s.trials >= 1, "at least 1")
        _require("search.eta", s.eta, s.eta >= 2, "at least 2")
        _require("search.seed", s.seed, s.seed >= 0, "at least 0")
        _require("search.max_concurrent", s.max_concurrent, s.max_concurrent is None or s.max_concurrent >= 1, ">= 1")
        _require("search.max_trials", s.max_trials, s.max_trials is None or s.max_trials >= 1, "at least 1")
        _require("search.max_gpu_hours", s.max_gpu_hours, s.max_gpu_hours is None or s.max_gpu_hours > 0, "positive")
        _ = self.budget().time_s  # refuses what is no time
        _require("finalists.count", self.finalists.count, self.finalists.count >= 1, "at least 1")
        _require("finalists.seeds", self.finalists.seeds, self.finalists.seeds >= 1, "at least 1")
        _require("objective.metric", o.metric, o.metric in get_args(ObjectiveMetric), f"one of {_METRICS}")
        _require("objective.cost_per_mask", o.cost_per_mask, o.cost_per_mask >= 0, "at least 0")
        _require("objective.against", o.against, o.against in get_args(Against), "one of none, labels, latency")
        _require("objective.pick", o.pick, o.pick in get_args(Pick), "best or knee")
        weighed = o.pick == "best" or o.against != "none"
        _require("objective.pick", o.pick, weighed, "best, unless objective.against is labels or latency")
        free = o.cost_per_mask == 0 or o.against != "labels"
        _require("objective.cost_per_mask", o.cost_per_mask, free, "0 where objective.against is labels")
        _require("objective.max_masks", o.max_masks, o.max_masks is None or o.max_masks >= 0, "at least 0")
        positive = o.max_latency_ms is None or o.max_latency_ms > 0
        _require("objective.max_latency_ms", o.max_latency_ms, positive, "positive")
        if s.shared:  # its study is told one mean objective, and its categories' pools differ
            for key, value, plain in (
                ("objective.against", o.against, "none"),
                ("objective.max_masks", o.max_masks, None),
                ("objective.max_latency_ms", o.max_latency_ms, None),
                ("search.transfer", s.transfer, False),
            ):
                _require(key, value, value == plain, f"{'null' if plain is None else plain} with search.shared")
        _require("resources.num_workers", r.num_workers, r.num_workers is None or r.num_workers >= 0, "at least 0")
        _require("resources.cpus_per_worker", r.cpus_per_worker, r.cpus_per_worker > 0, "positive")
        _require("resources.gpus_per_worker", r.gpus_per_worker, r.gpus_per_worker > 0, "positive")
        memory_gb = r.memory_gb_per_worker
        _require("resources.memory_gb_per_worker", memory_gb, memory_gb is None or memory_gb > 0, "positive")
        for category in (None, *s.categories):
            self._check_space(category)

    def _check_space(self, category: str | None) -> None:
        where = "search.space" if category is None else f"search.categories.{category}"
        space, grace = self.space(category), self.search.grace_epochs
        if space:
            validate_space(space, where=where)
            check_combinations(space, flatten(self.config()), where=where)
        searched = any(not isinstance(axis, Fixed) for axis in space.values())
        if not searched and self.search.trials > 1:
            raise SSNError(
                f"search.trials is {self.search.trials}, but {where} leaves nothing to search; give a range such as "
                "search.space.synthesis.noise_sigma={low: 0.001, high: 0.3, log: true}, or ask for one trial"
            )
        epochs = self.epochs(category)
        fits = grace is None or 1 <= grace <= epochs[0]
        _require("search.grace_epochs", grace, fits, f"in 1..{epochs[0]}, the number of epochs")

    def config(self) -> Config:
        """The training configuration that the first trial runs with."""
        return Config(model=self.model, data=self.data, synthesis=self.synthesis, train=self.train, eval=self.eval)

    def space(self, category: str | None = None) -> dict[str, Axis | AttainableRatio | Fixed]:
        """What is searched, by dotted config key: in one category, or in all that are not named on their own."""
        changes = self.search.categories.get(category, {}) if category is not None else {}
        where = f"search.categories.{category}" if changes else "search.space"
        return parse_space({**self.search.space, **changes}, where=where)

    def epochs(self, category: str | None = None) -> list[int]:
        """Lengths that the trials of a category may have, the shortest first."""
        axis = self.space(category).get(EPOCHS_KEY)
        if isinstance(axis, Fixed):
            return [int(axis.value)]
        values = axis.values if isinstance(axis, Choice) else ()
        if isinstance(axis, Follows):
            values = tuple(value for _, value in axis.values)
        return sorted({self.train.epochs, *map(int, values)})

    def base(self, space: Mapping[str, object]) -> dict[str, Any]:
        """The first trial's configuration, flat, where ``space`` is searched.

        What depends on the variant is filled in, unless the variant is searched: it is then each trial's own.
        """
        resolved = flatten(self.config().resolved())
        if "model.variant" not in space:
            return resolved
        return {key: resolved[key] if key in space else value for key, value in flatten(self.config()).items()}

    def budget(self) -> Budget:
        """What the search may spend."""
        return Budget(self.search.max_trials, self.search.time_budget, self.search.max_gpu_hours)

    def rungs(self) -> Rungs:
        """When trials are compared."""
        return Rungs(self.search.grace_epochs, self.search.eta)


_METRICS = ", ".join(get_args(ObjectiveMetric))


def _require(key: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise SSNError(f"{key} is {value!r}, but must be {allowed}")
