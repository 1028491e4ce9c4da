"""Brings operations from a journal to a tracker, in order, in a thread that alone talks to that tracker.

Three things may go wrong. The store is away: everything waits, and is tried again with growing pauses. The store cannot
take files: the operation waits, with all that follows for the same run, and the other runs go on. The store refuses an
operation: it is put aside in ``refused.jsonl`` and reported, and the next one is tried.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from ssn.errors import SSNError
from tuning.tracking.journal import FULL, Entry, Journal, Position
from tuning.tracking.operations import Operation, RunIds, apply
from tuning.tracking.protocol import ArtifactsUnavailableError, Tracker, TrackerUnavailableError

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
"""Between attempts while the store is away."""
FLUSH_INTERVAL_S = 2.0
"""Metrics of many epochs and trials are gathered for so long and then written together."""
SYNC_INTERVAL_S = 1.0
READ_LIMIT = 500
MAX_ERRORS_OF_THE_STORE = 10
"""Attempts after which an operation that makes the store fail, while it answers, counts as refused."""
STOP_TIMEOUT_S = 5.0
"""A request that takes longer is left to end with the process; what it was for is done again by the next one."""
WAITING_FILE = "waiting.jsonl"
REFUSED_FILE = "refused.jsonl"
FILES_FOLDER = "files"


class Question(Generic[T]):
    """Something to ask the tracker once everything before it was brought there."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._answer: T
        self._error: BaseException | None = None
        self.answered = threading.Event()
        self.after = 0
        """How many lines of the journal come before it."""

    def put(self) -> None:
        """Ask; an outage passes on to the caller, who asks again."""
        try:
            self._answer = self._ask()
        except TrackerUnavailableError:
            raise
        except BaseException as error:
            self._error = error
        self.answered.set()

    def fail(self, error: Exception) -> None:
        """There is no answer to be had."""
        self._error = error
        self.answered.set()

    def result(self) -> T:
        """The answer, or the exception that came instead."""
        if self._error is not None:
            raise self._error
        return self._answer


