"""Fixtures shared by every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from ssn.config import Config


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference tensors, real images and weights that the project does not ship."""
    default = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("SSN_SHARED", default))
    if not path.is_dir():
        pytest.skip(f"no reference data at {path}; set SSN_SHARED to its folder")
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the categories ``widget`` and ``gadget`` of the dataset ``tiny``; tests must not write to them.

    Each has 8 normal training images, 6 labelled defective ones, 8 for validation and 11 for test, 24 x 24 pixels of
    noise.
    """
    from ssn.data.ingest import ingest
    from ssn.data.manifest import Manifest
    from tests.raw_folders import write_mvtec

    base = tmp_path_factory.mktemp("tiny")
    write_mvtec(base / "raw", "widget")
    write_mvtec(base / "raw", "gadget", first_seed=1000)
    ingest(Manifest(name="tiny", layout="mvtec"), base / "raw", str(base / "shards"))
    return base / "shards"


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """Settings that train on ``tiny_data`` in a second, with a backbone of random weights."""
    from ssn.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig

    return Config(
        model=ModelConfig(backbone="resnet18", weights="random", layers=(1, 2), seg_channels=16, cls_channels=4),
        data=DataConfig(image_size=(32, 48)),
        train=TrainConfig(epochs=2, batch_size=8, supervision_ratio=1.0),
        eval=EvalConfig(size=(24, 32), batch_size=4),
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_data: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model trained on the category ``widget`` of ``tiny_data``."""
    from ssn.train_job import train

    out = tmp_path_factory.mktemp("model") / "widget"
    train(tiny_config, data_uri=str(tiny_data), dataset="tiny", category="widget", out=out)
    return out


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Undo what a test does to torch's number of threads: sums, and so trained models, depend on it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
