"""A tracker that never waits for its store: what it is told is on disk at once and reaches the store in the background.

A sweep goes on while the store is away, and a driver that dies loses nothing that it was told: whoever opens the
outbox's folder next, a resumed sweep or ``tuning replay``, brings the rest to the store. Whatever is brought there
twice, because the process died before it was ticked off, changes nothing: runs are found by key, an epoch that is there
is left alone.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ssn.errors import SSNError
from tuning.tracking.delivery import FILES_FOLDER, FIRST_PAUSE_S, REFUSED_FILE, Delivery, Question, say
from tuning.tracking.journal import FULL, Journal
from tuning.tracking.operations import Operation, sweep_to_dict, trial_to_dict
from tuning.tracking.protocol import (
    CLOSE_PATIENCE_S,
    MODEL_ARTIFACT_PATH,
    TRIAL_MODEL_FILES,
    RunRecord,
    RunStatus,
    Sweep,
    Tracker,
    TrialInfo,
    TrialState,
    describe_parent,
    describe_trial,
    now_ms,
)

T = TypeVar("T")

ABOUT_FILE = "outbox.json"
READ_PATIENCE_S = 60.0
"""How long a question to the store may go without any progress."""
_POLL_S = 0.1

_open: dict[Path, Delivery] = {}
"""Of this process, by folder: a sweep's own outbox and the copies that Tune makes of it share one."""
_opening = threading.Lock()


