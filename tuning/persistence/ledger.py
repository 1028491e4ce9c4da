"""A sweep's ledger: small JSON files from which a sweep that died goes on, whatever else of it is lost.

Below ``<out>/<sweep id>/``: ``sweep.json`` says what the sweep is, and is written before anything starts. Each trial
has one file, replaced whole as the trial starts, leaves a checkpoint, and ends; a trial whose file says that it has
ended is finished for good. What the test split said of a model, and which model was registered, have a file each.
Everything else is made again from these: the studies, the scheduler's rungs, and what the tracker lacks. Ray Tune's own
state is never read back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from ssn.errors import SSNError
from tuning.budget import Spent
from tuning.champions.category_result import ChampionScore
from tuning.champions.winner import TrialRecord, conclude
from tuning.persistence.json_store import JsonStore
from tuning.tracking.callback import RESULT_KEYS_NOT_LOGGED

if TYPE_CHECKING:
    from tuning.champions.registry import ChampionVersion

FORMAT_VERSION = 1
"""Raised when ledgers of before can no longer be read."""
SWEEP_FILE = "sweep.json"
STUDIES_FILE = "studies.db"
CONFIGURATION_STAGE = "configuration"
"""Of what a search for all categories suggested; such a record stays ``running``, and what became of it is told by its
trials."""
READERS = 16
"""Files read at once: an object store answers in tens of milliseconds, whoever asks."""

_NOT_KEPT = RESULT_KEYS_NOT_LOGGED - {"time_total_s", "hostname"}
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class SweepLedger:
    """The files of one sweep. It pickles."""

    sweep_id: str
    files: JsonStore

    @classmethod
    def open(cls, out: Path | str, sweep_id: str) -> SweepLedger:
        """Open, without reading or writing.

        Raises:
            SSNError: the URI's scheme is unknown, or its bucket does not exist.
        """
        return cls(sweep_id, JsonStore.open(str(out), sweep_id))

    # The sweep.

    def describe(self) -> dict[str, Any]:
        """What :meth:`create` was given.

        Raises:
            SSNError: there is no such sweep, or the store cannot be read.
        """
        content = self.files.read(SWEEP_FILE, version=FORMAT_VERSION)
        if content is None:
            where = self.files.root_uri.partition("?")[0]
            if self.files.damaged:
                raise SSNError(f"{where}/{SWEEP_FILE} is damaged or of another version; start a new sweep")
            raise SSNError(f"there is no sweep {self.sweep_id} at {where}; check the id and --out")
        return content

    def create(self, description: Mapping[str, Any]) -> None:
        """Begin; the first thing that a sweep writes.

        Raises:
            SSNError: the store cannot be written to.
        """
        self.files.write(SWEEP_FILE, description, version=FORMAT_VERSION)

    # Trials.

    def write_trial(self, record: TrialRecord) -> None:
        """Replace a trial's file.

        Raises:
            SSNError: the store cannot be written to.
        """
        self.files.write(trial_file(record), encode_trial(record), version=FORMAT_VERSION)

    def read_trials(self) -> list[TrialRecord]:
        """Every trial, by stage, category and index. One that was cut short has the state ``running``.

        A trial is taken for ended, too, if it had reported everything and left its model, but its end was not written.

        Raises:
            SSNError: the store cannot be read.
        """
        names = self.files.names("trials")
        with ThreadPoolExecutor(READERS) as pool:
            contents = list(pool.map(lambda name: self.files.read(name, version=FORMAT_VERSION), names))
        records = []
        for name, content in zip(names, contents, strict=True):
            record = None if content is None else decode_trial(content)
            if record is not None and trial_file(record) == name:
                records.append(record)
            elif content is not None:
                self.files.reject(name)
        return sorted(records, key=lambda record: record.name)

    # What follows a search.

    def write_end(self, stage: str, ended_by: str) -> None:
        """Keep which budget ended a stage, so that nothing more is started for it.

        Raises:
            SSNError: the store cannot be written to.
        """
        self.files.write(f"ended/{stage}.json", {"ended_by": ended_by}, version=FORMAT_VERSION)

    def read_end(self, stage: str) -> str | None:
        """What :meth:`write_end` kept; None: no budget has ended it.

        Raises:
            SSNError: the store cannot be read.
        """
        content = self.files.read(f"ended/{stage}.json", version=FORMAT_VERSION)
        return None if content is None else str(content["ended_by"])

    def write_spent(self, spent: Spent) -> None:
        """Keep how much of its budgets the sweep has spent.

        Raises:
            SSNError: the store cannot be written to.
        """
        self.files.write("spent.json", asdict(spent), version=FORMAT_VERSION)

    def read_spent(self) -> Spent:
        """What :meth:`write_spent` kept, if anything.

        Raises:
            SSNError: the store cannot be read.
        """
        content = self.files.read("spent.json", version=FORMAT_VERSION)
        return Spent() if content is None else Spent(content["time_s"], content.get("trials_s", 0.0))

    def write_score(self, category: str, trial_key: str, score: ChampionScore) -> None:
        """Keep what the test split said of a trial's model, so that it is asked once.

        Raises:
            SSNError: the store cannot be written to.
        """
        name = _score_name(category, trial_key)
        if score.picture is not None:
            self.files.write_bytes(f"{name}.png", score.picture)
        content = asdict(score) | {"picture": score.picture is not None}
        self.files.write(f"{name}.json", content, version=FORMAT_VERSION)

    def read_score(self, category: str, trial_key: str) -> ChampionScore | None:
        """What :meth:`write_score` kept; None: the model has not been scored.

        Raises:
            SSNError: the store cannot be read.
        """
        name = _score_name(category, trial_key)
        content = self.files.read(f"{name}.json", version=FORMAT_VERSION)
        if content is None:
            return None
        picture = self.files.read_bytes(f"{name}.png") if content["picture"] else None
        return ChampionScore(**content | {"picture": picture})

    def write_champion(self, category: str, champion: ChampionVersion) -> None:
        """Keep which model was registered, so that nothing is registered twice.

        Raises:
            SSNError: the store cannot be written to.
        """
        self.files.write(f"champions/{category}.json", asdict(champion), version=FORMAT_VERSION)

    def read_champion(self, category: str) -> ChampionVersion | None:
        """What :meth:`write_champion` kept; None: no champion has been registered.

        Raises:
            SSNError: the store cannot be read.
        """
        from tuning.champions.registry import ChampionVersion

        content = self.files.read(f"champions/{category}.json", version=FORMAT_VERSION)
        return None if content is None else ChampionVersion(**content)


def trial_file(record: TrialRecord) -> str:
    """Name of a trial's file."""
    return f"trials/{record.category}/{record.stage}-{record.index:04d}.json"


