"""The ledger: what is written is what is read, whatever holds the files, and what is damaged does not count."""

from __future__ import annotations

import json
import math
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssn.errors import SSNError
from tuning.champions.category_result import ChampionScore
from tuning.champions.registry import ChampionVersion
from tuning.champions.winner import TrialRecord
from tuning.persistence.ledger import SWEEP_FILE, SweepLedger, trial_file


def make_record(index: int = 0, category: str = "bolt", **changes: Any) -> TrialRecord:
    fields = {
        "trial_id": f"t{index}",
        "trial_key": f"key-{category}-{index}",
        "category": category,
        "index": index,
        "number": index,
        "max_epochs": 9,
        "config": {"train.epochs": 9, "data.image_size": [32, 48], "model.align_corners": None},
        "params": {"synthesis.noise_sigma": 0.02},
        "state": "complete",
        "epoch": 9,
        "objectives": {1: 0.25, 9: 0.5},
        "metrics": {"val_loss": 1.5, "hostname": "node", "feature_source": "cached", "time_total_s": 3.0},
        "checkpoint": "/runs/checkpoint_000002",
        "checkpoint_epoch": 9,
    }
    return TrialRecord(**{**fields, **changes})


@pytest.fixture(params=["disk", "object store"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """fsspec's in-memory store stands in for an object store: no folders, no renaming."""
    return str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}/runs"


@pytest.fixture
def ledger(out: str) -> SweepLedger:
    return SweepLedger.open(out, "s1")


def test_trials_are_read_as_they_were_written(ledger: SweepLedger, out: str) -> None:
    assert ledger.read_trials() == []
    written = [
        make_record(0, "nut"),
        make_record(0),
        make_record(1, state="pruned", epoch=3, checkpoint=None, checkpoint_epoch=3),
        make_record(2, state="failed", failure="the training loss became nan"),
        make_record(3, state="running", epoch=3, checkpoint_epoch=3),
        make_record(0, stage="finalist"),
    ]
    for record in written:
        ledger.write_trial(record)
    again = pickle.loads(pickle.dumps(SweepLedger.open(out, "s1")))
    assert again.read_trials() == sorted(written, key=lambda r: r.name)
    assert again.files.damaged == []
    assert SweepLedger.open(out, "s2").read_trials() == []


def test_a_trial_has_one_file_that_says_the_last(ledger: SweepLedger) -> None:
    for epoch in (1, 3):
        ledger.write_trial(make_record(state="running", epoch=epoch, checkpoint_epoch=epoch))
    (found,) = ledger.read_trials()
    assert (found.state, found.epoch) == ("running", 3)


def test_numbers_that_are_not_finite_survive(ledger: SweepLedger) -> None:
    ledger.write_trial(
        make_record(objectives={1: math.nan, 3: -math.inf}, metrics={"val_loss": math.inf, "x": None}, state="failed")
    )
    (found,) = ledger.read_trials()
    assert math.isnan(found.objectives[1])
    assert (found.objectives[3], found.metrics) == (-math.inf, {"val_loss": math.inf, "x": None})


def test_what_tune_adds_to_a_result_is_left_out(ledger: SweepLedger) -> None:
    metrics = {"epoch": 9, "val_loss": 1.5, "pid": 1, "done": True, "config/category": "bolt", "time_total_s": 3.0}
    ledger.write_trial(make_record(metrics={**metrics, "__duplicate__": True}))
    assert ledger.read_trials()[0].metrics == {"val_loss": 1.5, "time_total_s": 3.0}


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        ({1: 0.2, 9: 0.5}, ("complete", None)),
        ({1: 0.2, 9: math.nan}, ("failed", "its objective was nan at epoch 9")),
        ({1: 0.2}, ("failed", "it reported no objective at its last epoch")),
    ],
)
def test_trial_whose_end_alone_was_not_written_has_ended(
    ledger: SweepLedger, objectives: dict[int, float], expected: tuple[str, str | None]
) -> None:
    ledger.write_trial(make_record(state="running", objectives=objectives))
    (found,) = ledger.read_trials()
    assert (found.state, found.failure) == expected


