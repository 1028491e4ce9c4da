"""Raw folder layouts: pure functions from a folder to the images in it.

To add one, write a function ``(raw, name) -> list[RawItem]`` here and enter it in :data:`LAYOUTS` with what it expects
to find. It lists files and reads small annotation tables; it opens no image. It returns nothing for what is not there:
``ingest`` reports that.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ssn.data.records import GOOD
from ssn.data.split_files import Marked, read_list, read_two_lists
from ssn.errors import SSNError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
NORMAL_NAMES = ("good", "normal", "ok")
DEFECT = "defective"
"""The defect type where a dataset tells none apart."""
_MASK_FOLDERS = ("masks", "ground_truth")
# What the label column of a table may say.
_NORMAL_LABELS = ("0", "false", *NORMAL_NAMES)
_DEFECT_LABELS = ("1", "true", "defective", "defect", "anomaly", "anomalous", "bad", "ko", "ng")


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
    label_from_mask: bool = False
    """Whether a black mask makes the image a normal one, whatever ``label`` says; there is a mask for every image."""
    group: str = ""
    """Images of one group show the same part, and stay on one side of the split; empty: a group of its own."""
    folds: tuple[str, ...] = ()
    """For a dataset published in folds: ``train``, ``test`` or empty, in each of them."""
    mask_budgets: frozenset[int] | None = None
    """For a dataset that publishes which masks to train with, by their number: the numbers at which this image's mask
    is one of them. None: always."""


class Layout(NamedTuple):
    """A way to arrange a raw folder."""

    list_items: Callable[[Path, str], list[RawItem]]
    """From the raw folder and the dataset's name to the images in it, in a fixed order."""
    expects: str
    """What the raw folder should hold, for the error that says it does not."""
    takes_file: bool = False
    """Whether ``raw`` may be a file rather than a folder."""
    num_folds: int = 0
    """Of the cross-validation that the dataset's figures are published for; 0: it has a split, or none."""


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


def ksdd(raw: Path, name: str) -> list[RawItem]:
    """KolektorSDD: ``kosNN/PartN.jpg`` with the mask ``PartN_label.bmp`` beside it, black for a normal image; unsplit.

    A folder holds the surfaces of one part, which stay on one side as in the published folds.
    """
    return [
        _masked_item(name, image, image.with_name(f"{image.stem}_label.bmp"), "", group=folder.name)
        for folder in _folders(raw)
        if re.fullmatch(r"kos\d+", folder.name)
        for image in _images(folder)
        if not image.stem.endswith("_label")
    ]


def ksdd2(raw: Path, name: str) -> list[RawItem]:
    """KolektorSDD2: ``{train,test}/NNNNN.png`` with the mask ``NNNNN_GT.png`` beside it, black for a normal image.

    ``split_weakly_N.pyb`` or ``split_N.pyb``, where they lie in ``raw``, tell which N masks of defective training
    images to train with. The archive's stray ``10301 (copy).png`` and its mask are left out.
    """
    budgets = _read_mask_budgets(raw)
    return [
        _masked_item(
            name,
            image,
            image.with_name(f"{image.stem}_GT.png"),
            split,
            mask_budgets=(
                frozenset(number for number, labelled in budgets.items() if labelled.get(image.stem))
                if budgets and split == "train"
                else None
            ),
        )
        for split in ("train", "test")
        for image in _images(raw / split)
        if image.stem.isdecimal()
    ]


SENSUM_FOLDS = 3


def sensum(raw: Path, name: str) -> list[RawItem]:
    """SensumSODF: ``<category>/{positive,negative}/data/x.png``, masks ``<category>/positive/annotation/x.png``.

    The folds that SuperSimpleNet's figures are published for come apart from the images, as
    ``sensum_splits/<category>/{0,1,2}/{train,test}/``: pickled lists of the numbers that name the images.
    """
    items = []
    for category in _folders(raw):
        folds = _read_folds(raw / "sensum_splits" / category.name)
        for kind in ("negative", "positive"):
            for image in _images(category / kind / "data"):
                defective = kind == "positive"
                item = _item(
                    category.name,
                    image,
                    _find_mask(category / kind / "annotation", image) if defective else None,
                    DEFECT if defective else GOOD,
                    "",
                    folds=tuple(fold.get((kind, _number(image.stem)), "") for fold in folds),
                )
                items.append(item)
    return items


