"""Going on with a sweep: only as it was started, and the tracker is brought up to the ledger."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs as pafs

from ssn.config import flatten
from ssn.data.storage import resolve_uri
from ssn.errors import SSNError
from tests.unit.test_ledger import make_record
from tuning.persistence import resume
from tuning.persistence.ledger import SweepLedger
from tuning.persistence.resume import (
    check_unchanged,
    close_runs,
    describe_sweep,
    read_earlier,
    read_resumed,
    resume_command,
)
from tuning.settings import ResourceSettings, SearchSettings, SweepSettings
from tuning.tracking import MemoryTracker, RunRecord, Sweep
from tuning.tracking.protocol import TRIAL_MODEL_FILES

SPACE = {"synthesis.noise_sigma": {"low": 0.01, "high": 0.1, "log": True}, "model.layers": [[2], [2, 3]]}
SETTINGS = SweepSettings(
    search=SearchSettings(trials=7, space=SPACE, categories={"nut": {"synthesis.noise_sigma": 0.02}})
)


def make_data(search_fingerprint: str) -> Any:
    info = SimpleNamespace(search_fingerprint=search_fingerprint, test_fingerprint="t", split_seed=0)
    return {name: SimpleNamespace(info=info) for name in ("nut", "bolt")}


def describe(**changes: Any) -> dict[str, Any]:
    arguments = {
        "dataset": "parts",
        "data_uri": resolve_uri("shards"),
        "data": make_data("s"),
        "tracking_uri": "sqlite:///mlflow.db",
        "weights_digests": {"resnet": "w"},
        "code": {"git_commit": "c1", "version_torch": "2"},
    }
    return describe_sweep(SETTINGS, **{**arguments, **changes})


def same(one: SweepSettings, other: SweepSettings) -> bool:
    """Whether they search the same, however the space is written."""
    spaces = [[s.space(category) for category in (None, "nut", "bolt")] for s in (one, other)]
    plain = [flatten(s) | {"search.space": None} for s in (one, other)]
    return spaces[0] == spaces[1] and plain[0] == plain[1]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    SweepLedger.open(tmp_path, "s1").create(describe())
    return tmp_path


def test_sweep_is_found_again_by_its_id_and_place_alone(out: Path) -> None:
    resumed = read_resumed(out, "s1")
    assert same(resumed.settings, SETTINGS)
    assert resumed.categories == ("nut", "bolt")
    assert resumed.description == describe()


def test_the_same_may_be_said_again(out: Path) -> None:
    resumed = read_resumed(
        out, "s1", dataset="parts", data_uri="shards", categories=["nut", "bolt"], sets=["search.trials=7"]
    )
    assert same(resumed.settings, SETTINGS)


def test_where_and_how_fast_it_runs_may_change(out: Path) -> None:
    resumed = read_resumed(out, "s1", sets=["resources.num_workers=1", "search.max_concurrent=3"])
    assert resumed.settings.resources == ResourceSettings(num_workers=1)
    assert resumed.settings.search.max_concurrent == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "other"}, "dataset parts, not other"),
        ({"data_uri": "/elsewhere"}, r"--data .*/shards, not /elsewhere"),
        ({"categories": ["nut"]}, "--category nut, bolt, not nut"),
        ({"sets": ["search.trials=8"]}, "search.trials 7, not 8"),
        ({"sets": ["train.epochs=2"]}, "train.epochs 300, not 2"),
    ],
)
def test_what_is_to_change_is_named_in_one_line(out: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SSNError, match=rf"^sweep s1 was started with {message}; leave it out to go on as before, or"):
        read_resumed(out, "s1", **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_digests": {"resnet": "v"}}, r"the weights of resnet changed \(was w, is v\)"),
        (
            {"data": make_data("x")},
            r"the data of nut at .*/shards changed \(search_fingerprint\)",
        ),
    ],
)
def test_other_data_and_weights_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SSNError, match=rf"^sweep s1 cannot go on: {message}"):
        check_unchanged("s1", describe(), describe(**changes))


def test_other_numerics_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe()
    monkeypatch.setattr(resume, "NUMERICS_VERSION", 99)
    with pytest.raises(SSNError, match=r"numerics_version, how trials are computed, changed \(was \d, is 99\)"):
        check_unchanged("s1", before, describe())


def test_a_version_with_fewer_settings_is_not_gone_on_from() -> None:
    """The settings that it lacked are part of what trials are known by."""
    before = describe()
    del before["settings"]["train.flip_defects"]
    with pytest.raises(SSNError, match=r"without train\.flip_defects, .*go on with that version \(git_commit c1\), or"):
        check_unchanged("s1", before, describe())
    del before["settings"]["resources.cpus_per_worker"]
    before["settings"]["train.flip_defects"] = True
    assert check_unchanged("s1", before, describe()) == []


def test_other_code_is_told_of() -> None:
    assert check_unchanged("s1", describe(), describe()) == []
    lines = check_unchanged("s1", describe(), describe(code={"git_commit": "c2", "version_torch": "2"}))
    assert lines == ["git_commit was c1 when sweep s1 was started, and is c2"]


def test_failed_trials_are_tried_again_if_asked_for(tmp_path: Path) -> None:
    ledger = SweepLedger.open(tmp_path, "s1")
    ledger.write_trial(make_record(0))
    ledger.write_trial(
        make_record(1, state="failed", failure="it raised an error", checkpoint="/c", checkpoint_epoch=3)
    )
    assert [r.state for r in read_earlier(ledger, retry_failed=False)] == ["complete", "failed"]
    ledger.write_trial(make_record(2, state="failed", failure="its objective was nan at epoch 9"))
    again, anew = read_earlier(ledger, retry_failed=True)[1:]
    assert (anew.state, anew.checkpoint, anew.checkpoint_epoch) == ("running", None, 0), "after its last epoch"
    assert (again.state, again.failure, again.checkpoint) == ("running", None, "/c")


def test_command_can_be_pasted() -> None:
    assert resume_command("s1", "my runs") == "python -m tuning sweep --resume s1 --out 'my runs'"


def test_tracker_that_lacks_the_sweep_is_refused(out: Path) -> None:
    resumed = read_resumed(out, "s1")
    tracker: Any = MemoryTracker()
    tracker.tracking_uri = "sqlite:///mlflow.db"
    resumed.check_tracker(tracker)
    tracker.tracking_uri = "http://other:5000"
    with pytest.raises(SSNError, match=r"^http://other:5000 has no runs of sweep s1, which was started with sqlite:"):
        resumed.check_tracker(tracker)
    tracker.start_sweep(Sweep("s1", "parts", {"bolt": {}}))
    resumed.check_tracker(tracker)


# The tracker.

SWEEP = Sweep("s1", "parts", {"bolt": {}})


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    folder = tmp_path / "checkpoint" / "model"
    folder.mkdir(parents=True)
    for name in TRIAL_MODEL_FILES:
        (folder / name).write_text(name)
    return str(folder.parent)


def runs_of(tracker: MemoryTracker) -> dict[str, RunRecord]:
    return {r.name: r for r in tracker.find_runs("parts", sweep_id="s1") if r.parent_run_id is not None}


@pytest.mark.parametrize("filesystem", [None, pafs.LocalFileSystem()])
def test_runs_of_ended_trials_are_closed_with_their_models(
    tmp_path: Path, checkpoint: str, filesystem: pafs.FileSystem | None
) -> None:
    """The driver died between the ledger and the tracker, or before the tracker knew of a trial at all."""
    tracker, ledger = MemoryTracker(), SweepLedger.open(tmp_path, "s1")
    records = [
        make_record(0, checkpoint=checkpoint),
        make_record(1, state="pruned", epoch=3, checkpoint=None),
        make_record(2, state="failed", failure="it raised an error"),
        make_record(3, state="running", epoch=3),
        make_record(0, stage="finalist", checkpoint=checkpoint, tags={"finalist_of": "2"}),
        make_record(4, state="stopped", epoch=3),
    ]
    tracker.start_sweep(SWEEP)
    assert close_runs(tracker, SWEEP, ledger, records, filesystem) == []
    runs = runs_of(tracker)
    assert {name: (r.status, r.trial_state) for name, r in runs.items()} == {
        "bolt-000": ("FINISHED", "COMPLETE"),
        "bolt-001": ("FINISHED", "PRUNED"),
        "bolt-002": ("FAILED", "FAIL"),
        "bolt-finalist-000": ("FINISHED", "COMPLETE"),
        "bolt-004": ("KILLED", "INTERRUPTED"),
    }
    assert runs["bolt-finalist-000"].tags["finalist_of"] == "2"
    assert len(tracker.list_artifacts(runs["bolt-000"].run_id)) == 3
    assert runs["bolt-000"].metrics["val_loss"] == 1.5
    assert (runs["bolt-000"].tags["hostname"], runs["bolt-002"].tags["error"]) == ("node", "it raised an error")
    closed = dict(runs)
    assert close_runs(tracker, SWEEP, ledger, records, filesystem) == []
    assert runs_of(tracker) == closed


def test_what_is_closed_is_left_alone(tmp_path: Path, checkpoint: str) -> None:
    tracker, ledger = MemoryTracker(), SweepLedger.open(tmp_path, "s1")
    tracker.start_sweep(SWEEP)
    close_runs(tracker, SWEEP, ledger, [make_record(0, checkpoint=checkpoint)], None)
    run_id = runs_of(tracker)["bolt-000"].run_id
    tracker.log_summary(run_id, tags={"champion_version": "parts.bolt/1"})
    close_runs(tracker, SWEEP, ledger, [make_record(0, checkpoint="/gone")], None)
    assert runs_of(tracker)["bolt-000"].tags["champion_version"] == "parts.bolt/1"


def test_trial_whose_model_is_nowhere_has_failed_after_all(tmp_path: Path) -> None:
    tracker, ledger = MemoryTracker(), SweepLedger.open(tmp_path, "s1")
    tracker.start_sweep(SWEEP)
    record = make_record(0, checkpoint="/gone")
    lines = close_runs(tracker, SWEEP, ledger, [record], None)
    assert lines == ["bolt: trial 0 failed: its model at /gone is gone; --retry-failed repeats it"]
    assert (record.state, ledger.read_trials()[0].state) == ("failed", "failed")
    assert runs_of(tracker)["bolt-000"].trial_state == "FAIL"
