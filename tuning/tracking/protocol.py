"""What the platform asks of an experiment tracker, whatever stands behind it.

A sweep is a tree of runs: one parent run per category, one child run per trial. The tracker is driven from the Tune
driver alone, so no worker imports its client library. Every run is found again by its *run key*, so that a restored
sweep continues the runs that the interrupted one began, instead of opening new ones.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from ssn.errors import SSNError

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
"""What the tracker's own interface shows."""

TrialState = Literal["COMPLETE", "PRUNED", "FAIL", "INTERRUPTED"]
"""How a trial ended. A pruned trial did what was asked of it, so its run is FINISHED like a complete one: KILLED is
what an interrupted run is left as until its sweep is restored, and filters on status keep the two apart."""

STATUS_OF_STATE: dict[TrialState, RunStatus] = {
    "COMPLETE": "FINISHED",
    "PRUNED": "FINISHED",
    "FAIL": "FAILED",
    "INTERRUPTED": "KILLED",
}

PARENT_STAGE = "sweep"
"""Stage of a category's parent run."""

FINALIST_STAGE = "finalist"
"""Stage of the runs that repeat a category's best trials with other seeds."""

BENCHMARK_STAGE = "benchmark"
"""Stage of a benchmark's one parent run and of the runs below it; leaderboards and champions leave them alone."""

ALL_CATEGORIES = "all categories"
"""What a benchmark's parent run has for a category."""

MODEL_ARTIFACT_PATH = "model"
"""Where a run's artifacts hold the trained model."""

TRIAL_MODEL_FILES = ("config.json", "heads.safetensors", "meta.json")
"""The files of a trained model that a trial keeps; the frozen backbone is left out, its digest is in ``meta.json``."""


CLOSE_PATIENCE_S = 60.0
"""How long a tracker's store may be away at the end before the rest is left for later."""
STOP_PATIENCE_S = 3.0
"""Likewise for a sweep that was told to stop; whoever told it may kill it soon."""


class TrackerUnavailableError(SSNError):
    """The tracker's store cannot be reached now; the same call may succeed later."""

    def __init__(self, message: str, *, may_be_the_call: bool = False) -> None:
        super().__init__(message)
        self.may_be_the_call = may_be_the_call
        """The store answered, but with an error of its own, which may or may not come from what was asked of it."""


class ArtifactsUnavailableError(TrackerUnavailableError):
    """Files cannot be stored now, for lack of space or because their store is away; numbers can."""


@dataclass(frozen=True)
class Sweep:
    """One search, or benchmark, over categories of one dataset."""

    sweep_id: str
    dataset: str
    categories: Mapping[str, Mapping[str, str]]
    """Category name -> tags of all its runs (``search_fingerprint``, ``test_fingerprint``, ``backbone_digest``)."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of every run, such as :func:`tuning.tracking.environment.environment_tags`."""
    stage: str = PARENT_STAGE
    """Of its parent runs: one per category, but for a benchmark one in all."""


@dataclass(frozen=True)
class TrialInfo:
    """One trial, as it is known before it starts."""

    category: str
    trial_key: str
    """Trial identity (:func:`ssn.config.trial_identity`)."""
    index: int
    """Position in the category's search; 0 is the paper's default."""
    config: Mapping[str, Any]
    """Flat dotted configuration; becomes the run's parameters."""
    stage: str = "search"
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """A run as read back from the tracker."""

    run_id: str
    run_key: str
    name: str
    parent_run_id: str | None
    """None for a category's parent run."""
    status: RunStatus
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    """Last value of each metric."""
    tags: Mapping[str, str]
    started_ms: int | None = None
    """In milliseconds since 1970, when the run was first opened."""
    ended_ms: int | None = None
    """None while it runs."""

    @property
    def category(self) -> str:
        return self.tags["category"]

    @property
    def stage(self) -> str:
        return self.tags["stage"]

    @property
    def trial_state(self) -> str | None:
        """How the trial ended, or None while it runs and for parent runs."""
        return self.tags.get("trial_state")


def make_run_key(sweep_id: str, stage: str, category: str, trial_key: str) -> str:
    """The tag by which a run is found again: (sweep id, stage, category, trial identity).

    The category is part of it because two categories with the same images give their trials the same identity, yet
    each has its own parent.
    """
    return "/".join((sweep_id, stage, category, trial_key))


@dataclass(frozen=True)
class RunSpec:
    """What a run is opened with, the same for every implementation."""

    run_key: str
    name: str
    tags: Mapping[str, str]


def describe_parent(sweep: Sweep, category: str) -> RunSpec:
    """Key, name and tags of a category's parent run, or of the one that a benchmark's categories share."""
    if sweep.stage == BENCHMARK_STAGE:
        shared = replace(sweep, categories={ALL_CATEGORIES: {}})
        return _describe(shared, ALL_CATEGORIES, BENCHMARK_STAGE, "", f"benchmark {sweep.sweep_id}", {})
    return _describe(sweep, category, PARENT_STAGE, "", category, {})


