"""Features of a made-up category, drawn rather than computed: no images, no backbone, and defects where we put them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from ssn.config import Config, DataConfig, EvalConfig, ModelConfig, Size, SynthesisConfig, TrainConfig
from ssn.data.reader import CategoryInfo, SplitCount
from ssn.data.records import SCHEMA_VERSION
from ssn.features import NUM_FLIPS, CachedSplit, CategoryFeatures

CHANNELS = (6, 4)
SIZES: tuple[Size, ...] = ((6, 5), (3, 3))
MAP_SIZE = (12, 10)
EVAL_SIZE = (24, 20)

CONFIG = Config(
    model=ModelConfig(seg_channels=24, cls_channels=8),
    data=DataConfig(image_size=(48, 40), feature_dtype="fp32"),
    synthesis=SynthesisConfig(noise_sigma=0.5, perlin_threshold=0.2),
    train=TrainConfig(epochs=3, batch_size=4, lr_adaptor=1e-3, lr_heads=2e-3),
    eval=EvalConfig(size=EVAL_SIZE, batch_size=3),
)


def with_train(config: Config, **changes: object) -> Config:
    """A configuration with other ``train`` settings."""
    return replace(config, train=replace(config.train, **changes))  # type: ignore[arg-type]


def plant_split(
    split: str, normal: int, defective: int, *, num_flips: int = 1, masked: int | None = None, seed: int = 0
) -> CachedSplit:
    """Normal images are noise around a mean per channel; a defect shifts a third of the image in every channel.

    Args:
        split: Part of the images' ids.
        normal: Normal images, which come first.
        defective: Images with a defect in the upper left.
        num_flips: Views of each image; a flip moves the defect.
        masked: Defective images with a mask, the first ones; None: all.
        seed: Of the noise.
    """
    rng = np.random.default_rng([seed, *split.encode()])
    masked = defective if masked is None else masked
    images = normal + defective
    maps = []
    for (height, width), channels in zip(SIZES, CHANNELS, strict=True):
        mean = np.linspace(-1, 1, channels)
        maps.append((mean + 0.1 * rng.standard_normal((images * num_flips, height, width, channels))).astype("f4"))
    masks = np.zeros((images * num_flips, *MAP_SIZE), bool)
    eval_masks = np.zeros((images if num_flips == 1 else 0, *EVAL_SIZE), bool)
    for image in range(normal, images):
        for which in range(num_flips):
            view = image * num_flips + which
            for m in (*maps, masks):
                height, width = m.shape[1:3]
                upper = slice(0, height // 3) if not which & 2 else slice(height - height // 3, height)
                left = slice(0, width // 3) if not which & 1 else slice(width - width // 3, width)
                if m.dtype == bool:
                    m[view, upper, left] = image < normal + masked
                else:
                    m[view, upper, left] += 1.5
        if num_flips == 1 and image < normal + masked:
            eval_masks[image, : EVAL_SIZE[0] // 3, : EVAL_SIZE[1] // 3] = True
    return CachedSplit(
        maps_VhwC=tuple(maps),
        masks_VHW=masks,
        eval_masks_N=eval_masks,
        labels_N=np.array([0] * normal + [1] * defective, np.int64),
        has_mask_N=np.array([False] * normal + [i < masked for i in range(defective)], bool),
        defect_types=("good",) * normal + tuple(("dent", "scratch")[i % 2] for i in range(defective)),
        ids=tuple(hashlib.sha256(f"{split}-{i}".encode()).hexdigest() for i in range(images)),
        num_flips=num_flips,
    )


def plant_features(
    *,
    train: int = 8,
    pool: int = 2,
    pool_masks: int | None = None,
    validation: tuple[int, int] = (5, 4),
    validation_masks: int | None = None,
    seed: int = 0,
) -> CategoryFeatures:
    """A category's features; ``validation`` counts normal and defective images, ``..._masks`` those with a mask."""
    splits = {
        "train": plant_split("train", train, 0, seed=seed),
        "pool": plant_split("pool", 0, pool, num_flips=NUM_FLIPS, masked=pool_masks, seed=seed),
        "validation": plant_split("validation", *validation, masked=validation_masks, seed=seed),
    }
    counts = {
        name: SplitCount(int((s.labels_N == 0).sum()), int(s.labels_N.sum()), int(s.has_mask_N.sum()))
        for name, s in splits.items()
    }
    info = CategoryInfo(
        dataset="made_up",
        category="plate",
        schema_version=SCHEMA_VERSION,
        split_seed=0,
        counts={**counts, "test": SplitCount(0, 0, 0)},  # type: ignore[dict-item]
        search_fingerprint="f" * 64,
        test_fingerprint="0" * 64,
        defaults={},
    )
    return CategoryFeatures(info=info, **splits, backbone_digest="d" * 64, backbone_calibration={}, channels=CHANNELS)
