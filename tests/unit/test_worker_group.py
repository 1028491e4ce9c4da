"""A trial's group of Ray Train workers, as far as it goes without starting Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import train

from ssn.errors import SSNError
from tuning import sweep
from tuning.execution.capacity import Capacity, NodeShape
from tuning.execution.train_worker import MODEL_FOLDER, Placement, _reporter
from tuning.settings import ResourceSettings, SearchSettings, SweepSettings


class Api:
    """Takes reports as ``ray.train`` does."""

    Checkpoint = train.Checkpoint

    def __init__(self) -> None:
        self.reports: list[tuple[dict[str, Any], list[str] | None]] = []

    def report(self, result: dict[str, Any], checkpoint: train.Checkpoint | None = None) -> None:
        files = None if checkpoint is None else [p.name for p in Path(checkpoint.path, MODEL_FOLDER).iterdir()]
        self.reports.append((result, files))


def save(folder: Path) -> None:
    """Write something like a model."""
    folder.mkdir(parents=True)
    (folder / "heads").write_text("trained")


@pytest.mark.parametrize(("keeps", "files"), [(True, ["heads"]), (False, None)])
def test_every_worker_reports_and_the_first_keeps_the_checkpoint(keeps: bool, files: list[str] | None) -> None:
    api = Api()
    report = _reporter(api, keeps=keeps)
    report({"epoch": 1}, None)
    report({"epoch": 2}, save)
    assert api.reports == [({"epoch": 1}, None), ({"epoch": 2}, files)]


def settings(**resources: Any) -> SweepSettings:
    """A sweep's, with these resources."""
    return SweepSettings(search=SearchSettings(trials=1), resources=ResourceSettings(**resources))


def test_several_workers_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "cluster_capacity", lambda: Capacity((NodeShape({"CPU": 4.0}, 1),), "now"))
    placed = sweep.place(settings(num_workers=3, use_gpu=False))
    assert placed == Placement(num_workers=3, use_gpu=False, cpus=1.0, gpus=0.0)


def test_workers_of_a_trial_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = NodeShape({"CPU": 8.0, "GPU": 2.0}, 1)
    monkeypatch.setattr(sweep, "cluster_capacity", lambda: Capacity((shape,), "now"))
    with pytest.raises(SSNError, match=r"gpus_per_worker is 0\.5.*use 1, or a single worker"):
        sweep.place(settings(num_workers=2, use_gpu=True, gpus_per_worker=0.5))
    assert sweep.place(settings(num_workers=1, use_gpu=True, gpus_per_worker=0.5)).gpus == 0.5
    assert sweep.place(settings(num_workers=2, use_gpu=True)).gpus == 1.0