def describe_trial(sweep: Sweep, trial: TrialInfo) -> RunSpec:
    """Key, name and tags of a trial's run."""
    stage = "" if trial.stage == "search" else f"-{trial.stage}"
    tags = {**trial.tags, "trial_identity": trial.trial_key, "trial_index": str(trial.index)}
    name = f"{trial.category}{stage}-{trial.index:03d}"
    return _describe(sweep, trial.category, trial.stage, trial.trial_key, name, tags)


def _describe(sweep: Sweep, category: str, stage: str, trial_key: str, name: str, tags: Mapping[str, str]) -> RunSpec:
    run_key = make_run_key(sweep.sweep_id, stage, category, trial_key)
    own = {
        "run_key": run_key,
        "sweep_id": sweep.sweep_id,
        "stage": stage,
        "dataset": sweep.dataset,
        "category": category,
    }
    return RunSpec(run_key, name, {**sweep.tags, **sweep.categories[category], **tags, **own})


def now_ms() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def count_scores(
    runs: Sequence[RunRecord], *, category: str, test_fingerprint: str, besides: Collection[str] = ()
) -> int:
    """How many runs, of sweeps and benchmarks, have been scored on a test split.

    Args:
        runs: Of the dataset.
        category: Whose test split.
        test_fingerprint: Of the split as it is now.
        besides: Runs that do not count, by their ids.
    """
    return sum(
        any(metric.startswith("test_") for metric in run.metrics)
        and run.tags.get("test_fingerprint") == test_fingerprint
        and run.category == category
        and run.parent_run_id is not None
        and run.run_id not in besides
        for run in runs
    )


@runtime_checkable
class Tracker(Protocol):
    """Where runs, metrics, artifacts go.

    Implementations pickle (Ray copies callbacks), dropping clients and open handles; none may be used by two processes
    at once for the same sweep.

    A run is named by its *handle*, which is the store's id or, where a tracker writes later, the run key; every method
    takes either. ``at_ms`` says when something happened, in milliseconds since 1970, where that is not now.
    """

    def check(self) -> None:
        """Prove that the tracker can be written to, and initialise it where it is new.

        Call once in the driver, before anything expensive starts.

        Raises:
            SSNError: it cannot be reached; one line that names the URI and the way out.
        """

    def start_sweep(self, sweep: Sweep, *, at_ms: int | None = None) -> dict[str, str]:
        """Find or create the parent run of every category, or of the benchmark, and mark it RUNNING.

        Returns:
            Category -> handle of its parent run.
        """

    def start_trial(self, sweep: Sweep, trial: TrialInfo, *, at_ms: int | None = None) -> str:
        """Find or create the trial's run below its category's parent run, mark it RUNNING, and return its handle.

        A run that exists keeps its parameters and metrics; its ``trial_state`` and ``error`` tags are cleared.
        """

    def log_epoch(
        self,
        run_id: str,
        epoch: int,
        metrics: Mapping[str, float],
        *,
        tags: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> None:
        """Log metrics at ``step=epoch`` (1 is the first). Ignored where the run already has that epoch, as after a
        restore from an earlier checkpoint. May be buffered until :meth:`flush`."""

    def flush(self, run_id: str | None = None) -> None:
        """Make what is buffered, for one run or for all, outlive this process."""

    def drain(self, patience_s: float) -> bool:
        """Wait until the store has everything; False once nothing has moved for ``patience_s``."""

    def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        """Drain, and let go of the store; what cannot be written is kept, and a line on stderr says where.

        The tracker may be used again.
        """

    def finish_trial(
        self,
        run_id: str,
        state: TrialState,
        *,
        error: str | None = None,
        artifact_dir: Path | None = None,
        at_ms: int | None = None,
    ) -> None:
        """End a trial's run.

        Args:
            run_id: Its handle.
            state: Decides the run's status and its ``trial_state`` tag.
            error: One line, kept as the ``error`` tag of a failed trial.
            artifact_dir: Folder whose :data:`TRIAL_MODEL_FILES` become the artifact ``model``; required for COMPLETE.
        """

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
        """Add final numbers, tags and files (pictures, leaderboards) to any run, whatever its status."""

    def finish_sweep(self, sweep: Sweep, status: RunStatus = "FINISHED", *, at_ms: int | None = None) -> None:
        """End the sweep's parent runs with ``status``; any child still RUNNING becomes KILLED (INTERRUPTED)."""

    def find_runs(self, dataset: str, *, sweep_id: str | None = None, category: str | None = None) -> list[RunRecord]:
        """The dataset's runs, parents included, oldest first; an unknown dataset has none."""

    def metric_history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) pairs by step."""

    def list_artifacts(self, run_id: str, path: str = MODEL_ARTIFACT_PATH) -> list[str]:
        """Names, relative to the run's artifacts, of the files directly under ``path``."""
