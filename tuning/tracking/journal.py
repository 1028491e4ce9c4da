"""An ordered, durable list of lines in a folder: written by one thread, read and ticked off by another.

Lines lie in numbered segments, ``000001.jsonl`` and so on; ``position.json`` says up to where they were dealt with, and
segments before it are deleted. A line is in the operating system's hands as :meth:`Journal.append` returns, so that it
outlives the process, and on the disk within a second, so that it outlives the machine. While the disk is full, lines
are held in memory instead.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ssn.errors import SSNError

SEGMENT_BYTES = 4 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers that mean that a disk, or the user's share of it, is full."""
_LOCK_FILE = "lock"
_POSITION_FILE = "position.json"


@dataclass(frozen=True, order=True)
class Position:
    """A place between two lines."""

    segment: int
    offset: int


@dataclass(frozen=True)
class Entry:
    """A line and the place behind it."""

    line: bytes
    end: Position | None
    """None for a line that the full disk did not take."""


class Journal:
    """See the module. :meth:`append` and :meth:`read` may be called from different threads.

    Args:
        folder: Made if need be; one journal at a time may have it open, in whatever process.

    Raises:
        SSNError: the folder cannot be written, or another process has it open.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mutex = threading.Lock()
        self._held: deque[bytes] = deque()
        self._fd: int | None = None
        self._length = 0
        self._dirty = False
        self._reading: tuple[int, BinaryIO] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / _LOCK_FILE).open("a")
        except OSError as error:
            raise SSNError(f"the outbox {folder} cannot be written ({error.strerror}); give another --out") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise SSNError(
                f"the outbox {folder} is in use by another process; wait for its end, or end it, and try again"
            ) from error
        self.start = self._position = self._read_position()
        """From where on lines were not dealt with when the journal was opened."""
        self._segment = self._first_segment = max([*self._segments(), self._position.segment]) + 1
        self.num_appended = 0
        """Lines added since the journal was opened."""

    def append(self, line: bytes) -> bool:
        """Add a line, which must not contain a line break.

        Returns:
            Whether the disk took it; it is held in memory otherwise.
        """
        with self._mutex:
            self._held.append(line)
            self.num_appended += 1
            return self._write_held()

    def read(self, limit: int) -> list[Entry]:
        """The next lines, at most ``limit`` of them; those on the disk come first, as they are older."""
        with self._mutex:
            self._write_held()
            entries: list[Entry] = []
            while len(entries) < limit:
                entry = self._next_on_disk()
                if entry is None:
                    break
                entries.append(entry)
            while self._held and len(entries) < limit:
                entries.append(Entry(self._held.popleft(), None))
            return entries

    @property
    def has_more(self) -> bool:
        """Whether :meth:`read` would return anything, but for the torn end of a line."""
        with self._mutex:
            return bool(self._held) or self._position < Position(self._segment, self._length)

    @property
    def read_all_old(self) -> bool:
        """Whether :meth:`read` has come to what was added since the journal was opened."""
        return self._position.segment >= self._first_segment

    def is_new(self, entry: Entry) -> bool:
        """Whether a line was added since the journal was opened."""
        return entry.end is None or entry.end.segment >= self._first_segment

    def count_after(self, start: Position) -> int:
        """Lines behind a position, on the disk and held."""
        with self._mutex:
            count = len(self._held)
            for number in self._segments():
                if number >= start.segment:
                    data = self._path(number).read_bytes()
                    count += data[start.offset if number == start.segment else 0 :].count(b"\n")
            return count

    def acknowledge(self, end: Position) -> None:
        """Lines before ``end`` are dealt with, and are not read again after a restart."""
        path = self.folder / _POSITION_FILE
        scratch = path.with_suffix(".tmp")
        try:
            scratch.write_text(json.dumps({"segment": end.segment, "offset": end.offset}))
            scratch.replace(path)
        except OSError as error:
            if error.errno not in FULL:
                raise
            # the old position stands: after a restart more is done again than need be, which does no harm
            scratch.unlink(missing_ok=True)
            return
        for number in self._segments():
            if number < end.segment:
                self._path(number).unlink(missing_ok=True)

    def sync(self) -> None:
        """Have the disk take what the operating system has."""
        with self._mutex:
            # its own, because the other may be closed meanwhile, and because nobody who appends waits for a disk
            fd = os.dup(self._fd) if self._dirty and self._fd is not None else None
            self._dirty = False
        if fd is not None:
            _sync(fd)
            os.close(fd)

    def close(self) -> None:
        """Let go of the folder."""
        with self._mutex:
            self._write_held()
            self._close_segment()
            if self._reading is not None:
                self._reading[1].close()
                self._reading = None
            self._lock.close()

    def _write_held(self) -> bool:
        while self._held:
            if not self._write(self._held[0] + b"\n"):
                return False
            self._held.popleft()
        return True

    def _write(self, data: bytes) -> bool:
        """Write all of ``data`` or, on a full disk, nothing."""
        try:
            if self._fd is None:
                self._fd = os.open(self._path(self._segment), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            written = os.write(self._fd, data)
        except OSError as error:
            if error.errno not in FULL:
                raise
            written = 0
        if written < len(data):
            if written and self._fd is not None:
                os.ftruncate(self._fd, self._length)
            self._close_segment()  # opened again at the next attempt
            return False
        self._length += len(data)
        self._dirty = True
        if self._length >= SEGMENT_BYTES:
            self._close_segment()
            self._segment, self._length = self._segment + 1, 0
        return True

    def _close_segment(self) -> None:
        if self._fd is not None:
            if self._dirty:
                _sync(self._fd)
            os.close(self._fd)
            self._fd, self._dirty = None, False

    def _next_on_disk(self) -> Entry | None:
        while True:
            number = self._position.segment
            path = self._path(number)
            if self._reading is None or self._reading[0] != number:
                if self._reading is not None:
                    self._reading[1].close()
                    self._reading = None
                if path.exists():
                    file = path.open("rb")
                    file.seek(self._position.offset)
                    self._reading = (number, file)
            if self._reading is not None:
                line = self._reading[1].readline()
                if line.endswith(b"\n"):
                    self._position = Position(number, self._position.offset + len(line))
                    return Entry(line[:-1], self._position)
                # The machine went down while this line was written: whoever wrote it never went on from there.
                self._reading[1].seek(self._position.offset)
            if number >= self._segment:
                return None
            self._position = Position(min((n for n in self._segments() if n > number), default=self._segment), 0)

    def _read_position(self) -> Position:
        try:
            found = json.loads((self.folder / _POSITION_FILE).read_text())
            return Position(int(found["segment"]), int(found["offset"]))
        except FileNotFoundError:
            return Position(min(self._segments(), default=0), 0)

    def _segments(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.jsonl"))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in FULL:  # the process has what the disk has no space for
            raise
