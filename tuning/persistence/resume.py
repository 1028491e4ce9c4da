"""Going on with a sweep that died or was interrupted: from its ledger, and only as it was started."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssn.config import NUMERICS_VERSION, Config, flatten
from ssn.data.storage import resolve_uri
from ssn.errors import SSNError
from ssn.loader import load_config
from tuning.champions.winner import TrialRecord
from tuning.persistence.ledger import CONFIGURATION_STAGE, SweepLedger
from tuning.search.space_syntax import DEFAULT_SPACE
from tuning.settings import SweepSettings

if TYPE_CHECKING:
    import pyarrow.fs

    from ssn.data.reader import SearchData
    from tuning.tracking.protocol import Sweep, Tracker, TrialState

FREE_KEYS = ("search.max_concurrent", "search.storage")
FREE_SECTION = "resources."
"""Settings that say where and how fast a sweep runs, and not what it finds, may be others when it goes on."""
_IDENTITY_SECTIONS = tuple(field.name for field in fields(Config))
"""Whose settings are part of a trial's identity."""


@dataclass(frozen=True)
class ResumedSweep:
    """A sweep that goes on."""

    ledger: SweepLedger
    description: Mapping[str, Any]
    """What it was started as; see :func:`describe_sweep`."""
    settings: SweepSettings
    retry_failed: bool
    """Whether trials that failed are tried again."""

    @property
    def categories(self) -> tuple[str, ...]:
        """In the order in which they were given."""
        return tuple(self.description["order"])

    def check_tracker(self, tracker: Any) -> None:
        """Refuse a tracking store that is another one, and not just the same at a new address.

        Raises:
            SSNError: it has no runs of this sweep.
        """
        before, dataset = self.description["tracking_uri"], self.description["dataset"]
        if tracker.tracking_uri != before and not tracker.find_runs(dataset, sweep_id=self.ledger.sweep_id):
            raise SSNError(
                f"{tracker.tracking_uri} has no runs of sweep {self.ledger.sweep_id}, which was started with {before}; "
                "leave --tracking-uri and MLFLOW_TRACKING_URI out, or give the store that has them"
            )


def describe_sweep(
    settings: SweepSettings,
    *,
    dataset: str,
    data_uri: str,
    data: Mapping[str, SearchData],
    tracking_uri: str,
    weights_digests: Mapping[str, str],
    code: Mapping[str, str],
) -> dict[str, Any]:
    """All that a sweep is, as plain JSON."""
    flat = flatten(settings)
    # what is read back is put over the default space, so what was taken out of that must be said
    flat["search.space"] = {**dict.fromkeys(DEFAULT_SPACE), **flat["search.space"]}
    return {
        "dataset": dataset,
        "data_uri": data_uri,
        "order": list(data),
        "categories": {
            name: {
                "search_fingerprint": each.info.search_fingerprint,
                "test_fingerprint": each.info.test_fingerprint,
                "split_seed": each.info.split_seed,
            }
            for name, each in data.items()
        },
        "settings": flat,
        "tracking_uri": tracking_uri,
        "weights_digests": dict(weights_digests),
        "numerics_version": NUMERICS_VERSION,
        "code": dict(code),
    }


def read_resumed(
    out: Path | str,
    sweep_id: str,
    *,
    dataset: str | None = None,
    data_uri: str | None = None,
    categories: Sequence[str] | None = None,
    files: Sequence[Path] = (),
    sets: Sequence[str] = (),
    retry_failed: bool = False,
) -> ResumedSweep:
    """Find a sweep again, and refuse to go on with it as something else.

    Args:
        out: Where its ledger is.
        sweep_id: Which.
        dataset: None: as it was started; any other must be equal. So for ``data_uri`` and ``categories``.
        data_uri: See above.
        categories: See above.
        files: Settings that were given again; see :data:`FREE_SECTION`.
        sets: Likewise.
        retry_failed: See :class:`ResumedSweep`.

    Raises:
        SSNError: there is no such sweep, or something about it is to be changed.
    """
    ledger = SweepLedger.open(out, sweep_id)
    described = ledger.describe()
    given = {
        "dataset": dataset,
        "data_uri": None if data_uri is None else resolve_uri(data_uri),
        "order": None if categories is None else list(dict.fromkeys(categories)),
    }
    for key, value in given.items():
        if value is not None and value != described[key]:
            raise _changed(sweep_id, {"data_uri": "--data", "order": "--category"}.get(key, key), described[key], value)
    before = load_config(SweepSettings, defaults=described["settings"])
    settings = load_config(SweepSettings, defaults=described["settings"], files=files, sets=sets)
    is_, was = flatten(settings), flatten(before)
    for key, value in is_.items():
        if value != was[key] and key not in FREE_KEYS and not key.startswith(FREE_SECTION):
            raise _changed(sweep_id, key, was[key], value)
    return ResumedSweep(ledger, described, settings, retry_failed)


