"""Lines that outlive the process that wrote them, in order, whatever the disk does."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssn.errors import SSNError
from tests.small_disk import small_disk
from tuning.tracking import journal as module
from tuning.tracking.journal import Journal


def lines(journal: Journal) -> list[bytes]:
    return [entry.line for entry in journal.read(10**6)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size_kb=64) as folder:
        yield folder


def test_lines_come_in_the_order_in_which_they_were_added(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "outbox")
    assert lines(journal) == []
    for i in range(3):
        assert journal.append(b"%d" % i)
    assert lines(journal) == [b"0", b"1", b"2"]
    assert not journal.has_more
    journal.append(b"3")
    assert journal.has_more
    assert lines(journal) == [b"3"]
    journal.close()


def test_what_was_not_ticked_off_comes_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for i in range(4):
        journal.append(b"%d" % i)
    first, second, *_ = journal.read(10)
    assert first.end is not None
    assert second.end is not None
    journal.acknowledge(second.end)
    assert journal.count_after(second.end) == 2
    journal.close()

    again = Journal(tmp_path)
    again.append(b"new")
    entries = again.read(10)
    assert [e.line for e in entries] == [b"2", b"3", b"new"]
    assert [again.is_new(e) for e in entries] == [False, False, True]
    again.close()


def test_segments_are_deleted_once_dealt_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 10)
    journal = Journal(tmp_path)
    for i in range(10):
        journal.append(b"%04d" % i)
    assert len(list(tmp_path.glob("*.jsonl"))) == 5
    entries = journal.read(7)
    assert entries[-1].end is not None
    journal.acknowledge(entries[-1].end)
    assert [p.name for p in sorted(tmp_path.glob("*.jsonl"))] == ["000004.jsonl", "000005.jsonl"]
    assert lines(journal) == [b"0007", b"0008", b"0009"]
    journal.close()
    again = Journal(tmp_path)
    assert lines(again) == [b"0007", b"0008", b"0009"]
    again.close()


def test_torn_end_of_a_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "000001.jsonl").write_bytes(b"whole\nhal")
    journal = Journal(tmp_path)
    journal.append(b"next")
    assert lines(journal) == [b"whole", b"next"]
    journal.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(SSNError, match="in use by another process"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SSNError, match=r"file/outbox cannot be written"):
        Journal(tmp_path / "file" / "outbox")


@pytest.mark.parametrize("taken", [0, 3], ids=["nothing", "part of a line"])
def test_full_disk_holds_lines_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    journal = Journal(tmp_path)
    journal.append(b"before")
    write = os.write

    def write_to_full_disk(fd: int, data: bytes) -> int:
        if taken:
            return write(fd, data[:taken])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write_to_full_disk)
        assert not journal.append(b"held")
        assert not journal.append(b"held too")
        assert [(e.line, e.end is None) for e in journal.read(2)] == [(b"before", False), (b"held", True)]
    assert journal.append(b"after")
    assert (tmp_path / "000001.jsonl").read_bytes() == b"before\nheld too\nafter\n"
    assert lines(journal) == [b"held too", b"after"]
    journal.close()


def test_full_disk_takes_whole_lines_or_none(disk: Path) -> None:
    journal = Journal(disk / "outbox")
    line = b"x" * 5000
    taken = [journal.append(line) for _ in range(30)]
    assert (taken[0], taken[-1]) == (True, False)
    on_disk = b"".join(p.read_bytes() for p in sorted((disk / "outbox").glob("*.jsonl")))
    assert on_disk == (line + b"\n") * sum(taken)
    assert lines(journal) == [line] * 30
    journal.close()
