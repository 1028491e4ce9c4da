"""Configurations to try before the sampler's own: the registered champion's, and those that did best elsewhere.

All of it rests on validation objectives. Trials of one category in one sweep compare with one another and with no
others, so that what is carried from category to category is a configuration and its rank, never a number.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ssn.config import digest, flatten, unflatten
from ssn.errors import SSNError
from tuning.search.space import Axis, CategorySpace, Choice, FloatRange, Follows, IntRange, applies, as_plain, as_value

if TYPE_CHECKING:
    from ssn.data.reader import CategoryInfo
    from tuning.champions.registry import ChampionOrigin
    from tuning.tracking.protocol import RunRecord

SuggestedBy = Literal["default", "champion", "transfer", "sampler"]
"""Where a trial's configuration came from; a tag of its run."""

MAX_TRANSFERS = 3
"""Trials per category that other categories' configurations may take, and never more than a quarter of its budget."""

_NETWORK_KEYS = ("model.backbone", "model.layers")
_OUTSIDE = object()


@dataclass(frozen=True)
class Start:
    """A configuration that is tried without asking the sampler."""

    params: Mapping[str, Any]
    """Values on axes of the space; on the others, and in everything that is not searched, the base's value stands."""
    suggested_by: SuggestedBy


@dataclass(frozen=True)
class Projection:
    """What a search space can take over of a configuration."""

    params: dict[str, Any]
    outside: dict[str, Any]
    """Values of searched keys that the space does not hold."""


def project(config: Mapping[str, Any], axes: Mapping[str, Axis], base: Mapping[str, Any]) -> Projection:
    """Fit a configuration into a search space, key by key.

    A number between two choices becomes the nearer one: the ratio that was attainable with nine masks is not with ten.
    Nothing is moved to a bound: a value that the space was made to leave out stays out.

    Args:
        config: Flat; keys that it lacks have the base's value.
        axes: As :func:`tuning.search.space.resolve_space` returns them, those that depend on others last.
        base: The category's configuration, flat.
    """
    params: dict[str, Any] = {}
    outside: dict[str, Any] = {}
    for key, axis in axes.items():
        so_far = {**base, **params}
        if not applies(axis, so_far):
            continue
        if isinstance(axis, Follows):
            params[key] = as_plain(axis.value_for(so_far))
            continue
        if key not in config:
            continue
        value = _fit(axis, config[key])
        if value is _OUTSIDE:
            outside[key] = config[key]
        else:
            params[key] = value
    return Projection(params, outside)


def _fit(axis: FloatRange | IntRange | Choice, value: Any) -> Any:
    if not isinstance(axis, Choice):
        if value not in axis:
            return _OUTSIDE
        return float(value) if isinstance(axis, FloatRange) else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if as_value(value) in axis.values:
        return as_plain(axis.values[axis.values.index(as_value(value))])
    if axis.ordered and number and axis.values[0] <= value <= axis.values[-1]:
        return min(axis.values, key=lambda v: abs(v - value))
    return _OUTSIDE


