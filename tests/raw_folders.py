"""Small raw datasets on disk, for the tests of ingest and of whatever reads its shards."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 24


def draw_image(seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A random image that is no near-duplicate of another seed's."""
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def draw_mask(height: int = SIDE, width: int = SIDE, level: int = 255) -> np.ndarray:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[4:9, 6:12] = level
    return mask


def write_image(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_mvtec(
    raw: Path,
    category: str = "widget",
    *,
    train: int = 8,
    test_good: int = 5,
    defects: Mapping[str, int] | None = None,
    masks: bool = True,
    first_seed: int = 0,
) -> Path:
    """A category in MVTec AD's layout; seeds count up from ``first_seed`` in the order of writing."""
    seed = first_seed
    plan = {"train/good": train, "test/good": test_good}
    plan |= {f"test/{kind}": count for kind, count in (defects or {"dent": 10, "scratch": 10}).items()}
    for folder, count in plan.items():
        for index in range(count):
            write_image(raw / category / folder / f"{index:03d}.png", draw_image(seed))
            seed += 1
            if masks and not folder.endswith("good"):
                kind = folder.removeprefix("test/")
                write_image(raw / category / "ground_truth" / kind / f"{index:03d}_mask.png", draw_mask())
    return raw
