"""The split files that authors publish as Python pickles, read without running what is in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from ssn.errors import SSNError

MAX_BYTES = 16 * 2**20
"""Split files hold some kilobytes; a larger one is no split file."""

# Older pickles name the class of a set; lists, tuples, text, numbers and truth values are never looked up by name.
_ADMITTED: dict[tuple[str, str], type] = {
    (module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)
}
_WAY_OUT = "restore the published file, or remove it"

Marked = dict[str, bool]
"""A sample's name, and whether it is marked as fully labelled."""


def read_two_lists(path: Path) -> tuple[Marked, Marked]:
    """Read a file of training and of test samples, as published with KolektorSDD2.

    Raises:
        SSNError: the file cannot be read, holds anything but plain containers, text and numbers, or is arranged
            otherwise.
    """
    content = _load(path)
    if not isinstance(content, list | tuple) or len(content) != 2:
        raise SSNError(f"split file {path} must hold two lists, of training and of test samples; {_WAY_OUT}")
    return _parse_samples(content[0], path), _parse_samples(content[1], path)


def read_list(path: Path) -> Marked:
    """Read a file of samples, as published for SensumSODF.

    Raises:
        SSNError: as :func:`read_two_lists`.
    """
    return _parse_samples(_load(path), path)


def _parse_samples(content: Any, path: Path) -> Marked:
    if not isinstance(content, list | tuple | set | frozenset):
        raise SSNError(f"split file {path} holds a {type(content).__name__} where samples are listed; {_WAY_OUT}")
    samples: Marked = {}
    for entry in content:
        match entry:
            case [str() | int() as name, bool() | int() as marked]:
                samples[str(name)] = bool(marked)
            case _:
                raise SSNError(f"split file {path} holds {entry!r:.60}, but a sample is a (name, true or false) pair")
    return samples


class _PlainUnpickler(pickle.Unpickler):
    """Admits plain containers, text, numbers and truth values: nothing that could run code."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ADMITTED[module, name]


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SSNError(f"split file {path} cannot be read ({error.strerror or error}); {_WAY_OUT}") from error
    if len(data) > MAX_BYTES:
        raise SSNError(f"split file {path} is larger than {MAX_BYTES // 2**20} MB, which no split file is; {_WAY_OUT}")
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # whatever damaged bytes make of the unpickler; find_class has let nothing run
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SSNError(
            f"split file {path} is not read ({reason:.120}): a pickle may hold code, so only lists, tuples, sets, text"
            f" and numbers are taken from one; {_WAY_OUT}"
        ) from error
