"""Drives a tracker from the Tune driver: trials become child runs, and a resumed sweep continues the same ones."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.tune import Callback
from ray.tune.result import AUTO_RESULT_KEYS, DEBUG_METRICS

from tuning.execution.interrupt import StopFlag
from tuning.tracking.protocol import STOP_PATIENCE_S, Sweep, Tracker, TrialInfo

if TYPE_CHECKING:
    import pyarrow.fs
    from ray.tune import Checkpoint
    from ray.tune.experiment import Trial

RESULT_KEYS_NOT_LOGGED = frozenset({*AUTO_RESULT_KEYS, *DEBUG_METRICS, "epoch", "done", "experiment_tag"})
RESULT_TAGS = ("hardware", "hostname", "feature_source")
"""Text in a trial's results that becomes a tag: where it ran, which on a cluster is not where the driver runs, and
whether its features were ``cached`` or, for lack of memory, ``streamed``."""


class TrackerCallback(Callback):
    """Logs every trial of a sweep to a :class:`~tuning.tracking.protocol.Tracker`.

    A trial's Tune config is ``{"trial_key", "category", "index", "config": flat dotted dict}`` and, optionally,
    ``"stage"`` and ``"tags"``. It is complete when its last epoch is ``train.epochs``, pruned when it was stopped
    earlier. The model of a complete trial is in its last checkpoint.

    Args:
        tracker: Where to log; ``check()`` and ``start_sweep`` are the caller's, ``finish_sweep`` too, because a sweep
            goes on (champions, test scores) after Tune is done.
        sweep: What :meth:`Tracker.start_sweep` was given.
        filesystem: Of the checkpoints that Ray Train workers write; None: the local one.
        stop: True once the sweep was told to stop. All its runs are closed then, before Tune takes its seconds to end
            the trials: whoever told it may kill it meanwhile.
    """

    def __init__(
        self,
        tracker: Tracker,
        sweep: Sweep,
        *,
        filesystem: pyarrow.fs.FileSystem | None = None,
        stop: StopFlag | None = None,
    ) -> None:
        self.tracker = tracker
        self.sweep = sweep
        self.filesystem = filesystem
        self.stop = stop or StopFlag()
        self._open_runs: dict[str, str] = {}  # Tune trial id -> run id

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores its callbacks as a sweep begins.
        return {**self.__dict__, "_open_runs": {}}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._run_id(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if "epoch" in result and not self.stop:
            tags = {key: str(result[key]) for key in RESULT_TAGS if key in result}
            self.tracker.log_epoch(self._run_id(trial), int(result["epoch"]), epoch_metrics(result), tags=tags)

    def on_checkpoint(
        self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Checkpoint, **info: Any
    ) -> None:
        """What a resumed trial does not compute again must be in the tracker already."""
        self.tracker.flush(self._run_id(trial))

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if self.stop:
            self.tracker.finish_sweep(self.sweep, "KILLED")
            self.tracker.drain(STOP_PATIENCE_S)
            self._open_runs.clear()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._finish(trial, failed=reported_failure(trial) is not None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._finish(trial, failed=True)

    def has_begun(self, trial_id: str) -> bool:
        """Whether a trial, by Tune's id, has a run that is open."""
        return trial_id in self._open_runs

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Runs still open belong to trials that an interrupt cut short.

        Tune marks those TERMINATED, as if they had ended by themselves, without calling :meth:`on_trial_complete`.
        """
        for run_id in self._open_runs.values():
            self.tracker.finish_trial(run_id, "INTERRUPTED")
        self._open_runs.clear()
        self.tracker.flush()

    def _run_id(self, trial: Trial) -> str:
        if trial.trial_id not in self._open_runs:
            self._open_runs[trial.trial_id] = self.tracker.start_trial(self.sweep, trial_info(trial))
        return self._open_runs[trial.trial_id]

    def _finish(self, trial: Trial, *, failed: bool) -> None:
        run_id = self._run_id(trial)
        if failed:
            self.tracker.finish_trial(run_id, "FAIL", error=reported_failure(trial) or trial_error(trial))
        elif not reached_last_epoch(trial):
            self.tracker.finish_trial(run_id, "PRUNED")
        else:
            with checkpoint_folder(*self._checkpoint(trial)) as folder:
                self.tracker.finish_trial(run_id, "COMPLETE", artifact_dir=folder)
        del self._open_runs[trial.trial_id]

    def _checkpoint(self, trial: Trial) -> tuple[str, pyarrow.fs.FileSystem | None]:
        """Where a complete trial's last checkpoint is, and on which file system."""
        checkpoint = trial.checkpoint
        if checkpoint is not None:
            return checkpoint.path, checkpoint.filesystem
        # Ray Train inside a trial hands only its checkpoint's path to Tune
        path = trial.last_result.get("checkpoint_path")
        if not path:
            raise RuntimeError(f"trial {trial.trial_id} ended at its last epoch without a checkpoint")
        return path, self.filesystem


