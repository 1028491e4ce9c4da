"""Tracks the trials of a search and keeps its ledger: what is in the ledger is in the tracker already, or can be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pyarrow import fs as pafs

from tuning.champions.winner import TrialRecord
from tuning.persistence.ledger import SweepLedger
from tuning.tracking.callback import TrackerCallback

if TYPE_CHECKING:
    from ray.tune import Checkpoint
    from ray.tune.experiment import Trial


_LOGGER = logging.getLogger(__name__)


class RecordKeeper(Protocol):
    """Who knows what is known of a trial; :class:`tuning.search.searcher.MultiplexSearcher` does."""

    def record(self, trial_id: str) -> TrialRecord:
        """Of a trial, by Tune's id."""
        ...

    def origin(self, trial_id: str) -> TrialRecord | None:
        """What a trial cannot be suggested again without; None: nothing but its own record."""
        ...


class LedgerCallback(TrackerCallback):
    """Writes a trial's file as it starts, as it leaves a checkpoint, and as it ends.

    A checkpoint is in the ledger before the one in front of it is removed, and the epochs behind it are in the tracker
    before it is in the ledger: whatever the moment at which the driver dies, the ledger names a checkpoint that is
    there and from which nothing is missing. Tune therefore must keep all checkpoints (``num_to_keep=None``).

    Args:
        arguments: Of :class:`~tuning.tracking.callback.TrackerCallback`.
        ledger: Of the same sweep.
        keeper: Its records are what is written.
        options: Of :class:`~tuning.tracking.callback.TrackerCallback`.
    """

    def __init__(self, *arguments: Any, ledger: SweepLedger, keeper: RecordKeeper, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ledger = ledger
        self.keeper = keeper

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        origin = self.keeper.origin(trial.trial_id)
        if origin is not None:
            self.ledger.write_trial(origin)
        self.ledger.write_trial(self.keeper.record(trial.trial_id))
        super().on_trial_start(iteration, trials, trial, **info)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        super().on_trial_result(iteration, trials, trial, result, **info)
        # a worker group's checkpoints are its own to remove; Tune hears their paths alone
        if "checkpoint_path" in result:
            if not self.stop:
                self.tracker.flush(self._run_id(trial))
            self._note_checkpoint(trial, result["checkpoint_path"], int(result["epoch"]))

    def on_checkpoint(
        self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Checkpoint, **info: Any
    ) -> None:
        if not self.stop:
            super().on_checkpoint(iteration, trials, trial, checkpoint, **info)
        previous = self._note_checkpoint(trial, checkpoint.path, int(trial.last_result["epoch"]))
        if previous not in (None, checkpoint.path):
            self._remove(previous)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """One that still counts as running comes again, as another trial of Tune's."""
        if self.keeper.record(trial.trial_id).state != "running":
            super().on_trial_error(iteration, trials, trial, **info)

    def _note_checkpoint(self, trial: Trial, path: str, epoch: int) -> str | None:
        record = self.keeper.record(trial.trial_id)
        previous, record.checkpoint, record.checkpoint_epoch = record.checkpoint, path, epoch
        self.ledger.write_trial(record)
        return previous

    def _finish(self, trial: Trial, *, failed: bool) -> None:
        record, useless = self.keeper.record(trial.trial_id), None
        if record.state == "pruned" and trial.checkpoint is not None:
            useless, record.checkpoint = record.checkpoint, None
        self.tracker.flush(self._run_id(trial))
        self.ledger.write_trial(record)
        super()._finish(trial, failed=failed)
        if useless is not None:
            self._remove(useless)

    def _checkpoint(self, trial: Trial) -> tuple[str, pafs.FileSystem | None]:
        """What the ledger has. Tune's own note lacks a checkpoint if anything failed as Tune told its callbacks."""
        record = self.keeper.record(trial.trial_id)
        if record.checkpoint is None or record.checkpoint_epoch != record.max_epochs:
            raise RuntimeError(f"trial {trial.trial_id} ended at its last epoch without a checkpoint")
        return record.checkpoint, self.filesystem

    def _remove(self, checkpoint: str) -> None:
        """One that stays takes space, and nothing else; to Tune, an error would be the trial's."""
        filesystem = self.filesystem or pafs.LocalFileSystem()
        try:
            if filesystem.get_file_info(checkpoint).type == pafs.FileType.Directory:
                filesystem.delete_dir(checkpoint)
        except OSError as error:
            _LOGGER.warning("the checkpoint %s is not needed any more and could not be removed: %s", checkpoint, error)


def has_checkpoint(path: str | None, filesystem: pafs.FileSystem | None) -> bool:
    """Whether a checkpoint that a ledger names is still there."""
    if path is None:
        return False
    if filesystem is None:
        return Path(path).is_dir()
    return bool(filesystem.get_file_info(path).type == pafs.FileType.Directory)