def encode_trial(record: TrialRecord) -> dict[str, Any]:
    """As plain JSON: numbers that are not finite become text, and of Tune's own entries few are kept."""
    # Tune gives a result to its searcher with the keys of the trial's configuration, joined by slashes
    kept = [key for key in record.metrics if key not in _NOT_KEPT and "/" not in key and key[:2] != "__"]
    metrics = {key: record.metrics[key] for key in kept}
    content: dict[str, Any] = _to_plain(asdict(record) | {"metrics": metrics})
    return content


def decode_trial(content: Mapping[str, Any]) -> TrialRecord | None:
    """The inverse of :func:`encode_trial`; None: written by another release, with other fields."""
    hints, needed = _fields()
    if set(content) - set(hints) or needed - set(content):
        return None
    record = TrialRecord(**{name: _from_plain(value, hints[name]) for name, value in content.items()})
    if record.state == "running" and record.checkpoint_epoch >= record.max_epochs:
        record.state, record.failure = conclude(record)
    return record


@functools.cache
def _fields() -> tuple[dict[str, Any], set[str]]:
    """Type by name of a record's fields, and the names of those without a default."""
    all_ = fields(TrialRecord)
    hints = get_type_hints(TrialRecord)
    needed = {f.name for f in all_ if f.default is MISSING and f.default_factory is MISSING}
    return {f.name: hints[f.name] for f in all_}, needed


def _score_name(category: str, trial_key: str) -> str:
    return f"scores/{category}/{trial_key[:32]}"


def _to_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return _to_plain(value.item())  # NumPy's scalars


def _from_plain(value: Any, hint: Any) -> Any:
    if isinstance(value, dict):
        has_int_keys = get_origin(hint) is dict and get_args(hint)[0] is int
        return {int(key) if has_int_keys else key: _from_plain(each, None) for key, each in value.items()}
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
