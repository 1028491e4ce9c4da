"""Every setting of a sweep: a training run's sections, and how to search, judge and place trials.

Plain dataclasses, filled by ``ssn.loader`` from YAML files and ``--set`` options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ssn.config import Config, DataConfig, EvalConfig, ModelConfig, SynthesisConfig, TrainConfig
from ssn.errors import SSNError
from tuning.space import RATIO_KEY, WEAK_KEY, AttainableRatio, Choice, FloatRange, validate_space

ObjectiveMetric = Literal["mean(image_auroc, pixel_ap)", "image_auroc", "image_ap", "pixel_ap", "aupro"]


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, and for how long."""

    trials: int = 16
    """Trials per category; the first is the configuration as it stands."""
    noise_sigma: tuple[float, float] | None = (1e-3, 0.3)
    """Bounds of ``synthesis.noise_sigma``, on a log scale; None: not searched."""
    perlin_threshold: tuple[float, float] | None = (0.0, 0.7)
    """Bounds of ``synthesis.perlin_threshold``; None: not searched."""
    supervision_ratio: tuple[float, float] | None = (0.0, 1.0)
    """Bounds of ``train.supervision_ratio``, of which the attainable values are tried; None: not searched."""
    weak_labels: bool = False
    """Whether ``train.weak_labels`` is searched, in trials that leave a pool image's mask unused or whose pool has
    images without."""
    grace_epochs: int | None = None
    """Epochs that every trial gets before it may be stopped; None: epochs / reduction factor squared, at least 1."""
    eta: int = 3
    """Reduction factor: of the trials that reach a rung, about one in ``eta`` goes on."""
    seed: int = 0
    """Of the search; it draws suggestions, not weights or noise."""
    max_concurrent: int | None = None
    """Most trials at once; None: as many as the cluster holds."""
    storage: str | None = None
    """Optuna RDB URL of the studies, such as ``postgresql://...``, for Optuna's dashboard; None: a SQLite file in the
    sweep's folder, or none where that is an object store."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a trial is judged by, on the validation split."""

    metric: ObjectiveMetric = "mean(image_auroc, pixel_ap)"
    """Image metrics alone are used for a category without masks."""
    cost_per_mask: float = 0.0
    """Subtracted from the objective for every labelled mask used; 0: labels are free."""


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


@dataclass(frozen=True)
class SweepSettings:
    """Everything that determines a sweep, but for the data and where its results go."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    search: SearchSettings = field(default_factory=SearchSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)

    def __post_init__(self) -> None:
        self.config()
        s, o, r = self.search, self.objective, self.resources
        _require("search.trials", s.trials, s.trials >= 1, "at least 1")
        _require("search.eta", s.eta, s.eta >= 2, "at least 2")
        _require("search.seed", s.seed, s.seed >= 0, "at least 0")
        epochs = self.train.epochs
        grace_fits = s.grace_epochs is None or 1 <= s.grace_epochs <= epochs
        _require("search.grace_epochs", s.grace_epochs, grace_fits, f"in 1..{epochs}, the number of epochs")
        _require("search.max_concurrent", s.max_concurrent, s.max_concurrent is None or s.max_concurrent >= 1, ">= 1")
        _require("objective.metric", o.metric, o.metric in get_args(ObjectiveMetric), f"one of {_METRICS}")
        _require("objective.cost_per_mask", o.cost_per_mask, o.cost_per_mask >= 0, "at least 0")
        _require("resources.num_workers", r.num_workers, r.num_workers is None or r.num_workers >= 0, "at least 0")
        _require("resources.cpus_per_worker", r.cpus_per_worker, r.cpus_per_worker > 0, "positive")
        _require("resources.gpus_per_worker", r.gpus_per_worker, r.gpus_per_worker > 0, "positive")
        space = self.space()
        if space:
            validate_space(space)
        elif s.trials > 1:
            raise SSNError(
                f"search.trials is {s.trials}, but nothing is searched; give bounds such as "
                "search.noise_sigma=[0.001,0.3], or ask for one trial"
            )

    def config(self) -> Config:
        """The training configuration that the first trial runs with."""
        return Config(model=self.model, data=self.data, synthesis=self.synthesis, train=self.train, eval=self.eval)

    def space(self) -> dict[str, FloatRange | Choice | AttainableRatio]:
        """What is searched, by dotted config key."""
        space: dict[str, FloatRange | Choice | AttainableRatio] = {}
        if self.search.noise_sigma is not None:
            space["synthesis.noise_sigma"] = FloatRange(*self.search.noise_sigma, log=True)
        if self.search.perlin_threshold is not None:
            space["synthesis.perlin_threshold"] = FloatRange(*self.search.perlin_threshold)
        if self.search.supervision_ratio is not None:
            space[RATIO_KEY] = AttainableRatio(*self.search.supervision_ratio)
        if self.search.weak_labels:
            space[WEAK_KEY] = Choice(("drop", "use"))
        return space

    def grace_epochs(self) -> int:
        """Epochs that every trial gets: as set, else such that there are two rungs."""
        if self.search.grace_epochs is not None:
            return self.search.grace_epochs
        return max(1, self.train.epochs // self.search.eta**2)


_METRICS = ", ".join(get_args(ObjectiveMetric))


def _require(key: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise SSNError(f"{key} is {value!r}, but must be {allowed}")
