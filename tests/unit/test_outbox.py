"""What a sweep may say while the tracker's store is away, full, or refuses it; and what comes of it in the end."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ssn.errors import SSNError
from tuning.tracking import MemoryTracker, Outbox, RunRecord, Sweep, TrialInfo
from tuning.tracking import outbox as module
from tuning.tracking.delivery import MAX_ERRORS_OF_THE_STORE, REFUSED_FILE
from tuning.tracking.journal import Journal
from tuning.tracking.outbox import outbox_folder, replay
from tuning.tracking.protocol import TRIAL_MODEL_FILES, ArtifactsUnavailableError, TrackerUnavailableError

SWEEP = Sweep("s1", "widgets", {"bolt": {"search_fingerprint": "f"}, "nut": {}})
PAUSE_S = 0.01


def trial(index: int, category: str = "bolt") -> TrialInfo:
    return TrialInfo(category, f"key{index}", index, {"train.epochs": 3})


def until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.005)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in TRIAL_MODEL_FILES:
        (folder / name).write_text(f"{name} of the trial")
    return folder


@pytest.fixture
def store() -> MemoryTracker:
    return MemoryTracker()


@pytest.fixture
def make(store: MemoryTracker, tmp_path: Path) -> Iterator[Callable[..., Outbox]]:
    made: list[Outbox] = []

    def call(tracker: Any = None, folder: Path = tmp_path / "outbox", patience_s: float = 30.0) -> Outbox:
        made.append(Outbox(tracker or store, folder, first_pause_s=PAUSE_S, patience_s=patience_s))
        return made[-1]

    yield call
    for outbox in made:
        if outbox.folder in module._open:
            outbox.close(0)


def runs(store: MemoryTracker) -> dict[str, RunRecord]:
    records = store.find_runs("widgets")
    assert len({r.run_key for r in records}) == len(records)
    return {r.name: r for r in records}


def say_a_sweep(outbox: Outbox, checkpoint: Path, indices: range = range(3)) -> None:
    outbox.start_sweep(SWEEP)
    for index in indices:
        run = outbox.start_trial(SWEEP, trial(index))
        for epoch in (1, 2, 3):
            outbox.log_epoch(run, epoch, {"objective": index + epoch / 10}, tags={"hostname": "node-a"})
        outbox.finish_trial(run, "COMPLETE", artifact_dir=checkpoint)


def check_a_sweep(store: MemoryTracker, indices: range = range(3)) -> None:
    found = runs(store)
    assert set(found) == {"bolt", "nut", *(f"bolt-{i:03d}" for i in indices)}
    for index in indices:
        run = found[f"bolt-{index:03d}"]
        assert (run.status, run.trial_state, run.tags["hostname"]) == ("FINISHED", "COMPLETE", "node-a")
        assert run.params == {"train.epochs": "3"}
        history = store.metric_history(run.run_id, "objective")
        assert history == [(epoch, index + epoch / 10) for epoch in (1, 2, 3)]
        assert len(store.list_artifacts(run.run_id)) == len(TRIAL_MODEL_FILES)


def test_sweep_goes_on_while_the_store_is_away(
    store: MemoryTracker, make: Callable[..., Outbox], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox = make()
    outbox.start_sweep(SWEEP)
    assert outbox.drain(30)
    store.down = True
    say_a_sweep(outbox, checkpoint)
    shutil.rmtree(checkpoint)  # a sweep keeps no checkpoint for the tracker's sake
    until(lambda: outbox._delivery().trouble)
    time.sleep(10 * PAUSE_S)
    store.down = False
    outbox.finish_sweep(SWEEP)
    outbox.close()

    check_a_sweep(store)
    assert {r.status for r in runs(store).values()} == {"FINISHED"}
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: tracking waits: the tracker in memory is down. The sweep goes on; ")
    assert second.startswith("tracking: the store answers again")
    assert not outbox.folder.exists()


def test_each_outage_is_told_once(
    store: MemoryTracker, make: Callable[..., Outbox], capsys: pytest.CaptureFixture[str]
) -> None:
    outbox = make()
    for _ in range(2):
        store.down = True
        outbox.start_sweep(SWEEP)
        until(lambda: outbox._delivery().trouble)
        time.sleep(10 * PAUSE_S)
        store.down = False
        assert outbox.drain(30)
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_what_a_dead_driver_said_is_brought_by_the_next(
    store: MemoryTracker, make: Callable[..., Outbox], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.down = True
    dead = make()
    say_a_sweep(dead, checkpoint)
    dead.close(0.1)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "behind" in line]
    assert line == (
        f"warning: tracking is behind by 16 operations (the tracker in memory is down). {dead.folder} keeps them; "
        f"once the store can take them, run: python -m tuning replay {dead.folder}"
    )
    store.down = False
    resumed = make()
    run = resumed.start_trial(SWEEP, trial(3))
    assert [r.name for r in resumed.find_runs("widgets")] == ["bolt", "nut", *(f"bolt-{i:03d}" for i in range(4))]
    resumed.finish_trial(run, "PRUNED")
    resumed.finish_sweep(SWEEP)
    resumed.close()
    assert {r.status for r in runs(store).values()} == {"FINISHED"}
    (last,) = [r.run_id for r in store.find_runs("widgets") if r.trial_state == "PRUNED"]
    del store._runs[last]
    check_a_sweep(store)


def test_bringing_everything_twice_doubles_nothing(
    store: MemoryTracker,
    make: Callable[..., Outbox],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "acknowledge", lambda self, end: None)
        patched.setattr("tuning.tracking.delivery.Delivery._delete", lambda self, files: None)
        outbox = make()
        say_a_sweep(outbox, checkpoint)
        outbox.finish_sweep(SWEEP)
        assert outbox.drain(30)
        shutil.copytree(outbox.folder, tmp_path / "copy")  # as if the process had died before it ticked anything off
        outbox.close()
        check_a_sweep(store)
    for file in (tmp_path / "copy").glob("*.jsonl"):
        file.write_text(file.read_text().replace(str(outbox.folder), str(tmp_path / "copy")))
    again = make(folder=tmp_path / "copy")
    assert again.drain(30)
    again.close()
    check_a_sweep(store)
    assert {r.status for r in runs(store).values()} == {"FINISHED"}


def test_refused_operation_is_reported_and_the_rest_goes_on(
    store: MemoryTracker, make: Callable[..., Outbox], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox = make()
    outbox.log_summary("no-such-run", tags={"note": "lost"})
    say_a_sweep(outbox, checkpoint)
    outbox.close()
    check_a_sweep(store)
    said = capsys.readouterr().err
    assert "log_summary of no-such-run was refused (KeyError: 'no-such-run')" in said
    assert f"1 tracking operations were refused; see {outbox.folder / REFUSED_FILE}" in said
    (kept,) = [json.loads(line) for line in (outbox.folder / REFUSED_FILE).read_text().splitlines()]
    assert json.loads(kept["refused"])["tags"] == {"note": "lost"}


def test_operation_that_always_breaks_the_store_is_refused_in_the_end(
    store: MemoryTracker, make: Callable[..., Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def break_the_store(run_id: str, **options: Any) -> None:
        attempts.append(run_id)
        raise TrackerUnavailableError("too many 500 error responses", may_be_the_call=True)

    monkeypatch.setattr("tuning.tracking.delivery.LONGEST_PAUSE_S", PAUSE_S)
    outbox = make()
    monkeypatch.setattr(store, "log_summary", break_the_store)
    parents = outbox.start_sweep(SWEEP)
    outbox.log_summary(parents["nut"], tags={"note": "poison"})
    outbox.finish_sweep(SWEEP)
    outbox.close()
    assert len(attempts) == MAX_ERRORS_OF_THE_STORE
    assert (outbox.folder / REFUSED_FILE).exists()
    assert runs(store)["nut"].status == "FINISHED"


def test_no_space_for_artifacts_keeps_back_their_trial_alone(
    store: MemoryTracker, make: Callable[..., Outbox], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox = make()
    store.full = True
    say_a_sweep(outbox, checkpoint)
    pruned = outbox.start_trial(SWEEP, trial(9, "nut"))
    outbox.log_epoch(pruned, 1, {"objective": 0.1})
    outbox.finish_trial(pruned, "PRUNED")
    assert not outbox.drain(30), "files wait"
    found = runs(store)
    assert (found["nut-009"].trial_state, found["nut-009"].metrics["objective"]) == ("PRUNED", 0.1)
    for index in range(3):
        waits = found[f"bolt-{index:03d}"]
        assert (waits.status, waits.trial_state, waits.metrics["objective"]) == ("RUNNING", None, index + 0.3)
        assert store.list_artifacts(waits.run_id) == []

    outbox.close(1)  # and the sweep ends, or dies
    assert "tracking is behind by 3 operations (no space left for artifacts)" in capsys.readouterr().err
    store.full = False
    resumed = make()
    resumed.start_sweep(SWEEP)
    resumed.finish_sweep(SWEEP)
    resumed.close()
    store._runs = {k: r for k, r in store._runs.items() if r.name != "nut-009"}
    check_a_sweep(store)


def test_artifacts_that_fail_because_the_store_is_away_wait_with_everything(
    store: MemoryTracker,
    make: Callable[..., Outbox],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def upload_to_nowhere() -> None:
        store.down = True
        raise ArtifactsUnavailableError("connection refused")

    outbox = make()
    outbox.start_sweep(SWEEP)
    assert outbox.drain(30)
    with monkeypatch.context() as patched:
        patched.setattr(store, "_take_files", upload_to_nowhere)
        say_a_sweep(outbox, checkpoint)
        until(lambda: outbox._delivery().trouble)
    time.sleep(5 * PAUSE_S)
    store.down = False
    outbox.close()
    check_a_sweep(store)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[2][:22] for line in said] == [" tracking waits: conne", " the store answers aga"]


def test_what_is_buffered_is_no_answer(
    store: MemoryTracker,
    make: Callable[..., Outbox],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tracker that gathers metrics takes them while its store is away."""
    outbox = make()
    parents = outbox.start_sweep(SWEEP)
    run = outbox.start_trial(SWEEP, trial(0))
    assert outbox.drain(30)
    delivery = outbox._delivery()
    store.down = True
    outbox.log_summary(parents["nut"], tags={"note": "kept"})
    until(lambda: delivery.trouble)
    with monkeypatch.context() as patched:
        patched.setattr(store, "log_summary", lambda *arguments, **options: None)
        patched.setattr(store, "flush", lambda run_id: None)
        until(lambda: not delivery.journal.has_more and not delivery._unread)
        assert delivery.trouble
    assert "answers again" not in capsys.readouterr().err
    store.down = False
    outbox.finish_trial(run, "PRUNED")
    outbox.close()
    assert "answers again" in capsys.readouterr().err


