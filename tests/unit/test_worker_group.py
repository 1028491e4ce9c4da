"""A trial's group of Ray Train workers, as far as it goes without starting Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray import train
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from ssn.distributed import ALONE
from ssn.errors import SSNError
from tuning import sweep, worker_group
from tuning.capacity import Capacity, NodeShape
from tuning.settings import ResourceSettings, SearchSettings, SweepSettings
from tuning.train_worker import MODEL_FOLDER, Placement, _reporter


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


def test_workers_take_the_bundles_behind_the_trials_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(WorkerGroup, "_create_workers", lambda self, *args, **options: asked.append((args, options)))
    group = object.__new__(worker_group._TrialWorkerGroup)
    group._create_workers(3, "reservation", {"CPU": 1.0}, replica_group_size=None)
    ((arguments, options),) = asked
    assert arguments == (3, "reservation", {"CPU": 1.0})
    assert options == {"placement_group_bundle_indices": [1, 2, 3], "replica_group_size": None}


def test_the_reservation_is_tunes_to_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "get_current_placement_group", lambda: "tune's")
    group = object.__new__(worker_group._TrialWorkerGroup)
    reservation = group._create_placement_group(None, None)
    assert reservation.placement_group == "tune's"
    reservation.shutdown()  # would need Ray if it removed anything


@pytest.mark.parametrize("ending", [SystemExit, RuntimeError, None])
def test_workers_end_however_their_controller_ends(monkeypatch: pytest.MonkeyPatch, ending: Any) -> None:
    ended: list[str] = []

    class Controller:
        group: str | None = "workers"

        async def run(self) -> None:
            if ending is not None:
                raise ending
            self.group = None  # as Train's own does at the end of a run

        def get_worker_group(self) -> str | None:
            return self.group

        def _shutdown_worker_group(self) -> None:
            ended.append("workers")

        def get_result(self) -> str:
            return "result"

    monkeypatch.setattr(worker_group, "_TrialController", Controller)
    trainer = object.__new__(worker_group._TrialTrainer)
    if ending is None:
        assert trainer._initialize_and_run_controller() == "result"
        assert ended == []
    else:
        with pytest.raises(ending):
            trainer._initialize_and_run_controller()
        assert ended == ["workers"]


def test_one_worker_joins_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Context:
        def get_world_rank(self) -> int:
            return 0

        def get_world_size(self) -> int:
            return 1

    monkeypatch.setattr(train, "get_context", Context)
    with worker_group.joined_workers("cpu") as workers:
        assert workers is ALONE


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