def _file(out: str, name: str) -> Path:
    return Path(out, "s1", name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"9": 0.5', '"9": 0.9'),
        lambda text: text.replace('"format_version": 1', '"format_version": 0'),
    ],
    ids=["half", "empty", "list", "number", "version"],
)
def test_damaged_file_does_not_count(tmp_path: Path, damage: Callable[[str], str]) -> None:
    ledger = SweepLedger.open(tmp_path, "s1")
    for index in (0, 1):
        ledger.write_trial(make_record(index))
    file = _file(str(tmp_path), trial_file(make_record(0)))
    before = file.read_text()
    file.write_text(damage(before))
    assert file.read_text() != before
    assert [r.index for r in ledger.read_trials()] == [1]
    assert ledger.files.damaged == [str(file)]


def test_file_under_another_trials_name_does_not_count(tmp_path: Path) -> None:
    ledger = SweepLedger.open(tmp_path, "s1")
    ledger.write_trial(make_record(0))
    file = _file(str(tmp_path), trial_file(make_record(0)))
    file.rename(file.with_name("search-0007.json"))
    assert ledger.read_trials() == []
    assert len(ledger.files.damaged) == 1


def test_what_a_killed_writer_leaves_is_no_trial(tmp_path: Path) -> None:
    ledger = SweepLedger.open(tmp_path, "s1")
    ledger.write_trial(make_record(0))
    _file(str(tmp_path), "trials/bolt/search-0001.json.4711.partial").write_text("{")
    assert len(ledger.read_trials()) == 1
    assert ledger.files.damaged == []


def test_record_of_a_later_release_does_not_count_and_of_an_earlier_does(tmp_path: Path) -> None:
    from ssn.config import digest

    ledger = SweepLedger.open(tmp_path, "s1")
    ledger.write_trial(make_record(0))
    file = _file(str(tmp_path), trial_file(make_record(0)))
    sealed = json.loads(file.read_text())

    def put(content: dict[str, Any]) -> None:
        file.write_text(json.dumps({**sealed, "content": content, "sha256": digest(content)}))

    put({k: v for k, v in sealed["content"].items() if k != "stage"})
    assert ledger.read_trials() == [make_record(0)]
    put({**sealed["content"], "fancy": 1})
    assert ledger.read_trials() == []


def test_sweep_is_described_before_anything_else(ledger: SweepLedger, out: str) -> None:
    with pytest.raises(SSNError, match=r"^there is no sweep s1 at .*/s1; check the id and --out$"):
        ledger.describe()
    ledger.create({"dataset": "parts", "order": ["bolt", "nut"]})
    assert SweepLedger.open(out, "s1").describe() == {"dataset": "parts", "order": ["bolt", "nut"]}


def test_damaged_description_is_named(tmp_path: Path) -> None:
    ledger = SweepLedger.open(tmp_path, "s1")
    ledger.create({})
    _file(str(tmp_path), SWEEP_FILE).write_text("{")
    with pytest.raises(SSNError, match=r"s1/sweep.json is damaged or of another version; start a new sweep$"):
        ledger.describe()


def test_test_score_is_kept_with_its_picture(ledger: SweepLedger) -> None:
    score = ChampionScore({"image_auroc": 0.9}, {"pixel_ap": "no masks"}, 12, 4, b"\x89PNG")
    assert ledger.read_score("bolt", "key") is None
    ledger.write_score("bolt", "key", score)
    assert ledger.read_score("bolt", "key") == score
    assert ledger.read_score("bolt", "other") is None
    assert ledger.read_score("nut", "key") is None


def test_score_without_a_picture_is_one(ledger: SweepLedger) -> None:
    score = ChampionScore({"image_auroc": 0.9}, {}, 12, 4, None)
    ledger.write_score("bolt", "key", score)
    assert ledger.read_score("bolt", "key") == score


def test_budget_that_ended_a_stage_is_kept(ledger: SweepLedger) -> None:
    assert ledger.read_end("search") is None
    ledger.write_end("search", "search.time_budget=2h")
    assert ledger.read_end("search") == "search.time_budget=2h"
    assert ledger.read_end("finalist") is None


def test_champion_is_kept(ledger: SweepLedger) -> None:
    champion = ChampionVersion("parts.bolt", "3", "run", created=True)
    assert ledger.read_champion("bolt") is None
    ledger.write_champion("bolt", champion)
    assert ledger.read_champion("bolt") == champion


def test_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SSNError) as error:
        SweepLedger.open(tmp_path / "file", "s1").create({})
    assert str(tmp_path / "file") in str(error.value)
    assert "\n" not in str(error.value)
