"""Finished runs of a benchmark on a disk or in an object store: one file each, whole or not there at all.

A folder is one benchmark of one dataset; the same command again finds what is finished by the runs' keys. A file that
is damaged, or of another run than its name says, counts as not there.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from pyarrow import fs as pafs

from ssn.config import digest
from ssn.data.storage import (
    check_store,
    join_uri,
    open_filesystem,
    read_bytes,
    resolve_uri,
    storage_errors,
    write_bytes,
    write_json,
)
from tuning.benchmark_plan import Plan, PlannedRun

FORMAT_VERSION = 1
"""Raised when result files of before can no longer be read; they are then made again."""
RESULTS_FOLDER = "results"
ID_FILE = "benchmark.json"


@dataclass(frozen=True)
class RunResult:
    """A finished run: one network, trained and scored on the test split."""

    key: str
    """See :class:`tuning.benchmark_plan.PlannedRun`."""
    identity: str
    dataset: str
    category: str
    seed: int
    config: Mapping[str, Any]
    """Canonical, flat."""
    train_labels: int
    train_masks: int
    test: Mapping[str, float]
    """Metric to value in [0, 1]; undefined ones are absent."""
    test_undefined: Mapping[str, str]
    """Metric to reason."""
    test_intervals: Mapping[str, tuple[float, float]]
    """95 % bootstrap intervals of image metrics."""
    test_images: int
    test_defective: int
    test_masks: int
    validation: Mapping[str, float]
    """Likewise ``test``, at the last epoch; empty where there is no validation split."""
    train_loss: float
    duration_s: float
    """Training and validation alone."""
    elapsed_s: float
    """From the run's start to its result: features, training, validation and scoring."""
    cores: float
    """CPU cores that the run held."""
    gpus: float
    hardware: str
    hostname: str
    feature_source: str
    code: str
    """Git commit, or digest of the code where there is no checkout."""
    finished: str
    """UTC, ISO 8601."""


@dataclass
class ResultStore:
    """Results of one dataset's benchmark below a folder or object-store URI."""

    root_uri: str
    filesystem: pafs.FileSystem
    root: str
    damaged: list[str] = field(default_factory=list)
    """Files that were there and could not be used."""

    @classmethod
    def open(cls, out: str, dataset: str) -> ResultStore:
        """Open, without reading or writing.

        Raises:
            SSNError: the URI's scheme is unknown, or its bucket does not exist.
        """
        uri = join_uri(resolve_uri(out), dataset)
        filesystem, root = open_filesystem(uri)
        check_store(filesystem, root, uri)
        return cls(uri, filesystem, root)

    def benchmark_id(self) -> str:
        """The benchmark's name in the tracker: kept from the first time on, so that its runs stay in one place.

        Raises:
            SSNError: the folder cannot be written to.
        """
        path = f"{self.root}/{ID_FILE}"
        with storage_errors(self.root_uri):
            known = _parse(self._read(path)).get("benchmark_id")
            if isinstance(known, str):
                return known
            fresh = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            self.filesystem.create_dir(f"{self.root}/{RESULTS_FOLDER}", recursive=True)
            write_json(self.filesystem, path, {"benchmark_id": fresh})
        return fresh

    def read(self, run: PlannedRun) -> RunResult | None:
        """The result of a run, if it is finished.

        Raises:
            SSNError: the folder cannot be read.
        """
        path = self._path(run.category, run.key)
        with storage_errors(self.root_uri):
            data = self._read(path)
        if data is None:
            return None
        result = _parse_result(data)
        if result is None or (result.key, result.identity, result.category) != (run.key, run.identity, run.category):
            self.damaged.append(path)
            return None
        return result

    def read_all(self, plan: Plan) -> dict[str, RunResult]:
        """Every finished run of a plan, by key.

        Raises:
            SSNError: the folder cannot be read.
        """
        return {run.key: found for run in plan.runs if (found := self.read(run)) is not None}

    def write(self, result: RunResult) -> None:
        """Keep a finished run.

        Raises:
            SSNError: the folder cannot be written to.
            ValueError: a number is not finite.
        """
        content = asdict(result)
        path = self._path(result.category, result.key)
        with storage_errors(self.root_uri):
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            write_json(
                self.filesystem,
                path,
                {"format_version": FORMAT_VERSION, "sha256": digest(content), "result": content},
            )

    def write_file(self, name: str, data: bytes) -> str:
        """Keep a table or a picture beside the results; returns where.

        Raises:
            SSNError: the folder cannot be written to.
        """
        with storage_errors(self.root_uri):
            write_bytes(self.filesystem, f"{self.root}/{name}", data)
        return join_uri(self.root_uri, name).partition("?")[0]

    def _path(self, category: str, key: str) -> str:
        return f"{self.root}/{RESULTS_FOLDER}/{category}/{key[:32]}.json"

    def _read(self, path: str) -> bytes | None:
        try:
            return read_bytes(self.filesystem, path)
        except FileNotFoundError:
            return None


def _parse(data: bytes | None) -> dict[str, Any]:
    """A JSON object; an empty one where there is none, whatever there is instead."""
    try:
        content = json.loads(data or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _parse_result(data: bytes) -> RunResult | None:
    envelope = _parse(data)
    content = envelope.get("result")
    if envelope.get("format_version") != FORMAT_VERSION or not isinstance(content, dict):
        return None
    try:
        intact = envelope.get("sha256") == digest(content)
    except ValueError:  # a NaN, which Python reads and JSON has not
        return None
    if not intact or set(content) != {f.name for f in fields(RunResult)}:
        return None
    intervals = {name: (float(low), float(high)) for name, (low, high) in content["test_intervals"].items()}
    return RunResult(**{**content, "test_intervals": intervals})
