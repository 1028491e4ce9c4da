"""One driver per sweep: a lock file with its owner, renewed while it lives, in the sweep's folder or object store."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssn.data.storage import storage_errors, write_json
from ssn.errors import SSNError
from tuning.persistence.json_store import JsonStore

LOCK_FILE = "lock.json"
GUARD_FILE = "lock.guard"
"""Stays; empty."""
HEARTBEAT_S = 10.0
STALE_S = 60.0
"""Without a heartbeat for this long, an owner on another machine is taken for dead."""
SETTLE_S = 1.0
"""How long two drivers that begin at once wait to see each other, where nothing can guard the lock file."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    token: str
    host: str
    pid: int
    started: float
    """When its process started, by its machine's clock; a later process may have the same id."""
    heartbeat: float
    """Seconds since the epoch."""

    def describe(self) -> str:
        """Such as ``process 4711 on head``."""
        return f"process {self.pid} on {self.host}"


class SweepLock:
    """Held between ``__enter__`` and ``__exit__``.

    A driver that loses its lock, because it was silent for so long that another took it over, ends itself as an
    interrupt would.

    Args:
        store: The sweep's files.
        sweep_id: For messages.
        notify: Takes a line for the user.
        on_lost: For tests; None: interrupt this process.
        settle_s: See :data:`SETTLE_S`.
    """

    def __init__(
        self,
        store: JsonStore,
        sweep_id: str,
        *,
        notify: Callable[[str], None],
        on_lost: Callable[[], None] | None = None,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._store = store
        self._sweep_id = sweep_id
        self._notify = notify
        self._on_lost = on_lost or _interrupt_this_process
        self._settle_s = settle_s
        self._owner = Owner(secrets.token_hex(8), os.uname().nodename, os.getpid(), _start_time(os.getpid()), 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sweep-lock", daemon=True)

    def __enter__(self) -> SweepLock:
        """Take the lock.

        Raises:
            SSNError: the sweep is being run by another process.
        """
        with storage_errors(self._store.root_uri):
            self._store.filesystem.create_dir(self._store.root, recursive=True)
        with self._guard() as guarded:
            found = self._read()
            if found is not None:
                self._refuse_living(found)
                self._notify(f"note: taking sweep {self._sweep_id} over from {found.describe()}, which runs no more")
            with storage_errors(self._store.root_uri):
                write_json(self._store.filesystem, self._store.path(LOCK_FILE), self._content())
        if not guarded:
            time.sleep(self._settle_s)
        holder = self._read()
        if holder is None or holder.token != self._owner.token:
            raise self._refusal(holder)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Release it, unless somebody else has it by now."""
        self._ended.set()
        self._thread.join()
        with storage_errors(self._store.root_uri):
            if self._is_ours():
                self._store.filesystem.delete_file(self._store.path(LOCK_FILE))

    def beat(self) -> bool:
        """Say that this driver lives; False: the lock is somebody else's by now."""
        if not self._is_ours():
            return False
        write_json(self._store.filesystem, self._store.path(LOCK_FILE), self._content())
        return True

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                held = self.beat()
            except OSError:  # the store is out of reach for a while; whoever waits for STALE_S sees a dead owner
                continue
            if not held:
                self._notify(f"warning: another process has taken sweep {self._sweep_id} over; this one ends")
                self._on_lost()
                return

    @contextmanager
    def _guard(self) -> Iterator[bool]:
        """Let one driver at a time look at the lock and take it; gives whether that is so: only a disk can do it."""
        if not self._store.is_local:
            yield False
            return
        with Path(self._store.path(GUARD_FILE)).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a mounted object store, say
                yield False
                return
            yield True

    def _content(self) -> dict[str, Any]:
        return asdict(self._owner) | {"heartbeat": time.time()}

    def _read(self) -> Owner | None:
        with storage_errors(self._store.root_uri):
            data = self._store.read_bytes(LOCK_FILE)
        try:
            return Owner(**json.loads(data or b""))
        except (ValueError, TypeError):  # none, or one whose writer was killed at it
            return None

    def _is_ours(self) -> bool:
        data = self._store.read_bytes(LOCK_FILE)
        return data is not None and self._owner.token.encode() in data

    def _refuse_living(self, owner: Owner) -> None:
        if owner.host == self._owner.host:
            if _start_time(owner.pid) == owner.started:
                raise self._refusal(owner)
        elif time.time() - owner.heartbeat < STALE_S:
            raise self._refusal(owner)

    def _refusal(self, owner: Owner | None) -> SSNError:
        who = "another process" if owner is None else owner.describe()
        wait = ""
        if owner is not None and owner.host != self._owner.host:
            wait = f", or, if that machine is gone, come back {STALE_S:.0f} s after its end"
        return SSNError(f"sweep {self._sweep_id} is being run by {who}; let it end{wait}")


def _start_time(pid: int) -> float:
    """When a process started, in ticks since its machine did; 0 if it runs no more, -1 where that cannot be told."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            state, *rest = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        return 0.0 if state in "ZX" else float(rest[18])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0.0
    except PermissionError:
        return -1.0
    return -1.0


def _interrupt_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
