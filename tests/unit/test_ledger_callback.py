"""What the ledger's callback does when something fails while Tune tells it: Ray itself does not run here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs as pafs
from ray.tune import Checkpoint

from tuning.champions.winner import TrialRecord
from tuning.persistence.ledger import SweepLedger
from tuning.persistence.ledger_callback import LedgerCallback
from tuning.tracking import MemoryTracker, Sweep
from tuning.tracking.protocol import TRIAL_MODEL_FILES

SWEEP = Sweep("s1", "widgets", {"bolt": {}})
EPOCHS = 3


class Keeper:
    """One trial's record."""

    def __init__(self) -> None:
        self.known = TrialRecord("t0", "k0", "bolt", 0, 0, EPOCHS, {"train.epochs": EPOCHS}, {})

    def record(self, trial_id: str) -> TrialRecord:
        assert trial_id == self.known.trial_id
        return self.known

    def origin(self, trial_id: str) -> None:
        return None


class Stubborn(pafs.PyFileSystem):  # type: ignore[misc]
    """A store in which nothing may be deleted."""

    def __init__(self) -> None:
        super().__init__(pafs.FSSpecHandler(_NoDeletion()))


class _NoDeletion:
    """As much of fsspec as is needed."""

    protocol = "file"

    def info(self, path: str) -> dict[str, Any]:
        return {"name": path, "type": "directory", "size": 0}

    def isdir(self, path: str) -> bool:
        return True

    def exists(self, path: str) -> bool:
        return True

    def rm(self, path: str, recursive: bool) -> None:
        raise PermissionError(f"s3:DeleteObject denied on {path}")


def make_trial(checkpoint: Path | None, epoch: int) -> Any:
    return SimpleNamespace(
        trial_id="t0",
        config={"trial_key": "k0", "category": "bolt", "index": 0, "config": {"train.epochs": EPOCHS}},
        last_result={"epoch": epoch},
        checkpoint=None if checkpoint is None else Checkpoint(str(checkpoint)),
    )


def make_checkpoint(tmp_path: Path, epoch: int) -> Path:
    folder = tmp_path / f"epoch{epoch}"
    folder.mkdir()
    for name in TRIAL_MODEL_FILES:
        (folder / name).write_text(str(epoch))
    return folder


@pytest.fixture
def callback(tmp_path: Path) -> LedgerCallback:
    tracker = MemoryTracker()
    tracker.start_sweep(SWEEP)
    return LedgerCallback(tracker, SWEEP, ledger=SweepLedger.open(tmp_path, "s1"), keeper=Keeper())


def reach(callback: LedgerCallback, tmp_path: Path, epoch: int) -> Path:
    """A trial leaves a checkpoint."""
    folder = make_checkpoint(tmp_path, epoch)
    callback.keeper.record("t0").epoch = epoch
    callback.on_checkpoint(0, [], make_trial(None, epoch), Checkpoint(str(folder)))
    return folder


def test_model_is_that_of_the_last_epoch_whatever_tune_has_noted(callback: LedgerCallback, tmp_path: Path) -> None:
    stale = reach(callback, tmp_path, 1)
    reach(callback, tmp_path, EPOCHS)
    assert not stale.exists()
    stale.mkdir()  # even were it still there
    callback.keeper.record("t0").state = "complete"
    callback.on_trial_complete(0, [], make_trial(stale, EPOCHS))
    tracker: Any = callback.tracker
    (run,) = [r for r in tracker.find_runs("widgets") if r.parent_run_id is not None]
    assert run.trial_state == "COMPLETE"
    assert tracker.list_artifacts(run.run_id) == [f"model/{name}" for name in sorted(TRIAL_MODEL_FILES)]


def test_an_earlier_epochs_model_is_never_the_trials(callback: LedgerCallback, tmp_path: Path) -> None:
    folder = reach(callback, tmp_path, 1)
    callback.keeper.record("t0").state = "complete"
    with pytest.raises(RuntimeError, match="ended at its last epoch without a checkpoint"):
        callback.on_trial_complete(0, [], make_trial(folder, EPOCHS))


def test_a_checkpoint_that_cannot_be_removed_stops_nothing(
    callback: LedgerCallback, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tune takes an error here for the trial's: it would forget the new checkpoint, or run a pruned trial again."""
    callback.filesystem = Stubborn()
    first = reach(callback, tmp_path, 1)
    second = reach(callback, tmp_path, 2)
    record = callback.keeper.record("t0")
    assert (record.checkpoint, record.checkpoint_epoch) == (str(second), 2)
    record.state = "pruned"
    callback.on_trial_complete(0, [], make_trial(second, 2))
    assert [r.state for r in callback.ledger.read_trials()] == ["pruned"]
    assert len(caplog.messages) == 2
    assert f"the checkpoint {first} is not needed any more and could not be removed: " in caplog.messages[0]


def test_a_trial_that_comes_again_has_not_failed(callback: LedgerCallback) -> None:
    """One that Tune gave up before it began has no run and no file."""
    callback.on_trial_error(0, [], make_trial(None, 0))
    assert callback.ledger.read_trials() == []
    assert [r for r in callback.tracker.find_runs("widgets") if r.parent_run_id is not None] == []
