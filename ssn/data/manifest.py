"""What a dataset is: a YAML file read into a frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ssn.config import Config, flatten, unflatten
from ssn.data.layouts import LAYOUTS
from ssn.data.splits import SplitPolicy
from ssn.errors import SSNError
from ssn.resources import list_resources

Masks = Literal["required", "optional", "none"]


@dataclass(frozen=True)
class Manifest:
    """One dataset, as its manifest describes it."""

    name: str
    """Folder of its shards; letters, digits, ``_`` and ``-``."""
    layout: str
    """How the raw folder is arranged: a name in :data:`ssn.data.layouts.LAYOUTS`."""
    title: str = ""
    license: str = ""
    homepage: str = ""
    categories: tuple[str, ...] = ()
    """Known categories; empty: whatever the raw folder holds."""
    masks: Masks = "optional"
    """``required``: every defective image must have one; ``none``: they are ignored."""
    mask_threshold: int = 128
    """Lowest level, in 1..255, of a raw mask that means defective."""
    splits: SplitPolicy = field(default_factory=SplitPolicy)
    """How images are divided."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Dotted configuration keys and the values this dataset starts from."""
    category_defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Category to the defaults it has instead."""

    def defaults_of(self, category: str) -> dict[str, Any]:
        """Dotted configuration keys and the values that a category starts from."""
        return {**self.defaults, **self.category_defaults.get(category, {})}


def load_manifest(name_or_path: str | Path) -> Manifest:
    """Read a manifest: a packaged one by name, or any by the path of its YAML file.

    Raises:
        SSNError: no such manifest, or a key or value in it is wrong.
    """
    path = _find(str(name_or_path))
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SSNError(f"manifest {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SSNError(f"manifest {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SSNError(f"manifest {path} must be a mapping of keys; start from datasets/folder_template.yaml")
    return parse_manifest(content, source=str(path))


def parse_manifest(content: Mapping[str, Any], *, source: str) -> Manifest:
    """Check a manifest's content.

    Args:
        content: The parsed YAML.
        source: What to call it in an error.

    Raises:
        SSNError: a key is unknown or missing, or a value is out of range.
    """
    reject_unknown(content, [f.name for f in dataclasses.fields(Manifest)], f"key in {source}")
    for key in ("name", "layout"):
        if not content.get(key):
            raise SSNError(f"{source}: key {key!r} is missing")
    values = dict(content)
    for key in ("name", "layout", "title", "license", "homepage", "masks"):
        if key in values and not isinstance(values[key], str):
            raise SSNError(f"{source}: {key} is {values[key]!r}, but must be text (put quotes around it)")
    if not is_plain_name(values["name"]):
        raise SSNError(f"{source}: name {values['name']!r} may hold only letters, digits, _ and -")
    reject_unknown([values["layout"]], LAYOUTS, f"layout in {source}")
    if "masks" in values:
        reject_unknown([values["masks"]], get_args(Masks), f"value of masks in {source}")
    threshold = values.get("mask_threshold", 128)
    if not _is_int(threshold) or not 1 <= threshold <= 255:
        raise SSNError(f"{source}: mask_threshold is {threshold!r}, but must be a whole number in 1..255")
    categories = values.get("categories") or []
    if not isinstance(categories, list) or not all(isinstance(name, str) for name in categories):
        raise SSNError(f"{source}: categories must be a list of text (put quotes around numbers)")
    values["categories"] = tuple(categories)
    values["splits"] = SplitPolicy.parse(values.get("splits") or {}, source=source)
    values["defaults"] = _parse_defaults(values.get("defaults") or {}, "defaults", source)
    own = values.get("category_defaults") or {}
    if not isinstance(own, dict):
        raise SSNError(f"{source}: category_defaults must map categories to defaults")
    if values["categories"]:
        reject_unknown(own, values["categories"], f"category under category_defaults in {source}")
    values["category_defaults"] = {
        category: _parse_defaults(content, f"category_defaults.{category}", source) for category, content in own.items()
    }
    return Manifest(**values)


def reject_unknown(names: Iterable[str], valid: Iterable[str], what: str) -> None:
    """Refuse the first of ``names`` that is not ``valid``, naming the nearest that is.

    Raises:
        SSNError: ``unknown <what> 'x'; did you mean 'y'?``
    """
    allowed = list(valid)
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(sorted(allowed)) or 'none'}"
            raise SSNError(f"unknown {what} {name!r}; {hint}")


def is_plain_name(name: str) -> bool:
    """Whether a name is safe as a folder on every store: letters, digits, ``_``, ``-``, and dots inside."""
    return bool(name) and name.replace("_", "a").replace("-", "a").replace(".", "a").isalnum() and name[0] != "."


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise SSNError(f"manifest {path} does not exist; give the path of a YAML file or a packaged dataset's name")
        return path
    packaged = list_resources("datasets")
    reject_unknown([name_or_path], packaged, "dataset")
    return packaged[name_or_path]


def _parse_defaults(content: Any, where: str, source: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise SSNError(f"{source}: {where} must map dotted configuration keys to values")
    built_in = flatten(Config())
    reject_unknown(content, built_in, f"configuration key under {where} in {source}")
    for key, value in content.items():
        expected = built_in[key]
        if isinstance(expected, float) and _is_int(value):
            continue
        if expected is not None and type(value) is not type(expected):
            hint = " (YAML wants 1.0e-4, not 1e-4)" if isinstance(expected, float) else ""
            raise SSNError(f"{source}: default {key} is {value!r}, but must be like {expected!r}{hint}")
    try:
        config = unflatten({**built_in, **content})
    except SSNError as error:
        raise SSNError(f"{source}: default {error}") from error
    flat = flatten(config)
    return {key: flat[key] for key in content}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
