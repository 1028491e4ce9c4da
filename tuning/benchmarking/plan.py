"""What a benchmark runs: dataset x category x configuration x repetition, as a list in which nothing occurs twice.

Repetition r has the train seed r and the label seed r; the split seed is the data's own and the same for all. Two cells
of a table whose settings come to the same network, such as two supervision ratios that select the same masks, share one
run: what identifies a run is its canonical configuration, not what was typed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ssn.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    SynthesisConfig,
    TrainConfig,
    digest,
    flatten,
    trial_identity,
)
from ssn.data.reader import CategoryInfo, SplitCount
from ssn.errors import SSNError
from ssn.loader import load_config, read_yaml
from tuning.settings import ResourceSettings

DEFAULT, CHAMPION = "default", "champion"
BUILT_IN = (DEFAULT, CHAMPION)
RATIO_KEY, WEAK_KEY = "train.supervision_ratio", "train.weak_labels"
SEED_KEYS = ("train.train_seed", "train.label_seed")


@dataclass(frozen=True)
class BenchmarkSettings:
    """Everything a ``--set`` of a benchmark may name: a training run's sections, and where runs are placed."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    resources: ResourceSettings = field(default_factory=ResourceSettings)

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> Config:
        """The training configuration."""
        return Config(model=self.model, data=self.data, synthesis=self.synthesis, train=self.train, eval=self.eval)


@dataclass(frozen=True)
class Configuration:
    """A named configuration."""

    name: str
    origin: str
    """Where it was written, as error messages name it."""
    settings: Mapping[Any, Any]
    """As the file has them; empty for a built-in one."""


@dataclass(frozen=True)
class Variant:
    """A configuration with one choice of the ``--over`` values: a line of the tables."""

    configuration: Configuration
    over: tuple[tuple[str, str], ...] = ()
    """Dotted key and value, as typed."""

    @property
    def name(self) -> str:
        """The configuration's name."""
        return self.configuration.name

    @property
    def label(self) -> str:
        """Such as ``default, supervision_ratio=0.5``."""
        return ", ".join([self.name, *(f"{key.rpartition('.')[2]}={value}" for key, value in self.over)])

    def chosen(self, key: str) -> str | None:
        """The value that ``--over`` gives a key, as typed; None: none."""
        return dict(self.over).get(key)


@dataclass(frozen=True)
class PlannedRun:
    """One network to train and to score."""

    key: str
    """Digest of its identity, its category and the test split it is scored on."""
    identity: str
    """See :func:`ssn.config.trial_identity`."""
    category: str
    index: int
    """Position among the category's runs."""
    seed: int
    config: Mapping[str, Any]
    """Canonical, flat."""
    train_labels: int
    """Defective training images used."""
    train_masks: int
    """Those of them whose pixel masks are used."""
    labels: tuple[str, ...]
    """Of the variants that it serves."""


@dataclass(frozen=True)
class Plan:
    """All cells of a benchmark and the runs that fill them."""

    categories: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]
    """Each once, category by category."""
    cells: Mapping[tuple[str, str, int], str]
    """(category, variant's label, seed) -> run's key."""
    asked: Mapping[tuple[str, str], Config]
    """(category, variant's label) -> settings as they were asked for, seeds aside."""

    def run(self, category: str, label: str, seed: int) -> PlannedRun:
        """The run that fills a cell."""
        key = self.cells[category, label, seed]
        return next(run for run in self.runs if run.key == key)


def read_configurations(names: Sequence[str]) -> list[Configuration]:
    """The configurations that ``--configs`` names: built-in ones by name, others by the YAML file that holds them.

    Raises:
        SSNError: a file cannot be read or holds something else than settings by name, or a name occurs twice.
    """
    found: list[Configuration] = []
    for name in names:
        if name in BUILT_IN:
            found.append(Configuration(name, name, {}))
            continue
        if not name.endswith((".yaml", ".yml")):
            raise SSNError(f"--configs {name}: give {DEFAULT}, {CHAMPION} or the path of a YAML file")
        for own, settings in read_yaml(Path(name)).items():
            if str(own) in BUILT_IN:
                raise SSNError(f"{name}: {own} is a built-in configuration; choose another name for yours")
            if settings is not None and not isinstance(settings, Mapping):
                raise SSNError(f"{name}: {own} must hold settings such as train: {{epochs: 20}}, not {settings!r:.60}")
            found.append(Configuration(str(own), f"{name}: {own}", settings or {}))
    twice = next((c.name for i, c in enumerate(found) if c.name in [other.name for other in found[:i]]), None)
    if twice is not None:
        raise SSNError(f"the configuration {twice} is named twice in --configs; name each once")
    if not found:
        raise SSNError(f"--configs names no configuration; give {DEFAULT}, {CHAMPION} or a YAML file of settings")
    return found


