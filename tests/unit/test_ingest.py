"""Raw folders to shards: what is written, what is refused, and that doing it again changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssn.data import ingest as ingest_module
from ssn.data.ingest import CategoryReport, ingest
from ssn.data.manifest import Manifest, load_manifest
from ssn.data.preprocess import decode_image, decode_mask
from ssn.data.reader import list_categories, open_search_data, open_test_data
from ssn.data.records import SEARCH_SPLITS, Sample
from ssn.data.splits import SplitPolicy
from ssn.errors import SSNError
from tests.raw_folders import SIDE, draw_image, draw_mask, encode_png, write_image, write_mvtec

MANIFEST = Manifest(
    name="parts", layout="mvtec", splits=SplitPolicy(kind="test_defects"), defaults={"synthesis.perlin_threshold": 0.6}
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_mvtec(tmp_path / "raw")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "shards"


def run(raw: Path, out: Path | str, manifest: Manifest = MANIFEST, **options: object) -> CategoryReport:
    (report,) = ingest(manifest, raw, str(out), ["widget"], **options)  # type: ignore[arg-type]
    return report


def read_all(out: Path, category: str = "widget", dataset: str = "parts") -> list[Sample]:
    search = open_search_data(str(out), dataset, category)
    samples = [sample for split in SEARCH_SPLITS for sample in search.stream(split)]
    return samples + list(open_test_data(str(out), dataset, category).stream())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_image_is_stored_as_found(raw: Path, out: Path) -> None:
    report = run(raw, out)
    samples = {sample.source_path: sample for sample in read_all(out)}
    on_disk = sorted(path.relative_to(raw).as_posix() for path in raw.glob("widget/t*/*/*.png"))
    assert sorted(samples) == on_disk
    assert report.num_images == len(on_disk) == 33
    for source_path, sample in samples.items():
        assert sample.image == (raw / source_path).read_bytes()
        _, published_split, defect_type, _ = source_path.split("/")
        assert (sample.published_split, sample.defect_type) == (published_split, defect_type)
        assert sample.label == (defect_type != "good")
        assert (sample.width, sample.height) == (SIDE, SIDE)
        assert decode_image(sample.image, source="x").shape == (SIDE, SIDE, 3)
        if sample.label:
            assert sample.mask is not None
            assert np.array_equal(decode_mask(sample.mask, source="x"), draw_mask() > 0)
        else:
            assert sample.mask is None


def test_report_counts_and_stored_info_agree(raw: Path, out: Path) -> None:
    report = run(raw, out, split_seed=3)
    info = open_search_data(str(out), "parts", "widget").info
    assert info == report.info == open_test_data(str(out), "parts", "widget").info
    assert (info.split_seed, info.defaults) == (3, {"synthesis.perlin_threshold": 0.6})
    counted = Counter((sample.split, sample.label) for sample in read_all(out))
    for split, count in info.counts.items():
        assert (counted[split, 0], counted[split, 1]) == (count.normal, count.defective)
        assert count.masks == count.defective
    assert {split: (c.normal, c.defective) for split, c in info.counts.items()} == {
        "train": (8, 0),
        "pool": (0, 6),
        "validation": (2, 6),
        "test": (3, 8),
    }


def test_doing_it_again_changes_nothing(raw: Path, out: Path) -> None:
    first = run(raw, out)
    before = snapshot(out / "parts/widget")
    again = run(raw, out)
    assert (first.status, again.status) == ("written", "unchanged")
    assert dataclasses.replace(again, status="written") == first
    assert snapshot(out / "parts/widget") == before


def test_more_images_keep_the_earlier_splits(raw: Path, out: Path) -> None:
    before = {sample.id: sample.split for sample in _ingest_and_read(raw, out)}
    for index in range(10):
        write_image(raw / f"widget/test/dent/{100 + index}.png", draw_image(500 + index))
        write_image(raw / f"widget/train/good/{100 + index}.png", draw_image(600 + index))
    after = {sample.id: sample.split for sample in _ingest_and_read(raw, out)}
    assert len(after) == len(before) + 20
    assert {image_id: after[image_id] for image_id in before} == before


def test_an_image_that_returns_returns_to_its_split(raw: Path, out: Path) -> None:
    before = {sample.source_path: sample.split for sample in _ingest_and_read(raw, out)}
    moved = next(raw / path for path, split in before.items() if split == "pool")
    data = moved.read_bytes()
    moved.unlink()
    everything_to_test = SplitPolicy(kind="test_defects", rows={"test_defective": {"test": 1.0}})
    for _ in range(2):
        run(raw, out, dataclasses.replace(MANIFEST, splits=everything_to_test))
        after = {sample.source_path: sample.split for sample in read_all(out)}
        assert after == {path: split for path, split in before.items() if (raw / path).exists()}
        moved.write_bytes(data)


def _ingest_and_read(raw: Path, out: Path) -> list[Sample]:
    run(raw, out)
    return read_all(out)


def test_changed_test_images_leave_the_search_fingerprint_alone(raw: Path, out: Path) -> None:
    before = run(raw, out).info
    in_test = next(s for s in open_test_data(str(out), "parts", "widget").stream() if s.label)
    mask = raw / in_test.source_path.replace("/test/", "/ground_truth/").replace(".png", "_mask.png")
    write_image(mask, draw_mask()[::-1])
    after = run(raw, out).info
    assert after.search_fingerprint == before.search_fingerprint
    assert after.test_fingerprint != before.test_fingerprint


def test_a_damaged_or_missing_shard_is_written_again(raw: Path, out: Path) -> None:
    run(raw, out)
    before = snapshot(out / "parts/widget")
    (out / "parts/widget/pool-00000.parquet").unlink()
    assert run(raw, out).status == "written"
    shard = out / "parts/widget/train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert run(raw, out).status == "written"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert run(raw, out).status == "written"
    assert snapshot(out / "parts/widget") == before


def test_stale_shards_are_removed(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "ROW_GROUP_IMAGES", 2)
    monkeypatch.setattr(ingest_module, "SHARD_BYTES", 1)
    run(raw, out)
    assert len(list((out / "parts/widget").glob("train-*.parquet"))) == 4
    assert len(read_all(out)) == 33
    monkeypatch.undo()
    for path in (raw / "widget/train/good").glob("00[0-3].png"):
        path.unlink()
    run(raw, out)
    assert [path.name for path in (out / "parts/widget").glob("train-*.parquet")] == ["train-00000.parquet"]
    assert len(read_all(out)) == 29


@pytest.mark.parametrize("function", ["_write_shards", "_verify_shards", "write_json"])
@pytest.mark.parametrize("calls_before", [0, 1, 2])
def test_nothing_half_written_looks_finished(
    raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch, function: str, calls_before: int
) -> None:
    run(raw, out)
    write_image(raw / "widget/train/good/900.png", draw_image(900))
    original: Callable[..., object] = getattr(ingest_module, function)
    calls = 0

    def interrupted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls > calls_before:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(ingest_module, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(raw, out)
    assert list_categories(str(out), "parts") == []
    with pytest.raises(SSNError, match="parts/widget is not fully ingested; run `python -m ssn ingest` again"):
        open_search_data(str(out), "parts", "widget")
    monkeypatch.undo()
    assert run(raw, out).status == "written"
    assert len(read_all(out)) == 34


def test_what_does_not_read_back_is_refused(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ingest_module._to_sample

    def flip_a_byte(*args: object) -> Sample:
        sample = original(*args)  # type: ignore[arg-type]
        return dataclasses.replace(sample, image=sample.image[:-1] + bytes([sample.image[-1] ^ 1]))

    monkeypatch.setattr(ingest_module, "_to_sample", flip_a_byte)
    with pytest.raises(SSNError, match=r"train-00000.parquet does not read back as written"):
        run(raw, out)
    assert list_categories(str(out), "parts") == []


def test_progress_covers_reading_and_writing(raw: Path, out: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    for status in ("written", "unchanged"):
        steps.clear()
        assert run(raw, out, on_progress=lambda *step: steps.append(step)).status == status
        assert steps[-1] == ("widget", 66, 66)
        assert {(name, total) for name, _, total in steps} == {("widget", 66)}
        assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)


def test_masks_are_optional_and_the_report_says_so(tmp_path: Path, out: Path) -> None:
    report = run(write_mvtec(tmp_path / "raw", masks=False), out)
    assert all(count.masks == 0 for count in report.info.counts.values())
    assert len(report.without_mask) == 20
    assert any("no defective image has a mask" in line for line in report.lines())


def test_empty_masks_count_as_none_and_are_reported(raw: Path, out: Path) -> None:
    write_image(raw / "widget/ground_truth/dent/004_mask.png", draw_mask(level=0))
    write_image(raw / "widget/ground_truth/dent/005_mask.png", draw_mask(level=127))
    (raw / "widget/ground_truth/dent/006_mask.png").unlink()
    report = run(raw, out)
    assert report.empty_masks == ("widget/test/dent/004.png", "widget/test/dent/005.png")
    assert report.without_mask == ("widget/test/dent/006.png",)
    assert sum(count.masks for count in report.info.counts.values()) == 17
    text = "\n".join(report.lines())
    assert "2 (widget/test/dent/004.png, widget/test/dent/005.png) with an empty mask" in text
    assert "1 (widget/test/dent/006.png) without a mask" in text
    unmasked = {sample.source_path for sample in read_all(out) if sample.label and sample.mask is None}
    assert unmasked == {*report.empty_masks, *report.without_mask}


def test_masks_can_be_ignored(raw: Path, out: Path) -> None:
    write_image(raw / "widget/ground_truth/dent/004_mask.png", draw_mask(9, 9 + 4))
    report = run(raw, out, dataclasses.replace(MANIFEST, masks="none"))
    assert all(sample.mask is None for sample in read_all(out))
    assert report.empty_masks == ()


def test_masks_of_class_indices_need_a_threshold(raw: Path, out: Path) -> None:
    for path in raw.glob("widget/ground_truth/*/*.png"):
        write_image(path, draw_mask(level=3))
    with pytest.raises(SSNError, match=r"reaches level 128, though .*_mask.png is not black; .*`mask_threshold: 1`"):
        run(raw, out)
    run(raw, out, dataclasses.replace(MANIFEST, mask_threshold=1))
    masks = [sample.mask for sample in read_all(out) if sample.mask is not None]
    assert len(masks) == 20
    assert all(np.array_equal(decode_mask(mask, source="x"), draw_mask() > 0) for mask in masks)


def test_near_duplicates_stay_together_and_are_counted(raw: Path, out: Path) -> None:
    for index in range(4):
        source = raw / f"widget/test/dent/{index:03d}.png"
        copy = np.asarray(Image.open(source)) // 2 * 2
        write_image(raw / f"widget/test/scratch/{100 + index}.png", copy)
    report = run(raw, out)
    assert report.groups_of_duplicates == 4
    split_of = {sample.source_path: sample.split for sample in read_all(out)}
    for index in range(4):
        assert split_of[f"widget/test/dent/{index:03d}.png"] == split_of[f"widget/test/scratch/{100 + index}.png"]


def damage(raw: Path) -> Path:
    (raw / "widget/train/good/001.png").write_bytes(b"")
    (raw / "widget/test/dent/002.png").write_bytes(encode_png(draw_image(1))[:300])
    return raw


def test_unreadable_images_are_refused_by_name(raw: Path, out: Path) -> None:
    with pytest.raises(SSNError, match=r"^image widget/t\w+/\w+/00\d.png is (empty|corrupt)"):
        run(damage(raw), out)
    assert not out.exists() or list_categories(str(out), "parts") == []


def test_unreadable_images_are_skipped_and_counted_on_demand(raw: Path, out: Path) -> None:
    report = run(damage(raw), out, skip_unreadable=True)
    assert report.num_images == 31 == len(read_all(out))
    assert len(report.unreadable) == 2
    assert any(line.startswith("  skipped 2 (") for line in report.lines())


def test_an_unreadable_mask_is_named(raw: Path, out: Path) -> None:
    (raw / "widget/ground_truth/dent/002_mask.png").write_bytes(b"junk")
    with pytest.raises(SSNError, match=r"widget/ground_truth/dent/002_mask.png is corrupt or unreadable"):
        run(raw, out)


def test_a_mask_of_another_size_is_refused_even_when_skipping(raw: Path, out: Path) -> None:
    write_image(raw / "widget/ground_truth/scratch/001_mask.png", draw_mask(48, 32))
    expected = "mask widget/ground_truth/scratch/001_mask.png is 32x48 but its image is 24x24; fix or remove it"
    with pytest.raises(SSNError, match=f"^{re.escape(expected)}$"):
        run(raw, out, skip_unreadable=True)


def test_a_required_mask_that_is_missing_is_refused(raw: Path, out: Path) -> None:
    (raw / "widget/ground_truth/dent/006_mask.png").unlink()
    with pytest.raises(SSNError, match=r"defective image widget/test/dent/006.png has no mask, and parts requires one"):
        run(raw, out, dataclasses.replace(MANIFEST, masks="required"))


def test_one_image_with_two_labels_is_refused(raw: Path, out: Path) -> None:
    shutil.copy(raw / "widget/train/good/000.png", raw / "widget/test/dent/900.png")
    with pytest.raises(SSNError, match="are the same image, labelled good and dent; remove one"):
        run(raw, out)


@pytest.mark.parametrize(
    ("options", "split"), [({"train": 0}, "train"), ({"test_good": 0, "defects": {"dent": 1}}, "validation")]
)
def test_an_empty_split_is_refused(tmp_path: Path, out: Path, options: dict[str, int], split: str) -> None:
    raw = write_mvtec(tmp_path / "raw", **options)  # type: ignore[arg-type]
    with pytest.raises(SSNError, match=rf"category widget in .* leaves no .*image for {split}; add"):
        run(raw, out)


def test_another_split_seed_is_refused(raw: Path, out: Path) -> None:
    run(raw, out)
    with pytest.raises(SSNError, match=r"was made with split seed 0, not 1; use that seed, or another output folder"):
        run(raw, out, split_seed=1)


def test_changed_fractions_apply_to_new_images_and_are_noted(raw: Path, out: Path) -> None:
    before = {sample.id: sample.split for sample in _ingest_and_read(raw, out)}
    policy = SplitPolicy(kind="test_defects", rows={"test_defective": {"test": 1.0}})
    report = run(raw, out, dataclasses.replace(MANIFEST, splits=policy))
    assert {sample.id: sample.split for sample in read_all(out)} == before
    assert any("split fractions have changed" in line for line in report.lines())


def test_unknown_and_absent_categories_are_told_apart(raw: Path, out: Path) -> None:
    manifest = dataclasses.replace(MANIFEST, categories=("widget", "gadget"))
    with pytest.raises(SSNError, match=r"^unknown category of parts 'widgit'; did you mean 'widget'\?$"):
        ingest(manifest, raw, str(out), ["widgit"])
    with pytest.raises(SSNError, match="holds no images of category 'gadget'; it holds widget"):
        ingest(manifest, raw, str(out), ["gadget"])


def test_all_known_categories_found_are_ingested(raw: Path, out: Path) -> None:
    write_mvtec(raw, "gadget", first_seed=1000)
    write_mvtec(raw, "notes", first_seed=2000)
    manifest = dataclasses.replace(MANIFEST, categories=("widget", "gadget", "gizmo"))
    reports = ingest(manifest, raw, str(out))
    assert [report.info.category for report in reports] == ["gadget", "widget"] == list_categories(str(out), "parts")


def test_a_missing_or_foreign_raw_folder_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(SSNError, match=r"raw folder .*nowhere does not exist"):
        ingest(MANIFEST, tmp_path / "nowhere", str(out))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SSNError, match=r"empty has no images of layout 'mvtec'; it should hold <category>/train/good"):
        ingest(MANIFEST, tmp_path / "empty", str(out))


def test_an_output_that_cannot_be_written_is_named(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SSNError, match=r"file/parts/widget"):
        run(raw, tmp_path / "file")


def test_a_folder_of_normal_images_alone(tmp_path: Path, out: Path) -> None:
    for index in range(10):
        write_image(tmp_path / f"raw/{index}.png", draw_image(index))
    manifest = dataclasses.replace(load_manifest("folder_template"), name="valves")
    (report,) = ingest(manifest, tmp_path / "raw", str(out))
    assert {split: count.normal for split, count in report.info.counts.items()} == {
        "train": 6,
        "pool": 0,
        "validation": 2,
        "test": 2,
    }
    assert any("no defective images" in line for line in report.lines())


def test_a_file_uri_is_the_same_folder(raw: Path, out: Path) -> None:
    run(raw, out)
    assert run(raw, out.as_uri()).status == "unchanged"


def test_metadata_is_readable_json_and_names_no_test_shard(raw: Path, out: Path) -> None:
    run(raw, out)
    text = (out / "parts/widget/category.json").read_text()
    assert "test-0" not in text
    assert json.loads(text)["schema_version"] == 1
    assert sorted(os.listdir(out / "parts/widget")) == [
        "assignments.json",
        "category.json",
        "pool-00000.parquet",
        "test-00000.parquet",
        "test.json",
        "train-00000.parquet",
        "validation-00000.parquet",
    ]


@pytest.mark.real
@pytest.mark.parametrize(
    ("dataset", "category", "expected", "masks"),
    [
        ("mvtec_ad", "toothbrush", {"train": (48, 0), "pool": (0, 9), "validation": (5, 9), "test": (7, 12)}, 30),
        ("mvtec_ad", "bottle", {"train": (209, 0), "pool": (0, 18), "validation": (8, 19), "test": (12, 26)}, 0),
        (
            "magnetic_tile",
            "magnetic_tile",
            {"train": (571, 0), "pool": (0, 235), "validation": (190, 77), "test": (191, 80)},
            388,
        ),
    ],
)
def test_real_images(
    shared_dir: Path, out: Path, dataset: str, category: str, expected: dict[str, tuple[int, int]], masks: int
) -> None:
    raw = shared_dir / "data" / dataset
    if not raw.is_dir():
        pytest.skip(f"no images at {raw}")
    (report,) = ingest(load_manifest(dataset), raw, str(out), [category])
    assert {split: (count.normal, count.defective) for split, count in report.info.counts.items()} == expected
    assert sum(count.masks for count in report.info.counts.values()) == masks
    assert len(report.empty_masks) == (4 if category == "magnetic_tile" else 0)
