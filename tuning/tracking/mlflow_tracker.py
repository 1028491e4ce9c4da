"""MLflow behind the tracker protocol.

One MLflow experiment per dataset. Only the Tune driver talks to MLflow, through an explicit client: no global active
run and no ``mlflow.set_tracking_uri``, so that nothing of it leaks into workers or into the caller's own MLflow code.
"""

from __future__ import annotations

import getpass
import itertools
import logging
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from ssn.errors import SSNError
from tuning.tracking.journal import FULL
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

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_T = TypeVar("_T")

PARENT_RUN_TAG = "mlflow.parentRunId"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow's pages open with training runs and their charts, not with those for language models."""
PROBE_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 60
FLUSH_INTERVAL_S = 2.0
"""Metrics wait at most this long, so that short epochs of many trials do not stall the driver with one request each."""

# Limits of one log-batch request (MLflow REST API).
MAX_METRICS_PER_BATCH = 1000
MAX_ENTRIES_PER_BATCH = 100
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000


def default_tracking_uri(directory: Path) -> str:
    """The SQLite database under ``directory`` that is used when no server is named."""
    return f"sqlite:///{directory.resolve()}/mlflow.db"


def ui_command(tracking_uri: str, port: int = 5000) -> str | None:
    """The command that shows a local store in a browser; None for a server, which has its own address."""
    if urlsplit(tracking_uri).scheme in ("http", "https"):
        return None
    return f"mlflow ui --backend-store-uri {absolute_uri(tracking_uri)} --port {port}"


def absolute_uri(tracking_uri: str) -> str:
    """``tracking_uri`` with a relative SQLite path made absolute, so that it means the same from any folder."""
    path = sqlite_path(tracking_uri)
    return tracking_uri if path is None else f"sqlite:///{path}"


def sqlite_path(tracking_uri: str) -> Path | None:
    """The database file of a SQLite URI, or None."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(tracking_uri.removeprefix("sqlite:///")).absolute()


def open_client(tracking_uri: str) -> MlflowClient:
    """A client for tracking and registry at one URI, with MLflow's chatter silenced.

    Opening a new SQLite database creates its tables, which two processes must not do at once.

    Raises:
        SSNError: MLflow does not know this kind of URI, or the database is of another MLflow version.
    """
    # Read as MLflow is imported. Its usage statistics go to the internet, which many a factory network cuts
    # off; whoever wants them sets the variable.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines per trial
    uri = absolute_uri(tracking_uri)
    with warnings.catch_warnings(), explained(uri):
        # SQLAlchemy's deprecation of what MLflow's own tables still use: nothing that a user of this project can mend.
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # logs the traceback of what it raises, at every attempt
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def explained(tracking_uri: str) -> Iterator[None]:
    """Say in one line what a user can mend about the tracking store; bugs pass with their traceback."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    try:
        yield
    except MlflowException as error:
        text = one_line(error)
        if text.startswith("API request to"):
            raise TrackerUnavailableError(
                f"MLflow at {tracking_uri} does not answer ({text}); start it, mend the address, or leave the tracking "
                "URI out to use a local SQLite file",
                may_be_the_call="too many 500 error responses" in text,
            ) from error
        if error.error_code == "TEMPORARILY_UNAVAILABLE":
            raise TrackerUnavailableError(f"MLflow's database {tracking_uri} is not available ({text})") from error
        if "out-of-date database schema" in text:
            raise SSNError(
                f"{tracking_uri} was written by another MLflow version; run: mlflow db upgrade {tracking_uri}"
            ) from error
        if isinstance(error, UnsupportedModelRegistryStoreURIException) or "filesystem tracking backend" in text:
            raise SSNError(
                f"MLflow cannot keep runs at {tracking_uri!r}; give http(s)://host:port or sqlite:////absolute/mlflow.db"
            ) from error
        raise


@contextmanager
def _uploading(tracking_uri: str) -> Iterator[None]:
    """Whatever keeps a file from being stored, a full disk or an object store that is away, may pass."""
    try:
        yield
    except TrackerUnavailableError as error:
        raise ArtifactsUnavailableError(str(error)) from error
    except Exception as error:  # the clients of object stores have no common base
        if isinstance(error, OSError) and error.errno in FULL:
            reason = f"no space left where MLflow at {tracking_uri} keeps artifacts; make some"
        else:
            reason = f"MLflow at {tracking_uri} cannot store artifacts now ({one_line(error)})"
        raise ArtifactsUnavailableError(reason) from error


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's message on one line, cut at ``limit`` characters; the type's name where it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


