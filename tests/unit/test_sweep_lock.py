"""One driver per sweep: the living keep their lock, the dead lose it, and of two at once one wins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ssn.errors import SSNError
from tuning.persistence import sweep_lock
from tuning.persistence.json_store import JsonStore
from tuning.persistence.sweep_lock import GUARD_FILE, LOCK_FILE, STALE_S, SweepLock


@pytest.fixture(params=["disk", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> JsonStore:
    return JsonStore.open(str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}/runs", "s1")


def lock(store: JsonStore, said: list[str] | None = None, **options: Any) -> SweepLock:
    return SweepLock(store, "s1", notify=(said if said is not None else []).append, settle_s=0.05, **options)


def leave(store: JsonStore, **changes: Any) -> None:
    """The lock of another driver, of this machine and alive unless said otherwise."""
    if store.read_bytes(LOCK_FILE) is not None:
        store.filesystem.delete_file(store.path(LOCK_FILE))
    with lock(store):
        content = json.loads(store.read_bytes(LOCK_FILE) or b"")
    store.write_bytes(LOCK_FILE, json.dumps(content | {"token": "another"} | changes).encode())


def test_second_driver_is_refused_until_the_first_has_ended(store: JsonStore) -> None:
    with lock(store):
        with pytest.raises(SSNError) as error, lock(store):
            pass
        assert str(error.value) == (
            f"sweep s1 is being run by process {os.getpid()} on {os.uname().nodename}; let it end"
        )
    said: list[str] = []
    with lock(store, said):
        assert said == []
    assert store.read_bytes(LOCK_FILE) is None


def test_lock_of_a_dead_process_is_taken_over_with_a_notice(store: JsonStore) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    leave(store, pid=int(dead.stdout))
    said: list[str] = []
    with lock(store, said):
        assert said == [
            f"note: taking sweep s1 over from process {int(dead.stdout)} on {os.uname().nodename}, which runs no more"
        ]
    assert store.read_bytes(LOCK_FILE) is None


def test_process_id_that_was_given_again_is_not_the_owner(store: JsonStore) -> None:
    leave(store, started=1.0)
    said: list[str] = []
    with lock(store, said):
        assert len(said) == 1


def test_driver_on_another_machine_is_believed_while_its_heart_beats(store: JsonStore) -> None:
    leave(store, host="head", pid=7, heartbeat=time.time() - STALE_S / 2)
    with pytest.raises(SSNError, match=r"run by process 7 on head; let it end, or, if that machine is gone, come back"):
        lock(store).__enter__()
    leave(store, host="head", pid=7, heartbeat=time.time() - STALE_S - 1)
    with lock(store):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"token": "x"}'])
def test_lock_that_cannot_be_read_holds_nobody_up(tmp_path: Path, content: bytes) -> None:
    store = JsonStore.open(f"memory://{uuid.uuid4().hex}/runs", "s1")
    store.write_bytes(LOCK_FILE, content)
    with lock(store):
        pass


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    store = JsonStore.open(str(tmp_path), "s1")
    leave(store, started=1.0)  # a stale one, which all of them find

    def begin(number: int) -> bool:
        try:
            lock(store).__enter__()
        except SSNError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(begin, range(8))) == 1
    assert sorted(p.name for p in (tmp_path / "s1").iterdir()) == sorted([LOCK_FILE, GUARD_FILE])


def test_driver_whose_lock_was_taken_ends_and_leaves_it_alone(
    store: JsonStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_lock, "HEARTBEAT_S", 0.02)
    said: list[str] = []
    lost: list[bool] = []
    with lock(store, said, on_lost=lambda: lost.append(True)):
        first = json.loads(store.read_bytes(LOCK_FILE) or b"")["heartbeat"]
        deadline = time.monotonic() + 30
        while json.loads(store.read_bytes(LOCK_FILE) or b"")["heartbeat"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        content = json.loads(store.read_bytes(LOCK_FILE) or b"") | {"token": "another"}
        store.write_bytes(LOCK_FILE, json.dumps(content).encode())
        while not lost:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert said == ["warning: another process has taken sweep s1 over; this one ends"]
    assert b"another" in (store.read_bytes(LOCK_FILE) or b"")
