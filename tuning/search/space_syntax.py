"""How a search space is written in YAML: a mapping of dotted config keys to axes.

An axis is one of

* ``{low: 1e-3, high: 0.3, log: true}``: a range, linear unless ``log``; of whole numbers where the setting is one, then
  also with ``step``;
* ``[icpr, jims]`` or ``{values: [icpr, jims]}``: a choice. Of settings that are lists themselves,
  ``[[2, 3], [1, 2]]``; a number stands for a square in ``{values: [256, 320]}`` of an image size;
* ``attainable`` or ``{attainable: [0.5, 1]}``: the supervision ratios that select a whole number of masks;
* ``{follows: model.backbone, values: {resnet18: a.safetensors, resnet34: b.safetensors}}``: given by another setting;
* ``0.2`` or ``{value: [2, 3]}``: fixed, for the first trial too;
* ``null``: not searched, which takes an axis of the default space out.

Every mapping but the fixed value's may have ``when: {train.supervision_ratio: "< 1", model.variant: jims}``: the axis
is searched only in trials that meet all conditions, and elsewhere the setting keeps its configured value. A condition
is a value, a list of values, or a comparison (``<``, ``<=``, ``>``, ``>=``, ``!=``) in quotes.
``train.weak_labels`` needs none: it is searched only where the supervision ratio leaves an image.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, cast, get_args, get_origin

from ssn.config import Config
from ssn.errors import SSNError
from tuning.search.space import (
    COMPARISONS,
    RATIO_KEY,
    AttainableRatio,
    Axis,
    Choice,
    Condition,
    Fixed,
    FloatRange,
    Follows,
    IntRange,
    Relation,
    check_key,
)

DEFAULT_SPACE: Mapping[str, object] = {
    "synthesis.noise_sigma": {"low": 1e-3, "high": 0.3, "log": True},
    "synthesis.perlin_threshold": {"low": 0.0, "high": 0.7},
    RATIO_KEY: "attainable",
}
"""What a sweep searches unless told otherwise: sensible bounds for WideResNet50 and its like."""

_FORMS: Mapping[str, frozenset[str]] = {
    "low": frozenset({"low", "high", "log", "step", "when"}),
    "follows": frozenset({"follows", "values", "when"}),
    "values": frozenset({"values", "when"}),
    "attainable": frozenset({"attainable", "when"}),
    "value": frozenset({"value"}),
}
"""By the field that tells one from the others, in the order in which they are looked for: an axis's possible fields."""

_COMPARISON = re.compile(r"(<=|>=|<|>|!=)\s*(.*)", re.DOTALL)


def parse_space(
    written: Mapping[str, object], *, where: str = "search.space"
) -> dict[str, Axis | AttainableRatio | Fixed]:
    """Read a space; keys whose axis is null are left out.

    Args:
        written: As YAML has it.
        where: Names it in errors.

    Raises:
        SSNError: a key is unknown, or an axis cannot be read.
    """
    for key in written:
        check_key(key, where, searched=written[key] is not None)
    return {key: _parse_axis(key, axis, where) for key, axis in written.items() if axis is not None}


def _parse_axis(key: str, written: Any, where: str) -> Axis | AttainableRatio | Fixed:
    if written == "attainable":
        return AttainableRatio()
    if isinstance(written, Mapping):
        return _parse_fields(key, dict(written), where)
    if not isinstance(written, list | tuple):
        return Fixed(_read(key, written, where))
    if _is_list(key) and not any(isinstance(value, list | tuple) for value in written):
        example = list(written)
        raise SSNError(
            f"{where}: {key} is {example}, which may be one value or several; write {{value: {example}}} for one, or a "
            f"list of lists such as [{example}] for several"
        )
    return Choice(_read_all(key, written, where))


def _parse_fields(key: str, fields: dict[Any, Any], where: str) -> Axis | AttainableRatio | Fixed:
    at = f"{where}: {key}"
    form = next((name for name in _FORMS if name in fields), None)
    if form is None:
        raise SSNError(
            f"{at} has {', '.join(map(str, fields)) or 'nothing'}, but an axis has low and high, values, value, "
            "attainable, or follows and values"
        )
    for name in fields:
        if name not in _FORMS[form]:
            near = difflib.get_close_matches(str(name), _FORMS[form], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(_FORMS[form]))}"
            raise SSNError(f"{at} has no field {name!r} beside {form!r}; {hint}")
    when = _parse_when(fields.pop("when", None), at, where)
    if form == "value":
        return Fixed(_read(key, fields["value"], where))
    if form == "attainable":
        low, high = _pair(at, fields["attainable"])
        return AttainableRatio(float(_read(RATIO_KEY, low, where)), float(_read(RATIO_KEY, high, where)), when)
    if form == "follows":
        return _parse_follows(key, fields, when, where)
    if form == "values":
        if not isinstance(fields["values"], list | tuple):
            raise SSNError(f"{at} has the values {fields['values']!r}, but they must be a list")
        return Choice(_read_all(key, fields["values"], where), when)
    return _parse_range(key, fields, when, where)


