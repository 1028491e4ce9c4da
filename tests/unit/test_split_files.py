"""Split files are pickles of strangers: plain content is read, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from ssn.data.split_files import MAX_BYTES, read_list, read_two_lists
from ssn.errors import SSNError


class _Attack:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "split_weakly_16.pyb"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("container", [list, tuple, set])
def test_plain_content_of_any_protocol_is_read(path: Path, protocol: int, container: type) -> None:
    train, test = container([(10000, True), (10001, False)]), container([("20000", True)])
    path.write_bytes(pickle.dumps((train, test), protocol=protocol))
    assert read_two_lists(path) == ({"10000": True, "10001": False}, {"20000": True})
    path.write_bytes(pickle.dumps(train, protocol=protocol))
    assert read_list(path) == {"10000": True, "10001": False}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_refused_and_does_not_run(path: Path, tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "made"
    path.write_bytes(pickle.dumps(([(1, True)], [_Attack(target)]), protocol=protocol))
    with pytest.raises(SSNError, match=r"_16.pyb is not read \(it names \w+.mkdir\): a pickle may hold code"):
        read_two_lists(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())  # the attack is a real one
    assert target.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\nexec\n(S'1'\ntR.",
        b"cbuiltins\nset.__class__\n.",
        b"(ios\nsystem\nS'true'\no.",
        b"\x80\x02cbuiltins\ngetattr\n.",
    ],
)
def test_handwritten_attacks_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(SSNError, match="is not read") as error:
        read_list(path)
    assert "\n" not in str(error.value)


def test_numpy_scalars_are_refused_by_name(path: Path) -> None:
    path.write_bytes(pickle.dumps([(np.int64(1), np.bool_(True))]))
    with pytest.raises(SSNError, match=r"it names numpy\..*scalar.*only lists, tuples, sets, text and numbers"):
        read_list(path)


@pytest.mark.parametrize("data", [b"", b"junk", pickle.dumps([(1, True)])[:-4]])
def test_damaged_files_are_named(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(SSNError, match=r"split_weakly_16.pyb is not read") as error:
        read_list(path)
    assert "\n" not in str(error.value)


def test_missing_and_huge_files_are_named(path: Path) -> None:
    with pytest.raises(SSNError, match=r"split_weakly_16.pyb cannot be read \(No such file"):
        read_list(path)
    path.write_bytes(b"\0" * (MAX_BYTES + 1))
    with pytest.raises(SSNError, match="is larger than 16 MB"):
        read_list(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([(1, True)], "must hold two lists"),
        (([(1, True)], [(2,)]), r"holds \(2,\), but a sample is a \(name, true or false\) pair"),
        (([(1, True)], 3), "holds a int where samples are listed"),
        (([(1.5, True)], []), r"holds \(1.5, True\)"),
    ],
)
def test_content_arranged_otherwise_is_refused(path: Path, content: object, message: str) -> None:
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(SSNError, match=message):
        read_two_lists(path)
