"""Configuration from files and ``--set`` options, checked against the dataclasses it fills.

The one place where pydantic is used, and only the command lines and what reads a search space import it: the
dataclasses themselves, and everything that runs on a worker, need the standard library alone. Any frozen dataclass
whose fields are plain values, mappings or further dataclasses can be loaded; nothing here knows a setting by name.

A field that is a mapping takes any keys, dots and all: ``search.space.train.lr_heads=...`` sets the key
``train.lr_heads`` of the mapping ``search.space``. Sources are merged key by key, over the field's default, and so are
the inner ones of a mapping of mappings, whose own key ends at the first dot of a ``--set`` option. What a mapping holds
is for its owner to check.

What wins, from the weakest: the dataclass's defaults, a dataset manifest's defaults, named settings such as one
configuration of a benchmark, YAML files in the order given, ``--set`` options in the order given, ``--over`` options.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ssn.errors import SSNError

T = TypeVar("T")

_NULL_WORDS = ("", "~", "null", "none")

_Path = tuple[str, ...]
"""Dotted key of a setting and, in a mapping, the keys below it."""


@dataclasses.dataclass(frozen=True)
class _Setting:
    value: Any
    origin: str
    """Where it was written, as the error message names it."""
    text: str | None = None
    """What was typed after ``=``, for ``--set`` alone."""


def load_config(
    cls: type[T],
    *,
    files: Sequence[Path] = (),
    sets: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    named: Mapping[str, Mapping[Any, Any]] | None = None,
    overs: Sequence[str] = (),
) -> T:
    """Build ``cls`` from its own defaults, then ``defaults``, ``named``, ``files``, ``sets`` and ``overs``.

    Args:
        cls: A frozen dataclass whose fields are plain values or dataclasses (``ssn.config.Config``).
        files: YAML files, nested by section or with dotted keys; a later file wins.
        sets: ``section.name=value`` strings; the value is read as YAML, and according to the field's type: ``1e-4``
            is a number where the field is one, a path stays text, ``data.image_size=256`` is a square.
        defaults: Flat dotted keys of a dataset manifest.
        named: Settings as a file has them, by the name that error messages give them.
        overs: As ``sets``, from ``--over``.

    Raises:
        SSNError: a key is unknown, a value has the wrong type or is out of range, or a file cannot be read.
    """
    leaves = dict(_leaves(cls))
    settings: dict[_Path, _Setting] = {}
    for key, value in (defaults or {}).items():
        settings.update(_flatten(key, value, "the dataset's defaults", leaves))
    for origin, content in [*(named or {}).items(), *((str(file), read_yaml(file)) for file in files)]:
        for key, value in content.items():
            settings.update(_flatten(str(key), value, origin, leaves))
    for option, text in [*(("--set", text) for text in sets), *(("--over", text) for text in overs)]:
        key, separator, raw = text.partition("=")
        if not separator or not key.strip():
            raise SSNError(f"{option} {text!r} is not of the form section.name=value")
        key, origin = key.strip(), f"{option} {text}"
        value = _parse_yaml(raw, origin)
        if _mapping_of(key, leaves):
            settings.update(_flatten(key, value, origin, leaves))
            continue
        _check_known(key, origin, leaves)
        settings[key,] = _Setting(value, origin, raw.strip())
    values: dict[str, Any] = {}
    for (key, *inner), setting in settings.items():
        if inner:
            values.setdefault(key, {})[tuple(inner)] = setting.value
        else:
            values[key] = _convert(key, setting, leaves[key])
    built: T = _build(cls, "", values)
    return built


@functools.cache
def leaf_types(cls: type) -> Mapping[str, Any]:
    """Dotted key and type of every setting of a dataclass."""
    return dict(_leaves(cls))


def read_value(cls: type, key: str, value: Any, origin: str) -> Any:
    """A value as the setting ``key`` of ``cls`` takes it: ``"1e-4"`` is a number where the setting is one.

    Args:
        cls: As for :func:`load_config`.
        key: Dotted; must be known.
        value: As YAML has it.
        origin: Where it was written, for the error.

    Raises:
        SSNError: it has the wrong type.
    """
    return _convert(key, _Setting(value, origin), leaf_types(cls)[key])


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and type of every field that is not itself a section."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _leaves(hint, f"{key}.")
        else:
            yield key, hint


def _build(cls: type, prefix: str, values: Mapping[str, Any]) -> Any:
    hints, arguments = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            arguments[field.name] = _build(hint, f"{key}.", values)
        elif key in values and _depth(hint):
            default = {} if field.default_factory is dataclasses.MISSING else field.default_factory()
            arguments[field.name] = _merge(default, values[key])
        elif key in values:
            arguments[field.name] = values[key]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SSNError(f"{key} has no default; give it with --set {key}=...")
    return cls(**arguments)


def _merge(default: Mapping[str, Any], changes: Mapping[_Path, Any]) -> dict[str, Any]:
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in default.items()}
    for path, value in changes.items():
        (merged.setdefault(path[0], {}) if len(path) == 2 else merged)[path[-1]] = value
    return merged


def _depth(hint: Any) -> int:
    """How many keys lead to what a mapping, or a mapping of mappings, holds; 0: it is no mapping."""
    return 1 + _depth(get_args(hint)[1]) if get_origin(hint) is Mapping else 0


def _mapping_of(key: str, leaves: Mapping[str, Any]) -> str | None:
    """The setting with a mapping that a dotted key is, or leads into."""
    return next((leaf for leaf in leaves if _depth(leaves[leaf]) and f"{key}.".startswith(f"{leaf}.")), None)


def _flatten(key: str, value: Any, origin: str, leaves: Mapping[str, Any]) -> dict[_Path, _Setting]:
    mapping = _mapping_of(key, leaves)
    if mapping:
        depth, rest = _depth(leaves[mapping]), key[len(mapping) + 1 :]
        return _flatten_mapping((mapping, *(rest.split(".", depth - 1) if rest else ())), value, origin, depth)
    is_section = any(leaf.startswith(f"{key}.") for leaf in leaves)
    if not is_section:
        _check_known(key, origin, leaves)
        return {(key,): _Setting(value, origin)}
    if value is None:  # a section with every line commented out
        return {}
    if not isinstance(value, Mapping):
        example = next(leaf for leaf in leaves if leaf.startswith(f"{key}."))
        raise SSNError(f"{key} is {value!r}, but it is a section and must hold keys such as {example} ({origin})")
    flat: dict[_Path, _Setting] = {}
    for name, nested in value.items():
        flat.update(_flatten(f"{key}.{name}", nested, origin, leaves))
    return flat


def _flatten_mapping(path: _Path, value: Any, origin: str, depth: int) -> dict[_Path, _Setting]:
    if len(path) == depth + 1:
        return {path: _Setting(value, origin)}
    if value is None:  # every line commented out
        return {}
    if not isinstance(value, Mapping):
        raise SSNError(f"{'.'.join(path)} is {value!r}, but it must hold keys and their values ({origin})")
    flat: dict[_Path, _Setting] = {}
    for name, nested in value.items():
        flat.update(_flatten_mapping((*path, str(name)), nested, origin, depth))
    return flat


def _check_known(key: str, origin: str, leaves: Mapping[str, Any]) -> None:
    if key in leaves:
        return
    nested = [leaf for leaf in leaves if leaf.startswith(f"{key}.")]
    if nested:
        raise SSNError(f"{key} is a section, not a setting ({origin}); set one of its keys, such as {nested[0]}")

    def likeness(leaf: str) -> float:
        whole = difflib.SequenceMatcher(None, key, leaf).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], leaf.rpartition(".")[2]).ratio()
        return max(whole, last) + 0.1 * whole

    raise SSNError(f"unknown config key {key} ({origin}); did you mean {max(leaves, key=likeness)}?")


def _convert(key: str, setting: _Setting, hint: Any) -> Any:
    value = setting.value
    kinds = _alternatives(hint)
    if setting.text is not None and str in kinds:
        value = None if type(None) in kinds and setting.text.lower() in _NULL_WORDS else setting.text
    elif any(get_origin(kind) is Literal and setting.text in get_args(kind) for kind in kinds):
        value = setting.text  # YAML 1.1 reads words such as "no" and "off" as booleans
    elif isinstance(value, str):
        value = _number_or_list(value.strip(), kinds)
    sequence = next((kind for kind in kinds if get_origin(kind) is tuple), None)
    if sequence is not None:
        items = get_args(sequence)
        if isinstance(value, list | tuple):
            value = tuple(float(v) if isinstance(v, str) and _is_number(v) and float in items else v for v in value)
        elif type(value) is int and items == (int, int):
            value = (value, value)
        elif type(value) in items and items[-1] is Ellipsis:
            value = (value,)
    try:
        # strict: true is no integer, "3" is no number; integers are fine where a float is wanted
        return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        shown = setting.text if setting.text is not None else setting.value
        raise SSNError(f"{key} is {shown!r}, but must be {_describe(hint)} ({setting.origin})") from error


def _number_or_list(text: str, kinds: Sequence[Any]) -> Any:
    """What YAML 1.1 leaves as text although a person means a number (``1e-4``) or a list (``256,320``)."""
    if type(None) in kinds and text.lower() in _NULL_WORDS:
        return None
    if float in kinds and _is_number(text):
        return float(text)
    if "," in text and any(get_origin(kind) is tuple for kind in kinds):
        return [_parse_yaml(part, text) for part in text.split(",")]
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _describe(hint: Any) -> str:
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}
    plurals = {int: "integers", float: "numbers", str: "texts"}
    described: list[str] = []
    for kind in _alternatives(hint):
        items = get_args(kind)
        if get_origin(kind) is Literal:
            described.extend(str(item) for item in items)
        elif get_origin(kind) is tuple:
            count = "a list of" if items[-1] is Ellipsis else {2: "two", 3: "three"}.get(len(items), str(len(items)))
            described.append(f"{count} {plurals.get(items[0], 'values')}")
        else:
            described.append(names.get(kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(described)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            name = str(key_node.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name} occurs twice", key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise SSNError(f"{origin}{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from error


def read_yaml(file: Path) -> Mapping[Any, Any]:
    """The mapping in a YAML file, in which no key may occur twice; an empty file is an empty one.

    Raises:
        SSNError: it cannot be read, is not YAML, or holds something else.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SSNError(f"cannot read the configuration file {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SSNError(f"the configuration file {file} is not UTF-8 text; save it as UTF-8") from error
    loaded = _parse_yaml(text, str(file))
    if loaded is None:
        return {}
    if not isinstance(loaded, Mapping):
        raise SSNError(f"the configuration file {file} must hold sections (model:, train:, ...), not {loaded!r:.60}")
    return loaded