def _parse_range(key: str, fields: Mapping[str, Any], when: tuple[Condition, ...], where: str) -> FloatRange | IntRange:
    at = f"{where}: {key}"
    if "high" not in fields:
        raise SSNError(f"{at} has low, but no high")
    kinds = _kinds(key)
    if not (float in kinds or int in kinds):
        raise SSNError(f"{at} is not a number, so it has no range; give a list of values")
    low, high = (_read(key, fields[end], where) for end in ("low", "high"))
    log, step = fields.get("log", False), fields.get("step", 1)
    if not isinstance(log, bool):
        raise SSNError(f"{at}.log is {log!r}, but must be true or false")
    if isinstance(step, bool) or not isinstance(step, int):
        raise SSNError(f"{at}.step is {step!r}, but must be an integer")
    if low is None or high is None:
        raise SSNError(f"{at} runs from {low} to {high}, but both ends must be numbers")
    if float in kinds:
        if "step" in fields:
            raise SSNError(f"{at} is continuous, so it has no step; leave it out or give a list of values")
        return FloatRange(float(low), float(high), log, when)
    return IntRange(low, high, log, step, when)


def _parse_follows(key: str, fields: Mapping[str, Any], when: tuple[Condition, ...], where: str) -> Follows:
    other, values = str(fields["follows"]), fields.get("values")
    at = f"{where}: {key}"
    check_key(other, where, searched=False)
    if not isinstance(values, Mapping):
        raise SSNError(f"{at} follows {other}, so its values must be a mapping from those of {other}")
    pairs = tuple((_read(other, from_, where), _read(key, to, where)) for from_, to in values.items())
    return Follows(other, pairs, when)


def _parse_when(written: Any, at: str, where: str) -> tuple[Condition, ...]:
    if written is None:
        return ()
    if not isinstance(written, Mapping):
        raise SSNError(f'{at}.when is {written!r}, but must be keys and conditions, such as {{{RATIO_KEY}: "< 1"}}')
    conditions = []
    for key, condition in written.items():
        check_key(str(key), f"{at}.when", searched=False)
        conditions.append(_parse_condition(str(key), condition, f"{at}.when", where))
    return tuple(conditions)


def _parse_condition(key: str, written: Any, at: str, where: str) -> Condition:
    compared = _COMPARISON.fullmatch(written) if isinstance(written, str) else None
    if compared:
        relation, value = compared[1], _read(key, compared[2], where)
        if relation in COMPARISONS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise SSNError(f"{at} compares {key}, which is not a number; give a value or a list of values")
        return Condition(key, cast(Relation, relation), (value,))
    one = not isinstance(written, list | tuple)
    one = one or (_is_list(key) and not any(isinstance(value, list | tuple) for value in written))
    return Condition(key, "in", _read_all(key, [written] if one else written, where))


def _read(key: str, written: Any, where: str) -> Any:
    from ssn.loader import read_value

    if isinstance(written, str) and int in _kinds(key) and float not in _kinds(key):
        written = int(written) if re.fullmatch(r"[+-]?\d+", written) else written
    return read_value(Config, key, written, where)


def _read_all(key: str, written: Any, where: str) -> tuple[Any, ...]:
    return tuple(_read(key, value, where) for value in written)


def _pair(at: str, written: Any) -> tuple[Any, Any]:
    if not isinstance(written, list | tuple) or len(written) != 2:
        raise SSNError(f"{at}.attainable is {written!r}, but must be two ratios, such as [0.5, 1]")
    return written[0], written[1]


def _kinds(key: str) -> tuple[Any, ...]:
    """The types that a setting may have."""
    from ssn.loader import leaf_types

    hint = leaf_types(Config)[key]
    return (hint,) if get_origin(hint) is tuple or not get_args(hint) else get_args(hint)


def _is_list(key: str) -> bool:
    return any(get_origin(kind) is tuple for kind in _kinds(key))
