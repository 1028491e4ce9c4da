"""Raw layouts, each on a small folder arranged as its authors publish it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssn.data.layouts import LAYOUTS, RawItem
from ssn.errors import SSNError

Row = tuple[str, str, str | None, int, str, str]


def touch(raw: Path, *names: str) -> None:
    for name in names:
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def rows(raw: Path, layout: str, name: str = "mine") -> set[Row]:
    def row(item: RawItem) -> Row:
        mask = item.mask_path.relative_to(raw).as_posix() if item.mask_path else None
        image = item.image_path.relative_to(raw).as_posix()
        return item.category, image, mask, item.label, item.defect_type, item.published_split

    items = LAYOUTS[layout].list_items(raw, name)
    assert len({row(item) for item in items}) == len(items)
    return {row(item) for item in items}


def test_mvtec(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "license.txt",
        "nut/train/good/000.png",
        "nut/test/good/000.png",
        "nut/test/bent/000.png",
        "nut/test/bent/001.png",
        "nut/test/bent/._000.png",
        "nut/ground_truth/bent/000_mask.png",
    )
    assert rows(tmp_path, "mvtec") == {
        ("nut", "nut/train/good/000.png", None, 0, "good", "train"),
        ("nut", "nut/test/good/000.png", None, 0, "good", "test"),
        ("nut", "nut/test/bent/000.png", "nut/ground_truth/bent/000_mask.png", 1, "bent", "test"),
        ("nut", "nut/test/bent/001.png", None, 1, "bent", "test"),
    }


def test_btad_mixes_image_formats(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "01/train/ok/0000.bmp",
        "03/test/ok/0001.bmp",
        "01/test/ko/0000.bmp",
        "01/ground_truth/ko/0000.png",
        "02/test/ko/0007.png",
        "02/ground_truth/ko/0007.png",
        "03/test/ko/0002.bmp",
        "03/ground_truth/ko/0002.bmp",
    )
    assert rows(tmp_path, "btad") == {
        ("01", "01/train/ok/0000.bmp", None, 0, "good", "train"),
        ("03", "03/test/ok/0001.bmp", None, 0, "good", "test"),
        ("01", "01/test/ko/0000.bmp", "01/ground_truth/ko/0000.png", 1, "ko", "test"),
        ("02", "02/test/ko/0007.png", "02/ground_truth/ko/0007.png", 1, "ko", "test"),
        ("03", "03/test/ko/0002.bmp", "03/ground_truth/ko/0002.bmp", 1, "ko", "test"),
    }


IMAGE = "candle/Data/Images"
MASK = "candle/Data/Masks/Anomaly/000.png"
ANNOTATIONS = (
    f"image,label,mask\n{IMAGE}/Normal/0000.JPG,normal,\n{IMAGE}/Normal/0001.JPG,normal,\n"
    f'{IMAGE}/Anomaly/000.JPG,"melt,bent",{MASK}\n'
)
SPLIT = (
    f"object,split,label,image,mask\ncandle,train,normal,{IMAGE}/Normal/0000.JPG,\n"
    f"candle,test,normal,{IMAGE}/Normal/0001.JPG,\ncandle,test,anomaly,{IMAGE}/Anomaly/000.JPG,{MASK}\n"
    "cashew,train,normal,cashew/Data/Images/Normal/000.JPG,\n"
)


@pytest.mark.parametrize(
    ("annotations", "split", "defect_type", "published"),
    [
        (ANNOTATIONS, SPLIT, "bent+melt", ("train", "test", "test")),
        (ANNOTATIONS, None, "bent+melt", ("", "", "")),
        (None, SPLIT, "anomaly", ("train", "test", "test")),
    ],
)
def test_visa(
    tmp_path: Path, annotations: str | None, split: str | None, defect_type: str, published: tuple[str, str, str]
) -> None:
    (tmp_path / "candle").mkdir()
    if annotations:
        (tmp_path / "candle/image_anno.csv").write_text(annotations)
    if split:
        (tmp_path / "split_csv").mkdir()
        (tmp_path / "split_csv/1cls.csv").write_text(split)
    assert rows(tmp_path, "visa") == {
        ("candle", f"{IMAGE}/Normal/0000.JPG", None, 0, "good", published[0]),
        ("candle", f"{IMAGE}/Normal/0001.JPG", None, 0, "good", published[1]),
        ("candle", f"{IMAGE}/Anomaly/000.JPG", MASK, 1, defect_type, published[2]),
    }


def test_visa_table_without_a_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "candle").mkdir()
    (tmp_path / "candle/image_anno.csv").write_text("image,label\na.jpg,normal\n")
    with pytest.raises(SSNError, match=r"image_anno.csv has no column 'mask'; it must have image, label, mask"):
        LAYOUTS["visa"].list_items(tmp_path, "visa")


def test_magnetic_tile(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "README.md",
        "MT_Free/Imgs/a.jpg",
        "MT_Free/Imgs/a.png",
        "MT_Crack/Imgs/b.jpg",
        "MT_Crack/Imgs/b.png",
        "MT_Fray/Imgs/c.jpg",
    )
    assert rows(tmp_path, "magnetic_tile") == {
        ("magnetic_tile", "MT_Free/Imgs/a.jpg", None, 0, "good", ""),
        ("magnetic_tile", "MT_Crack/Imgs/b.jpg", "MT_Crack/Imgs/b.png", 1, "crack", ""),
        ("magnetic_tile", "MT_Fray/Imgs/c.jpg", None, 1, "fray", ""),
    }


def test_folder_of_one_category(tmp_path: Path) -> None:
    touch(tmp_path, "Good/1.jpg", "scratch/1.jpg", "scratch/2.jpg", "scratch/3.jpg", "dent/1.png")
    touch(tmp_path, "masks/scratch/1.png", "ground_truth/scratch/2_mask.png", "notes.txt")
    assert rows(tmp_path, "folder", "valves") == {
        ("valves", "Good/1.jpg", None, 0, "good", ""),
        ("valves", "scratch/1.jpg", "masks/scratch/1.png", 1, "scratch", ""),
        ("valves", "scratch/2.jpg", "ground_truth/scratch/2_mask.png", 1, "scratch", ""),
        ("valves", "scratch/3.jpg", None, 1, "scratch", ""),
        ("valves", "dent/1.png", None, 1, "dent", ""),
    }


def test_folder_of_categories_with_and_without_a_split(tmp_path: Path) -> None:
    touch(tmp_path, "a/normal/1.jpg", "b/1.jpg", "c/train/good/1.jpg", "c/train/dent/1.jpg", "c/test/dent/1.jpg")
    touch(tmp_path, "c/masks/test/dent/1.png", "c/masks/train/dent/1.png")
    assert rows(tmp_path, "folder") == {
        ("a", "a/normal/1.jpg", None, 0, "good", ""),
        ("b", "b/1.jpg", None, 0, "good", ""),
        ("c", "c/train/good/1.jpg", None, 0, "good", "train"),
        ("c", "c/train/dent/1.jpg", "c/masks/train/dent/1.png", 1, "dent", "train"),
        ("c", "c/test/dent/1.jpg", "c/masks/test/dent/1.png", 1, "dent", "test"),
    }


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_an_empty_folder_has_no_items(tmp_path: Path, layout: str) -> None:
    assert LAYOUTS[layout].list_items(tmp_path, "mine") == []