def make_variants(configurations: Sequence[Configuration], overs: Sequence[str]) -> tuple[Variant, ...]:
    """Every configuration with every combination of the ``--over`` values.

    Args:
        configurations: In the order of the tables.
        overs: ``section.name=value,value,...``; a comma inside brackets belongs to the value.

    Raises:
        SSNError: one is malformed, or a key is given twice, or is a seed.
    """
    axes: dict[str, list[str]] = {}
    for text in overs:
        key, separator, raw = text.partition("=")
        key, values = key.strip(), _split_values(raw)
        if not separator or not key or not all(values):
            raise SSNError(f"--over {text!r} is not of the form section.name=value,value,...")
        if key in axes:
            raise SSNError(f"--over names {key} twice; give all its values in one")
        if len(set(values)) < len(values):
            raise SSNError(f"--over {text} names a value twice")
        if key.startswith("resources."):
            raise SSNError(f"--over {text}: where runs are placed does not change what they compute; use --set")
        if key in SEED_KEYS:
            raise SSNError(f"--over {text}: {_ABOUT_SEEDS}")
        axes[key] = values
    combinations = [tuple(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]
    return tuple(Variant(configuration, over) for configuration in configurations for over in combinations)


def _split_values(raw: str) -> list[str]:
    values, depth = [""], 0
    for character in raw:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


_ABOUT_SEEDS = "repetition r has the train seed r and the label seed r; say how many with --seeds"


def configure(
    variant: Variant, info: CategoryInfo, sets: Sequence[str], champion: Config | None = None
) -> BenchmarkSettings:
    """A variant's settings for one category, seeds aside.

    From the weakest: the manifest's defaults, or the champion's whole configuration; the configuration's own settings;
    ``--set``; ``--over``.

    Args:
        variant: Whose.
        info: Of the category.
        sets: ``--set`` options.
        champion: The registered champion's configuration, for the built-in name.

    Raises:
        SSNError: a key is unknown, a value cannot be, or a seed is set.
    """
    named = {variant.configuration.origin: variant.configuration.settings}
    if variant.name == CHAMPION:
        assert champion is not None
        named = {f"the champion of {info.category}": _without_seeds(flatten(champion))}
    settings = load_config(
        BenchmarkSettings,
        defaults={} if variant.name == CHAMPION else info.defaults,
        named=named,
        sets=sets,
        overs=[f"{key}={value}" for key, value in variant.over],
    )
    for key in SEED_KEYS:
        if getattr(settings.train, key.partition(".")[2]) != getattr(TrainConfig(), key.partition(".")[2]):
            raise SSNError(f"{variant.name} sets {key}, but {_ABOUT_SEEDS}")
    if any(str(key).partition(".")[0] == "resources" for key in variant.configuration.settings):
        raise SSNError(f"{variant.configuration.origin}: resources are the same for all configurations; use --set")
    return settings


def _without_seeds(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if key not in SEED_KEYS}


def count_used(train: TrainConfig, pool: SplitCount) -> tuple[int, int]:
    """Defective training images that a configuration uses, and how many of them with their masks.

    As :func:`ssn.data.sampling.supervised_subset` and the weak regime choose them (JIMS 2025, section 4).
    """
    masks = math.floor(train.supervision_ratio * pool.masks + 0.5)
    return (pool.defective if train.weak_labels == "use" else masks), masks


def canonical(config: Config, pool: SplitCount) -> Config:
    """The same training run, written in the one way that all settings have which come to it on this pool.

    The supervision ratio becomes that of the masks it selects, and the rest of the pool is dropped where there is none.
    """
    labels, masks = count_used(config.train, pool)
    train = replace(config.train, supervision_ratio=masks / pool.masks if pool.masks else 0.0)
    if labels == masks:
        train = replace(train, weak_labels="drop")
    return replace(config, train=train)


def make_plan(
    infos: Mapping[str, CategoryInfo],
    variants: Sequence[Variant],
    seeds: int,
    sets: Sequence[str],
    *,
    champions: Mapping[str, Config],
    weights_digest: Callable[[ModelConfig], str],
) -> Plan:
    """Plan every cell.

    Args:
        infos: By category, in the order of the tables.
        variants: Of every category.
        seeds: Repetitions.
        sets: ``--set`` options.
        champions: Configuration of each category's champion, if a variant is of the champion.
        weights_digest: SHA-256 of a backbone's weights.

    Raises:
        SSNError: see :func:`configure`; also where there is nothing to repeat.
    """
    if seeds < 1:
        raise SSNError(f"--seeds is {seeds}, but must be at least 1")
    runs: dict[str, PlannedRun] = {}
    cells: dict[tuple[str, str, int], str] = {}
    asked: dict[tuple[str, str], Config] = {}
    for category, info in infos.items():
        for variant in variants:
            chosen = configure(variant, info, sets, champions.get(category)).config()
            asked[category, variant.label] = chosen
            for seed in range(seeds):
                seeded = replace(chosen, train=replace(chosen.train, train_seed=seed, label_seed=seed))
                index = sum(run.category == category for run in runs.values())
                run = _plan_run(seeded, info, index, seed, weights_digest)
                cells[category, variant.label, seed] = run.key
                known = runs.get(run.key, run)
                runs[run.key] = replace(known, labels=(*known.labels, variant.label))
    return Plan(tuple(infos), tuple(variants), tuple(range(seeds)), tuple(runs.values()), cells, asked)


def _plan_run(
    config: Config, info: CategoryInfo, index: int, seed: int, weights_digest: Callable[[ModelConfig], str]
) -> PlannedRun:
    pool = info.counts["pool"]
    labels, masks = count_used(config.train, pool)
    config = canonical(config, pool).resolved()
    identity = trial_identity(
        config,
        search_fingerprint=info.search_fingerprint,
        weights_digest=weights_digest(config.model),
        split_seed=info.split_seed,
    )
    key = digest({"identity": identity, "category": info.category, "test_fingerprint": info.test_fingerprint})
    return PlannedRun(key, identity, info.category, index, seed, flatten(config), labels, masks, ())