def dagm(raw: Path, name: str) -> list[RawItem]:
    """DAGM 2007: ``ClassN/{Train,Test}/NNNN.PNG``; an image is defective if it has a mask ``Label/NNNN_label.PNG``."""
    items = []
    for category in _folders(raw):
        for split in ("Train", "Test"):
            for image in _images(category / split):
                mask = _first_file(category / split / "Label", (f"{image.stem}_label.PNG", f"{image.stem}_label.png"))
                items.append(_item(category.name, image, mask, DEFECT if mask else GOOD, split.lower()))
    return items


TABLE_COLUMNS = ("image", "label")
OPTIONAL_TABLE_COLUMNS = ("mask", "category", "defect_type", "split", "group")


def table(raw: Path, name: str) -> list[RawItem]:
    """One's own images, listed in a CSV or Parquet table: ``raw`` itself, or the one in the folder ``raw``.

    Columns ``image`` (path, relative to the table) and ``label`` (0 or 1, or a word such as ``good`` or ``defective``);
    if wanted ``mask`` (path), ``category`` (otherwise ``name``), ``defect_type``, ``split`` (``train``, ``test`` or
    empty) and ``group`` (images of one part, which stay on one side of the split). Other columns are ignored.

    Raises:
        SSNError: a column is missing, or a row wrong; it names the row, counting from 1 below the heading.
    """
    path = _find_table(raw)
    if path is None:
        return []
    items = []
    seen: dict[Path, int] = {}
    for number, row in enumerate(_read_table(path, TABLE_COLUMNS, OPTIONAL_TABLE_COLUMNS), start=1):
        item = _table_item(path, number, row, name)
        if item.image_path in seen:
            raise SSNError(f"{path}, row {number}: image {row['image']} is listed in row {seen[item.image_path]} too")
        seen[item.image_path] = number
        items.append(item)
    return items


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
    "ksdd": Layout(ksdd, "kos01/Part0.jpg and kos01/Part0_label.bmp, up to kos50"),
    "ksdd2": Layout(ksdd2, "train/ and test/ with NNNNN.png and NNNNN_GT.png"),
    "sensum": Layout(
        sensum,
        "capsule/ and softgel/ with positive/data, positive/annotation and negative/data",
        num_folds=SENSUM_FOLDS,
    ),
    "dagm": Layout(dagm, "Class1/Train/*.PNG, Class1/Train/Label/*_label.PNG, Class1/Test/*.PNG, up to Class10"),
    "folder": Layout(folder, "good/ with images, in it or in a folder for each category"),
    "table": Layout(table, "one table, *.csv or *.parquet, that lists images", takes_file=True),
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


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _item(
    category: str,
    image: Path,
    mask: Path | None,
    kind: str,
    published_split: str,
    *,
    group: str = "",
    folds: tuple[str, ...] = (),
) -> RawItem:
    normal = kind.lower() in NORMAL_NAMES
    return RawItem(
        category=category,
        image_path=image,
        mask_path=None if normal else mask,
        label=0 if normal else 1,
        defect_type=GOOD if normal else kind,
        published_split=published_split,
        group=group,
        folds=folds,
    )


def _masked_item(
    category: str,
    image: Path,
    mask: Path,
    published_split: str,
    *,
    group: str = "",
    mask_budgets: frozenset[int] | None = None,
) -> RawItem:
    """An image whose mask, which has to be there, tells whether it is defective."""
    return RawItem(
        category=category,
        image_path=image,
        mask_path=mask,
        label=1,
        defect_type=DEFECT,
        published_split=published_split,
        label_from_mask=True,
        group=group,
        mask_budgets=mask_budgets,
    )