class _FewRetries:
    """MLflow's HTTP requests give up at once instead of after its minutes of retries.

    MLflow reads that from the environment, which all threads share: the first to enter sets it, the last to leave
    restores it.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._inside = 0
        self._before: dict[str, str | None] = {}

    @contextmanager
    def __call__(self, timeout_s: int) -> Iterator[None]:
        wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s)}
        with self._mutex:
            self._inside += 1
            if self._inside == 1:
                self._before = {name: os.environ.get(name) for name in wanted}
                os.environ.update(wanted)
        try:
            yield
        finally:
            with self._mutex:
                self._inside -= 1
                if self._inside == 0:
                    for name, value in self._before.items():
                        if value is None:
                            del os.environ[name]
                        else:
                            os.environ[name] = value


few_retries = _FewRetries()


class MLflowTracker:
    """See :class:`tuning.tracking.protocol.Tracker`.

    Args:
        tracking_uri: Any MLflow tracking URI: a server, or ``sqlite:///<path>``.
        artifact_root: Folder or URI under which new experiments keep their artifacts, one subfolder per dataset. By
            default ``mlruns`` beside a SQLite database, and whatever the server decides otherwise.
        persistent: Whether requests that fail are repeated, for minutes; whoever tries again by itself says False.
    """

    def __init__(self, tracking_uri: str, *, artifact_root: str | None = None, persistent: bool = True) -> None:
        self.tracking_uri = absolute_uri(tracking_uri)
        database = sqlite_path(tracking_uri)
        if artifact_root is None and database is not None:
            artifact_root = (database.parent / "mlruns").as_uri()
        elif artifact_root is not None and "://" not in artifact_root:
            artifact_root = Path(artifact_root).absolute().as_uri()
        self.artifact_root = artifact_root
        self.persistent = persistent
        self._forget()

    def _forget(self) -> None:
        self._client_or_none: MlflowClient | None = None
        self._experiment_ids: dict[str, str] = {}
        self._run_ids: dict[str, dict[str, str]] = {}  # sweep id -> run key -> run id
        self._last_epochs: dict[str, int] = {}
        self._pending: dict[str, _Pending] = {}

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return {name: getattr(self, name) for name in ("tracking_uri", "artifact_root", "persistent")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def client(self) -> MlflowClient:
        """The MLflow client, opened at first use."""
        if self._client_or_none is None:
            self._client_or_none = open_client(self.tracking_uri)
        return self._client_or_none

    @contextmanager
    def _talking(self) -> Iterator[None]:
        with explained(self.tracking_uri), nullcontext() if self.persistent else few_retries(REQUEST_TIMEOUT_S):
            yield

    def check(self) -> None:
        database = sqlite_path(self.tracking_uri)
        if database is not None:
            _check_sqlite(database)
        with few_retries(PROBE_TIMEOUT_S), self._talking():
            self.client.search_experiments(max_results=1)

    def start_sweep(self, sweep: Sweep, *, at_ms: int | None = None) -> dict[str, str]:
        with self._talking():
            return {
                c: self._open(sweep, describe_parent(sweep, c), parent=None, at_ms=at_ms)[0] for c in sweep.categories
            }

    def start_trial(self, sweep: Sweep, trial: TrialInfo, *, at_ms: int | None = None) -> str:
        from mlflow.entities import Param

        with self._talking():
            parent_spec = describe_parent(sweep, trial.category)
            parent = self._known_runs(sweep).get(parent_spec.run_key)
            if parent is None:
                parent, _ = self._open(sweep, parent_spec, parent=None, at_ms=at_ms)
            run_id, created = self._open(sweep, describe_trial(sweep, trial), parent=parent, at_ms=at_ms)
            written: Mapping[str, str] = {}
            self._last_epochs[run_id] = 0
            if not created:
                data = self.client.get_run(run_id).data
                # A driver that died between the run's creation and this request left it without parameters.
                written = data.params
                self._last_epochs[run_id] = int(data.metrics.get("epoch", 0))
                for tag in ("trial_state", "error"):
                    if tag in data.tags:
                        self.client.delete_tag(run_id, tag)
            missing = [
                Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in trial.config.items() if key not in written
            ]
            for batch in _batches(missing, MAX_ENTRIES_PER_BATCH):
                self.client.log_batch(run_id, params=batch)
            return run_id

    def _open(self, sweep: Sweep, spec: RunSpec, *, parent: str | None, at_ms: int | None) -> tuple[str, bool]:
        """The id of the run, RUNNING, and whether it is new."""
        known = self._known_runs(sweep)
        if spec.run_key in known:
            self.client.update_run(known[spec.run_key], status="RUNNING")
            return known[spec.run_key], False
        tags = {key: value[:MAX_TAG_LENGTH] for key, value in spec.tags.items()}
        # The names under which MLflow's own pages show parent, user, source and commit.
        tags |= {"mlflow.user": getpass.getuser(), "mlflow.source.name": "tuning", "mlflow.source.type": "LOCAL"}
        if "git_commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git_commit"]
        if parent is not None:
            tags[PARENT_RUN_TAG] = parent
        try:
            run = self.client.create_run(
                self._experiment_id(sweep.dataset), start_time=at_ms, tags=tags, run_name=spec.name
            )
        except Exception:
            # The run may be there all the same, its answer lost: whoever tries again must look first.
            del self._run_ids[sweep.sweep_id]
            raise
        known[spec.run_key] = run.info.run_id
        return cast(str, run.info.run_id), True

    def _known_runs(self, sweep: Sweep) -> dict[str, str]:
        """Run key -> run id of a sweep, read once: this process is the only one that adds to it."""
        if sweep.sweep_id not in self._run_ids:
            records = self.find_runs(sweep.dataset, sweep_id=sweep.sweep_id)
            self._run_ids[sweep.sweep_id] = {record.run_key: record.run_id for record in records}
        return self._run_ids[sweep.sweep_id]

    def _experiment_id(self, dataset: str) -> str:
        if dataset not in self._experiment_ids:
            experiment = self.client.get_experiment_by_name(dataset)
            if experiment is None:
                location = None if self.artifact_root is None else f"{self.artifact_root}/{dataset}"
                self._experiment_ids[dataset] = self.client.create_experiment(
                    dataset, artifact_location=location, tags=EXPERIMENT_TAGS
                )
            elif experiment.lifecycle_stage == "deleted":
                raise SSNError(
                    f"experiment {dataset!r} is deleted at {self.tracking_uri}; restore it with: "
                    f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
                )
            else:
                self._experiment_ids[dataset] = experiment.experiment_id
        return self._experiment_ids[dataset]

    def log_epoch(
        self,
        run_id: str,
        epoch: int,
        metrics: Mapping[str, float],
        *,
        tags: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> None:
        from mlflow.entities import Metric

        if run_id not in self._last_epochs:
            with self._talking():
                self._last_epochs[run_id] = int(self.client.get_run(run_id).data.metrics.get("epoch", 0))
        if epoch <= self._last_epochs[run_id]:
            return
        self._last_epochs[run_id] = epoch
        pending = self._pending.setdefault(run_id, _Pending())
        at = at_ms or now_ms()
        pending.metrics += [Metric(k, float(v), at, epoch) for k, v in {**metrics, "epoch": epoch}.items()]
        pending.tags |= tags or {}
        if len(pending.metrics) >= MAX_METRICS_PER_BATCH or time.monotonic() - pending.since_s >= FLUSH_INTERVAL_S:
            self.flush(run_id)

    def flush(self, run_id: str | None = None) -> None:
        for each in [run_id] if run_id is not None else list(self._pending):
            pending = self._pending.get(each)
            if pending is None:
                continue
            try:
                with self._talking():
                    self._write(each, pending.metrics, pending.tags)
            except TrackerUnavailableError:
                raise  # writing the same again later does no harm
            except Exception:
                del self._pending[each]  # refused once, refused for ever
                raise
            del self._pending[each]

    def _write(self, run_id: str, metrics: Sequence[Metric], tags: Mapping[str, str]) -> None:
        """Metrics and tags in as few requests as MLflow's limits allow."""
        from mlflow.entities import RunTag

        metric_batches = list(_batches(list(metrics), MAX_METRICS_PER_BATCH - MAX_ENTRIES_PER_BATCH))
        run_tags = [RunTag(key, value[:MAX_TAG_LENGTH]) for key, value in tags.items()]
        tag_batches = list(_batches(run_tags, MAX_ENTRIES_PER_BATCH))
        for some_metrics, some_tags in itertools.zip_longest(metric_batches, tag_batches, fillvalue=()):
            self.client.log_batch(run_id, metrics=some_metrics, tags=some_tags)

    def drain(self, patience_s: float) -> bool:
        self.flush()
        return True

    def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        self.flush()

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
        if artifact_dir is not None:
            self.flush(run_id)  # numbers are there whatever becomes of the files
            with _uploading(self.tracking_uri), self._talking():
                for name in TRIAL_MODEL_FILES:
                    self.client.log_artifact(run_id, str(artifact_dir / name), MODEL_ARTIFACT_PATH)
        pending = self._pending.setdefault(run_id, _Pending())
        pending.tags |= {"trial_state": state, **({} if error is None else {"error": error})}
        self.flush(run_id)
        with self._talking():
            self.client.set_terminated(run_id, STATUS_OF_STATE[state], end_time=at_ms)

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
        from mlflow.entities import Metric

        at = at_ms or now_ms()
        with self._talking():
            self._write(run_id, [Metric(k, float(v), at, 0) for k, v in (metrics or {}).items()], tags or {})
        with _uploading(self.tracking_uri), self._talking():
            for file in files:
                self.client.log_artifact(run_id, str(file), artifact_path)

    def finish_sweep(self, sweep: Sweep, status: RunStatus = "FINISHED", *, at_ms: int | None = None) -> None:
        self.flush()
        of_sweep = f"tags.sweep_id = {_quote(sweep.sweep_id)}"
        for record in self._search_runs(sweep.dataset, [of_sweep, "attributes.status = 'RUNNING'"]):
            if record.parent_run_id is not None:
                self.finish_trial(record.run_id, "INTERRUPTED", at_ms=at_ms)
        for record in self._search_runs(sweep.dataset, [of_sweep, f"tags.stage = {_quote(sweep.stage)}"]):
            if record.parent_run_id is None:  # a benchmark's runs are of its own stage
                with self._talking():
                    self.client.set_terminated(record.run_id, status, end_time=at_ms)

    def find_runs(self, dataset: str, *, sweep_id: str | None = None, category: str | None = None) -> list[RunRecord]:
        wanted = {"sweep_id": sweep_id, "category": category}
        return self._search_runs(
            dataset, [f"tags.{key} = {_quote(value)}" for key, value in wanted.items() if value is not None]
        )

    def _search_runs(self, dataset: str, clauses: Sequence[str]) -> list[RunRecord]:
        # Runs that others logged into an experiment of the same name have no run key, and are left alone.
        query = " AND ".join(["tags.run_key LIKE '%/%'", *clauses])
        records: list[RunRecord] = []
        with self._talking():
            experiment = self.client.get_experiment_by_name(dataset)
            if experiment is None:
                return []
            token = None
            while True:
                page = self.client.search_runs(
                    [experiment.experiment_id],
                    query,
                    order_by=["attributes.start_time ASC"],
                    max_results=1000,
                    page_token=token,
                )
                records += [_to_record(run) for run in page]
                token = page.token
                if not token:
                    return records

    def metric_history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        self.flush(run_id)
        with self._talking():
            return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, metric))

    def list_artifacts(self, run_id: str, path: str = MODEL_ARTIFACT_PATH) -> list[str]:
        with self._talking():
            return sorted(item.path for item in self.client.list_artifacts(run_id, path) if not item.is_dir)


class _Pending:
    """Metrics and tags of one run that are not yet written."""

    def __init__(self) -> None:
        self.since_s = time.monotonic()
        self.metrics: list[Metric] = []
        self.tags: dict[str, str] = {}


def _check_sqlite(database: Path) -> None:
    """Prove that a SQLite file can be written to; MLflow itself retries for minutes where it cannot."""
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(database, timeout=PROBE_TIMEOUT_S)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        raise SSNError(
            f"tracking database {database} cannot be written ({one_line(error)}); give another with --tracking-uri"
        ) from error


def _to_record(run: Run) -> RunRecord:
    tags = dict(run.data.tags)
    return RunRecord(
        run_id=run.info.run_id,
        run_key=tags["run_key"],
        name=run.info.run_name,
        parent_run_id=tags.get(PARENT_RUN_TAG),
        status=cast(RunStatus, run.info.status),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        tags=tags,
        started_ms=run.info.start_time,
        ended_ms=None if run.info.status == "RUNNING" else run.info.end_time,
    )


def _quote(value: str) -> str:
    if "'" in value:
        return f'"{value}"'
    return f"'{value}'"


def _batches(items: list[_T], size: int) -> Iterator[list[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
