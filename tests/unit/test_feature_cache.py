"""What features on a disk depend on, that half of them is never taken for all, and that they keep to a size."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssn import feature_cache, features
from ssn.config import Config
from ssn.engine import Trainer
from ssn.errors import SSNError
from ssn.feature_cache import ABANDONED_S, META_FILE, FeatureCache
from ssn.features import CachedSplit, CategoryFeatures, MapStorage, feature_key
from tests.planted_features import CONFIG, plant_features, with_train

SPLITS = ("train", "pool", "validation")
ROOM = 10**9


def into(storage: MapStorage, given: CategoryFeatures) -> CategoryFeatures:
    """What ``extract`` does: maps go to the storage in pieces, in the order of the views."""

    def write(name: str) -> CachedSplit:
        split: CachedSplit = getattr(given, name)
        maps = []
        for layer, m in enumerate(split.maps_VhwC):
            writer = storage.create(f"{name}.{layer}", m.shape, m.dtype.type)
            for start in range(0, len(m), 3):
                writer.append(m[start : start + 3])
            maps.append(writer.close())
        return replace(split, maps_VhwC=tuple(maps))

    return replace(given, **{name: write(name) for name in SPLITS})  # type: ignore[arg-type]


def keep(cache: FeatureCache, key: str, given: CategoryFeatures) -> CategoryFeatures:
    return cache.build(key, given.num_bytes, given.info, lambda storage: into(storage, given))


def assert_equal(a: CategoryFeatures, b: CategoryFeatures) -> None:
    for name in SPLITS:
        x, y = getattr(a, name), getattr(b, name)
        for field in ("masks_VHW", "eval_masks_N", "labels_N", "has_mask_N"):
            np.testing.assert_array_equal(getattr(x, field), getattr(y, field))
        for m, n in zip(x.maps_VhwC, y.maps_VhwC, strict=True):
            assert m.dtype == n.dtype
            np.testing.assert_array_equal(m, n)
        assert (x.ids, x.defect_types, x.num_flips) == (y.ids, y.defect_types, y.num_flips)
    assert (a.info, a.backbone_digest, a.channels) == (b.info, b.backbone_digest, b.channels)
    assert a.backbone_calibration.keys() == b.backbone_calibration.keys()
    assert all(np.array_equal(v, b.backbone_calibration[k]) for k, v in a.backbone_calibration.items())


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "some" / "cache", ROOM)


@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.float32])
def test_features_come_back_as_they_were(cache: FeatureCache, dtype: type[np.generic]) -> None:
    given = replace(plant_features(), backbone_calibration={"bn1.running_mean": np.arange(3, dtype=np.float32)})
    for name in SPLITS:
        split: CachedSplit = getattr(given, name)
        maps = tuple(m.astype(dtype) for m in split.maps_VhwC)
        given = replace(given, **{name: replace(split, maps_VhwC=maps)})  # type: ignore[arg-type]
    assert cache.load("k", given.info) is None
    assert_equal(keep(cache, "k", given), given)
    loaded = cache.load("k", given.info)
    assert loaded is not None
    assert_equal(loaded, given)
    for split in (loaded.train, loaded.pool, loaded.validation):
        assert isinstance(split, CachedSplit)
        assert all(isinstance(m, np.memmap) and not m.flags.writeable for m in split.maps_VhwC)
    assert loaded.num_bytes == given.num_bytes
    assert cache.load("another", given.info) is None


def test_training_on_mapped_features_is_training_on_those_in_memory(cache: FeatureCache) -> None:
    """Without a copy of the whole, and without a warning about arrays that must not be written to."""
    config = with_train(CONFIG, supervision_ratio=1.0)
    given = plant_features()
    mapped = keep(cache, "k", given)
    results = []
    for each in (given, mapped):
        trainer = Trainer(config, each)
        results.append((trainer.run_epoch(), trainer.validate(pixel=True), trainer.net.state_dict()))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(value, results[1][2][name]) for name, value in results[0][2].items())


@pytest.mark.parametrize(("pool", "validation"), [(0, (3, 2)), (2, (3, 0))])
def test_splits_may_be_empty(cache: FeatureCache, pool: int, validation: tuple[int, int]) -> None:
    given = plant_features(pool=pool, validation=validation)
    assert_equal(keep(cache, "k", given), given)


def test_metadata_of_the_category_is_the_present_one(cache: FeatureCache) -> None:
    given = plant_features()
    keep(cache, "k", given)
    now = replace(given.info, defaults={"train.epochs": 7})
    loaded = cache.load("k", now)
    assert loaded is not None
    assert loaded.info == now


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / META_FILE).unlink(),
        lambda folder: cut(folder / META_FILE),
        lambda folder: edit(folder / META_FILE, format_version=0),
        lambda folder: edit(folder / META_FILE, key="other"),
        lambda folder: (folder / META_FILE).write_text("[]"),
        lambda folder: cut(folder / "pool.1.npy"),
        lambda folder: (folder / "validation.0.npy").unlink(),
        lambda folder: shutil.copy(folder / "validation.0.npy", folder / "train.0.npy"),
        lambda folder: cut(folder / "train.labels_N.npy"),
        lambda folder: (folder / "train.masks_VHW.npy").write_bytes(b""),
    ],
)
def test_damaged_features_are_computed_again(cache: FeatureCache, damage: Callable[[Path], None]) -> None:
    given = plant_features()
    keep(cache, "k", given)
    damage(cache.folder / "k")
    assert cache.load("k", given.info) is None
    assert_equal(keep(cache, "k", given), given)


def test_run_that_fails_leaves_nothing(cache: FeatureCache) -> None:
    given = plant_features()

    def fail(storage: MapStorage) -> CategoryFeatures:
        storage.create("train.0", (8, 6, 5, 6), np.float32).append(np.zeros((3, 6, 5, 6), np.float32))
        raise SSNError("an image is corrupt")

    with pytest.raises(SSNError, match=r"^an image is corrupt$"):
        cache.build("k", 100, given.info, fail)
    assert list(cache.folder.iterdir()) == []


def test_faster_process_wins(cache: FeatureCache) -> None:
    given = plant_features()

    def slow(storage: MapStorage) -> CategoryFeatures:
        keep(FeatureCache(cache.folder, ROOM), "k", given)
        return into(storage, given)

    assert_equal(cache.build("k", given.num_bytes, given.info, slow), given)
    assert [path.name for path in cache.folder.iterdir()] == ["k"]


def age(path: Path, seconds: float) -> None:
    for each in (path, *path.iterdir()):
        os.utime(each, (each.stat().st_atime, each.stat().st_mtime - seconds))


def test_least_recently_used_features_go_first(tmp_path: Path) -> None:
    given = plant_features()
    keep(FeatureCache(tmp_path, ROOM), "a", given)
    size = sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    cache = FeatureCache(tmp_path, 3 * size + given.num_bytes)
    for seconds, key in ((300, "a"), (200, "b"), (100, "c")):
        keep(cache, key, given)
        age(tmp_path / key, seconds)
    assert cache.load("a", given.info) is not None  # now b is the oldest
    keep(cache, "d", given)
    age(tmp_path / "d", 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]
    keep(cache, "e", given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d", "e"]
    keep(FeatureCache(tmp_path, given.num_bytes), "f", given)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_features_in_use_survive_their_removal(tmp_path: Path) -> None:
    given = plant_features()
    mapped = keep(FeatureCache(tmp_path, ROOM), "a", given)
    keep(FeatureCache(tmp_path, 0), "b", given)
    assert not (tmp_path / "a").exists()
    assert_equal(mapped, given)


def test_what_dead_runs_left_is_removed(cache: FeatureCache) -> None:
    given = plant_features()
    for name, seconds in (("dead", ABANDONED_S + 60), ("alive", ABANDONED_S - 60)):
        folder = cache.folder / f".fresh-{name}"
        folder.mkdir()
        (folder / "train.0.npy").write_bytes(b"half")
        age(folder, seconds)
    (cache.folder / "not ours").mkdir()
    keep(cache, "k", given)
    assert sorted(path.name for path in cache.folder.iterdir()) == [".fresh-alive", "k", "not ours"]


def test_full_disk_is_one_line(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    given = plant_features()
    with pytest.raises(
        SSNError, match=r"^the feature cache .*cache needs 1000000000\.00 GB, but its disk has [\d.]+ GB left"
    ):
        cache.build("k", 10**18, given.info, lambda storage: pytest.fail("worked for nothing"))

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(feature_cache, "_sync", full)
    with pytest.raises(
        SSNError, match=r"^cannot write to the feature cache .*cache: No space left on device; choose an"
    ):
        keep(cache, "k", given)
    assert list(cache.folder.iterdir()) == []


def test_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(
            SSNError, match=r"^cannot write to the feature cache .*; choose another --cache or leave it"
        ):
            FeatureCache(folder, ROOM)


def test_read_only_folder_can_be_read(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    given = plant_features()
    keep(cache, "k", given)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(feature_cache.os, "utime", refuse)
    monkeypatch.setattr(feature_cache.tempfile, "mkdtemp", refuse)
    assert cache.load("k", given.info) is not None
    with pytest.raises(
        SSNError, match=r"^cannot write to the feature cache .*cache: Permission denied; choose another"
    ):
        keep(cache, "other", given)


INFO = plant_features().info
WHERE = {"data_uri": "/data", "weights_digest": "w", "device": "cpu"}


@pytest.mark.parametrize(
    "other",
    [
        replace(CONFIG, data=replace(CONFIG.data, image_size=(64, 40))),
        replace(CONFIG, data=replace(CONFIG.data, feature_dtype="fp16")),
        replace(CONFIG, data=replace(CONFIG.data, feature_dtype="bf16")),
        replace(CONFIG, data=replace(CONFIG.data, antialias=True)),
        replace(CONFIG, model=replace(CONFIG.model, backbone="resnet18")),
        replace(CONFIG, model=replace(CONFIG.model, layers=(1, 2))),
        replace(CONFIG, model=replace(CONFIG.model, variant="jims")),  # its preprocessing differs
        replace(CONFIG, model=replace(CONFIG.model, weights="random")),  # calibrated, unlike a file of equal weights
        replace(CONFIG, eval=replace(CONFIG.eval, size=(32, 32))),
    ],
)
def test_key_depends_on_what_features_depend_on(other: Config) -> None:
    assert feature_key(other, INFO, **WHERE) != feature_key(CONFIG, INFO, **WHERE)


@pytest.mark.parametrize(("key", "value"), [("data_uri", "/other"), ("weights_digest", "v"), ("device", "cuda:1")])
def test_key_depends_on_the_place_the_weights_and_the_kind_of_device(key: str, value: str) -> None:
    assert feature_key(CONFIG, INFO, **{**WHERE, key: value}) != feature_key(CONFIG, INFO, **WHERE)
    cuda = [feature_key(CONFIG, INFO, **{**WHERE, "device": device}) for device in ("cuda", "cuda:1")]
    assert cuda[0] == cuda[1]


@pytest.mark.parametrize("changes", [{"search_fingerprint": "e" * 64}, {"category": "rod"}, {"dataset": "other"}])
def test_key_depends_on_the_data(changes: dict[str, str]) -> None:
    assert feature_key(CONFIG, replace(INFO, **changes), **WHERE) != feature_key(CONFIG, INFO, **WHERE)  # type: ignore[arg-type]


def test_key_depends_on_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = feature_key(CONFIG, INFO, **WHERE)
    with monkeypatch.context() as changed:
        changed.setattr(features, "NUMERICS_VERSION", -1)
        assert feature_key(CONFIG, INFO, **WHERE) != before
    monkeypatch.setattr(features, "version", lambda name: "0" if name == "timm" else "1")
    assert feature_key(CONFIG, INFO, **WHERE) != before


@pytest.mark.parametrize(
    "other",
    [
        with_train(CONFIG, epochs=7, train_seed=5, label_seed=3, supervision_ratio=0.5, batch_size=9, lr_heads=1e-5),
        replace(CONFIG, synthesis=replace(CONFIG.synthesis, noise_sigma=0.1, perlin_threshold=0.6)),
        replace(CONFIG, model=replace(CONFIG.model, seg_channels=9, cls_channels=9, align_corners=False)),
        replace(CONFIG, eval=replace(CONFIG.eval, aupro_fpr_limit=0.05)),
        CONFIG.resolved(),
    ],
)
def test_runs_that_differ_in_training_alone_share_features(other: Config) -> None:
    assert feature_key(other, INFO, **WHERE) == feature_key(CONFIG, INFO, **WHERE)


def test_metrics_and_test_split_are_no_part_of_the_key() -> None:
    info = replace(INFO, test_fingerprint="1" * 64, defaults={"train.epochs": 3})
    assert feature_key(CONFIG, info, **WHERE) == feature_key(CONFIG, INFO, **WHERE)
