"""What a search varies: plain dataclasses keyed by dotted config keys, checked before anything starts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ssn.config import Config, flatten, unflatten
from ssn.errors import SSNError

RATIO_KEY = "train.supervision_ratio"
WEAK_KEY = "train.weak_labels"

# Fixed for a whole sweep: budgets and seeds must be equal for trials to compare, and evaluation is the yardstick.
_FIXED_KEYS = ("train.epochs", "train.label_seed", "train.train_seed")
_FIXED_SECTIONS = ("eval.",)


@dataclass(frozen=True)
class FloatRange:
    """A continuous range, both ends included."""

    low: float
    high: float
    log: bool = False
    """Sample the logarithm uniformly; needs ``low > 0``."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Choice:
    """Some values; increasing numbers are searched as an ordered axis, everything else as unordered categories."""

    values: tuple[Any, ...]
    ratio_below: float = math.inf
    """Searched only in trials whose ``train.supervision_ratio`` is below this; the others have the base's value."""

    @property
    def ordered(self) -> bool:
        """Whether neighbouring values are alike, so that a sampler may interpolate between them."""
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)
        return numbers and list(self.values) == sorted(set(self.values))

    def __contains__(self, value: object) -> bool:
        return value in self.values


@dataclass(frozen=True)
class AttainableRatio:
    """Supervision ratios that select a whole number of labelled masks; a :class:`Choice` once the pool is known."""

    low: float = 0.0
    high: float = 1.0


Axis = FloatRange | Choice
SearchSpace = Mapping[str, FloatRange | Choice | AttainableRatio]


def applies(axis: Axis, config: Mapping[str, Any]) -> bool:
    """Whether an axis is searched in a trial, given the values that do not depend on others."""
    return not isinstance(axis, Choice) or config[RATIO_KEY] < axis.ratio_below


def validate_space(space: SearchSpace) -> None:
    """Refuse a search space with an unknown or fixed key, or with a value no configuration may have.

    Raises:
        SSNError: naming the key, what it has and what is allowed.
    """
    if not space:
        raise SSNError("search space: it is empty; name at least one config key")
    known = flatten(Config())
    for key, axis in space.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise SSNError(f"search space: unknown config key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if key in _FIXED_KEYS or key.startswith(_FIXED_SECTIONS):
            raise SSNError(f"search space: {key} is the same for all trials of a sweep; set it outside of the space")
        if isinstance(axis, FloatRange):
            _check_range(key, axis, known[key])
            _check_values(key, (axis.low, axis.high))
        elif isinstance(axis, AttainableRatio):
            if key != RATIO_KEY:
                raise SSNError(f"search space: {key} cannot be 'attainable'; only {RATIO_KEY} can")
            if not 0 <= axis.low <= axis.high <= 1:
                raise SSNError(f"search space: {key} is {axis.low}..{axis.high}, but must lie within 0..1")
        else:
            if not axis.values:
                raise SSNError(f"search space: {key} has no values")
            if len(set(axis.values)) < len(axis.values):
                raise SSNError(f"search space: {key} names a value twice: {list(axis.values)}")
            for value in axis.values:
                _check_type(key, value, known[key])
            _check_values(key, axis.values)


def resolve_space(
    space: SearchSpace, *, category: str, base: Mapping[str, Any], attainable: Sequence[float], num_defective: int
) -> tuple[dict[str, Axis], list[str]]:
    """The search space of one category, where the supervision ratio has become a choice among attainable counts.

    Args:
        space: As validated by :func:`validate_space`.
        category: Named in notices and errors.
        base: The category's configuration, flat; the first trial is this configuration, unchanged.
        attainable: Ratios k/n, k in 0..n, for a pool of n masks; ``[0.0]`` where the pool has no masks.
        num_defective: Images in the pool, with and without masks.

    Returns:
        The axes, those that depend on others last, and notices to show the user: where a setting has nothing to act on,
        and so is not searched if it was to be, because the pool lacks masks, images without a used mask, or images.

    Raises:
        SSNError: the base configuration lies outside of the space, so that it could not be the first trial.
    """
    if space:
        validate_space(space)
    axes: dict[str, Axis] = {}
    notices: list[str] = []
    for key, axis in space.items():
        if key == RATIO_KEY and max(attainable, default=0.0) == 0:
            if base[key] != 0:
                raise SSNError(f"{category}: {key} is {base[key]}, but its pool has no masks; set it to 0")
            notices.append(f"{category}: the pool has no masks, so {key} is fixed at 0")
            continue
        if isinstance(axis, AttainableRatio):
            axis = Choice(tuple(r for r in sorted(set(attainable)) if axis.low <= r <= axis.high))
            if not axis.values:
                raise SSNError(
                    f"{category}: none of the attainable ratios {sorted(set(attainable))} lies in the search space's "
                    f"range of {key}; widen it"
                )
        if _hashable(base[key]) not in axis:
            within = f"{axis.low}..{axis.high}" if isinstance(axis, FloatRange) else f"{list(axis.values)}"
            raise SSNError(
                f"{category}: the default {key}={base[key]} is not in the search space ({within}), but is always the "
                "first trial; widen the space or change the default"
            )
        axes[key] = axis
    if RATIO_KEY not in space and base[RATIO_KEY] > 0 and max(attainable, default=0.0) == 0:
        notices.append(f"{category}: the pool has no masks, so {RATIO_KEY} is taken as 0")
    if WEAK_KEY in axes:
        weak, why_not = _condition(axes.pop(WEAK_KEY), axes.get(RATIO_KEY), base, len(attainable) - 1, num_defective)
        if weak is not None:
            axes[WEAK_KEY] = weak
        else:
            notices.append(f"{category}: {why_not}, so {WEAK_KEY} is not searched")
    elif base[WEAK_KEY] == "use" and num_defective == 0:
        notices.append(f"{category}: the pool has no defective images, so {WEAK_KEY}=use adds none")
    return axes, notices


def _condition(
    weak: Axis, ratio: Axis | None, base: Mapping[str, Any], num_masks: int, num_defective: int
) -> tuple[Choice | None, str]:
    """The axis of weak labels, restricted to trials in which it makes a difference; None, and why, if it never does."""
    assert isinstance(weak, Choice)
    if num_defective == 0:
        return None, "the pool has no defective images"
    if num_defective > num_masks:
        return weak, ""
    below = (num_masks - 0.5) / num_masks  # from there on every mask is used
    lowest = base[RATIO_KEY] if ratio is None else ratio.low if isinstance(ratio, FloatRange) else min(ratio.values)
    if lowest >= below:
        return None, "every image of the pool is used with its mask"
    return (weak if ratio is None else replace(weak, ratio_below=below)), ""


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_range(key: str, axis: FloatRange, default: Any) -> None:
    if not isinstance(default, float):
        raise SSNError(f"search space: {key} is not a continuous setting; give a list of values")
    if not (math.isfinite(axis.low) and math.isfinite(axis.high) and axis.low < axis.high):
        raise SSNError(f"search space: {key} is {axis.low}..{axis.high}, but low must be less than high")
    if axis.log and axis.low <= 0:
        raise SSNError(f"search space: {key}.low is {axis.low}, but a log scale needs it to be positive")


def _check_type(key: str, value: Any, default: Any) -> None:
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
        raise SSNError(f"search space: {key} has the value {value!r}, but must be of type {expected[0].__name__}")


def _check_values(key: str, values: Sequence[Any]) -> None:
    for value in values:
        try:
            unflatten(flatten(Config()) | {key: value})
        except SSNError as error:
            raise SSNError(f"search space: {error}") from error
