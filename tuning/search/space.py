"""What a search varies: plain dataclasses keyed by dotted config keys, checked before anything starts.

How a space is written in a configuration file is the business of ``tuning.search.space_syntax``.
"""

from __future__ import annotations

import difflib
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ssn.config import Config, flatten, unflatten
from ssn.errors import SSNError

RATIO_KEY = "train.supervision_ratio"
WEAK_KEY = "train.weak_labels"
EPOCHS_KEY = "train.epochs"

# Fixed for a whole sweep: seeds must be equal for trials to compare, and evaluation is the yardstick.
_FIXED_KEYS = ("train.label_seed", "train.train_seed")
_FIXED_SECTIONS = ("eval.",)

Relation = Literal["<", "<=", ">", ">=", "!=", "in"]
COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Condition:
    """What another setting must be for an axis to be searched in a trial."""

    key: str
    relation: Relation
    values: tuple[Any, ...]
    """One, but for ``in``."""

    def holds_for(self, value: Any) -> bool:
        """Whether a value of the setting meets the condition."""
        value = as_value(value)
        if self.relation == "in":
            return value in self.values
        if self.relation == "!=":
            return value not in self.values
        return value is not None and bool(COMPARISONS[self.relation](value, self.values[0]))

    def __str__(self) -> str:
        if self.relation != "in":
            return f"{self.key} {self.relation} {show(self.values[0])}"
        return f"{self.key} is {' or '.join(map(show, self.values))}"


@dataclass(frozen=True)
class FloatRange:
    """A continuous range, both ends included."""

    low: float
    high: float
    log: bool = False
    """Sample the logarithm uniformly; needs ``low > 0``."""
    when: tuple[Condition, ...] = ()
    """Searched only in trials that meet all of them; the others have the base's value."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class IntRange:
    """Whole numbers from ``low``, ``step`` apart, up to ``high``."""

    low: int
    high: int
    log: bool = False
    """Sample the logarithm uniformly; needs ``low > 0`` and a step of 1."""
    step: int = 1
    when: tuple[Condition, ...] = ()

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value in range_values(self)


@dataclass(frozen=True)
class Choice:
    """Some values; increasing numbers are searched as an ordered axis, everything else as unordered categories."""

    values: tuple[Any, ...]
    when: tuple[Condition, ...] = ()

    @property
    def ordered(self) -> bool:
        """Whether neighbouring values are alike, so that a sampler may interpolate between them."""
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)
        return numbers and list(self.values) == sorted(set(self.values))

    def __contains__(self, value: object) -> bool:
        return value in self.values


@dataclass(frozen=True)
class Follows:
    """Not searched by itself: given by another setting, as a file of weights is by its backbone."""

    key: str
    """The other setting."""
    values: tuple[tuple[Any, Any], ...]
    """(The other setting's value, this one's)."""
    when: tuple[Condition, ...] = ()

    def value_for(self, config: Mapping[str, Any]) -> Any:
        """This setting's value in a configuration."""
        return dict(self.values)[as_value(config[self.key])]


@dataclass(frozen=True)
class AttainableRatio:
    """Supervision ratios that select a whole number of labelled masks; a :class:`Choice` once the pool is known."""

    low: float = 0.0
    high: float = 1.0
    when: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Fixed:
    """One value, for the first trial too; part of a category's base configuration once that is known."""

    value: Any
    when: tuple[Condition, ...] = ()
    """Always empty: a single value under a condition is a :class:`Choice`."""


Axis = FloatRange | IntRange | Choice | Follows
SearchSpace = Mapping[str, Axis | AttainableRatio | Fixed]


@dataclass(frozen=True)
class CategorySpace:
    """One category's search."""

    base: Mapping[str, Any]
    """Flat configuration of the first trial; later trials replace what the axes name."""
    axes: Mapping[str, Axis]
    """Those that depend on others after them."""
    notices: tuple[str, ...] = ()
    """Lines for the user: where a setting has nothing to act on, and so is not searched if it was to be."""


def applies(axis: Axis | AttainableRatio | Fixed, config: Mapping[str, Any]) -> bool:
    """Whether an axis is searched in a trial, given the values of those that it depends on."""
    return all(condition.holds_for(config[condition.key]) for condition in axis.when)


def as_value(value: Any) -> Any:
    """A value as axes hold it; a flat configuration has lists where they have tuples."""
    return tuple(value) if isinstance(value, list) else value


def as_plain(value: Any) -> Any:
    """The inverse of :func:`as_value`."""
    return list(value) if isinstance(value, tuple) else value


