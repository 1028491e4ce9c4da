"""Raw folders to shards: what is written, what is refused, and that doing it again changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ssn.data import ingest as ingest_module
from ssn.data.ingest import CategoryReport, ingest
from ssn.data.manifest import Manifest, load_manifest
from ssn.data.preprocess import decode_image, decode_mask
from ssn.data.reader import list_categories, open_search_data, open_test_data
from ssn.data.records import SEARCH_SPLITS, Sample
from ssn.data.splits import SplitPolicy, side_of
from ssn.errors import SSNError
from tests.raw_folders import (
    SIDE,
    draw_image,
    draw_mask,
    encode_png,
    write_dagm,
    write_image,
    write_ksdd,
    write_ksdd2,
    write_mvtec,
    write_sensum,
    write_sensum_folds,
    write_visa,
)

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


def test_near_duplicates_stay_together_and_are_named(raw: Path, out: Path) -> None:
    for index in range(4):
        source = raw / f"widget/test/dent/{index:03d}.png"
        copy = np.asarray(Image.open(source)) // 2 * 2
        write_image(raw / f"widget/test/scratch/{100 + index}.png", copy)
    report = run(raw, out)
    assert report.duplicates == tuple(
        (f"widget/test/dent/{index:03d}.png", f"widget/test/scratch/{100 + index}.png") for index in range(4)
    )
    assert report.torn == ()
    assert (
        "  identical or near-duplicate images, kept together: 4 group(s) (widget/test/dent/000.png,"
        " widget/test/scratch/100.png; widget/test/dent/001.png, widget/test/scratch/101.png; widget/test/dent/002.png,"
        " widget/test/scratch/102.png; ...)"
    ) in report.lines()
    split_of = {sample.source_path: sample.split for sample in read_all(out)}
    for index in range(4):
        assert split_of[f"widget/test/dent/{index:03d}.png"] == split_of[f"widget/test/scratch/{100 + index}.png"]


def test_duplicates_on_several_sides_are_named(raw: Path, out: Path) -> None:
    """An image that comes later links two that were assigned apart: neither moves, and the report says so."""
    samples = {sample.split: sample.source_path for sample in _ingest_and_read(raw, out) if sample.label}
    apart = [samples["pool"], samples["test"]]
    shutil.copy(raw / apart[0], raw / "widget/test/dent/900.png")
    middle = np.asarray(Image.open(raw / apart[0]))
    shutil.copy(raw / apart[1], raw / "widget/test/dent/901.png")
    report = run(raw, out)
    assert report.torn == ()  # identical images follow the one that was assigned
    write_image(raw / apart[1], middle // 2 * 2)  # a new image under an old name, near the one in pool
    (raw / "widget/test/dent/901.png").unlink()
    report = run(raw, out)
    assert report.torn == ()
    assert {sample.source_path: sample.split for sample in read_all(out)}[apart[1]] == "pool"
    # by hand, as no picture here is near two that are not near each other
    ledger = out / "parts/widget/assignments.json"
    content = json.loads(ledger.read_text())
    twin = next(sample.id for sample in read_all(out) if sample.source_path == apart[1])
    content["images"][twin]["split"] = "test"
    ledger.write_text(json.dumps(content))
    report = run(raw, out)
    (torn,) = report.torn
    assert set(torn) == {apart[0], apart[1], "widget/test/dent/900.png"}
    assert any(
        line.startswith(
            "  of these, on several sides of the split because assigned before they were linked: 1 group(s)"
        )
        for line in report.lines()
    )


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


def take(manifest: str | Manifest, raw: Path, out: Path, **options: object) -> list[CategoryReport]:
    return ingest(load_manifest(manifest) if isinstance(manifest, str) else manifest, raw, str(out), **options)  # type: ignore[arg-type]


def counts(report: CategoryReport) -> dict[str, tuple[int, int, int]]:
    return {split: (count.normal, count.defective, count.masks) for split, count in report.info.counts.items()}


def test_ksdd_labels_by_mask_and_keeps_parts_whole(tmp_path: Path, out: Path) -> None:
    write_ksdd(tmp_path / "raw", parts=10, surfaces=4)
    (report,) = take("ksdd", tmp_path / "raw", out)
    samples = read_all(out, "ksdd", "ksdd")
    assert {(sample.source_path.endswith("Part0.jpg"), sample.label) for sample in samples} == {(True, 1), (False, 0)}
    sides: dict[str, set[str]] = {}
    for sample in samples:
        sides.setdefault(sample.source_path.partition("/")[0], set()).add(side_of(sample.split))
    assert all(len(side) == 1 for side in sides.values())
    assert counts(report) == {"train": (18, 0, 0), "pool": (0, 6, 6), "validation": (6, 2, 2), "test": (6, 2, 2)}
    assert report.duplicates == ()  # parts belong together, and are no duplicates


def test_an_image_whose_mask_tells_its_label_needs_one(tmp_path: Path, out: Path) -> None:
    write_ksdd2(tmp_path / "raw")
    (tmp_path / "raw/train/10003_GT.png").unlink()
    with pytest.raises(SSNError, match=r"^train/10003_GT.png cannot be read \(No such file or directory\); restore"):
        take("ksdd2", tmp_path / "raw", out)
    (report,) = take(
        dataclasses.replace(load_manifest("ksdd2"), masks="none"), tmp_path / "raw", out, skip_unreadable=True
    )
    assert len(report.unreadable) == 1
    assert {split: row[1] for split, row in counts(report).items()} == {
        "train": 0,
        "pool": 5,
        "validation": 1,
        "test": 4,
    }
    assert all(row[2] == 0 for row in counts(report).values())


def test_ksdd2_leaves_its_published_test_alone(tmp_path: Path, out: Path) -> None:
    write_ksdd2(tmp_path / "raw")
    (report,) = take("ksdd2", tmp_path / "raw", out)
    assert counts(report) == {"train": (8, 0, 0), "pool": (0, 5, 5), "validation": (2, 1, 1), "test": (4, 4, 4)}
    in_test = {sample.source_path for sample in read_all(out, "ksdd2", "ksdd2") if sample.split == "test"}
    assert in_test == {f"test/{name}.png" for name in range(20000, 20008)}


def test_published_masks_are_used_and_the_others_withheld(tmp_path: Path, out: Path) -> None:
    write_ksdd2(tmp_path / "raw")
    with pytest.raises(SSNError, match=r"^ksdd2/ksdd2 publishes no choice of 2 masks here; leave --masks out$"):
        take("ksdd2", tmp_path / "raw", out, masks=2)
    for number in (0, 2, 6):
        train = [(10000 + index, index < 10 + number) for index in range(16)]
        test = [(20000 + index, True) for index in range(8)]
        (tmp_path / f"raw/split_weakly_{number}.pyb").write_bytes(pickle.dumps((train, test)))
    with pytest.raises(SSNError, match=r"publishes no choice of 3 masks here; it does for 0, 2, 6$"):
        take("ksdd2", tmp_path / "raw", out, masks=3)
    (every,) = take("ksdd2", tmp_path / "raw", out)
    (two,) = take("ksdd2", tmp_path / "raw", out, masks=2)
    assert every.withheld_masks == ()
    assert two.withheld_masks == tuple(f"train/{10000 + index}.png" for index in range(12, 16))
    assert counts(two)["test"] == counts(every)["test"]
    assert counts(two)["pool"][2] + counts(two)["validation"][2] == 2
    assert two.without_mask == two.empty_masks == ()
    assert any("4 (train/10012.png, " in line and "outside --masks" in line for line in two.lines())
    masked = {sample.source_path for sample in read_all(out, "ksdd2", "ksdd2") if sample.mask is not None}
    assert masked == {"train/10010.png", "train/10011.png", *(f"test/{name}.png" for name in range(20004, 20008))}
    assert two.info.search_fingerprint != every.info.search_fingerprint
    assert two.info.test_fingerprint == every.info.test_fingerprint


def test_sensum_is_unsplit_and_its_categories_have_their_own_sizes(tmp_path: Path, out: Path) -> None:
    write_sensum(tmp_path / "raw")
    capsule, softgel = take("sensum", tmp_path / "raw", out)
    assert counts(capsule) == {"train": (5, 0, 0), "pool": (0, 4, 4), "validation": (2, 1, 1), "test": (2, 1, 1)}
    assert capsule.info.defaults["data.image_size"] == [320, 192]
    assert softgel.info.defaults["data.image_size"] == [144, 144] == softgel.info.defaults["eval.size"]
    assert open_search_data(str(out), "sensum", "softgel").info == softgel.info
    assert {key: value for key, value in softgel.info.defaults.items() if not key.endswith("size")} == {
        "synthesis.perlin_threshold": 0.6,
        "train.supervision_ratio": 1.0,
    }


def test_dagm_trains_on_defects(tmp_path: Path, out: Path) -> None:
    write_dagm(tmp_path / "raw")
    (report,) = take("dagm", tmp_path / "raw", out)
    assert counts(report) == {"train": (8, 0, 0), "pool": (0, 5, 5), "validation": (2, 1, 1), "test": (4, 4, 4)}


def test_visa_reads_its_one_class_split(tmp_path: Path, out: Path) -> None:
    write_visa(tmp_path / "raw")
    (report,) = take("visa", tmp_path / "raw", out)
    assert counts(report) == {"train": (8, 0, 0), "pool": (0, 3, 3), "validation": (2, 3, 3), "test": (2, 4, 4)}
    (report,) = take("visa", tmp_path / "raw", out.with_name("official"), protocol="official")
    assert counts(report) == {"train": (8, 0, 0), "pool": (0, 0, 0), "validation": (0, 0, 0), "test": (4, 10, 10)}


def test_mpdd_and_btad_are_arranged_as_mvtec(tmp_path: Path, out: Path) -> None:
    write_mvtec(tmp_path / "raw", "tubes")
    (report,) = take("mpdd", tmp_path / "raw", out)
    assert sum(map(sum, counts(report).values())) == 33 + 20


def test_a_table_is_ingested_from_its_file(tmp_path: Path, out: Path) -> None:
    lines = ["image,label,mask,group"]
    for index in range(24):
        write_image(tmp_path / f"raw/{index}.png", draw_image(index))
        lines.append(f"{index}.png,{index % 2},,part {index // 4}")
    write_image(tmp_path / "raw/1_mask.png", draw_mask())
    lines[2] = "1.png,1,1_mask.png,part 0"
    path = tmp_path / "raw/list.csv"
    path.write_text("\n".join(lines))
    manifest = Manifest(name="mine", layout="table")
    (report,) = take(manifest, path, out)
    assert (report.info.category, report.num_images, len(report.without_mask)) == ("mine", 24, 11)
    sides: dict[int, set[str]] = {}
    for sample in read_all(out, "mine", "mine"):
        sides.setdefault(int(sample.source_path.partition(".")[0]) // 4, set()).add(side_of(sample.split))
    assert all(len(side) == 1 for side in sides.values())
    assert set.union(*sides.values()) == {"fit", "validation", "test"}
    assert take(manifest, path.parent, out)[0].status == "unchanged"
    with pytest.raises(SSNError, match=r"raw folder .*list.csv does not exist; give the folder"):
        take(MANIFEST, path, out)
    path.write_text(path.read_text() + "\n99.png,good,,")
    with pytest.raises(SSNError, match=r"^99.png cannot be read \(No such file"):
        take(manifest, path, out)


def test_check_reports_what_would_be_written_and_writes_nothing(raw: Path, out: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    steps: list[tuple[str, int, int]] = []
    checked = run(raw, out, check=True, on_progress=lambda *step: steps.append(step))
    (nowhere,) = ingest(MANIFEST, raw, None, check=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert steps[-1] == ("widget", 33, 33)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    written = run(raw, out)
    assert checked == nowhere == dataclasses.replace(written, status="would be written")
    assert checked.lines()[0] == "parts/widget: 33 images, would be written (split seed 0)"
    assert checked.lines()[1:] == written.lines()[1:]
    content = snapshot(out / "parts/widget")
    assert run(raw, out, check=True).status == "unchanged"
    write_image(raw / "widget/train/good/900.png", draw_image(900))
    assert run(raw, out, check=True).status == "would be written"
    assert snapshot(out / "parts/widget") == content


def test_check_honours_assignments(raw: Path, out: Path) -> None:
    run(raw, out)
    for index in range(12):
        write_image(raw / f"widget/test/dent/{100 + index}.png", draw_image(500 + index))
    grown = run(raw, out, check=True)
    assert grown.info != ingest(MANIFEST, raw, None, check=True)[0].info
    assert grown.info == run(raw, out).info
    with pytest.raises(SSNError, match="was made with split seed 0, not 1"):
        run(raw, out, check=True, split_seed=1)


def test_check_names_all_that_is_at_fault(raw: Path, out: Path) -> None:
    damage(raw)
    write_image(raw / "widget/ground_truth/scratch/001_mask.png", draw_mask(48, 32))
    (raw / "widget/ground_truth/scratch/002_mask.png").write_bytes(b"junk")
    with pytest.raises(SSNError) as error:
        run(raw, out, check=True)
    assert str(error.value) == (
        "image widget/train/good/001.png is empty (0 bytes); restore or remove it; at fault as well: 3"
        " (widget/test/dent/002.png, widget/test/scratch/001.png, widget/test/scratch/002.png)"
    )
    with pytest.raises(SSNError, match=r"001_mask.png is 32x48 but its image is 24x24; fix or remove it$"):
        run(raw, out, check=True, skip_unreadable=True)
    write_image(raw / "widget/ground_truth/scratch/001_mask.png", draw_mask())
    assert len(run(raw, out, check=True, skip_unreadable=True).unreadable) == 3
    assert not out.exists()


def test_without_an_output_only_a_check_is_possible(raw: Path) -> None:
    with pytest.raises(SSNError, match=r"^give --out, the folder or URI to write shards to; or --check"):
        ingest(MANIFEST, raw, None)


def test_official_protocol_takes_the_published_split(raw: Path, out: Path) -> None:
    write_image(raw / "widget/train/chip/000.png", draw_image(900))
    report = run(raw, out, protocol="official")
    assert counts(report) == {"train": (8, 0, 0), "pool": (0, 1, 0), "validation": (0, 0, 0), "test": (5, 20, 20)}
    assert report.lines()[0] == "parts/widget: 34 images, written (official split)"
    search, test = open_search_data(str(out), "parts", "widget"), open_test_data(str(out), "parts", "widget")
    assert search.info.protocol == test.info.protocol == report.info.protocol == "official"
    assert json.loads((out / "parts/widget/category.json").read_text())["protocol"] == "official"
    assert list(search.stream("validation")) == []
    assert {sample.published_split for split in SEARCH_SPLITS for sample in search.stream(split)} == {"train"}
    assert {sample.published_split for sample in test.stream()} == {"test"}
    assert run(raw, out, protocol="official").status == "unchanged"


def test_official_protocol_grows_with_the_published_split(raw: Path, out: Path) -> None:
    run(raw, out, protocol="official")
    write_image(raw / "widget/train/good/900.png", draw_image(900))
    assert counts(run(raw, out, protocol="official"))["train"] == (9, 0, 0)
    (raw / "widget/train/good/900.png").rename(raw / "widget/test/good/900.png")
    expected = (
        "widget/test/good/900.png was ingested into train and now stands in the published test split; put it back"
    )
    with pytest.raises(SSNError, match=f"^{re.escape(expected)}, or use another output folder$"):
        run(raw, out, protocol="official")


@pytest.mark.parametrize(("first", "second"), [("validation", "official"), ("official", "validation")])
def test_another_protocol_is_refused(raw: Path, out: Path, first: str, second: str) -> None:
    run(raw, out, protocol=first)
    expected = rf"assignments.json was made with --protocol {first}, not {second}; use that protocol, or another output"
    for check in (True, False):
        with pytest.raises(SSNError, match=expected):
            run(raw, out, protocol=second, check=check)


def test_shards_from_before_protocols_are_unchanged_and_keep_theirs(raw: Path, out: Path) -> None:
    run(raw, out)
    for name in ("category.json", "assignments.json"):
        path = out / "parts/widget" / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps({key: content[key] for key in content if key not in ("protocol", "fold")}))
    assert open_search_data(str(out), "parts", "widget").info.protocol == "validation"
    assert run(raw, out).status == "unchanged"
    with pytest.raises(SSNError, match="was made with --protocol validation, not official"):
        run(raw, out, protocol="official")


def test_duplicates_across_the_published_splits_are_named_and_stay(raw: Path, out: Path) -> None:
    shutil.copy(raw / "widget/train/good/000.png", raw / "widget/test/good/900.png")
    write_image(raw / "widget/test/good/901.png", np.asarray(Image.open(raw / "widget/train/good/001.png")) // 2 * 2)
    write_image(raw / "widget/test/good/902.png", np.asarray(Image.open(raw / "widget/test/good/001.png")) // 2 * 2)
    report = run(raw, out, protocol="official")
    assert counts(report)["train"] == (8, 0, 0)
    assert counts(report)["test"] == (8, 20, 20)
    assert report.torn == (
        ("widget/test/good/900.png", "widget/train/good/000.png"),
        ("widget/test/good/901.png", "widget/train/good/001.png"),
    )
    assert len(report.duplicates) == 3
    assert (
        "  of these, on several sides of the split because published in train and in test: 2 group(s)"
        " (widget/test/good/900.png, widget/train/good/000.png; widget/test/good/901.png, widget/train/good/001.png)"
    ) in report.lines()
    assert run(raw, out, protocol="official").status == "unchanged"
    kept_apart = run(raw, out.with_name("validation"))
    assert kept_apart.torn == ()
    assert counts(kept_apart)["train"] == (6, 0, 0)


def test_a_dataset_without_a_published_split_has_no_official_one(tmp_path: Path, out: Path) -> None:
    write_image(tmp_path / "raw/MT_Free/Imgs/a.jpg", draw_image(0))
    expected = "magnetic_tile/magnetic_tile publishes no train and test split here, which --protocol official takes"
    with pytest.raises(SSNError, match=f"^{expected}; leave --protocol out$"):
        take("magnetic_tile", tmp_path / "raw", out, protocol="official")
    assert not out.exists()


def test_images_of_no_published_split_are_left_out_by_name(tmp_path: Path, out: Path) -> None:
    lines = ["image,label,split"]
    for index in range(12):
        write_image(tmp_path / f"raw/{index}.png", draw_image(index))
        lines.append(f"{index}.png,{index % 2},{('train', 'test', '')[index // 4]}")
    (tmp_path / "raw/list.csv").write_text("\n".join(lines))
    (report,) = take(Manifest(name="mine", layout="table"), tmp_path / "raw", out, protocol="official")
    assert counts(report) == {"train": (2, 0, 0), "pool": (0, 2, 0), "validation": (0, 0, 0), "test": (2, 2, 0)}
    assert report.num_images == 8
    assert len(report.without_mask) == 4
    assert (
        "  4 (8.png, 9.png, 10.png, ...) left out: in neither of the published train and test splits" in report.lines()
    )


def test_an_official_split_needs_training_and_test_images(raw: Path, out: Path) -> None:
    shutil.rmtree(raw / "widget/test")
    with pytest.raises(SSNError, match=r"category widget in .* leaves no image for test"):
        run(raw, out, protocol="official")


def test_published_folds(tmp_path: Path, out: Path) -> None:
    raw = tmp_path / "raw"
    write_sensum(raw)
    write_sensum_folds(raw)
    in_test = []
    for fold in range(3):
        capsule, _ = take("sensum", raw, out / str(fold), protocol="official", fold=fold)
        assert counts(capsule) == {"train": (6, 0, 0), "pool": (0, 4, 4), "validation": (0, 0, 0), "test": (3, 2, 2)}
        assert capsule.info.fold == fold == open_test_data(str(out / str(fold)), "sensum", "capsule").info.fold
        assert capsule.lines()[0] == f"sensum/capsule: 15 images, written (official split, fold {fold})"
        assert capsule.notes == ()
        in_test += [sample.source_path for sample in open_test_data(str(out / str(fold)), "sensum", "capsule").stream()]
    assert len(in_test) == len(set(in_test)) == 15
    with pytest.raises(SSNError, match=r"was made with --fold 0, not 1; use that fold, or another output folder$"):
        take("sensum", raw, out / "0", protocol="official", fold=1)


def test_folds_by_digest_stand_in_for_published_ones(tmp_path: Path, out: Path) -> None:
    write_sensum(tmp_path / "raw")
    in_test = []
    for fold in range(3):
        (report,) = take(
            "sensum", tmp_path / "raw", out / str(fold), categories=["capsule"], protocol="official", fold=fold
        )
        assert report.notes == (
            "the published folds are not in the raw folder: 3 folds by image digest stand in for them",
        )
        in_test += open_test_data(str(out / str(fold)), "sensum", "capsule").ids()
    assert len(in_test) == len(set(in_test)) == 15


@pytest.mark.parametrize(
    ("manifest", "options", "message"),
    [
        ("sensum", {"protocol": "official"}, "sensum/capsule is published in 3 folds; choose one with --fold 0, 1, 2"),
        ("sensum", {"protocol": "official", "fold": 3}, "choose one with --fold 0, 1, 2, not 3"),
        ("sensum", {"fold": 0}, "--fold 0 belongs to --protocol official; give both, or neither"),
        (
            dataclasses.replace(MANIFEST, layout="mvtec"),
            {"protocol": "official", "fold": 0},
            "parts/widget is not published in folds; leave --fold out",
        ),
        ("sensum", {"masks": 10}, "sensum/capsule publishes no choice of 10 masks here; leave --masks out"),
    ],
)
def test_folds_and_masks_that_are_not_published_are_refused(
    tmp_path: Path, out: Path, manifest: str | Manifest, options: dict[str, object], message: str
) -> None:
    write_sensum(tmp_path) if manifest == "sensum" else write_mvtec(tmp_path)
    with pytest.raises(SSNError) as error:
        take(manifest, tmp_path, out, **options)
    assert message in str(error.value)
    assert not out.exists()


def test_manifest_fractions_override_the_kind_s(raw: Path, out: Path) -> None:
    content = {"kind": "test_defects", "test_defective": {"pool": 0.5, "validation": 0.1, "test": 0.4}}
    policy = SplitPolicy.parse(content, source="parts.yaml")
    report = run(raw, out, dataclasses.replace(MANIFEST, splits=policy))
    assert counts(report) == {"train": (8, 0, 0), "pool": (0, 10, 10), "validation": (2, 2, 2), "test": (3, 8, 8)}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_images_in_any_order_and_batches_never_move(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """As a factory adds images, day by day: what a report once put in test never comes to be trained on."""
    base = tmp_path_factory.mktemp("growth")
    source = write_mvtec(base / "source", train=5, test_good=5, defects={"dent": 7, "rust": 2}, masks=False)
    paths = data.draw(st.permutations(sorted(path.relative_to(source) for path in source.rglob("*.png"))))
    seen: dict[str, str] = {}
    while paths:
        size = data.draw(st.integers(1, len(paths)))
        batch, paths = paths[:size], paths[size:]
        for path in batch:
            (base / "raw" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / path, base / "raw" / path)
        if not seen and paths:
            with contextlib.suppress(SSNError):  # of the first few images, none may be left for some split
                run(base / "raw", base / "out")
        else:
            run(base / "raw", base / "out")
        if list_categories(str(base / "out"), "parts"):
            splits = {sample.id: sample.split for sample in read_all(base / "out")}
            assert {name: splits[name] for name in seen} == seen
            seen = splits
    assert len(seen) == 19


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
