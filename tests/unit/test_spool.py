"""Arrays in a temporary file: what went in comes out, and nothing stays behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from ssn.errors import SSNError
from ssn.spool import Spool


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, bool])
def test_what_was_appended_is_read_and_mapped(scratch: Path, dtype: type) -> None:
    arrays = np.random.default_rng(0).integers(0, 2, size=(5, 3, 4)).astype(dtype)
    with Spool((3, 4), dtype) as spool:
        for index, array in enumerate(arrays):
            spool.append(np.asfortranarray(array))
            assert len(spool) == index + 1
            assert spool[0].tolist() == arrays[0].tolist()  # reading does not disturb writing
        assert np.array_equal(np.stack(list(spool)), arrays)
        assert np.array_equal(spool[-1], arrays[-1])
        with pytest.raises(IndexError):
            spool[5]
        mapped = spool.mapped()
    assert mapped.dtype == np.dtype(dtype)
    assert np.array_equal(mapped, arrays)
    assert not mapped.flags.writeable
    assert list(scratch.iterdir()) == []


def test_arrays_read_belong_to_the_reader(scratch: Path) -> None:
    with Spool((2,), np.float32) as spool:
        spool.append(np.ones(2))
        spool[0][:] = 7
        assert spool[0].tolist() == [1, 1]


def test_nothing_maps_to_nothing(scratch: Path) -> None:
    with Spool((3, 4), np.float32) as spool:
        assert spool.mapped().shape == (0, 3, 4)
        assert list(spool) == []


def test_other_shapes_are_refused(scratch: Path) -> None:
    with Spool((3, 4), np.float32) as spool, pytest.raises(ValueError, match=r"\(4, 3\) in a spool of \(3, 4\)"):
        spool.append(np.zeros((4, 3)))


def test_full_disk_and_missing_folder_are_one_line(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "TemporaryFile", lambda **_: full.open("r+b", buffering=0))
        with (
            Spool((3, 4), np.float32) as spool,
            pytest.raises(SSNError, match=r"^cannot keep results .* \(No space left on device\); set TMPDIR"),
        ):
            spool.append(np.zeros((3, 4)))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch / "missing"))
    with pytest.raises(SSNError, match=r"\(No such file or directory\); set TMPDIR"):
        Spool((3, 4), np.float32)
