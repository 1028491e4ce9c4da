"""Several workers train the network that one trains: losses, gradients, weights, batch-norm buffers and metrics.

Each process imports this module.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ssn.config import Config
from ssn.distributed import ALONE, ProcessGroup, Workers, merge_moments
from ssn.engine import Trainer
from ssn.features import CategoryFeatures
from tests.planted_features import CONFIG, plant_features, with_train
from tests.tolerances import FLOAT32_ATOL, FLOAT32_RTOL, SHARED_RTOL, TRAINED_RTOL

WORLD_SIZES = [1, 2, 3]
# batches of 4, 4 and 1 images: uneven slices, and none for some worker
EPOCH = {"epochs": 2, "draws_per_epoch": 9, "batch_size": 4}


@dataclass(frozen=True)
class Case:
    """Something to train."""

    name: str
    variant: str
    train: dict[str, Any]
    features: dict[str, Any]

    def config(self, *, plain: bool) -> Config:
        # with AdamW a bias in front of a batch norm, whose gradient is rounding and nothing else, goes wherever that
        # takes it, a learning rate's length a step: small steps keep that small
        rates = {} if plain else {"lr_adaptor": 1e-5, "lr_heads": 2e-5}
        config = with_train(CONFIG, **EPOCH, **rates, **self.train)
        return replace(config, model=replace(config.model, variant=self.variant))  # type: ignore[arg-type]

    def plant(self) -> CategoryFeatures:
        return plant_features(**self.features)


CASES = [
    Case(f"{variant} {name}", variant, train, features)
    for variant in ("icpr", "jims")
    for name, train, features in (
        ("unsupervised", {"supervision_ratio": 0.0}, {}),
        ("supervised, clipped", {"supervision_ratio": 1.0, "grad_clip_norm": 0.1}, {"pool": 3}),
        (
            "weak, few to validate",
            {"supervision_ratio": 0.5, "weak_labels": "use"},
            {"pool": 4, "pool_masks": 2, "validation": (1, 1), "validation_masks": 0},
        ),
    )
]


class Recorder(Trainer):
    """A trainer that remembers every step's loss and the first one's gradients, clipped where they are.

    Args:
        plain: Descend by the gradient itself, instead of AdamW's quotient.
    """

    def __init__(self, *arguments: Any, plain: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if plain:
            self.optimizer = torch.optim.SGD(self.net.parameter_groups()[0])  # type: ignore[assignment]
            self.optimizer.add_param_group({"params": self.net.parameter_groups()[1]})
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def _step(self, *arguments: Any) -> float:
        self.losses.append(super()._step(*arguments))
        if len(self.losses) == 1:
            self.gradients = {n: p.grad.clone() for n, p in self.net.named_parameters() if p.grad is not None}
        return self.losses[-1]


def run(case: Case, workers: Workers, *, plain: bool) -> dict[str, Any]:
    """Train on ``workers`` and tell everything."""
    trainer = Recorder(case.config(plain=plain), case.plant(), workers=workers, plain=plain)
    for _ in range(trainer.config.train.epochs):
        trainer.run_epoch()
    loss, metrics = trainer.validate(pixel=True)
    return {
        "losses": trainer.losses,
        "gradients": trainer.gradients,
        "state": dict(trainer.net.state_dict()),
        "metrics": {"loss": loss, **metrics.values},
        "undefined": dict(metrics.undefined),
    }


def run_all(workers: Workers) -> dict[str, dict[bool, Any]]:
    """Every case, with AdamW and without."""
    return {case.name: {plain: run(case, workers, plain=plain) for plain in (False, True)} for case in CASES}


def work(rank: int, folder: str) -> None:
    """One of the processes; in turn it is one of three workers, one of two, and one."""
    torch.set_num_threads(1)
    for world_size in [size for size in WORLD_SIZES if rank < size]:
        store = f"file://{folder}/store{world_size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        try:
            workers = ProcessGroup()
            said: dict[str, Any] = dict(run_all(workers))
            said["rows"] = workers.gather(torch.full((rank, 2), float(rank)))
            said["once"] = workers.compute_once(lambda: f"from {rank}")
            said["slice"] = workers.slice(np.arange(5)).tolist()
        finally:
            dist.destroy_process_group()
        torch.save(said, Path(folder, f"{rank}-of-{world_size}.pt"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one worker computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    told = run_all(ALONE)
    torch.set_num_threads(threads)
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes have left what they computed. They are forked from one that has imported everything."""
    folder = tmp_path_factory.mktemp("workers")
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(work, (str(folder),), nprocs=max(WORLD_SIZES), start_method="forkserver")
    return folder


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda size: f"{size} workers")
def told(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """What each of several workers computed, by rank."""
    return [torch.load(folder / f"{rank}-of-{request.param}.pt") for rank in range(request.param)]


@pytest.mark.integration
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_workers_train_the_network_that_one_trains(
    told: list[dict[str, Any]], alone: dict[str, Any], case: Case
) -> None:
    expected = alone[case.name][True]
    assert len(expected["losses"]) == 6
    for found in (each[case.name][True] for each in told):
        assert found["losses"] == pytest.approx(expected["losses"], rel=FLOAT32_RTOL)
        assert found["gradients"].keys() == expected["gradients"].keys()
        whole = torch.cat([g.flatten() for g in expected["gradients"].values()]).norm()
        for name, gradient in expected["gradients"].items():
            assert (found["gradients"][name] - gradient).norm() <= SHARED_RTOL * whole, name
        for name, value in expected["state"].items():
            assert (found["state"][name] - value).abs().max() <= SHARED_RTOL * value.abs().max(), name
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=FLOAT32_RTOL)
        assert found["undefined"] == expected["undefined"]


@pytest.mark.integration
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_workers_get_where_one_gets_with_the_real_optimiser(
    told: list[dict[str, Any]], alone: dict[str, Any], case: Case
) -> None:
    expected = alone[case.name][False]
    for found in (each[case.name][False] for each in told):
        assert found["losses"] == pytest.approx(expected["losses"], rel=TRAINED_RTOL)
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=TRAINED_RTOL)


@pytest.mark.integration
def test_workers_hold_the_same_network_to_the_last_bit(told: list[dict[str, Any]]) -> None:
    for case in CASES:
        first = told[0][case.name][False]
        for other in (each[case.name][False] for each in told[1:]):
            assert [
                name for name, value in first["state"].items() if not torch.equal(other["state"][name], value)
            ] == []
            assert other["metrics"] == first["metrics"]


@pytest.mark.integration
def test_what_workers_exchange(told: list[dict[str, Any]]) -> None:
    size = len(told)
    rows = [[float(rank)] * 2 for rank in range(size) for _ in range(rank)]
    for each in told:
        assert each["rows"].tolist() == rows
        assert each["once"] == "from 0"
    assert [item for each in told for item in each["slice"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("counts", [[7, 3, 0, 5], [1, 14], [15]])
def test_merged_moments_are_those_of_everything(counts: list[int]) -> None:
    values = torch.randn(15, 3, generator=torch.Generator().manual_seed(0)) + 100
    parts = values.split(counts)
    means = torch.stack([part.mean(0) for part in parts])  # not a number where a part is empty
    variances = torch.stack([part.var(0, correction=0) if len(part) else part.sum(0) / 0 for part in parts])
    mean, var = merge_moments(means, variances, counts)
    torch.testing.assert_close(mean, values.mean(0), rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)
    torch.testing.assert_close(var, values.var(0, correction=0), rtol=FLOAT32_RTOL * 100, atol=FLOAT32_ATOL)
