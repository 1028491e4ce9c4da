"""Raw folder layouts: pure functions from a folder to the images in it.

To add one, write a function ``(raw, name) -> list[RawItem]`` here and enter it in :data:`LAYOUTS` with what it expects
to find. It lists files and reads small annotation tables; it opens no image. It returns nothing for what is not there:
``ingest`` reports that.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ssn.data.records import GOOD
from ssn.errors import SSNError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
NORMAL_NAMES = ("good", "normal", "ok")
_MASK_FOLDERS = ("masks", "ground_truth")


@dataclass(frozen=True)
class RawItem:
    """One image of a raw folder."""

    category: str
    image_path: Path
    mask_path: Path | None
    label: int
    """0 normal, 1 defective."""
    defect_type: str
    """``good`` for a normal image."""
    published_split: str
    """``train``, ``test``, or empty where the dataset publishes no split."""


class Layout(NamedTuple):
    """A way to arrange a raw folder."""

    list_items: Callable[[Path, str], list[RawItem]]
    """From the raw folder and the dataset's name to the images in it, in a fixed order."""
    expects: str
    """What the raw folder should hold, for the error that says it does not."""


def mvtec(raw: Path, name: str) -> list[RawItem]:
    """MVTec AD: ``<category>/{train,test}/<type>/x.png``, masks ``<category>/ground_truth/<type>/x_mask.png``.

    BTAD is the same with types ``ok`` and ``ko``, bitmaps among the images, and masks called as their images.
    """
    return [
        _item(category.name, image, _find_mask(category / "ground_truth" / folder.name, image), folder.name, split)
        for category in _folders(raw)
        for split in ("train", "test")
        for folder in _folders(category / split)
        for image in _images(folder)
    ]


def visa(raw: Path, name: str) -> list[RawItem]:
    """VisA: images listed by ``<category>/image_anno.csv`` and split by ``split_csv/1cls.csv``.

    The annotation table gives the defect types (``bent,melt`` becomes ``bent+melt``), the split table the published
    split; either is enough. Paths in both are relative to ``raw``.
    """
    table = raw / "split_csv" / "1cls.csv"
    split_rows = _read_table(table, ("object", "split", "label", "image", "mask")) if table.is_file() else []
    published = {row["image"]: row["split"] for row in split_rows}
    annotated = [folder for folder in _folders(raw) if (folder / "image_anno.csv").is_file()]
    rows = [
        (folder.name, row)
        for folder in annotated
        for row in _read_table(folder / "image_anno.csv", ("image", "label", "mask"))
    ]
    names = {folder.name for folder in annotated}
    rows += [(row["object"], row) for row in split_rows if row["object"] not in names]
    present = {folder.name for folder in _folders(raw)}
    return [
        _item(
            category,
            raw / row["image"],
            raw / row["mask"] if row["mask"] else None,
            "+".join(sorted(part.strip() for part in row["label"].split(","))),
            published.get(row["image"], ""),
        )
        for category, row in rows
        if category in present
    ]


def magnetic_tile(raw: Path, name: str) -> list[RawItem]:
    """Magnetic tile: ``MT_<type>/Imgs/x.jpg`` with the mask ``x.png`` beside it; ``MT_Free`` is normal; unsplit."""
    return [
        _item(
            "magnetic_tile",
            image,
            image.with_suffix(".png") if image.with_suffix(".png").is_file() else None,
            GOOD if folder.name == "MT_Free" else folder.name.removeprefix("MT_").lower(),
            "",
        )
        for folder in _folders(raw)
        if folder.name.startswith("MT_")
        for image in _images(folder / "Imgs")
        if image.suffix.lower() in (".jpg", ".jpeg")
    ]


def folder(raw: Path, name: str) -> list[RawItem]:
    """One's own images: a folder a category, or ``raw`` itself as the one category called ``name``.

    A category holds ``good/`` (or ``normal/``, ``ok/``) and any number of other folders, one per defect type; or
    ``train/`` and ``test/`` with such folders inside; or just images, which are then normal. The mask of
    ``scratch/7.jpg`` is ``masks/scratch/7.png`` or ``masks/scratch/7_mask.png`` (``ground_truth/`` will do too).
    """
    return list(_folder_items(raw, name))


LAYOUTS: dict[str, Layout] = {
    "mvtec": Layout(mvtec, "<category>/train/good/*.png and <category>/test/<type>/*.png"),
    "visa": Layout(visa, "split_csv/1cls.csv or <category>/image_anno.csv, and <category>/Data/Images"),
    "btad": Layout(mvtec, "<category>/train/ok and <category>/test/{ok,ko}"),
    "magnetic_tile": Layout(magnetic_tile, "MT_Free/Imgs/*.jpg and MT_<type>/Imgs/*.jpg"),
    "folder": Layout(folder, "good/ with images, in it or in a folder for each category"),
}


def _folder_items(raw: Path, name: str) -> Iterator[RawItem]:
    categories = {name: raw} if _is_category(raw) else {path.name: path for path in _folders(raw)}
    for category, root in categories.items():
        splits = [split for split in ("train", "test") if (root / split).is_dir()]
        for split in splits or [""]:
            base = root / split
            yield from (_item(category, image, None, GOOD, split) for image in _images(base))
            for kind in _folders(base):
                if kind.name in _MASK_FOLDERS:
                    continue
                for image in _images(kind):
                    yield _item(category, image, _folder_mask(root, split, kind.name, image), kind.name, split)


def _is_category(path: Path) -> bool:
    names = {child.name.lower() for child in _folders(path)}
    return bool(names & {*NORMAL_NAMES, "train", "test"}) or bool(_images(path))


def _folder_mask(root: Path, split: str, kind: str, image: Path) -> Path | None:
    for masks in _MASK_FOLDERS:
        for folder in (root / masks / split / kind, root / masks / kind):
            mask = _find_mask(folder, image)
            if mask is not None:
                return mask
    return None


def _find_mask(folder: Path, image: Path) -> Path | None:
    for stem in (f"{image.stem}_mask", image.stem):
        for suffix in (".png", ".bmp", ".tif", ".tiff", ".jpg", image.suffix):
            path = folder / f"{stem}{suffix}"
            if path.is_file():
                return path
    return None


def _item(category: str, image: Path, mask: Path | None, kind: str, published_split: str) -> RawItem:
    normal = kind.lower() in NORMAL_NAMES
    return RawItem(
        category=category,
        image_path=image,
        mask_path=None if normal else mask,
        label=0 if normal else 1,
        defect_type=GOOD if normal else kind,
        published_split=published_split,
    )


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _images(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(
        child
        for child in path.iterdir()
        if child.suffix.lower() in IMAGE_SUFFIXES and child.is_file() and not child.name.startswith(".")
    )


def _read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise SSNError(f"{path} has no column {missing[0]!r}; it must have {', '.join(columns)}")
        return [{column: (row[column] or "").strip() for column in columns} for row in reader]
