"""Raw layouts, each on a small folder arranged as its authors publish it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssn.data.layouts import LAYOUTS, RawItem
from ssn.errors import SSNError
from tests.raw_folders import write_dagm, write_ksdd, write_ksdd2, write_sensum, write_sensum_folds

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


def test_ksdd_keeps_the_surfaces_of_a_part_together(tmp_path: Path) -> None:
    write_ksdd(tmp_path, parts=2, surfaces=2)
    touch(tmp_path, "readme.txt", "other/Part0.jpg", "kos01/Thumbs.db")
    assert rows(tmp_path, "ksdd", "ksdd") == {
        ("ksdd", f"{part}/{surface}.jpg", f"{part}/{surface}_label.bmp", 1, "defective", "")
        for part in ("kos01", "kos02")
        for surface in ("Part0", "Part1")
    }
    items = LAYOUTS["ksdd"].list_items(tmp_path, "ksdd")
    assert all(item.label_from_mask and item.group == item.image_path.parent.name for item in items)


def test_ksdd2_leaves_the_archive_s_stray_copies_out(tmp_path: Path) -> None:
    write_ksdd2(tmp_path, train=(1, 1), test=(1, 0))
    assert rows(tmp_path, "ksdd2", "ksdd2") == {
        ("ksdd2", f"{stem}.png", f"{stem}_GT.png", 1, "defective", stem.partition("/")[0])
        for stem in ("train/10000", "train/10001", "test/20000")
    }
    items = LAYOUTS["ksdd2"].list_items(tmp_path, "ksdd2")
    assert all(item.label_from_mask and item.mask_budgets is None for item in items)


def test_ksdd2_split_files_tell_which_masks_are_used(tmp_path: Path) -> None:
    write_ksdd2(tmp_path, train=(1, 2), test=(1, 1))
    every = {10000: True, 10001: True, 10002: True}
    test = [(20000, True), (20001, True)]
    for name, train in (
        ("split_weakly_0.pyb", {**every, 10001: False, 10002: False}),
        ("split_weakly_1.pyb", {**every, 10002: False}),
        ("split_2.pyb", every),
    ):
        (tmp_path / name).write_bytes(pickle.dumps((list(train.items()), test)))
    budgets = {item.image_path.stem: item.mask_budgets for item in LAYOUTS["ksdd2"].list_items(tmp_path, "ksdd2")}
    assert budgets == {"10000": {0, 1, 2}, "10001": {1, 2}, "10002": {2}, "20000": None, "20001": None}


def test_sensum_with_and_without_published_folds(tmp_path: Path) -> None:
    write_sensum(tmp_path, normal=2, defective=1)
    expected = {
        (category, f"{category}/{path}.png", mask and f"{category}/{mask}.png", label, kind, "")
        for category in ("capsule", "softgel")
        for path, mask, label, kind in (
            ("negative/data/000", None, 0, "good"),
            ("negative/data/001", None, 0, "good"),
            ("positive/data/000", "positive/annotation/000", 1, "defective"),
        )
    }
    assert rows(tmp_path, "sensum") == expected
    assert {item.folds for item in LAYOUTS["sensum"].list_items(tmp_path, "sensum")} == {()}
    write_sensum_folds(tmp_path, normal=2, defective=1)
    assert rows(tmp_path, "sensum") == expected
    folds = {
        item.image_path.relative_to(tmp_path / "capsule").as_posix(): item.folds
        for item in LAYOUTS["sensum"].list_items(tmp_path, "sensum")
        if item.category == "capsule"
    }
    assert folds == {
        "negative/data/000.png": ("test", "train", "train"),
        "negative/data/001.png": ("train", "test", "train"),
        "positive/data/000.png": ("test", "train", "train"),
    }


def test_sensum_folds_that_train_on_a_test_image_are_refused(tmp_path: Path) -> None:
    write_sensum(tmp_path, normal=2, defective=1)
    write_sensum_folds(tmp_path, normal=2, defective=1)
    (tmp_path / "sensum_splits/softgel/1/test/neg.pckl").write_bytes(pickle.dumps([(0, True)]))
    with pytest.raises(SSNError, match=r"softgel/1/test/neg.pckl holds negative image 0, which fold 1 also trains on"):
        LAYOUTS["sensum"].list_items(tmp_path, "sensum")


def test_dagm_images_with_a_label_are_defective(tmp_path: Path) -> None:
    write_dagm(tmp_path, train=(1, 1), test=(1, 1))
    touch(tmp_path, "Class1/Train/Label/Labels.txt", "readme.txt")
    assert rows(tmp_path, "dagm") == {
        ("Class1", "Class1/Train/0001.PNG", None, 0, "good", "train"),
        ("Class1", "Class1/Train/0002.PNG", "Class1/Train/Label/0002_label.PNG", 1, "defective", "train"),
        ("Class1", "Class1/Test/0501.PNG", None, 0, "good", "test"),
        ("Class1", "Class1/Test/0502.PNG", "Class1/Test/Label/0502_label.PNG", 1, "defective", "test"),
    }


COLUMNS = ("image", "label", "mask", "category", "defect_type", "split", "group", "remark")
RECORDS = (
    ("a/1.jpg", "Good", "", "valve", "", "train", "", "first"),
    ("a/2.jpg", "1", "m/2.png", "valve", "dent", "test", "p7", ""),
    ("./a/3.jpg", "defective", "", "", "", "", "p7", ""),
    ("a/4.jpg", "0", "m/4.png", "", "scratch", "", "", ""),
)
LISTED = {
    ("valve", "a/1.jpg", None, 0, "good", "train"),
    ("valve", "a/2.jpg", "m/2.png", 1, "dent", "test"),
    ("mine", "a/3.jpg", None, 1, "defective", ""),
    ("mine", "a/4.jpg", None, 0, "good", ""),
}


def write_table(path: Path, records: tuple[tuple[str, ...], ...] = RECORDS, columns: tuple[str, ...] = COLUMNS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(",".join(record) for record in (columns, *records)) + "\n", encoding="utf-8-sig")
    return path


def test_table_as_csv(tmp_path: Path) -> None:
    path = write_table(tmp_path / "images.csv")
    assert rows(tmp_path, "table") == LISTED
    items = LAYOUTS["table"].list_items(path, "mine")
    assert items == LAYOUTS["table"].list_items(tmp_path, "mine")
    assert [item.group for item in items] == ["", "p7", "p7", ""]


def test_table_as_parquet_takes_numbers_and_nulls(tmp_path: Path) -> None:
    columns = dict(zip(COLUMNS, zip(*RECORDS, strict=True), strict=True))
    arrays = {name: [value or None for value in values] for name, values in columns.items() if name != "label"}
    pq.write_table(pa.table({**arrays, "label": [0, 1, 1, 0]}), tmp_path / "images.parquet")
    assert rows(tmp_path, "table") == LISTED
    pq.write_table(pa.table({"image": ["a/1.jpg", "a/2.jpg"], "label": [False, True]}), tmp_path / "images.parquet")
    assert rows(tmp_path, "table") == {
        ("mine", "a/1.jpg", None, 0, "good", ""),
        ("mine", "a/2.jpg", None, 1, "defective", ""),
    }


def test_table_may_name_absolute_paths_and_linked_folders(tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table/linked").symlink_to(tmp_path)
    write_table(tmp_path / "table/t.csv", ((f"{tmp_path}/table/1.jpg", "good"), ("linked/2.jpg", "1")), COLUMNS[:2])
    assert {row[1] for row in rows(tmp_path / "table", "table")} == {"1.jpg", "linked/2.jpg"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (("1.jpg", "gooood"), "row 2: label is 'gooood', but must be 0 or 1, good or defective"),
        (("1.jpg", ""), "row 2: label is '', but must be"),
        (("", "good"), "row 2: image is empty"),
        (("../1.jpg", "good"), "row 2: ../1.jpg lies outside the table's folder"),
        (("1.jpg", "1", "/elsewhere/1.png"), "row 2: /elsewhere/1.png lies outside"),
        (("a/1.jpg", "good"), "row 2: image a/1.jpg is listed in row 1 too"),
        (("a/../a/1.jpg", "good"), "is listed in row 1 too"),
        (("1.jpg", "1", "", "", "good"), "row 2: defect_type is 'good', but label is '1'"),
        (("1.jpg", "good", "", "", "", "val"), "row 2: split is 'val', but must be train, test or empty"),
    ],
)
def test_a_wrong_row_is_refused_by_number(tmp_path: Path, record: tuple[str, ...], message: str) -> None:
    write_table(tmp_path / "t.csv", (("a/1.jpg", "good"), record))
    with pytest.raises(SSNError) as error:
        LAYOUTS["table"].list_items(tmp_path, "mine")
    assert message in str(error.value)
    assert str(tmp_path / "t.csv") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_that_is_none_or_one_of_several_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", (), ("image", "mask"))
    with pytest.raises(SSNError, match=r"a.csv has no column 'label'; it must have image, label$"):
        LAYOUTS["table"].list_items(tmp_path, "mine")
    (tmp_path / "b.parquet").write_bytes(b"junk")
    with pytest.raises(SSNError, match=r"holds 2 tables, a.csv first; give one of them as --raw"):
        LAYOUTS["table"].list_items(tmp_path, "mine")
    with pytest.raises(SSNError, match=r"table .*b.parquet cannot be read: "):
        LAYOUTS["table"].list_items(tmp_path / "b.parquet", "mine")
    (tmp_path / "a.csv").write_bytes(b"image,label\n\xff\xfe,good\n")
    with pytest.raises(SSNError, match=r"table .*a.csv cannot be read: "):
        LAYOUTS["table"].list_items(tmp_path / "a.csv", "mine")


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