def show(value: Any) -> str:
    """A value for people: ``0.015``, ``[2, 3]``, ``jims``."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(as_plain(value))


def describe_axis(axis: Axis | AttainableRatio | Fixed) -> str:
    """An axis for people: ``0.001 to 0.3, log``, ``icpr | jims``."""
    if isinstance(axis, FloatRange | IntRange):
        step = f" in steps of {axis.step}" if isinstance(axis, IntRange) and axis.step > 1 else ""
        text = f"{show(axis.low)} to {show(axis.high)}{step}{', log' if axis.log else ''}"
    elif isinstance(axis, AttainableRatio):
        text = f"attainable ratios within {show(axis.low)} to {show(axis.high)}"
    elif isinstance(axis, Fixed):
        text = show(axis.value)
    elif isinstance(axis, Follows):
        text = " | ".join(f"{show(value)} with {show(other)}" for other, value in axis.values)
    elif axis.ordered and len(axis.values) > 8:
        text = f"{len(axis.values)} values from {show(axis.values[0])} to {show(axis.values[-1])}"
    else:
        text = " | ".join(map(show, axis.values))
    return text + "".join(f", when {condition}" for condition in axis.when)


def validate_space(space: SearchSpace, *, where: str = "search.space") -> None:
    """Refuse a search space with an unknown or fixed key, or with a value no configuration may have.

    Args:
        space: By dotted config key.
        where: Names it in errors.

    Raises:
        SSNError: naming the key, what it has and what is allowed.
    """
    if not space:
        raise SSNError(f"{where}: it is empty; name at least one config key")
    known = flatten(Config())
    for key, axis in space.items():
        check_key(key, where)
        at = f"{where}: {key}"
        if isinstance(axis, FloatRange | IntRange):
            _check_range(at, axis, known[key])
            _check_values(key, (axis.low, axis.high), where)
        elif isinstance(axis, AttainableRatio):
            if key != RATIO_KEY:
                raise SSNError(f"{at} cannot be 'attainable'; only {RATIO_KEY} can")
            if not 0 <= axis.low <= axis.high <= 1:
                raise SSNError(f"{at} is {axis.low}..{axis.high}, but must lie within 0..1")
        else:
            values = (axis.value,) if isinstance(axis, Fixed) else axis.values
            if not values:
                raise SSNError(f"{at} has no values")
            if isinstance(axis, Follows):
                values = tuple(value for _, value in axis.values)
            elif len(set(values)) < len(values):
                raise SSNError(f"{at} names a value twice: {list(values)}")
            for value in values:
                _check_type(at, value, known[key])
            _check_values(key, values, where)
        for other in _depends_on(key, axis):
            check_key(other, where, searched=False)
        if isinstance(axis, Follows):
            _check_followed(at, axis, space.get(axis.key))
    order_axes(space, where=where)


def check_key(key: str, where: str, *, searched: bool = True) -> None:
    """Refuse a key that no configuration has, or that a search may not vary.

    Raises:
        SSNError: naming the nearest valid key.
    """
    known = flatten(Config())
    if key not in known:
        inside = next((k for k in known if k.startswith(f"{key}.")), None)
        if inside is not None:
            raise SSNError(f"{where}: {key} is a section; write its keys whole and dotted, such as {inside}")
        near = difflib.get_close_matches(key, known, n=1)
        raise SSNError(f"{where}: unknown config key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
    if searched and (key in _FIXED_KEYS or key.startswith(_FIXED_SECTIONS)):
        raise SSNError(f"{where}: {key} is the same for all trials of a sweep; set it outside of the space")


def order_axes(space: SearchSpace, *, where: str = "search.space") -> list[str]:
    """The keys, each after those that it depends on, otherwise as they stand.

    Raises:
        SSNError: some depend on each other in a circle.
    """
    ordered: list[str] = []
    waiting = list(space)
    while waiting:
        ready = [k for k in waiting if not any(other in waiting for other in _depends_on(k, space[k]) if other != k)]
        ready = [k for k in ready if k not in _depends_on(k, space[k])]
        if not ready:
            raise SSNError(f"{where}: {' and '.join(waiting)} depend on each other in a circle; drop one `when`")
        ordered += ready
        waiting = [k for k in waiting if k not in ready]
    return ordered


def check_combinations(space: SearchSpace, base: Mapping[str, Any], *, where: str = "search.space") -> None:
    """Refuse a space in which two axes have values that no configuration may have together.

    Raises:
        SSNError: naming the setting that cannot be; a ``when`` keeps the two apart.
    """
    base = {**base, **{key: as_plain(axis.value) for key, axis in space.items() if isinstance(axis, Fixed)}}
    samples = {key: [(key, as_plain(v)) for v in _sample(axis)] for key, axis in space.items()}
    for first, second in itertools.combinations_with_replacement(samples, 2):
        for values in itertools.product(samples[first], samples[second]):
            config = {**base, **dict(values)}
            if all(applies(space[key], config) for key in (first, second)):
                _try_config(config, where)


def resolve_space(
    space: SearchSpace, *, category: str, base: Mapping[str, Any], attainable: Sequence[float], num_defective: int
) -> CategorySpace:
    """The search of one category, where the supervision ratio has become a choice among attainable counts.

    Args:
        space: As validated by :func:`validate_space`.
        category: Named in notices and errors.
        base: The category's configuration, flat; with the space's fixed values it is the first trial's.
        attainable: Ratios k/n, k in 0..n, for a pool of n masks; ``[0.0]`` where the pool has no masks.
        num_defective: Images in the pool, with and without masks.

    Raises:
        SSNError: the base configuration lies outside of the space, so that it could not be the first trial.
    """
    if space:
        validate_space(space)
    resolving = _Resolving(category, dict(base), attainable, num_defective)
    for key, axis in space.items():
        if isinstance(axis, Fixed):
            resolving.base[key] = as_plain(axis.value)
    for key in order_axes(space):
        axis = space[key]
        if not isinstance(axis, Fixed):
            resolving.add(key, axis)
    if RATIO_KEY not in space and resolving.base[RATIO_KEY] > 0 and not resolving.has_masks:
        resolving.note(f"the pool has no masks, so {RATIO_KEY} is taken as 0")
    if WEAK_KEY not in space and resolving.base[WEAK_KEY] == "use" and num_defective == 0:
        resolving.note(f"the pool has no defective images, so {WEAK_KEY}=use adds none")
    return CategorySpace(resolving.base, resolving.axes, tuple(resolving.notices))


class _Resolving:
    """A category's space, axis by axis."""

    def __init__(self, category: str, base: dict[str, Any], attainable: Sequence[float], num_defective: int) -> None:
        self.category, self.base = category, base
        self._attainable, self._num_defective = sorted(set(attainable)), num_defective
        self.axes: dict[str, Axis] = {}
        self.notices: list[str] = []

    @property
    def has_masks(self) -> bool:
        return max(self._attainable, default=0.0) > 0

    def note(self, text: str) -> None:
        self.notices.append(f"{self.category}: {text}")

    def add(self, key: str, axis: Axis | AttainableRatio) -> None:
        if key == RATIO_KEY and not self.has_masks:
            if self.base[key] != 0:
                raise SSNError(f"{self.category}: {key} is {self.base[key]}, but its pool has no masks; set it to 0")
            self.note(f"the pool has no masks, so {key} is fixed at 0")
            return
        if key == WEAK_KEY:
            inherent, why_not = self._weak_labels_matter()
            if why_not:
                self.note(f"{why_not}, so {key} is not searched")
                return
            axis = replace(axis, when=(*axis.when, *inherent))
        for condition in axis.when:
            if not _can_hold(condition, self.axes, self.base):
                self.note(f"{condition} in no trial, so {key} is not searched")
                return
        resolved = self._among_attainable(axis) if isinstance(axis, AttainableRatio) else axis
        if isinstance(resolved, Follows):
            self._follow(key, resolved)
        elif applies(resolved, self.base) and as_value(self.base[key]) not in resolved:
            raise SSNError(
                f"{self.category}: the default {key}={show(self.base[key])} is not in the search space "
                f"({describe_axis(resolved)}), but is always the first trial; widen the space or change the default"
            )
        self.axes[key] = resolved

    def _among_attainable(self, axis: AttainableRatio) -> Choice:
        values = tuple(r for r in self._attainable if axis.low <= r <= axis.high)
        if not values:
            raise SSNError(
                f"{self.category}: none of the attainable ratios {self._attainable} lies in the search space's range "
                f"of {RATIO_KEY}; widen it"
            )
        return Choice(values, axis.when)

    def _follow(self, key: str, axis: Follows) -> None:
        if applies(axis, self.base):
            if as_value(self.base[axis.key]) not in dict(axis.values):
                raise SSNError(
                    f"{self.category}: {key} has no value for {axis.key}={show(self.base[axis.key])}; name it"
                )
            self.base[key] = as_plain(axis.value_for(self.base))

    def _weak_labels_matter(self) -> tuple[tuple[Condition, ...], str]:
        """When weak labels make a difference: a condition on the ratio where there is one, and why, if never."""
        num_masks = len(self._attainable) - 1
        if self._num_defective == 0:
            return (), "the pool has no defective images"
        if self._num_defective > num_masks:
            return (), ""
        # from there on every mask is used
        below = Condition(RATIO_KEY, "<", ((num_masks - 0.5) / num_masks,))
        if not _can_hold(below, self.axes, self.base):
            return (), "every image of the pool is used with its mask"
        return ((below,) if RATIO_KEY in self.axes else ()), ""