class Outbox:
    """See :class:`tuning.tracking.protocol.Tracker`; a run's handle is its run key.

    Args:
        tracker: Where everything goes in the end; only the outbox may use it from now on.
        folder: Local; one sweep's alone. Deleted once it is closed with nothing left in it.
        first_pause_s: Before a second attempt to reach the store.
        patience_s: How long a question to the store may wait for it.
    """

    def __init__(
        self,
        tracker: Tracker,
        folder: Path,
        *,
        first_pause_s: float = FIRST_PAUSE_S,
        patience_s: float = READ_PATIENCE_S,
    ) -> None:
        self.tracker = tracker
        self.folder = folder.absolute()
        self._first_pause_s = first_pause_s
        self._patience_s = patience_s
        # Ray pickles callbacks as the sweep goes on, and the tracker is the thread's alone by then.
        self._pickled_tracker = pickle.dumps(tracker)
        self._datasets: dict[str, str] = {}  # of the runs that were opened here
        self._numbers = itertools.count()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tracker": None, "_datasets": {}, "_numbers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tracker = pickle.loads(self._pickled_tracker)
        self._numbers = itertools.count()

    @property
    def tracking_uri(self) -> str:
        """Of the tracker behind."""
        return self.tracker.tracking_uri  # type: ignore[attr-defined]

    @property
    def way_out(self) -> str:
        """What a person can do about an outbox that is not empty."""
        return f"python -m tuning replay {self.folder}"

    @property
    def num_left(self) -> int:
        """Operations that the store does not have yet."""
        return self._delivery().num_left

    def check(self) -> None:
        if self.folder in _open:
            self._ask(lambda tracker: tracker.check())
        else:
            self.tracker.check()

    def start_sweep(self, sweep: Sweep, *, at_ms: int | None = None) -> dict[str, str]:
        self._describe(sweep)
        handles = {category: describe_parent(sweep, category).run_key for category in sweep.categories}
        self._datasets |= dict.fromkeys(handles.values(), sweep.dataset)
        self._put("start_sweep", at_ms, sweep=sweep_to_dict(sweep, list(sweep.categories)))
        return handles

    def start_trial(self, sweep: Sweep, trial: TrialInfo, *, at_ms: int | None = None) -> str:
        handle = describe_trial(sweep, trial).run_key
        self._datasets[handle] = sweep.dataset
        described = sweep_to_dict(sweep, [trial.category])
        self._put("start_trial", at_ms, handle, sweep=described, trial=trial_to_dict(trial))
        return handle

    def log_epoch(
        self,
        run_id: str,
        epoch: int,
        metrics: Mapping[str, float],
        *,
        tags: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> None:
        self._put("log_epoch", at_ms, run_id, epoch=epoch, metrics=dict(metrics), tags=dict(tags or {}))

    def flush(self, run_id: str | None = None) -> None:
        """Everything outlives this process as soon as it is said."""

    def finish_trial(
        self,
        run_id: str,
        state: TrialState,
        *,
        error: str | None = None,
        artifact_dir: Path | None = None,
        at_ms: int | None = None,
    ) -> None:
        if state == "COMPLETE" and artifact_dir is None:
            raise ValueError("a complete trial has a model to log")
        files = [] if artifact_dir is None else self._keep([artifact_dir / name for name in TRIAL_MODEL_FILES])
        self._put("finish_trial", at_ms, run_id, state=state, error=error, files=files)

    def log_summary(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        files: Sequence[Path] = (),
        artifact_path: str | None = None,
        at_ms: int | None = None,
    ) -> None:
        self._put(
            "log_summary",
            at_ms,
            run_id,
            metrics=dict(metrics or {}),
            tags=dict(tags or {}),
            files=self._keep(files),
            artifact_path=artifact_path,
        )

    def finish_sweep(self, sweep: Sweep, status: RunStatus = "FINISHED", *, at_ms: int | None = None) -> None:
        self._put("finish_sweep", at_ms, sweep=sweep_to_dict(replace(sweep, categories={}), []), status=status)

    def find_runs(self, dataset: str, *, sweep_id: str | None = None, category: str | None = None) -> list[RunRecord]:
        return self._ask(lambda tracker: tracker.find_runs(dataset, sweep_id=sweep_id, category=category))

    def metric_history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        return self._ask(lambda tracker: tracker.metric_history(self._find(run_id), metric))

    def list_artifacts(self, run_id: str, path: str = MODEL_ARTIFACT_PATH) -> list[str]:
        return self._ask(lambda tracker: tracker.list_artifacts(self._find(run_id), path))

    def drain(self, patience_s: float) -> bool:
        delivery = self._delivery()
        answered = self._wait(delivery, Question(lambda: None), patience_s)
        return answered and delivery.num_waiting == 0

    def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        if self.folder not in _open and not self.folder.exists():
            return
        behind = self._let_go(drained=self.drain(patience_s))
        if behind is not None:
            say(f"warning: {behind}")

    def _let_go(self, *, drained: bool) -> str | None:
        """End the thread and leave the folder; the line to say if anything is left in it."""
        with _opening:
            delivery = _open.pop(self.folder)
        delivery.stop()
        num_left, reason = delivery.num_left, delivery.trouble
        delivery.journal.close()
        refused = self.folder / REFUSED_FILE
        if delivery.num_refused:
            say(f"warning: {delivery.num_refused} tracking operations were refused; see {refused}")
        if drained and not refused.exists():
            shutil.rmtree(self.folder)
        if drained:
            return None
        why = f" ({reason})" if reason else ""
        return (
            f"tracking is behind by {num_left} operations{why}. {self.folder} keeps them; once the store can take "
            f"them, run: {self.way_out}"
        )

    def _delivery(self) -> Delivery:
        with _opening:
            if self.folder not in _open:
                _open[self.folder] = Delivery(Journal(self.folder), self.tracker, first_pause_s=self._first_pause_s)
            return _open[self.folder]

    def _put(self, name: str, at_ms: int | None, run: str | None = None, **arguments: Any) -> None:
        if run is not None:
            arguments |= {"run": run, "dataset": self._datasets.get(run)}
        self._delivery().put(Operation(name, at_ms or now_ms(), arguments))

    def _ask(self, ask: Callable[[Tracker], T]) -> T:
        delivery = self._delivery()
        question = Question(lambda: ask(delivery.tracker))
        if not self._wait(delivery, question, self._patience_s):
            if delivery.failure is not None:
                raise RuntimeError(f"tracking has stopped; {self.folder} keeps the rest") from delivery.failure
            raise SSNError(
                f"{delivery.trouble or 'tracking is behind'}; {delivery.num_left} operations wait in {self.folder}, "
                f"to be brought there by: {self.way_out}"
            )
        return question.result()

    def _wait(self, delivery: Delivery, question: Question[Any], patience_s: float) -> bool:
        """Whether the question was answered before nothing had moved for ``patience_s``."""
        delivery.ask(question)
        moves, until_s = delivery.moves, time.monotonic() + patience_s
        while not question.answered.wait(_POLL_S):
            if delivery.failure is not None:
                return False
            if delivery.moves != moves:
                moves, until_s = delivery.moves, time.monotonic() + patience_s
            if time.monotonic() > until_s:
                delivery.withdraw(question)
                return False
        return True

    def _find(self, run: str) -> str:
        """The store's id; in the delivery's thread."""
        delivery = self._delivery()
        return delivery.ids.find(delivery.tracker, run, self._datasets.get(run))

    def _keep(self, files: Sequence[Path]) -> list[str]:
        """Links or copies of files that may be gone when their turn comes; on a full disk, the files themselves."""
        if not files:
            return []
        home = self.folder / FILES_FOLDER / f"{time.time_ns()}-{next(self._numbers)}"
        try:
            home.mkdir(parents=True)
            for file in files:
                _link_or_copy(file, home / file.name)
        except OSError as error:
            if error.errno not in FULL:
                raise
            shutil.rmtree(home, ignore_errors=True)
            say(f"warning: no space left for {self.folder}; {files[0].parent} must stay until its files are stored")
            return [str(file.absolute()) for file in files]
        return [str(home / file.name) for file in files]

    def _describe(self, sweep: Sweep) -> None:
        """Leave a note of where the outbox's contents go and which sweep they are of, for whoever finds it."""
        self._delivery()
        path = self.folder / ABOUT_FILE
        about = json.loads(path.read_text()) if path.exists() else {"sweeps": []}
        about["tracking_uri"] = getattr(self.tracker, "tracking_uri", None)
        mine = {"sweep_id": sweep.sweep_id, "dataset": sweep.dataset, "stage": sweep.stage}
        if mine not in about["sweeps"]:
            about["sweeps"].append(mine)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(about))
        scratch.replace(path)


