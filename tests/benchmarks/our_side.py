"""Our side of the comparison with a peer: what the product does, on made-up images."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ssn.backbone import Backbone
from ssn.bundle import write_bundle
from ssn.checkpoint import load_checkpoint
from ssn.config import Config, DataConfig, ModelConfig, SynthesisConfig, TrainConfig
from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from ssn.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from ssn.data.reader import SearchData, open_search_data
from ssn.engine import Trainer
from ssn.features import CategoryFeatures, extract, load_image_batches, prepare_backbone
from ssn.model import SuperSimpleNet, image_map
from ssn.predictor import Predictor
from tests.raw_folders import write_mvtec

Precision = Literal["fp32", "bf16"]
"""Of inference."""
TrainingPrecision = Literal["fp32", "bf16 noise", "bf16"]
"""``bf16 noise``: of the noise's products alone; ``bf16``: of all products with weights."""
VARIANT = "jims"
"""anomalib's default."""


@dataclass(frozen=True)
class Case:
    """What is computed, on either side."""

    backbone: str
    batch: int
    side: int = 256
    """Height and width of the images, pixels."""
    threshold: float = 0.2

    @property
    def config(self) -> Config:
        """Our settings; an epoch is one step."""
        return Config(
            model=ModelConfig(variant=VARIANT, backbone=self.backbone, weights="random"),
            data=DataConfig(image_size=(self.side, self.side)),
            synthesis=SynthesisConfig(perlin_threshold=self.threshold),
            train=TrainConfig(epochs=1_000_000, batch_size=self.batch, draws_per_epoch=self.batch),
        )


@dataclass(frozen=True)
class Scene:
    """A case with its inputs and weights."""

    case: Case
    backbone: Backbone
    images_BCHW: Tensor
    """Preprocessed: those that ``features`` were computed from."""
    features: CategoryFeatures

    def build_net(self) -> SuperSimpleNet:
        """Our heads, always with the same weights."""
        return SuperSimpleNet(self.features.channels, self.case.config.model)


def build_scene(case: Case) -> Scene:
    """Draw images, calibrate a random backbone on them, and compute their features."""
    data = _open_noise(case.batch)
    config = case.config
    backbone = prepare_backbone(config, data)
    features = extract(config, data, backbone)
    images = torch.cat([x_BCHW for _, x_BCHW in load_image_batches(data.stream("train"), config)])
    return Scene(case, backbone, images, features)


def with_precision(config: Config, precision: TrainingPrecision) -> Config:
    """Settings that train in this precision."""
    products = "bf16" if precision == "bf16" else "fp32"
    noise = "fp32" if precision == "fp32" else "bf16"
    return replace(config, train=replace(config.train, precision=products, noise_precision=noise))


def training_steps(scene: Scene, precision: TrainingPrecision) -> dict[str, Callable[[], float]]:
    """A training step on cached features, and one that runs the backbone first; both return the loss.

    A step is everything an epoch does: draws, masks, noise, forward, loss, backward, optimiser.
    """
    trainer = Trainer(with_precision(scene.case.config, precision), scene.features)

    def without_cache() -> float:
        # the step then reads the cache all the same, which adds a copy of the features to what is timed
        compute_features(scene.backbone, scene.images_BCHW)
        return trainer.run_epoch()

    return {"cached": trainer.run_epoch, "no cache": without_cache}


@torch.inference_mode()
def compute_features(backbone: Backbone, images_BCHW: Tensor) -> list[Tensor]:
    """The backbone as ``ssn.features`` runs it; maps channels last."""
    maps = backbone(images_BCHW.contiguous(memory_format=torch.channels_last))
    return [m.permute(0, 2, 3, 1).contiguous() for m in maps]


def build_predictor(scene: Scene, heads_state: Mapping[str, Tensor], precision: Precision) -> Predictor:
    """A predictor with these heads."""
    net = scene.build_net()
    net.load_state_dict(dict(heads_state))
    return Predictor(net, scene.backbone, scene.case.config, precision=precision)


def write_model(scene: Scene, heads_state: Mapping[str, Tensor], folder: Path) -> Path:
    """Write a model directory with these heads, as ``train`` does, for ``ssn.export``."""
    trainer = Trainer(scene.case.config, scene.features)
    trainer.net.load_state_dict(dict(heads_state))
    trainer.save(folder / "heads", resumable=False)
    write_bundle(load_checkpoint(folder / "heads"), scene.backbone, folder / "model")
    return folder / "model"


def as_exported(images_BCHW: Tensor) -> Tensor:
    """Images as ``ssn.export``'s models take them: before normalisation, in 0..1."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (images_BCHW * std + mean).contiguous()


@torch.no_grad()
def predict(predictor: Predictor, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Smoothed map at image size [B, height, width] and score [B], as probabilities: what anomalib's model returns."""
    map_BHW, score_B = predictor.score_raw(images_BCHW)
    height, width = images_BCHW.shape[2:]
    return image_map(map_BHW, (height, width)).sigmoid(), score_B.sigmoid()


@functools.lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bench-")  # removed when the process ends


@functools.cache
def _open_noise(num_images: int) -> SearchData:
    """A category of ``num_images`` training images of noise and as good as nothing else."""
    base, category = Path(_scratch().name), f"noise{num_images}"
    write_mvtec(base / "raw", category, train=num_images, test_good=5, defects={"dent": 5}, masks=False)
    ingest(Manifest(name="bench", layout="mvtec"), base / "raw", str(base / "shards"), categories=[category])
    return open_search_data(str(base / "shards"), "bench", category)
