"""A tracker that keeps everything in dictionaries: what tests look into, and proof that the protocol suffices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuning.tracking.protocol import (
    CLOSE_PATIENCE_S,
    MODEL_ARTIFACT_PATH,
    STATUS_OF_STATE,
    TRIAL_MODEL_FILES,
    ArtifactsUnavailableError,
    RunRecord,
    RunSpec,
    RunStatus,
    Sweep,
    TrackerUnavailableError,
    TrialInfo,
    TrialState,
    describe_parent,
    describe_trial,
    now_ms,
)


@dataclass
class _Run:
    run_id: str
    run_key: str
    name: str
    dataset: str
    parent_run_id: str | None
    status: RunStatus
    tags: dict[str, str]
    started_ms: int
    ended_ms: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    history: dict[str, dict[int, float]] = field(default_factory=dict)
    artifacts: dict[str, bytes] = field(default_factory=dict)


class MemoryTracker:
    """See :class:`tuning.tracking.protocol.Tracker`. Copies made by pickling share nothing.

    A test may take it away: while ``down``, every call fails as if a server did not answer, and while ``full``, every
    call that brings files fails as if a disk were full.
    """

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}
        self.down = False
        self.full = False

    def check(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.down:
            raise TrackerUnavailableError("the tracker in memory is down")

    def _take_files(self) -> None:
        if self.full:
            raise ArtifactsUnavailableError("no space left for artifacts")

    def start_sweep(self, sweep: Sweep, *, at_ms: int | None = None) -> dict[str, str]:
        self._answer()
        return {
            c: self._open(sweep, describe_parent(sweep, c), parent=None, at_ms=at_ms).run_id for c in sweep.categories
        }

    def start_trial(self, sweep: Sweep, trial: TrialInfo, *, at_ms: int | None = None) -> str:
        self._answer()
        parent = self._open(sweep, describe_parent(sweep, trial.category), parent=None, at_ms=at_ms)
        run = self._open(sweep, describe_trial(sweep, trial), parent=parent.run_id, at_ms=at_ms)
        run.params = {key: str(value) for key, value in trial.config.items()}
        for tag in ("trial_state", "error"):
            run.tags.pop(tag, None)
        return run.run_id

    def _open(self, sweep: Sweep, spec: RunSpec, *, parent: str | None, at_ms: int | None) -> _Run:
        run = next((r for r in self._runs.values() if r.run_key == spec.run_key), None)
        if run is None:
            run_id = f"run-{len(self._runs) + 1:04d}"
            tags = dict(spec.tags)
            run = _Run(run_id, spec.run_key, spec.name, sweep.dataset, parent, "RUNNING", tags, at_ms or now_ms())
            self._runs[run_id] = run
        run.status, run.ended_ms = "RUNNING", None
        return run

    def log_epoch(
        self,
        run_id: str,
        epoch: int,
        metrics: Mapping[str, float],
        *,
        tags: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> None:
        self._answer()
        run = self._runs[run_id]
        if epoch in run.history.get("epoch", {}):
            return
        for name, value in {**metrics, "epoch": epoch}.items():
            run.history.setdefault(name, {})[epoch] = float(value)
        run.tags |= tags or {}

    def flush(self, run_id: str | None = None) -> None:
        """Nothing is buffered."""
        self._answer()

    def drain(self, patience_s: float) -> bool:
        return not self.down

    def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        """Nothing is held."""

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
        self._answer()
        run = self._runs[run_id]
        if artifact_dir is not None:
            self._take_files()
            for name in TRIAL_MODEL_FILES:
                run.artifacts[f"{MODEL_ARTIFACT_PATH}/{name}"] = (artifact_dir / name).read_bytes()
        run.tags["trial_state"] = state
        if error is not None:
            run.tags["error"] = error
        run.status, run.ended_ms = STATUS_OF_STATE[state], at_ms or now_ms()

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
        self._answer()
        if files:
            self._take_files()
        run = self._runs[run_id]
        for name, value in (metrics or {}).items():
            run.history[name] = {0: float(value)}
        run.tags |= tags or {}
        for file in files:
            run.artifacts[f"{artifact_path}/{file.name}" if artifact_path else file.name] = file.read_bytes()

    def finish_sweep(self, sweep: Sweep, status: RunStatus = "FINISHED", *, at_ms: int | None = None) -> None:
        self._answer()
        for run in self._runs.values():
            if run.tags["sweep_id"] != sweep.sweep_id:
                continue
            if run.parent_run_id is None:
                run.status, run.ended_ms = status, at_ms or now_ms()
            elif run.status == "RUNNING":
                self.finish_trial(run.run_id, "INTERRUPTED", at_ms=at_ms)

    def find_runs(self, dataset: str, *, sweep_id: str | None = None, category: str | None = None) -> list[RunRecord]:
        self._answer()
        return [
            RunRecord(
                run_id=run.run_id,
                run_key=run.run_key,
                name=run.name,
                parent_run_id=run.parent_run_id,
                status=run.status,
                params=dict(run.params),
                metrics={name: points[max(points)] for name, points in run.history.items()},
                tags=dict(run.tags),
                started_ms=run.started_ms,
                ended_ms=run.ended_ms,
            )
            for run in self._runs.values()
            if run.dataset == dataset
            and sweep_id in (None, run.tags["sweep_id"])
            and category in (None, run.tags["category"])
        ]

    def metric_history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        return sorted(self._runs[run_id].history.get(metric, {}).items())

    def list_artifacts(self, run_id: str, path: str = MODEL_ARTIFACT_PATH) -> list[str]:
        prefix = f"{path}/"
        names = [n for n in self._runs[run_id].artifacts if n.startswith(prefix)]
        return sorted(n for n in names if "/" not in n.removeprefix(prefix))