def _depends_on(key: str, axis: Axis | AttainableRatio | Fixed) -> Iterator[str]:
    """Keys whose values decide about an axis."""
    yield from (condition.key for condition in axis.when)
    if isinstance(axis, Follows):
        yield axis.key
    if key == WEAK_KEY:
        yield RATIO_KEY  # see _weak_labels_matter


def _can_hold(condition: Condition, axes: Mapping[str, Axis], base: Mapping[str, Any]) -> bool:
    """Whether a trial may meet a condition; the axes that it depends on are resolved."""
    axis = axes.get(condition.key)
    if isinstance(axis, FloatRange) and condition.relation in ("in", "!="):
        return condition.relation == "!=" or any(value in axis for value in condition.values)
    reached: Iterable[Any] = () if axis is None else range_values(axis) if isinstance(axis, IntRange) else _sample(axis)
    return any(condition.holds_for(value) for value in (base[condition.key], *reached))


def range_values(axis: IntRange) -> range:
    """All values of a range."""
    return range(axis.low, axis.high + 1, axis.step)


def _sample(axis: Axis | AttainableRatio | Fixed) -> tuple[Any, ...]:
    """An axis's values; of a range, its ends."""
    if isinstance(axis, Fixed):
        return (axis.value,)
    if isinstance(axis, Follows):
        return tuple(value for _, value in axis.values)
    return axis.values if isinstance(axis, Choice) else (axis.low, axis.high)