def trial_info(trial: Trial) -> TrialInfo:
    """What the tracker needs to know of a Tune trial."""
    config = trial.config
    return TrialInfo(
        category=config["category"],
        trial_key=config["trial_key"],
        index=config["index"],
        config=config["config"],
        stage=config.get("stage", "search"),
        tags=config.get("tags", {}),
    )


def reached_last_epoch(trial: Trial) -> bool:
    """Whether the trial had its full budget of epochs."""
    return int(trial.last_result.get("epoch", 0)) >= int(trial.config["config"]["train.epochs"])


def reported_failure(trial: Trial) -> str | None:
    """Why a trial ended itself, in one line; None if it did not. See ``train_in_trial``."""
    failure: str | None = trial.last_result.get("failure")
    return failure


def epoch_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The trial's own numbers, without those that Tune adds but for the time it took; undefined metrics are absent."""
    own = {key: value for key, value in result.items() if key not in RESULT_KEYS_NOT_LOGGED and key[:2] != "__"}
    if "time_total_s" in result:
        own["elapsed_s"] = result["time_total_s"]
    return {
        key: float(value)
        for key, value in own.items()
        if isinstance(value, numbers.Real) and not isinstance(value, bool)
    }


def trial_error(trial: Trial) -> str:
    """One line that says why a trial failed: the message of the exception that its own code raised."""
    error = _load_error(trial)
    while getattr(error, "cause", None) is not None:  # RayTaskError
        error = error.cause  # type: ignore[union-attr]
    if isinstance(error, RayActorError):
        times = trial.run_metadata.num_failures
        why = "its node ran low on memory" if "low on memory" in str(error) else "killed, for its memory perhaps"
        return f"its process died {times} times ({why}); lower train.batch_size, or give it more memory"
    if isinstance(error, BaseException) and not str(error).strip():
        return type(error).__name__
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    if not lines:
        return "the trial failed without an error message; see its folder in the sweep's storage"
    # What crossed process borders as text is a whole traceback, whose last line names the exception itself.
    if isinstance(error, str) or lines[0].startswith("Traceback") or len(lines) > 3:
        return lines[-1]
    return f"{type(error).__name__}: {' '.join(lines)}"


def _load_error(trial: Trial) -> BaseException | str | None:
    """The exception, or its text, that Tune kept of a trial's last failure.

    Tune writes it beside the driver and copies it to the sweep's storage later than it calls back.
    """
    if trial.pickled_error_file and Path(trial.pickled_error_file).exists():
        error: BaseException = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        return error
    if trial.error_file and Path(trial.error_file).exists():
        return Path(trial.error_file).read_text()
    return trial.get_pickled_error() or trial.get_error()


@contextlib.contextmanager
def checkpoint_folder(path: str, filesystem: pyarrow.fs.FileSystem | None) -> Iterator[Path]:
    """The local folder with the model files of a checkpoint, downloaded for the time being where it is remote."""
    from ray.tune import Checkpoint

    with Checkpoint(path, filesystem).as_directory() as folder:
        nested = Path(folder) / "model"
        yield nested if nested.is_dir() else Path(folder)
