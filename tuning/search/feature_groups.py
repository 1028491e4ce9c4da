"""Which trials of a search share backbone features, and which backbones they load: known before it runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ssn.config import Config, ModelConfig, unflatten
from ssn.data.reader import CategoryInfo
from ssn.data.sampling import attainable_ratios
from ssn.errors import SSNError
from tuning.execution.weights import weights_key
from tuning.search.costs import limit_masks
from tuning.search.space import (
    RATIO_KEY,
    AttainableRatio,
    Axis,
    CategorySpace,
    Choice,
    FloatRange,
    Follows,
    as_plain,
    resolve_space,
)
from tuning.settings import SweepSettings

MODEL_KEYS = ("model.backbone", "model.weights", "model.layers")
"""What decides which weights are loaded."""

FEATURE_KEYS = (
    *MODEL_KEYS,
    "model.variant",  # by its preprocessing
    "data.image_size",
    "data.antialias",
    "data.feature_dtype",
    "train.flip_defects",  # where the pool has images
    "train.weak_labels",  # where the pool has images without masks
)
"""Settings on which :func:`ssn.features.feature_key` may depend, of those that a search may vary."""


def category_spaces(settings: SweepSettings, infos: Mapping[str, CategoryInfo]) -> dict[str, CategorySpace]:
    """The search of every category; the same for all where the search is a shared one.

    Raises:
        SSNError: see :func:`category_space` and :func:`shared_space`.
    """
    if settings.search.shared:
        return dict.fromkeys(infos, shared_space(settings, infos))
    return {name: category_space(settings, info) for name, info in infos.items()}


def category_space(settings: SweepSettings, info: CategoryInfo) -> CategorySpace:
    """The search of one category, as its data allow.

    Raises:
        SSNError: see :func:`tuning.search.space.resolve_space`.
    """
    space, pool = settings.space(info.category), info.counts["pool"]
    resolved = resolve_space(
        space,
        category=info.category,
        base=settings.base(space),
        attainable=attainable_ratios(pool.masks),
        num_defective=pool.defective,
    )
    return limit_masks(resolved, info.category, pool.masks, settings.objective.max_masks)


def shared_space(settings: SweepSettings, infos: Mapping[str, CategoryInfo]) -> CategorySpace:
    """The search of one configuration for all categories.

    The supervision ratio is a float in it, as the categories' pools differ; each category takes its nearest.

    Raises:
        SSNError: there is but one category, or the settings differ between categories; see also
            :func:`tuning.search.space.resolve_space`.
    """
    if len(infos) < 2:
        raise SSNError(f"a shared search needs several categories, but there is only {next(iter(infos))}; do without")
    if settings.search.categories:
        raise SSNError(
            "search.shared searches the same for all categories, but search.categories."
            f"{next(iter(settings.search.categories))} is given; leave one of the two out"
        )
    space, notices = settings.space(), []
    ratio = space.get(RATIO_KEY)
    if isinstance(ratio, AttainableRatio) and ratio.low < ratio.high:
        space[RATIO_KEY] = FloatRange(ratio.low, ratio.high, when=ratio.when)
        notices.append(f"one {RATIO_KEY} is searched for all categories; each takes the nearest that its masks allow")
    pools = {name: info.counts["pool"] for name, info in infos.items()}
    base = settings.base(space)
    if RATIO_KEY in space or base[RATIO_KEY] > 0:
        without = [name for name, pool in pools.items() if pool.masks == 0]
        notices += [f"{name}: the pool has no masks, so {RATIO_KEY} is taken as 0" for name in without]
    resolved = resolve_space(
        space,
        category="all categories",
        base=base,
        attainable=attainable_ratios(max(pool.masks for pool in pools.values())),
        num_defective=max(pool.defective for pool in pools.values()),
    )
    return replace(resolved, notices=(*notices, *resolved.notices))


def enumerate_configs(space: CategorySpace, keys: Collection[str]) -> list[Config]:
    """Every combination of values that trials may have of some settings; the others have the base's.

    Args:
        space: Of a category.
        keys: Settings that are searched as choices, if at all.
    """
    flats: list[dict[str, Any]] = [dict(space.base)]
    for key, axis in space.axes.items():
        if key in keys:
            flats = [{**flat, key: value} for flat in flats for value in _values(key, axis, flat, space.axes, keys)]
    configs = [unflatten(flat).resolved() for flat in flats]
    return list(dict.fromkeys(configs))


def models_of(space: CategorySpace) -> list[ModelConfig]:
    """The networks of all backbones and weights that a category's trials may load, each once."""
    models = [config.model for config in enumerate_configs(space, MODEL_KEYS)]
    return list({weights_key(model): model for model in models}.values())


def _values(
    key: str, axis: Axis, flat: Mapping[str, Any], axes: Mapping[str, Axis], keys: Collection[str]
) -> Sequence[Any]:
    """What a setting may be, given those before it; a condition on a setting that is left out may hold or not."""
    known = tuple(c for c in axis.when if c.key in keys or c.key not in axes)
    if not all(condition.holds_for(flat[condition.key]) for condition in known):
        return [flat[key]]
    if isinstance(axis, Follows):
        values = [as_plain(axis.value_for(flat))] if axis.key in keys else [as_plain(v) for _, v in axis.values]
    else:
        assert isinstance(axis, Choice), f"{key} has no list of values"
        values = [as_plain(value) for value in axis.values]
    return values if len(known) == len(axis.when) else [flat[key], *values]
