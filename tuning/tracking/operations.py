"""What is asked of a tracker, as a line of JSON that can be done later.

Every operation says when it was asked for, so that a run's times are those of the trial, however late the store hears
of them, and names its run by *run key*, because the store's own id is not known yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuning.tracking.protocol import Sweep, Tracker, TrialInfo, describe_parent


@dataclass(frozen=True)
class Operation:
    """One call of a tracker's method."""

    name: str
    """``start_sweep``, ``start_trial``, ``log_epoch``, ``finish_trial``, ``log_summary`` or ``finish_sweep``."""
    at_ms: int
    """When it was asked for, in milliseconds since 1970."""
    arguments: Mapping[str, Any]
    """Plain; ``run`` is a run key or, where ``dataset`` is None, the store's id."""

    def encode(self) -> bytes:
        """As a line."""
        return json.dumps({"op": self.name, "at_ms": self.at_ms, **self.arguments}).encode()

    @classmethod
    def decode(cls, line: bytes) -> Operation:
        """The counterpart of :meth:`encode`.

        Raises:
            ValueError: the line is none.
        """
        found = json.loads(line)
        return cls(found.pop("op"), found.pop("at_ms"), found)

    @property
    def run(self) -> str | None:
        """Run key, or the store's id; None for a whole sweep."""
        return self.arguments.get("run")

    @property
    def files(self) -> list[Path]:
        """What it brings to the store."""
        return [Path(name) for name in self.arguments.get("files", ())]

    def describe(self) -> str:
        """For a person."""
        return f"{self.name} of {self.run or self.arguments['sweep']['sweep_id']}"


def sweep_to_dict(sweep: Sweep, categories: Sequence[str]) -> dict[str, Any]:
    """A sweep with some of its categories, as plain values; a thousand would not go with every trial."""
    return {
        "sweep_id": sweep.sweep_id,
        "dataset": sweep.dataset,
        "categories": {name: dict(sweep.categories[name]) for name in categories},
        "tags": dict(sweep.tags),
        "stage": sweep.stage,
    }


def trial_to_dict(trial: TrialInfo) -> dict[str, Any]:
    """A trial as plain values."""
    return asdict(trial)


class RunIds:
    """The store's id of each run key, looked up where this process did not open the run itself."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def add(self, run_key: str, run_id: str) -> None:
        """Remember one."""
        self._known[run_key] = run_id

    def find(self, tracker: Tracker, run: str, dataset: str | None) -> str:
        """The id of a run.

        Args:
            tracker: To ask.
            run: Run key or id.
            dataset: Of the run; None: ``run`` is an id.

        Raises:
            KeyError: the store has no such run.
        """
        if dataset is None:
            return run
        if run not in self._known:
            sweep_id = run.partition("/")[0]
            self._known |= {r.run_key: r.run_id for r in tracker.find_runs(dataset, sweep_id=sweep_id)}
        return self._known[run]


def apply(operation: Operation, tracker: Tracker, ids: RunIds) -> None:
    """Do what was asked."""
    given, at_ms = operation.arguments, operation.at_ms
    if operation.name == "start_sweep":
        sweep = Sweep(**given["sweep"])
        for category, run_id in tracker.start_sweep(sweep, at_ms=at_ms).items():
            ids.add(describe_parent(sweep, category).run_key, run_id)
    elif operation.name == "start_trial":
        run_id = tracker.start_trial(Sweep(**given["sweep"]), TrialInfo(**given["trial"]), at_ms=at_ms)
        ids.add(given["run"], run_id)
    elif operation.name == "finish_sweep":
        tracker.finish_sweep(Sweep(**given["sweep"]), given["status"], at_ms=at_ms)
    else:
        run_id = ids.find(tracker, given["run"], given["dataset"])
        if operation.name == "log_epoch":
            tracker.log_epoch(run_id, given["epoch"], given["metrics"], tags=given["tags"], at_ms=at_ms)
        elif operation.name == "finish_trial":
            folder = operation.files[0].parent if operation.files else None
            tracker.finish_trial(run_id, given["state"], error=given["error"], artifact_dir=folder, at_ms=at_ms)
        elif operation.name == "log_summary":
            tracker.log_summary(
                run_id,
                metrics=given["metrics"],
                tags=given["tags"],
                files=operation.files,
                artifact_path=given["artifact_path"],
                at_ms=at_ms,
            )
        else:
            raise ValueError(f"no such operation: {operation.name}")