def replay(
    folder: Path,
    tracking_uri: str | None = None,
    *,
    tracker: Tracker | None = None,
    patience_s: float = CLOSE_PATIENCE_S,
) -> int:
    """Bring what a sweep left in its outbox to the store, and end the runs that it left open.

    Args:
        folder: Of an outbox that no sweep uses any more.
        tracking_uri: Of the MLflow to write to; None: where the sweep had it.
        tracker: Another than MLflow.
        patience_s: How long the store may be away.

    Returns:
        How many operations were brought there.

    Raises:
        SSNError: the folder is no outbox or still in use, or the store cannot be reached or not take all of it.
    """
    path = folder / ABOUT_FILE
    if not path.is_file():
        raise SSNError(
            f"{folder} is no outbox of a sweep: it has no {ABOUT_FILE}; an outbox with nothing left is deleted"
        )
    about = json.loads(path.read_text())
    if tracker is None:
        from tuning.tracking.mlflow_tracker import MLflowTracker

        tracker = MLflowTracker(tracking_uri or about["tracking_uri"], persistent=False)
    outbox = Outbox(tracker, folder, patience_s=patience_s)
    num_left, drained = outbox.num_left, False
    try:
        for each in about["sweeps"]:
            sweep = Sweep(each["sweep_id"], each["dataset"], {}, stage=each["stage"])
            parents = [r for r in outbox.find_runs(sweep.dataset, sweep_id=sweep.sweep_id) if r.parent_run_id is None]
            if any(parent.status == "RUNNING" for parent in parents):
                outbox.finish_sweep(sweep, "KILLED")
        drained = outbox.drain(patience_s)
    finally:
        behind = outbox._let_go(drained=drained)
    if behind is not None:
        raise SSNError(behind)
    return num_left


def outbox_folder(out: Path | str, sweep_id: str) -> Path:
    """Where a sweep's outbox is: with its state or, where that is remote, in the machine's temporary folder."""
    if "://" in str(out):
        return Path(tempfile.gettempdir()) / f"tuning-outbox-{sweep_id}"
    return Path(out).absolute() / sweep_id / "outbox"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in FULL or isinstance(error, FileNotFoundError):
            raise
        shutil.copyfile(source, target)  # another disk, or one without links