def test_space_is_noticed_without_being_asked(
    store: MemoryTracker, make: Callable[..., Outbox], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox = make()
    store.full = True
    say_a_sweep(outbox, checkpoint)
    until(lambda: outbox._delivery().num_waiting == 3)
    store.full = False
    until(lambda: outbox._delivery().num_waiting == 0)
    outbox.close()
    check_a_sweep(store)
    said = capsys.readouterr().err.splitlines()
    assert [line[:54] for line in said] == [
        "warning: tracking: no space left for artifacts. Metric",
        "tracking: there is space for artifacts again, and thos",
    ]


def test_no_space_for_the_outbox_leaves_the_model_where_it_is(
    store: MemoryTracker,
    make: Callable[..., Outbox],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_space(source: Path, target: Path) -> None:
        target.write_text("hal")
        raise OSError(errno.ENOSPC, "No space left on device")

    outbox = make()
    store.down = True
    monkeypatch.setattr(module, "_link_or_copy", no_space)
    say_a_sweep(outbox, checkpoint, range(1))
    assert list((outbox.folder / "files").iterdir()) == [], "nothing half-written is left"
    assert f"{checkpoint} must stay until its files are stored" in capsys.readouterr().err
    store.down = False
    outbox.close()
    check_a_sweep(store, range(1))
    run = runs(store)["bolt-000"]
    assert store._runs[run.run_id].artifacts["model/config.json"] == b"config.json of the trial"


def test_model_that_is_gone_is_refused_and_its_run_is_not_complete(
    store: MemoryTracker, make: Callable[..., Outbox], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = make()
    store.down = True
    say_a_sweep(outbox, checkpoint, range(1))
    shutil.rmtree(outbox.folder / "files")
    store.down = False
    outbox.finish_sweep(SWEEP)
    outbox.close()
    assert (runs(store)["bolt-000"].status, runs(store)["bolt-000"].trial_state) == ("KILLED", "INTERRUPTED")
    assert "is gone" in (outbox.folder / REFUSED_FILE).read_text()


def test_question_to_a_store_that_is_away_names_the_outbox(store: MemoryTracker, make: Callable[..., Outbox]) -> None:
    outbox = make(patience_s=0.5)
    store.down = True
    outbox.start_sweep(SWEEP)
    with pytest.raises(SSNError, match=r"is down; 1 operations wait in .*outbox, .* by: python -m tuning replay") as e:
        outbox.find_runs("widgets")
    assert "\n" not in str(e.value)
    assert not outbox.drain(0.1)
    store.down = False
    assert len(outbox.find_runs("widgets")) == 2


def test_nobody_waits_for_the_store_and_one_thread_alone_talks_to_it(tmp_path: Path, checkpoint: Path) -> None:
    threads, gate = set(), threading.Event()

    class Slow(MemoryTracker):
        def _answer(self) -> None:
            threads.add(threading.current_thread().name)
            assert gate.wait(30)

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return MemoryTracker, ()

    store = Slow()
    outbox = Outbox(store, tmp_path / "outbox")
    say_a_sweep(outbox, checkpoint)
    for epoch in range(4, 1000):
        outbox.log_epoch("s1/search/bolt/key0", epoch, {"objective": 1.0})
    assert store._runs == {}, "all was said before the store answered once"
    gate.set()
    assert len(outbox.find_runs("widgets")) == 5
    assert threads == {"tracking"}
    outbox.close()


def test_copies_of_one_process_share_the_outbox(store: MemoryTracker, make: Callable[..., Outbox]) -> None:
    outbox = make()
    outbox.start_sweep(SWEEP)
    copy = pickle.loads(pickle.dumps(outbox))
    run = copy.start_trial(SWEEP, trial(0))
    copy.finish_trial(run, "PRUNED")
    outbox.finish_sweep(SWEEP)
    outbox.close()
    assert runs(store)["bolt-000"].trial_state == "PRUNED"
    copy.close()


def test_replay_brings_the_rest_and_closes_what_a_dead_sweep_left_open(
    store: MemoryTracker, make: Callable[..., Outbox], checkpoint: Path
) -> None:
    dead = make()
    say_a_sweep(dead, checkpoint)
    assert dead.drain(30)
    store.down = True
    run = dead.start_trial(SWEEP, trial(7))
    dead.log_epoch(run, 1, {"objective": 0.5})
    with pytest.raises(SSNError, match="in use by another process"):
        Journal(dead.folder)
    dead.close(0)
    with pytest.raises(SSNError, match="is down"):
        replay(dead.folder, tracker=store, patience_s=0.5)
    store.down = False
    assert replay(dead.folder, tracker=store) == 2
    found = runs(store)
    assert {name: r.status for name, r in found.items()} == {
        "bolt": "KILLED",
        "nut": "KILLED",
        **{f"bolt-{i:03d}": "FINISHED" for i in range(3)},
        "bolt-007": "KILLED",
    }
    assert found["bolt-007"].trial_state == "INTERRUPTED"
    with pytest.raises(SSNError, match="no outbox of a sweep"):
        replay(dead.folder, tracker=store)


def test_bug_in_tracking_does_not_end_the_sweep_and_is_no_secret(
    make: Callable[..., Outbox], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("tuning.tracking.delivery.Delivery._flush", broken)
    outbox = make()
    outbox.start_sweep(SWEEP)
    with pytest.raises(RuntimeError, match="tracking has stopped") as caught:
        outbox.find_runs("widgets")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    outbox.finish_sweep(SWEEP)
    outbox.close()
    said = capsys.readouterr().err
    assert "tracking has stopped (ZeroDivisionError: a bug)" in said
    assert "tracking is behind by 2 operations" in said
    assert (outbox.folder / "000001.jsonl").exists()


def test_question_that_breaks_the_store_is_answered_with_that(
    store: MemoryTracker, make: Callable[..., Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_the_store(*arguments: Any, **options: Any) -> None:
        raise TrackerUnavailableError("too many 500 error responses", may_be_the_call=True)

    monkeypatch.setattr("tuning.tracking.delivery.LONGEST_PAUSE_S", PAUSE_S)
    outbox = make()
    outbox.start_sweep(SWEEP)
    with monkeypatch.context() as patched:
        patched.setattr(store, "find_runs", break_the_store)
        with pytest.raises(TrackerUnavailableError, match="500"):
            outbox.find_runs("widgets")
    assert len(outbox.find_runs("widgets")) == 2


def test_damaged_line_is_refused(store: MemoryTracker, make: Callable[..., Outbox], tmp_path: Path) -> None:
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox" / "000001.jsonl").write_bytes(b"\x00\x00\x00\n")
    outbox = make()
    outbox.start_sweep(SWEEP)
    outbox.close()
    assert len(runs(store)) == 2
    assert "damaged" not in runs(store)
    assert (outbox.folder / REFUSED_FILE).exists()


def test_outbox_lies_with_the_sweeps_state_or_on_this_machine(tmp_path: Path) -> None:
    assert outbox_folder(tmp_path, "s1") == tmp_path / "s1" / "outbox"
    assert outbox_folder("s3://bucket/runs", "s1").name == "tuning-outbox-s1"