def check_unchanged(sweep_id: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Refuse to mix trials that do not compare: on other data, with other weights, by other numerics.

    Args:
        sweep_id: Which sweep.
        before: What it was started as.
        now: What it would be now.

    Returns:
        Lines for the user about what changed and does not matter as much.

    Raises:
        SSNError: naming what changed.
    """
    for category, known in before["categories"].items():
        for key, value in known.items():
            if now["categories"][category][key] != value:
                raise SSNError(
                    f"sweep {sweep_id} cannot go on: the data of {category} at {before['data_uri']} changed ({key}); "
                    "bring it back, or start a new sweep"
                )
    added = sorted(
        key for key in now["settings"] if key.partition(".")[0] in _IDENTITY_SECTIONS and key not in before["settings"]
    )
    if added:
        raise SSNError(
            f"sweep {sweep_id} cannot go on: it was started by a version without {added[0]}, to which its trials have "
            "other identities, so that finished ones would be repeated; go on with that version (git_commit "
            f"{before['code'].get('git_commit', 'unknown')}), or start a new sweep"
        )
    known = [(f"the weights of {key}", before["weights_digests"][key], now["weights_digests"].get(key)) for key in
             before["weights_digests"]]  # fmt: skip
    known.append(("numerics_version, how trials are computed,", before["numerics_version"], now["numerics_version"]))
    for what, was, is_ in known:
        if was != is_:
            raise SSNError(
                f"sweep {sweep_id} cannot go on: {what} changed (was {was}, is {is_}), so its trials would not "
                "compare; bring it back, or start a new sweep"
            )
    return [
        f"{key} was {value} when sweep {sweep_id} was started, and is {now['code'].get(key, 'unknown')}"
        for key, value in before["code"].items()
        if now["code"].get(key) != value
    ]


def read_earlier(ledger: SweepLedger, *, retry_failed: bool) -> list[TrialRecord]:
    """The trials of a sweep so far, those to be tried again among those that were cut short.

    What failed goes on from its last checkpoint, unless that is the end: from there, it would only fail again.

    Raises:
        SSNError: the ledger cannot be read.
    """
    records = ledger.read_trials()
    if not retry_failed:
        return records

    def again(record: TrialRecord) -> TrialRecord:
        record = replace(record, state="running", failure=None)
        at_its_end = record.checkpoint_epoch >= record.max_epochs
        return replace(record, checkpoint=None, checkpoint_epoch=0) if at_its_end else record

    return [again(record) if record.state == "failed" else record for record in records]


def count_trials(records: Sequence[TrialRecord]) -> str:
    """How many have ended and how many were cut short, in words."""
    states = [record.state for record in records if record.stage != CONFIGURATION_STAGE]
    running = states.count("running")
    return f"{len(states) - running} trials have ended, {running} were cut short"


def resume_command(sweep_id: str, out: Path | str) -> str:
    """What to type."""
    return shlex.join(["python", "-m", "tuning", "sweep", "--resume", sweep_id, "--out", str(out)])


def close_runs(
    tracker: Tracker,
    sweep: Sweep,
    ledger: SweepLedger,
    records: Sequence[TrialRecord],
    filesystem: pyarrow.fs.FileSystem | None,
) -> list[str]:
    """Bring the tracker up to the ledger: trials that have ended end there as well, with their models.

    Args:
        tracker: Where the sweep's runs are; it has been told that the sweep starts.
        sweep: Which.
        ledger: Of the sweep. A trial whose model is neither in the tracker nor in the store has failed after all.
        records: Its trials.
        filesystem: Of checkpoints; None: the local one.

    Returns:
        Lines for the user.
    """
    from tuning.persistence.ledger_callback import has_checkpoint
    from tuning.tracking.callback import RESULT_TAGS, checkpoint_folder, epoch_metrics
    from tuning.tracking.protocol import STATUS_OF_STATE, TrialInfo, describe_trial

    states: dict[str, TrialState] = {
        "complete": "COMPLETE",
        "pruned": "PRUNED",
        "failed": "FAIL",
        "stopped": "INTERRUPTED",
    }
    known = {run.run_key: run for run in tracker.find_runs(sweep.dataset, sweep_id=sweep.sweep_id)}
    lines = []
    for record in records:
        if record.state == "running":
            continue
        info = TrialInfo(record.category, record.trial_key, record.index, record.config, record.stage, tags=record.tags)
        run, state = known.get(describe_trial(sweep, info).run_key), states[record.state]
        if run is not None and run.trial_state == state and run.status == STATUS_OF_STATE[state]:
            continue
        run_id = tracker.start_trial(sweep, info)
        if record.metrics:
            tags = {key: str(record.metrics[key]) for key in RESULT_TAGS if key in record.metrics}
            tracker.log_epoch(run_id, record.epoch, epoch_metrics(record.metrics), tags=tags)
        if state == "COMPLETE" and not has_checkpoint(record.checkpoint, filesystem):
            record.state, record.failure = "failed", f"its model at {record.checkpoint} is gone"
            ledger.write_trial(record)
            lines.append(f"{record.category}: trial {record.index} failed: {record.failure}; --retry-failed repeats it")
        if record.state == "complete":
            assert record.checkpoint is not None
            with checkpoint_folder(record.checkpoint, filesystem) as folder:
                tracker.finish_trial(run_id, "COMPLETE", artifact_dir=folder)
        else:
            tracker.finish_trial(run_id, states[record.state], error=record.failure)
    return lines


def _changed(sweep_id: str, key: str, before: Any, now: Any) -> SSNError:
    def show(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return SSNError(
        f"sweep {sweep_id} was started with {key} {show(before)}, not {show(now)}; leave it out to go on as before, or "
        "start a new sweep"
    )
