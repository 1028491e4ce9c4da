"""Finished runs of a benchmark on a disk or in an object store: one file each, whole or not there at all.

A folder is one benchmark of one dataset; the same command again finds what is finished by the runs' keys. A file that
is damaged, or of another run than its name says, counts as not there.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

from tuning.benchmarking.plan import Plan, PlannedRun
from tuning.persistence.json_store import JsonStore

FORMAT_VERSION = 2
"""Raised when result files of before can no longer be read; they are then made again."""
RESULTS_FOLDER = "results"
ID_FILE = "benchmark.json"


@dataclass(frozen=True)
class RunResult:
    """A finished run: one network, trained and scored on the test split."""

    key: str
    """See :class:`tuning.benchmarking.plan.PlannedRun`."""
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

    files: JsonStore

    @classmethod
    def open(cls, out: str, dataset: str) -> ResultStore:
        """Open, without reading or writing.

        Raises:
            SSNError: the URI's scheme is unknown, or its bucket does not exist.
        """
        return cls(JsonStore.open(out, dataset))

    @property
    def root_uri(self) -> str:
        """Where the results are."""
        return self.files.root_uri

    @property
    def damaged(self) -> list[str]:
        """Files that were there and could not be used."""
        return self.files.damaged

    def benchmark_id(self) -> str:
        """The benchmark's name in the tracker: kept from the first time on, so that its runs stay in one place.

        Raises:
            SSNError: the folder cannot be written to.
        """
        known = (self.files.read(ID_FILE, version=FORMAT_VERSION) or {}).get("benchmark_id")
        if isinstance(known, str):
            return known
        fresh = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        self.files.write(ID_FILE, {"benchmark_id": fresh}, version=FORMAT_VERSION)
        return fresh

    def read(self, run: PlannedRun) -> RunResult | None:
        """The result of a run, if it is finished.

        Raises:
            SSNError: the folder cannot be read.
        """
        name = _name(run.category, run.key)
        content = self.files.read(name, version=FORMAT_VERSION)
        if content is None:
            return None
        expected = {"key": run.key, "identity": run.identity, "category": run.category}
        if set(content) != {f.name for f in fields(RunResult)} or any(content[k] != v for k, v in expected.items()):
            self.files.reject(name)
            return None
        intervals = {metric: (float(low), float(high)) for metric, (low, high) in content["test_intervals"].items()}
        return RunResult(**{**content, "test_intervals": intervals})

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
        self.files.write(_name(result.category, result.key), asdict(result), version=FORMAT_VERSION)

    def write_file(self, name: str, data: bytes) -> str:
        """Keep a table or a picture beside the results; returns where.

        Raises:
            SSNError: the folder cannot be written to.
        """
        return self.files.write_bytes(name, data)


def _name(category: str, key: str) -> str:
    return f"{RESULTS_FOLDER}/{category}/{key[:32]}.json"
