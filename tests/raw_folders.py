"""Small raw datasets on disk, for the tests of ingest and of whatever reads its shards."""

from __future__ import annotations

import io
import pickle
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


def write_ksdd(raw: Path, *, parts: int = 6, surfaces: int = 3) -> Path:
    """KolektorSDD's layout: of each part, the first surface is defective."""
    for part in range(parts):
        for surface in range(surfaces):
            folder = raw / f"kos{part + 1:02d}"
            write_image(folder / f"Part{surface}.jpg", draw_image(100 * part + surface))
            write_image(folder / f"Part{surface}_label.bmp", draw_mask(level=0 if surface else 255))
    return raw


def write_ksdd2(raw: Path, *, train: tuple[int, int] = (10, 6), test: tuple[int, int] = (4, 4)) -> Path:
    """KolektorSDD2's layout, its stray copies included; of each split, so many normal and so many defective images.

    Names count up from 10000 in train and from 20000 in test, normal images first; masks hold the level 1.
    """
    for first, (split, (normal, defective)) in ((10000, ("train", train)), (20000, ("test", test))):
        for index in range(normal + defective):
            write_image(raw / split / f"{first + index}.png", draw_image(first + index))
            write_image(raw / split / f"{first + index}_GT.png", draw_mask(level=int(index >= normal)))
    write_image(raw / "train/10000 (copy).png", draw_image(10000))
    write_image(raw / "train/10000_GT (copy).png", draw_mask(level=0))
    return raw


def write_sensum(raw: Path, *, normal: int = 9, defective: int = 6) -> Path:
    """SensumSODF's layout without its folds; images of both labels count up from 000.png."""
    for offset, category in ((0, "capsule"), (1000, "softgel")):
        for index in range(normal):
            write_image(raw / category / f"negative/data/{index:03d}.png", draw_image(offset + index))
        for index in range(defective):
            write_image(raw / category / f"positive/data/{index:03d}.png", draw_image(offset + 500 + index))
            write_image(raw / category / f"positive/annotation/{index:03d}.png", draw_mask())
    return raw


def write_sensum_folds(raw: Path, *, normal: int = 9, defective: int = 6) -> Path:
    """The split files of :func:`write_sensum`'s images: image i is tested in fold i mod 3."""
    for category in ("capsule", "softgel"):
        for fold in range(3):
            for kind, name, count in (("neg", "neg", normal), ("pos", "pos_100", defective)):
                for split, file in (("train", name), ("test", kind)):
                    chosen = [(i, True) for i in range(count) if (i % 3 == fold) == (split == "test")]
                    path = raw / "sensum_splits" / category / str(fold) / split / f"{file}.pckl"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(pickle.dumps(chosen))
    return raw


def write_dagm(raw: Path, *, train: tuple[int, int] = (10, 6), test: tuple[int, int] = (4, 4)) -> Path:
    """DAGM 2007's layout, one class; of each split, so many normal and so many defective images."""
    for first, (split, (normal, defective)) in ((1, ("Train", train)), (501, ("Test", test))):
        for index in range(first, first + normal + defective):
            write_image(raw / "Class1" / split / f"{index:04d}.PNG", draw_image(index))
            if index >= first + normal:
                write_image(raw / "Class1" / split / f"Label/{index:04d}_label.PNG", draw_mask())
    return raw


def write_visa(raw: Path, *, train: int = 8, test: tuple[int, int] = (4, 10)) -> Path:
    """VisA's layout, one category, with its one-class split; masks hold the index of a defect class."""
    lines = ["object,split,label,image,mask"]
    for index in range(train + test[0]):
        path = f"candle/Data/Images/Normal/{index:04d}.JPG"
        write_image(raw / path, draw_image(index))
        lines.append(f"candle,{'train' if index < train else 'test'},normal,{path},")
    for index in range(test[1]):
        path, mask = f"candle/Data/Images/Anomaly/{index:03d}.JPG", f"candle/Data/Masks/Anomaly/{index:03d}.png"
        write_image(raw / path, draw_image(500 + index))
        write_image(raw / mask, draw_mask(level=3))
        lines.append(f"candle,test,anomaly,{path},{mask}")
    (raw / "split_csv").mkdir()
    (raw / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return raw
