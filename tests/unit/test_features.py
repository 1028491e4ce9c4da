"""Cached features against direct runs of the backbone, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssn.backbone import Backbone, load_backbone
from ssn.bundle import find_backbone
from ssn.checkpoint import load_checkpoint
from ssn.config import Config
from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from ssn.data.preprocess import decode_image, decode_mask, preprocess
from ssn.data.reader import CategoryInfo, SearchData, SplitCount, open_search_data
from ssn.data.records import Sample, SearchSplit
from ssn.engine import EpochReport, Trainer, fit
from ssn.errors import SSNError
from ssn.features import (
    NUM_FLIPS,
    CachedSplit,
    CategoryFeatures,
    downsample_mask,
    estimate_bytes,
    extract,
    feature_key,
    flip,
    prepare_backbone,
)
from ssn.streaming import hold_images
from tests.raw_folders import write_mvtec
from tests.tolerances import FLOAT32_ATOL, FLOAT32_RTOL

FLOAT16_RTOL = float(np.finfo(np.float16).eps)
MAP_SIZE = (16, 24)


@pytest.fixture(scope="module")
def search(tiny_data: Path) -> SearchData:
    return open_search_data(str(tiny_data), "tiny", "widget")


@pytest.fixture(scope="module")
def backbone(tiny_config: Config, search: SearchData) -> Backbone:
    return prepare_backbone(tiny_config, search)


@pytest.fixture(scope="module")
def features(tiny_config: Config, search: SearchData, backbone: Backbone) -> CategoryFeatures:
    return extract(tiny_config, search, backbone)


@pytest.fixture
def shards(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_data, tmp_path / "shards"))


def split_of(features: CategoryFeatures, name: str) -> CachedSplit:
    split = getattr(features, name)
    assert isinstance(split, CachedSplit)
    return split


def load_image(sample: Sample, config: Config) -> torch.Tensor:
    image = decode_image(sample.image, source=sample.source_path)
    return preprocess(image, config.data.image_size, antialias=bool(config.resolved().data.antialias))


def run_backbone(backbone: Backbone, image: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [m[0].permute(1, 2, 0).numpy() for m in backbone(image[None])]


@pytest.mark.parametrize("split", ["train", "pool", "validation"])
def test_features_are_those_of_the_backbone(
    split: SearchSplit, tiny_config: Config, search: SearchData, backbone: Backbone, features: CategoryFeatures
) -> None:
    """Image by image, and flips are of the image: the features of a flipped image are not flipped features."""
    stored = split_of(features, split)
    samples = list(search.stream(split))
    assert stored.ids == tuple(s.id for s in samples)
    assert stored.labels_N.tolist() == [s.label for s in samples]
    assert stored.defect_types == tuple(s.defect_type for s in samples)
    assert stored.num_flips == (NUM_FLIPS if split == "pool" else 1)
    flips: list[Callable[[Any], Any]] = [
        lambda x: x,
        lambda x: x[..., :, ::-1],
        lambda x: x[..., ::-1, :],
        lambda x: x[..., ::-1, ::-1],
    ]
    for i, sample in enumerate(samples):
        image = load_image(sample, tiny_config).numpy()
        for which in range(stored.num_flips):
            view = torch.from_numpy(flips[which](image).copy())
            for m, expected in zip(stored.maps_VhwC, run_backbone(backbone, view), strict=True):
                assert m.dtype == np.float16
                actual = m[i * stored.num_flips + which]
                np.testing.assert_allclose(actual, expected, rtol=FLOAT16_RTOL, atol=FLOAT16_RTOL / 100)
    if split == "pool":
        commuted = stored.maps_VhwC[0][0][:, ::-1]
        assert np.abs(stored.maps_VhwC[0][1] - commuted).max() > 0.01


def test_maps_and_masks_have_their_sizes(features: CategoryFeatures, tiny_config: Config) -> None:
    assert features.channels == (64, 128)
    for name in ("train", "pool", "validation"):
        split = split_of(features, name)
        assert [m.shape[1:] for m in split.maps_VhwC] == [(8, 12, 64), (4, 6, 128)]
        assert split.masks_VHW.shape == (len(split.maps_VhwC[0]), *MAP_SIZE)
        scored = len(split.ids) if name == "validation" else 0
        assert split.eval_masks_N.shape == (scored, *tiny_config.eval.size)


def test_masks_line_up_with_flips(features: CategoryFeatures, search: SearchData, tiny_config: Config) -> None:
    pool = split_of(features, "pool")
    samples = list(search.stream("pool"))
    assert len(pool.masks_VHW) == NUM_FLIPS * len(samples) > 0
    for i, sample in enumerate(samples):
        assert sample.mask is not None
        mask = decode_mask(sample.mask, source="x")
        straight = downsample_mask(mask, tiny_config.data.image_size, MAP_SIZE)
        views = pool.masks_VHW[i * NUM_FLIPS :][:NUM_FLIPS]
        assert straight.any()
        assert not np.array_equal(straight, straight[:, ::-1])
        expected = [straight, straight[:, ::-1], straight[::-1], straight[::-1, ::-1]]
        for view, wanted in zip(views, expected, strict=True):
            np.testing.assert_array_equal(view, wanted)
    assert pool.has_mask_N.all()


def test_normal_images_have_empty_masks(features: CategoryFeatures) -> None:
    assert not features.train.masks_VHW.any()
    validation = features.validation
    normal = validation.labels_N == 0
    assert normal.any()
    assert not validation.masks_VHW[normal].any()
    assert not validation.eval_masks_N[normal].any()
    assert validation.eval_masks_N[~normal].any((1, 2)).all()
    assert validation.masks_VHW[~normal].any((1, 2)).all()


def test_downsampled_mask_is_cut_at_a_half() -> None:
    """Nearest to the image's size, then bilinear: a cell is anomalous if at least half of it is."""
    mask = np.zeros((8, 8), bool)
    mask[0, :2] = True  # half of the first cell
    mask[4, 4] = True  # a quarter of another
    mask[6:, 6:] = True
    small = downsample_mask(mask, (8, 8), (4, 4))
    assert np.argwhere(small).tolist() == [[0, 0], [3, 3]]
    doubled = np.kron(mask, np.ones((2, 2), bool))
    np.testing.assert_array_equal(downsample_mask(doubled, (8, 8), (4, 4)), small)