class Delivery:
    """See the module; the thread starts at once.

    Args:
        journal: Where operations come from.
        tracker: Where they go.
        first_pause_s: After a first failed attempt; doubles up to :data:`LONGEST_PAUSE_S`.
    """

    def __init__(self, journal: Journal, tracker: Tracker, *, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self.journal = journal
        self.tracker = tracker
        self.moves = 0
        """Grows with everything that reaches the store."""
        self.failure: BaseException | None = None
        """Why the thread ended before it was stopped: a bug."""
        self.num_refused = 0
        self._error: str | None = None
        self._files_error: str | None = None
        self._first_pause_s = first_pause_s
        self.ids = RunIds()
        """For the thread, and for questions, which it asks."""
        self._woken = threading.Condition()
        self._stopping = False
        self._hurry = False
        self._try_now = False
        self._questions: list[Question] = []
        self._unread: list[Entry] = []
        self._num_new = 0
        self._unflushed: list[Operation] = []
        self._flush_due_s: float | None = None
        self._reached: Position | None = None
        self._acknowledged: Position | None = None
        self._waiting: list[Operation] = self._read_waiting()
        self._waiting_changed = False
        self._retry_files_s = 0.0 if self._waiting else float("inf")
        self._files_pause_s = first_pause_s
        self._synced_s = time.monotonic()
        self._outage_said = False
        self._full_said = False
        self._held_said = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    # What other threads call.

    def put(self, operation: Operation) -> None:
        """Add an operation to the journal; takes microseconds."""
        if not self.journal.append(operation.encode()) and not self._held_said:
            self._held_said = True
            say(f"warning: tracking: no space left for {self.journal.folder}; what the store has not yet is in memory")
        with self._woken:
            self._woken.notify()

    def ask(self, question: Question) -> None:
        """Put a question to the tracker, after all that is in the journal."""
        with self._woken:
            question.after = self.journal.num_appended
            self._questions.append(question)
            self._hurry = self._try_now = True
            self._woken.notify()

    def withdraw(self, question: Question) -> None:
        """Nobody waits for the answer any more."""
        with self._woken:
            if question in self._questions:
                self._questions.remove(question)

    @property
    def num_waiting(self) -> int:
        """Operations, with files, that wait for space."""
        return len(self._waiting)

    @property
    def trouble(self) -> str | None:
        """Why the store does not have everything: what it, or the store of files, said last."""
        return self._error or (self._files_error if self._waiting else None)

    @property
    def num_left(self) -> int:
        """Operations that the store does not have yet, or may not have."""
        return self.num_waiting + self.journal.count_after(self._acknowledged or self.journal.start)

    def stop(self) -> None:
        """End the thread after its present operation; what is left stays in the journal."""
        with self._woken:
            self._stopping = True
            self._woken.notify()
        self._thread.join(STOP_TIMEOUT_S)

    # The thread.

    def _work(self) -> None:
        try:
            self._deliver()
        except BaseException as error:
            if self._stopping:
                return
            self.failure = error
            say(
                f"warning: tracking has stopped ({type(error).__name__}: {error}); {self.journal.folder} keeps the rest"
            )

    def _deliver(self) -> None:
        while not self._stopping:
            self._apply_new()
            self._retry_waiting()
            if self._flush_due_s is not None and (self._hurry or time.monotonic() >= self._flush_due_s):
                self._flush()
            self._sync()
            self._answer()
            self._rest()

    def _rest(self) -> None:
        """Until there is something to do."""
        with self._woken:
            if self._stopping or self._questions or self._unread or self.journal.has_more:
                return
            self._hurry = False
            now = time.monotonic()
            due = [self._retry_files_s - now]
            if self._flush_due_s is not None:
                due += [self._flush_due_s - now, SYNC_INTERVAL_S]
            wait_s = max(0.0, min(due))
            self._woken.wait(wait_s if wait_s < float("inf") else None)

    def _apply_new(self) -> None:
        self._unread = self._unread or self.journal.read(READ_LIMIT)
        while self._unread and not self._stopping:
            entry = self._unread[0]
            operation = self._decode(entry.line)
            if operation is not None:
                if operation.run is not None and any(w.run == operation.run for w in self._waiting):
                    self._wait_for_space(operation)
                elif not self._bring(operation):
                    return
            self._reached = entry.end or self._reached
            self._num_new += self.journal.is_new(entry)
            self._unread.pop(0)
            if self._flush_due_s is None:
                self._flush_due_s = time.monotonic() + FLUSH_INTERVAL_S
            if time.monotonic() >= self._flush_due_s:
                self._flush()
        self._hurry = self._hurry or bool(self._questions)

    def _decode(self, line: bytes) -> Operation | None:
        try:
            return Operation.decode(line)
        except (ValueError, KeyError, TypeError) as error:
            self._refuse(line.decode(errors="replace"), "a line of the outbox is damaged", error)
            return None

    def _bring(self, operation: Operation) -> bool:
        """Do it, wait for the store as long as it takes; False only if the thread is to end meanwhile."""
        missing = next((file for file in operation.files if not file.is_file()), None)
        if missing is not None:
            self._refuse_operation(operation, SSNError(f"{missing} is gone"))
            return True
        try:
            done = self._insist(lambda: apply(operation, self.tracker, self.ids))
        except ArtifactsUnavailableError as error:
            self._say_no_space(error)
            self._wait_for_space(operation)
            return True
        except Exception as error:
            self._refuse_operation(operation, error)
            return True
        if done:
            self.moves += 1
            self._unflushed.append(operation)
        return done

    def _insist(self, action: Callable[[], None]) -> bool:
        """Try until the store answers.

        Raises:
            Exception: what the store has to say against it.
        """
        pause_s, errors = self._first_pause_s, 0
        while True:
            try:
                action()
            except TrackerUnavailableError as error:
                if isinstance(error, ArtifactsUnavailableError) and self._store_answers():
                    raise
                errors += error.may_be_the_call
                if errors >= MAX_ERRORS_OF_THE_STORE:
                    raise
                self._say_away(error)
            else:
                self._say_back()
                return True
            with self._woken:
                if self._stopping:
                    return False
                self._woken.wait_for(lambda: self._stopping or self._try_now, pause_s)
                # whoever asks has less patience than the longest pause
                pause_s = self._first_pause_s if self._try_now else min(2 * pause_s, LONGEST_PAUSE_S)
                self._try_now = False
            self._sync()

    def _store_answers(self) -> bool:
        """Whether anything at all can be had of the store."""
        try:
            self.tracker.check()
        except SSNError:
            return False
        return True

    def _flush(self) -> None:
        """Have the tracker write what it gathered, and tick off what is written."""
        for run in dict.fromkeys(operation.run for operation in self._unflushed):
            if run is not None and not self._flush_run(run):
                return
        finished = [file for operation in self._unflushed for file in operation.files]
        self._unflushed.clear()
        self._flush_due_s = None
        if not self._save_waiting():
            return
        if self._reached is not None and self._reached != self._acknowledged:
            self.journal.acknowledge(self._reached)
            self._acknowledged = self._reached
        self._delete(finished)

    def _flush_run(self, run: str) -> bool:
        mine = [operation for operation in self._unflushed if operation.run == run]

        def flush() -> None:
            self.tracker.flush(self.ids.find(self.tracker, run, mine[0].arguments["dataset"]))

        try:
            if not self._insist(flush):
                return False
        except Exception as error:
            for operation in mine:
                if operation.name == "log_epoch":
                    self._refuse_operation(operation, error)
        self.moves += 1
        return True

    def _delete(self, files: list[Path]) -> None:
        """What was copied for the journal's sake."""
        home = self.journal.folder / FILES_FOLDER
        for folder in {file.parent for file in files}:
            if folder.parent == home:
                shutil.rmtree(folder, ignore_errors=True)

    # Operations that wait for space.

    def _wait_for_space(self, operation: Operation) -> None:
        self._waiting.append(operation)
        self._waiting_changed = True
        self._retry_files_s = min(self._retry_files_s, time.monotonic() + self._files_pause_s)

    def _retry_waiting(self) -> None:
        if not self._waiting or not (self._hurry or time.monotonic() >= self._retry_files_s):
            return
        left: list[Operation] = []
        waiting, self._waiting = self._waiting, []
        for operation in waiting:
            if any(each.run == operation.run for each in left) or not self._bring(operation):
                left.append(operation)
            elif self._waiting:  # it waits again
                left.append(self._waiting.pop())
        self._waiting = left
        self._waiting_changed = self._waiting_changed or len(left) < len(waiting)
        if left:
            self._files_pause_s = min(2 * self._files_pause_s, LONGEST_PAUSE_S)
            self._retry_files_s = time.monotonic() + self._files_pause_s
        else:
            self._files_pause_s, self._retry_files_s = self._first_pause_s, float("inf")
            self._full_said = False
            say("tracking: there is space for artifacts again, and those that waited are stored")
        if self._flush_due_s is None:
            self._flush_due_s = time.monotonic()

    def _save_waiting(self) -> bool:
        """Keep them where a restart finds them, before the journal's position moves past them; not on a full disk."""
        if not self._waiting_changed:
            return True
        path = self.journal.folder / WAITING_FILE
        scratch = path.with_suffix(".tmp")
        try:
            scratch.write_bytes(b"".join(operation.encode() + b"\n" for operation in self._waiting))
            scratch.replace(path)
        except OSError as error:
            if error.errno not in FULL:
                raise
            scratch.unlink(missing_ok=True)
            self._flush_due_s = time.monotonic() + LONGEST_PAUSE_S
            return False
        self._waiting_changed = False
        return True

    def _read_waiting(self) -> list[Operation]:
        path = self.journal.folder / WAITING_FILE
        return [Operation.decode(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    # What was refused.

    def _refuse_operation(self, operation: Operation, error: Exception) -> None:
        self._refuse(operation.encode().decode(), operation.describe(), error)

    def _refuse(self, line: str, what: str, error: Exception) -> None:
        self.num_refused += 1
        reason = str(error) if isinstance(error, SSNError) else f"{type(error).__name__}: {error}"
        entry = {"refused": line, "reason": reason, "traceback": traceback.format_exception(error)}
        path = self.journal.folder / REFUSED_FILE
        kept = f"it is kept in {path}"
        try:
            with path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as full:
            if full.errno not in FULL:
                raise
            kept = f"and the full disk did not take it: {line}"
        say(f"warning: tracking: {what} was refused ({reason}); {kept}")

    # Questions.

    def _answer(self) -> None:
        while not self._stopping:
            with self._woken:
                if not self._questions:
                    return
                question = self._questions[0]
                if self._num_new < question.after or not self.journal.read_all_old:
                    return
            if self._flush_due_s is not None:
                self._flush()
            try:
                if not self._insist(question.put):
                    return
            except TrackerUnavailableError as error:
                question.fail(error)
            self.withdraw(question)
            self.moves += 1

    def _sync(self) -> None:
        if time.monotonic() - self._synced_s >= SYNC_INTERVAL_S:
            self.journal.sync()
            self._synced_s = time.monotonic()

    # Notices, one per change.

    def _say_away(self, error: Exception) -> None:
        self._error = str(error)
        if not self._outage_said:
            self._outage_said = True
            say(
                f"warning: tracking waits: {error}. The sweep goes on; {self.journal.folder} keeps what is to be stored"
            )

    def _say_back(self) -> None:
        # what was done may have been kept in the tracker's memory for the time being
        if self._outage_said and self._store_answers():
            self._outage_said, self._error = False, None
            say("tracking: the store answers again; what was kept is being written")

    def _say_no_space(self, error: Exception) -> None:
        self._files_error = str(error)
        if not self._full_said:
            self._full_said = True
            say(f"warning: tracking: {error}. Metrics go on; the files wait in {self.journal.folder}")


def say(line: str) -> None:
    """Tell the user, above whatever live view there is."""
    print(" ".join(line.split()), file=sys.stderr, flush=True)