def _read_mask_budgets(raw: Path) -> dict[int, Marked]:
    """By number of masks, which training images are fully labelled; empty without split files."""
    found = sorted(raw.glob("split_*.pyb")) if raw.is_dir() else []
    matches = [(re.fullmatch(r"split_(?:weakly_)?(\d+)", path.stem), path) for path in found]
    return {int(match[1]): read_two_lists(path)[0] for match, path in matches if match}


def _read_folds(folder: Path) -> list[dict[tuple[str, str], str]]:
    """For each fold, from kind and number of an image to the split it is in; empty without split files."""
    if not folder.is_dir():
        return []
    folds: list[dict[tuple[str, str], str]] = []
    for fold in range(SENSUM_FOLDS):
        splits: dict[tuple[str, str], str] = {}
        # training lists come for shares of the masks; the one for all of them names every image
        for split, kind, name in (
            ("train", "negative", "neg.pckl"),
            ("train", "positive", "pos_100.pckl"),
            ("test", "negative", "neg.pckl"),
            ("test", "positive", "pos.pckl"),
        ):
            path = folder / str(fold) / split / name
            for number in read_list(path):
                key = (kind, _number(number))
                if splits.setdefault(key, split) != split:
                    raise SSNError(f"split file {path} holds {kind} image {number}, which fold {fold} also trains on")
        folds.append(splits)
    return folds


def _number(stem: str) -> str:
    """An image's number without leading zeros, as split files give it."""
    return str(int(stem)) if stem.isdecimal() else stem


def _find_table(raw: Path) -> Path | None:
    if raw.is_file():
        return raw
    found = sorted(path for path in raw.iterdir() if path.suffix.lower() in (".csv", ".parquet") and path.is_file())
    if len(found) > 1:
        raise SSNError(f"raw folder {raw} holds {len(found)} tables, {found[0].name} first; give one of them as --raw")
    return found[0] if found else None


def _table_item(path: Path, number: int, row: dict[str, str], name: str) -> RawItem:
    def refuse(problem: str) -> SSNError:
        return SSNError(f"{path}, row {number}: {problem}")

    label, split, kind = row["label"].lower(), row["split"].lower(), row["defect_type"]
    if label not in (*_NORMAL_LABELS, *_DEFECT_LABELS):
        raise refuse(f"label is {row['label']!r}, but must be 0 or 1, good or defective")
    if split not in ("", "train", "test"):
        raise refuse(f"split is {row['split']!r}, but must be train, test or empty")
    if not row["image"]:
        raise refuse("image is empty; give the path of an image")
    defective = label in _DEFECT_LABELS
    if defective and kind.lower() in NORMAL_NAMES:
        raise refuse(f"defect_type is {kind!r}, but label is {row['label']!r}; correct one of them")

    base = os.path.abspath(path.parent)

    def locate(value: str) -> Path:
        located = Path(os.path.abspath(os.path.join(base, value)))  # symbolic links are left alone
        if not located.is_relative_to(base):
            raise refuse(f"{value} lies outside the table's folder; move the table or the file")
        return path.parent / located.relative_to(base)

    return _item(
        row["category"] or name,
        locate(row["image"]),
        locate(row["mask"]) if row["mask"] else None,
        (kind or DEFECT) if defective else GOOD,
        split,
        group=row["group"],
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


def _read_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, str]]:
    """Rows of a CSV or Parquet table as text, stripped; an optional column that is not there is empty."""
    try:
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path) as content:
                names: Sequence[str] = content.schema_arrow.names
                rows = content.read(columns=[name for name in (*columns, *optional) if name in names]).to_pylist()
        else:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
                names = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise SSNError(f"table {path} cannot be read: {' '.join(str(error).split())}") from error
    missing = [column for column in columns if column not in names]
    if missing:
        raise SSNError(f"{path} has no column {missing[0]!r}; it must have {', '.join(columns)}")

    def text(value: object) -> str:
        return "" if value is None else str(value).strip()

    return [{column: text(row.get(column)) for column in (*columns, *optional)} for row in rows]