def champion_start(
    find: Callable[[], ChampionOrigin], info: CategoryInfo, space: CategorySpace
) -> tuple[list[Start], list[str]]:
    """The registered champion's configuration, as far as this search can try it.

    Args:
        find: Looks the champion up.
        info: Of the category. A champion that was tuned on another split is left alone: its validation images may be
            test images now.
        space: Of the category.

    Returns:
        One start, or none where there is no champion or what is left of it is the base; and what to tell the user.
    """
    from tuning.champions.registry import NoChampionError

    category = info.category
    try:
        champion = find()
    except NoChampionError:
        return [], []
    except SSNError as error:
        return [], [f"{category}: not started from its champion: {error}"]
    if champion.split_seed not in (None, str(info.split_seed)):
        return [], [
            f"{category}: not started from its champion, which was tuned on another split (split_seed "
            f"{champion.split_seed}; here {info.split_seed})"
        ]
    config = flatten(champion.config.resolved())
    found = project(config, space.axes, space.base)
    start = flatten(unflatten({**space.base, **found.params}).resolved())
    not_searched = {key: value for key, value in config.items() if key not in space.axes and value != start[key]}
    notices = []
    if found.outside:
        notices.append(
            f"{category}: of its champion, {_listed(found.outside)} lies outside of the search space and is left out"
        )
    if not_searched:
        notices.append(
            f"{category}: of its champion, {_listed(not_searched)} is not searched here; this sweep's setting stands"
        )
    return ([] if _is_base(found.params, space.base) else [Start(found.params, "champion")]), notices


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _is_base(params: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    return all(value == base[key] for key, value in params.items())


@dataclass
class _Group:
    """Trials that compare with one another: those of one category in one sweep."""

    objectives: dict[str, float] = field(default_factory=dict)
    """By configuration's digest."""
    best: tuple[float, Mapping[str, Any]] | None = None
    default_objective: float | None = None

    def rank(self, key: str) -> int:
        """1 for the best; equal objectives share the better rank."""
        return 1 + sum(objective > self.objectives[key] for objective in self.objectives.values())


class Transfers:
    """Which configurations did best, over many groups of trials; it pickles."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    def note(self, group: str, config: Mapping[str, Any], objective: float, *, is_default: bool = False) -> None:
        """Take in a trial that used its whole budget.

        Args:
            group: The category, or sweep and category, whose other trials it compares with.
            config: Flat.
            objective: On validation.
            is_default: Whether it is the group's trial 0, which a configuration must beat to be carried elsewhere.
        """
        found = self._groups.setdefault(group, _Group())
        found.objectives[digest(dict(config))] = objective
        if is_default:
            found.default_objective = objective
        if found.best is None or objective > found.best[0]:
            found.best = (objective, config)

    def ranked(
        self, axes: Mapping[str, Axis], base: Mapping[str, Any], *, besides: str | None = None
    ) -> list[dict[str, Any]]:
        """The groups' best configurations that beat their group's default, projected onto a space, most useful first.

        One that is best in more groups comes first; then the one with the lower mean rank over all groups in which that
        very configuration was tried; then the one that is best of more trials. All of these are ranks: a category in
        which every objective is high has no louder voice.

        What was tried with another backbone is left out, unless that is searched: a noise sigma is good for one.

        Args:
            axes: Of the category that is to try them.
            base: Of that category; what is no different from it is left out.
            besides: A group to leave out.
        """
        wins: dict[str, int] = {}
        best: dict[str, tuple[float, int, dict[str, Any]]] = {}
        for name, group in self._groups.items():
            if name == besides or group.best is None:
                continue
            objective, config = group.best
            if any(config.get(key) != base[key] for key in _NETWORK_KEYS if key not in axes):
                continue
            params = project(config, axes, base).params
            beaten = group.default_objective is None or objective > group.default_objective
            if not beaten or _is_base(params, base):
                continue
            key = digest(params)
            wins[key] = wins.get(key, 0) + 1
            standing = (self._mean_rank(digest(dict(config)), besides), -len(group.objectives))
            if key not in best or standing < best[key][:2]:
                best[key] = (*standing, params)
        order = sorted(best, key=lambda key: (-wins[key], *best[key][:2]))
        return [best[key][2] for key in order]

    def _mean_rank(self, key: str, besides: str | None) -> float:
        groups = [g for name, g in self._groups.items() if name != besides and key in g.objectives]
        return statistics.fmean(group.rank(key) for group in groups)


def max_transfers(trials_per_category: int) -> int:
    """How many trials of a category's budget other configurations may take."""
    return min(MAX_TRANSFERS, trials_per_category // 4)


def transfer_is_due(trials_per_category: int, *, started: int, transferred: int) -> bool:
    """Whether a category's next trial may be another category's configuration.

    They are spread over the budget: at its beginning, nobody knows yet what is good.

    Args:
        trials_per_category: Budget.
        started: Trials of the category so far.
        transferred: Those of them that came from elsewhere.
    """
    most = max_transfers(trials_per_category)
    return transferred < most and started * (most + 1) >= (transferred + 1) * trials_per_category


def read_transfers(runs: Sequence[RunRecord], split_seeds: Mapping[str, int]) -> Transfers:
    """What earlier sweeps of a dataset found, from the tracker's runs.

    Args:
        runs: Of the dataset. Complete trials of a search count, by their validation objective.
        split_seeds: By category. Runs on other splits of these categories do not count: their validation images may be
            test images now.
    """
    transfers = Transfers()
    for run in runs:
        if run.stage != "search" or run.trial_state != "COMPLETE" or "objective" not in run.metrics:
            continue
        if run.category in split_seeds and run.tags.get("split_seed") != str(split_seeds[run.category]):
            continue
        config = {key: _parse(text) for key, text in run.params.items()}
        transfers.note(
            f"{run.tags['sweep_id']}/{run.category}",
            config,
            run.metrics["objective"],
            is_default=run.tags.get("trial_index") == "0",
        )
    return transfers


def _parse(text: str) -> Any:
    """A parameter as it was before the tracker made it a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a plain word
        return text


def plan_starts(
    info: CategoryInfo,
    space: CategorySpace,
    *,
    trials_per_category: int,
    find: Callable[[], ChampionOrigin] | None,
    earlier: Transfers | None,
) -> tuple[tuple[Start, ...], list[str]]:
    """What a category tries between its base configuration and the sampler's suggestions, each configuration once.

    Args:
        info: Of the category.
        space: Of the category.
        trials_per_category: Budget.
        find: Looks up the category's champion; None: not asked for.
        earlier: What earlier sweeps found; None: not asked for.
    """
    starts, notices = ([], []) if find is None else champion_start(find, info, space)
    seen = [start.params for start in starts]
    others = [] if earlier is None else earlier.ranked(space.axes, space.base)
    for params in others[: max_transfers(trials_per_category)]:
        if params not in seen:
            starts.append(Start(params, "transfer"))
    return tuple(starts), notices