@pytest.mark.parametrize("which", range(NUM_FLIPS))
def test_flips_undo_themselves(which: int) -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(flip(flip(x, which), which), x)
    grid = F.affine_grid(
        torch.tensor([[[-1.0 if which & 1 else 1.0, 0, 0], [0, -1.0 if which & 2 else 1.0, 0]]]),
        [1, 2, 3, 4],
        align_corners=False,
    )
    by_hand = F.grid_sample(x[None], grid, align_corners=False)[0]
    torch.testing.assert_close(flip(x, which), by_hand, rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_estimate_is_exact(
    dtype: Literal["fp16", "bf16", "fp32"], tiny_config: Config, search: SearchData, backbone: Backbone
) -> None:
    config = replace(tiny_config, data=replace(tiny_config.data, feature_dtype=dtype))
    sizes = [(64, (8, 12)), (128, (4, 6))]
    assert estimate_bytes(config, search.info, sizes) == extract(config, search, backbone).num_bytes


def test_progress_reaches_the_total(tiny_config: Config, search: SearchData, backbone: Backbone) -> None:
    seen: list[tuple[int, int]] = []
    extract(tiny_config, search, backbone, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(1 for split in ("train", "pool", "validation") for _ in search.stream(split))  # type: ignore[arg-type]
    assert {t for _, t in seen} == {total}
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert done[-1] == total


def test_fp32_storage(tiny_config: Config, search: SearchData, backbone: Backbone, features: CategoryFeatures) -> None:
    config = replace(tiny_config, data=replace(tiny_config.data, feature_dtype="fp32"))
    exact = extract(config, search, backbone)
    for full, half in zip(split_of(exact, "train").maps_VhwC, split_of(features, "train").maps_VhwC, strict=True):
        assert full.dtype == np.float32
        np.testing.assert_array_equal(full.astype(np.float16), half)


def test_bf16_storage(tiny_config: Config, search: SearchData, backbone: Backbone) -> None:
    """Kept as the upper half of a float32's bits, rounded to nearest, and read as such."""
    exact, coarse = (
        extract(replace(tiny_config, data=replace(tiny_config.data, feature_dtype=dtype)), search, backbone)
        for dtype in ("fp32", "bf16")
    )
    views = np.array([3, 0, 3])
    for layer, gathered in enumerate(coarse.train.gather(views, torch.device("cpu"))):
        stored = split_of(coarse, "train").maps_VhwC[layer]
        full = split_of(exact, "train").maps_VhwC[layer]
        assert stored.dtype == np.uint16
        assert gathered.dtype == torch.bfloat16
        bits = (stored.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(gathered.float().numpy(), bits[views])
        np.testing.assert_allclose(bits, full, rtol=2**-8, atol=0)
        assert not np.array_equal(bits, full)


def test_gathered_views_come_in_the_order_asked_for(features: CategoryFeatures) -> None:
    views = np.array([5, 0, 9, 5])
    for m, gathered in zip(
        split_of(features, "pool").maps_VhwC, features.pool.gather(views, torch.device("cpu")), strict=True
    ):
        assert gathered.dtype == torch.float16
        np.testing.assert_array_equal(gathered.numpy(), m[views])


def test_features_beyond_float16_are_refused(tiny_config: Config, search: SearchData) -> None:
    backbone = prepare_backbone(tiny_config, search)
    backbone.register_forward_hook(lambda module, inputs, maps: tuple(m * 1e6 for m in maps))
    with pytest.raises(
        SSNError,
        match=r"^backbone features exceed float16's range; use --set data\.feature_dtype=fp32, or bf16 at half",
    ):
        extract(tiny_config, search, backbone)
    for dtype in ("fp32", "bf16"):
        config = replace(tiny_config, data=replace(tiny_config.data, feature_dtype=dtype))  # type: ignore[arg-type]
        (first, _) = extract(config, search, backbone).train.gather(np.array([0]), torch.device("cpu"))
        assert first.isfinite().all()


@pytest.fixture
def half_masked(tmp_path: Path) -> SearchData:
    """A category in which every second defective image has a mask."""
    raw = write_mvtec(tmp_path / "raw")
    for path in sorted(raw.glob("widget/ground_truth/*/*.png"))[::2]:
        path.unlink()
    ingest(Manifest(name="half", layout="mvtec"), raw, str(tmp_path / "shards"))
    return open_search_data(str(tmp_path / "shards"), "half", "widget")


def test_pool_images_without_masks_are_left_out(tiny_config: Config, half_masked: SearchData) -> None:
    counts = half_masked.info.counts
    assert 0 < counts["pool"].masks < counts["pool"].defective
    assert 0 < counts["validation"].masks < counts["validation"].defective
    features = extract(tiny_config, half_masked, prepare_backbone(tiny_config, half_masked))
    assert features.pool.ids == tuple(s.id for s in half_masked.stream("pool") if s.mask is not None)
    assert len(features.validation.ids) == counts["validation"].normal + counts["validation"].defective
    validation = list(half_masked.stream("validation"))
    assert features.validation.has_mask_N.tolist() == [s.mask is not None for s in validation]
    assert features.validation.masks_VHW.any((1, 2)).tolist() == features.validation.has_mask_N.tolist()


def weakly(config: Config) -> Config:
    return replace(config, train=replace(config.train, weak_labels="use"))


def test_pool_images_without_masks_are_there_for_weak_labels(tiny_config: Config, half_masked: SearchData) -> None:
    """Cached and streamed, under every flip; what is common with other runs is the same."""
    backbone = prepare_backbone(tiny_config, half_masked)
    config, samples = weakly(tiny_config), list(half_masked.stream("pool"))
    masked = extract(tiny_config, half_masked, backbone)
    whole = extract(config, half_masked, backbone)
    assert whole.num_bytes == estimate_bytes(config, half_masked.info, [(64, (8, 12)), (128, (4, 6))])
    streamed = hold_images(config, half_masked, backbone, budget_bytes=10**9).with_backbone(backbone)
    has_mask = [s.mask is not None for s in samples]
    assert 0 < sum(has_mask) < len(has_mask)
    for features in (whole, streamed):
        assert features.pool.ids == tuple(s.id for s in samples)
        assert features.pool.labels_N.all()
        assert features.pool.has_mask_N.tolist() == has_mask
        assert features.pool.masks_VHW.any((1, 2)).tolist() == np.repeat(has_mask, NUM_FLIPS).tolist()
    views = np.arange(NUM_FLIPS * len(samples))
    for kept, made in zip(
        whole.pool.gather(views, torch.device("cpu")), streamed.pool.gather(views, torch.device("cpu")), strict=True
    ):
        torch.testing.assert_close(made, kept, rtol=FLOAT16_RTOL, atol=FLOAT16_RTOL)
    common = np.repeat(has_mask, NUM_FLIPS)
    for m, n in zip(split_of(masked, "pool").maps_VhwC, split_of(whole, "pool").maps_VhwC, strict=True):
        np.testing.assert_array_equal(m, n[common])
    unmasked = has_mask.index(False)
    view = flip(load_image(samples[unmasked], config), 1)
    at = unmasked * NUM_FLIPS + 1
    for m, expected in zip(split_of(whole, "pool").maps_VhwC, run_backbone(backbone, view), strict=True):
        np.testing.assert_allclose(m[at], expected, rtol=FLOAT16_RTOL, atol=FLOAT16_RTOL / 100)


def test_key_tells_weak_labels_apart_only_where_the_pool_has_images_without_masks(
    tiny_config: Config, half_masked: SearchData, search: SearchData
) -> None:
    def keys(data: SearchData) -> set[str]:
        return {
            feature_key(config, data.info, data_uri="here", weights_digest="w", device="cpu")
            for config in (tiny_config, weakly(tiny_config))
        }

    assert len(keys(search)) == 1
    assert len(keys(half_masked)) == 2


def test_without_flips_the_pool_has_one_view_of_an_image(
    tiny_config: Config, search: SearchData, backbone: Backbone, features: CategoryFeatures
) -> None:
    """Cached and streamed: the first view of those with flips, in less memory, and under another key."""
    plain = replace(tiny_config, train=replace(tiny_config.train, flip_defects=False))
    sizes = [(64, (8, 12)), (128, (4, 6))]
    made = extract(plain, search, backbone)
    streamed = hold_images(plain, search, backbone, budget_bytes=10**9).with_backbone(backbone)
    pool = split_of(made, "pool")
    assert pool.num_flips == streamed.pool.num_flips == 1
    for m, n in zip(pool.maps_VhwC, split_of(features, "pool").maps_VhwC, strict=True):
        np.testing.assert_array_equal(m, n[::NUM_FLIPS])
    for split in (pool, streamed.pool):
        np.testing.assert_array_equal(split.masks_VHW, features.pool.masks_VHW[::NUM_FLIPS])
    views = np.arange(len(pool.ids))
    cpu = torch.device("cpu")
    for m, n in zip(pool.gather(views, cpu), streamed.pool.gather(views, cpu), strict=True):
        torch.testing.assert_close(n, m, rtol=FLOAT16_RTOL, atol=FLOAT16_RTOL)
    assert made.num_bytes == estimate_bytes(plain, search.info, sizes) < estimate_bytes(tiny_config, search.info, sizes)

    def key(config: Config, info: CategoryInfo) -> str:
        return feature_key(config, info, data_uri="here", weights_digest="w", device="cpu")

    assert key(plain, search.info) != key(tiny_config, search.info)
    without = replace(search.info, counts={**search.info.counts, "pool": SplitCount(0, 0, 0)})
    assert key(plain, without) == key(tiny_config, without)


def test_random_weights_are_calibrated_on_normal_images(
    tiny_config: Config, search: SearchData, features: CategoryFeatures
) -> None:
    assert features.backbone_digest != load_backbone(tiny_config.model).digest
    assert features.backbone_digest == prepare_backbone(tiny_config, search).digest
    assert set(features.backbone_calibration) == {
        name
        for name, _ in load_backbone(tiny_config.model).net.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }
    # what the noise's sigma refers to
    for m in split_of(features, "train").maps_VhwC:
        assert 0.1 < m.astype(np.float32).std() < 10


def test_calibrated_backbone_is_found_again_from_a_checkpoint(
    tmp_path: Path, tiny_config: Config, features: CategoryFeatures
) -> None:
    """The trial's folder holds the statistics alone; seed and statistics make the same backbone, bit for bit."""
    Trainer(tiny_config, features).save(tmp_path / "trial", resumable=False)
    found = find_backbone(load_checkpoint(tmp_path / "trial"))
    assert found.digest == features.backbone_digest


def test_backbone_other_than_the_trained_one_is_refused(
    tmp_path: Path, tiny_config: Config, features: CategoryFeatures
) -> None:
    foreign = replace(features, backbone_digest="0" * 64)
    Trainer(tiny_config, foreign).save(tmp_path / "trial", resumable=False)
    with pytest.raises(SSNError, match=r"was trained on a backbone with digest 000000000000, but model\.weights"):
        find_backbone(load_checkpoint(tmp_path / "trial"))


def test_category_without_normal_images_is_refused(shards: Path, tiny_config: Config, backbone: Backbone) -> None:
    edit_counts(shards, "train", normal=0)
    with pytest.raises(SSNError, match="tiny/widget has no normal training images; ingest some"):
        extract(tiny_config, open_search_data(str(shards), "tiny", "widget"), backbone)


def edit_counts(shards: Path, split: str, **counts: int) -> None:
    path = shards / "tiny" / "widget" / "category.json"
    content = json.loads(path.read_text())
    content["counts"][split] |= counts
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("normal", "message"), [(7, "hold more images than their metadata"), (9, "hold fewer images than their metadata")]
)
def test_shards_that_disagree_with_their_metadata_are_refused(
    shards: Path, tiny_config: Config, backbone: Backbone, normal: int, message: str
) -> None:
    edit_counts(shards, "train", normal=normal)
    with pytest.raises(SSNError, match=message):
        extract(tiny_config, open_search_data(str(shards), "tiny", "widget"), backbone)


def test_truncated_shard_is_named(shards: Path, tiny_config: Config, backbone: Backbone) -> None:
    (shard,) = (shards / "tiny" / "widget").glob("train-*.parquet")
    shard.write_bytes(shard.read_bytes()[:-500])
    with pytest.raises(SSNError, match=r"train-00000\.parquet is corrupt at row group 0"):
        extract(tiny_config, open_search_data(str(shards), "tiny", "widget"), backbone)


def test_search_is_the_same_without_the_test_images(
    shards: Path, tiny_config: Config, features: CategoryFeatures
) -> None:
    """No leak: with nothing of the test split on disk, features and every reported number are identical."""
    folder = shards / "tiny" / "widget"
    removed = [*folder.glob("test*"), folder / "assignments.json"]
    assert len(removed) == 3
    for path in removed:
        path.unlink()
    search = open_search_data(str(shards), "tiny", "widget")
    again = extract(tiny_config, search, prepare_backbone(tiny_config, search))
    assert again.backbone_digest == features.backbone_digest
    runs = []
    for each in (features, again):
        reports: list[dict[str, float]] = []

        def report(epoch: EpochReport, save: Callable[..., None], to: list[dict[str, float]] = reports) -> None:
            to.append({k: v for k, v in epoch.metrics.items() if "duration" not in k})

        fit(tiny_config, each, report=report)
        runs.append(reports)
    assert runs[0] == runs[1]
    for name in ("train", "pool", "validation"):
        a, b = split_of(features, name), split_of(again, name)
        assert all(map(np.array_equal, (*a.maps_VhwC, a.masks_VHW), (*b.maps_VhwC, b.masks_VHW)))