def _check_range(at: str, axis: FloatRange | IntRange, default: Any) -> None:
    is_whole = default is None or (isinstance(default, int) and not isinstance(default, bool))
    if isinstance(axis, FloatRange) and not isinstance(default, float):
        raise SSNError(f"{at} is not a continuous setting; give a list of values")
    if isinstance(axis, IntRange) and not is_whole:
        raise SSNError(f"{at} is not a whole number; give a list of values")
    if isinstance(axis, IntRange) and at.endswith(EPOCHS_KEY):
        raise SSNError(
            f"{at} cannot be a range, because trials compare only with trials as long; give a list of values"
        )
    if not (math.isfinite(axis.low) and math.isfinite(axis.high) and axis.low < axis.high):
        raise SSNError(f"{at} is {axis.low}..{axis.high}, but low must be less than high")
    if axis.log and axis.low <= 0:
        raise SSNError(f"{at}.low is {axis.low}, but a log scale needs it to be positive")
    if isinstance(axis, IntRange) and (axis.step < 1 or (axis.log and axis.step != 1)):
        raise SSNError(f"{at}.step is {axis.step}, but must be at least 1, and 1 on a log scale")


def _check_type(at: str, value: Any, default: Any) -> None:
    if default is None:
        return
    expected: tuple[type, ...]
    if isinstance(default, bool):
        ok, expected = isinstance(value, bool), (bool,)
    elif isinstance(default, float):
        ok, expected = isinstance(value, int | float) and not isinstance(value, bool), (float,)
    elif isinstance(default, int):
        ok, expected = isinstance(value, int) and not isinstance(value, bool), (int,)
    elif isinstance(default, list):
        ok, expected = isinstance(value, tuple), (list,)
    else:
        ok, expected = isinstance(value, str), (str,)
    if not ok:
        raise SSNError(f"{at} has the value {value!r}, but must be of type {expected[0].__name__}")


def _check_followed(at: str, axis: Follows, followed: Axis | AttainableRatio | Fixed | None) -> None:
    """A value for every one that the other setting may have."""
    if len(dict(axis.values)) < len(axis.values):
        raise SSNError(f"{at} names a value of {axis.key} twice")
    if followed is None:
        return
    if not isinstance(followed, Choice | Fixed | Follows):
        raise SSNError(f"{at} follows {axis.key}, which must be a list of values then")
    for value in _sample(followed):
        if value not in dict(axis.values):
            raise SSNError(f"{at} has no value for {axis.key}={show(value)}; name it")


def _check_values(key: str, values: Sequence[Any], where: str) -> None:
    for value in values:
        _try_config(flatten(Config()) | {key: value}, where)


def _try_config(config: Mapping[str, Any], where: str) -> None:
    try:
        unflatten(config)
    except SSNError as error:
        raise SSNError(f"{where}: {error}") from error
