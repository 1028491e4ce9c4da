"""Streamed features against cached ones: the same numbers, whatever the memory."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from ssn import streaming
from ssn.backbone import Backbone
from ssn.config import Config
from ssn.data.reader import SearchData, open_search_data
from ssn.engine import EpochReport, Trainer, fit
from ssn.errors import SSNError
from ssn.features import NUM_FLIPS, CategoryFeatures, estimate_bytes, estimate_target_bytes, extract, prepare_backbone
from ssn.streaming import (
    DecodedImages,
    EncodedImages,
    StreamedSplit,
    default_budget_bytes,
    format_bytes,
    hold_images,
    prepare_features,
    reload_backbone,
)
from tests.tolerances import FLOAT32_ATOL, FLOAT32_RTOL, TRAINED_RTOL

SPLITS = ("train", "pool", "validation")
SIZES = [(64, (8, 12)), (128, (4, 6))]
MAP_SIZE = (16, 24)
CPU = torch.device("cpu")


def stored_as(config: Config, dtype: str) -> Config:
    return replace(config, data=replace(config.data, feature_dtype=dtype))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def search(tiny_data: Path) -> SearchData:
    return open_search_data(str(tiny_data), "tiny", "widget")


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    """In which nothing is rounded but by arithmetic."""
    return stored_as(tiny_config, "fp32")


@pytest.fixture(scope="module")
def backbone(config: Config, search: SearchData) -> Backbone:
    return prepare_backbone(config, search)


@pytest.fixture(scope="module")
def cached(config: Config, search: SearchData, backbone: Backbone) -> CategoryFeatures:
    return extract(config, search, backbone)


def budget_for(kind: str, config: Config, search: SearchData) -> int:
    """Bytes that decoded images, or files alone, fit into exactly."""
    samples = [s for split in SPLITS for s in search.stream(split)]  # type: ignore[arg-type]
    files = sum(len(s.image) for s in samples)
    pixels = len(samples) * 3 * 4 * config.data.image_size[0] * config.data.image_size[1]
    assert files < pixels
    return estimate_target_bytes(config, search.info, MAP_SIZE) + (pixels if kind == "decoded" else files)


@pytest.fixture(scope="module", params=["decoded", "encoded"])
def streamed(
    request: pytest.FixtureRequest, config: Config, search: SearchData, backbone: Backbone
) -> CategoryFeatures:
    budget = budget_for(request.param, config, search)
    held = hold_images(config, search, backbone, budget_bytes=budget)
    for split in SPLITS:
        kind = {"decoded": DecodedImages, "encoded": EncodedImages}[request.param]
        assert isinstance(getattr(held, split).images, kind)
    assert held.num_bytes == budget
    return held.with_backbone(backbone)


def test_streamed_features_are_the_cached_ones(cached: CategoryFeatures, streamed: CategoryFeatures) -> None:
    assert (cached.source, streamed.source) == ("cached", "streamed")
    rng = np.random.default_rng(0)
    for name in SPLITS:
        kept, made = getattr(cached, name), getattr(streamed, name)
        views = rng.permutation(len(kept.masks_VHW))[:7]
        for expected, actual in zip(kept.gather(views, CPU), made.gather(views, CPU), strict=True):
            assert actual.dtype == expected.dtype == torch.float32
            assert actual.is_contiguous()
            torch.testing.assert_close(actual, expected, rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)
        for field in ("masks_VHW", "eval_masks_N", "labels_N", "has_mask_N"):
            np.testing.assert_array_equal(getattr(made, field), getattr(kept, field))
        assert (made.ids, made.defect_types, made.num_flips) == (kept.ids, kept.defect_types, kept.num_flips)


def test_flips_are_of_the_pixels(streamed: CategoryFeatures, backbone: Backbone) -> None:
    pool = streamed.pool
    assert isinstance(pool, StreamedSplit)
    image = pool.images.load(2)
    views = torch.stack([image, image.flip(-1), image.flip(-2), image.flip(-1, -2)])
    with torch.no_grad():
        expected = [m.permute(0, 2, 3, 1) for m in backbone(views.contiguous(memory_format=torch.channels_last))]
    for actual, wanted in zip(pool.gather(2 * NUM_FLIPS + np.arange(NUM_FLIPS), CPU), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)


def run(config: Config, features: CategoryFeatures) -> tuple[Trainer, list[dict[str, float]]]:
    reports: list[dict[str, float]] = []

    def report(epoch: EpochReport, save: Callable[..., None]) -> None:
        reports.append({k: v for k, v in epoch.metrics.items() if "duration" not in k})

    return fit(config, features, report=report), reports


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_training_computes_the_same(
    ratio: float, config: Config, cached: CategoryFeatures, streamed: CategoryFeatures
) -> None:
    """Training and validation, with and without defects and their flips."""
    config = replace(config, train=replace(config.train, supervision_ratio=ratio))
    expected, reports = run(config, cached)
    actual, again = run(config, streamed)
    for before, after in zip(reports, again, strict=True):
        assert after == pytest.approx(before, rel=TRAINED_RTOL)
        assert "val_image_auroc" in after
    for (name, x), y in zip(expected.net.state_dict().items(), actual.net.state_dict().values(), strict=True):
        torch.testing.assert_close(y, x, rtol=TRAINED_RTOL, atol=TRAINED_RTOL, msg=name)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_streamed_features_are_rounded_as_stored_ones(
    dtype: Literal["fp16", "bf16"], config: Config, search: SearchData, backbone: Backbone
) -> None:
    """A run's numbers depend on its configuration and not on how much memory there was."""
    config = stored_as(config, dtype)
    kept = extract(config, search, backbone)
    made = hold_images(config, search, backbone, budget_bytes=10**9).with_backbone(backbone)
    one_step = {"fp16": 2**-10, "bf16": 2**-7}[dtype]
    for expected, actual in zip(
        kept.train.gather(np.arange(4), CPU), made.train.gather(np.arange(4), CPU), strict=True
    ):
        assert actual.dtype == expected.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        torch.testing.assert_close(actual, expected, rtol=one_step, atol=one_step * FLOAT32_ATOL)
        same = (actual == expected).float().mean()
        assert same > 0.99, "only what lies between two neighbours may go to the other one"


def test_features_beyond_float16_are_refused(config: Config, search: SearchData) -> None:
    backbone = prepare_backbone(config, search)
    backbone.register_forward_hook(lambda module, inputs, maps: tuple(m * 1e6 for m in maps))
    made = hold_images(stored_as(config, "fp16"), search, backbone, budget_bytes=10**9).with_backbone(backbone)
    with pytest.raises(SSNError, match=r"^backbone features exceed float16's range"):
        made.train.gather(np.arange(2), CPU)


def test_budget_decides_and_the_switch_is_said(config: Config, search: SearchData, backbone: Backbone) -> None:
    needed = estimate_bytes(config, search.info, SIZES)
    notices: list[str] = []
    options: dict[str, Any] = {"on_notice": notices.append}
    assert prepare_features(config, search, backbone, budget_bytes=needed, **options).source == "cached"
    assert notices == []
    features = prepare_features(config, search, backbone, budget_bytes=needed - 1, **options)
    assert features.source == "streamed"
    assert features.num_bytes < needed
    (notice,) = notices
    assert notice.startswith(
        "the features of tiny/widget take 1.5 MB, more than the 1.5 MB there is for them; its images"
    )
    assert "\n" not in notice


def test_images_beyond_the_budget_are_refused(config: Config, search: SearchData, backbone: Backbone) -> None:
    budget = budget_for("encoded", config, search) - 1
    with pytest.raises(
        SSNError,
        match=r"^neither the features nor the image files of tiny/widget fit into the 0\.\d MB there is for them",
    ):
        prepare_features(config, search, backbone, budget_bytes=budget)


def test_progress_reaches_the_total(config: Config, search: SearchData, backbone: Backbone) -> None:
    for kind in ("decoded", "encoded"):
        seen: list[tuple[int, int]] = []
        budget = budget_for(kind, config, search)
        hold_images(config, search, backbone, budget_bytes=budget, on_progress=lambda *at, to=seen: to.append(at))
        assert seen[-1] == (22, 22)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_held_images_travel_as_arrays_alone(
    config: Config, search: SearchData, backbone: Backbone, cached: CategoryFeatures
) -> None:
    """As Ray shares them: pickled without the backbone, every array out of band and read-only on the other side."""
    for kind in ("decoded", "encoded"):
        held = hold_images(config, search, backbone, budget_bytes=budget_for(kind, config, search))
        buffers: list[pickle.PickleBuffer] = []
        body = pickle.dumps(held, protocol=5, buffer_callback=buffers.append)
        assert len(body) < 100_000
        arrived = pickle.loads(body, buffers=[bytes(b.raw()) for b in buffers])
        assert not arrived.train.masks_VHW.flags.writeable
        with pytest.raises(RuntimeError, match="call with_backbone first"):
            arrived.train.gather(np.arange(2), CPU)
        again = reload_backbone(config, arrived)
        assert again is not backbone
        _, reports = run(config, arrived.with_backbone(again))
        _, expected = run(config, cached)
        assert reports[-1] == pytest.approx(expected[-1], rel=TRAINED_RTOL)


def test_another_backbone_is_refused(config: Config, streamed: CategoryFeatures, cached: CategoryFeatures) -> None:
    other = reload_backbone(config, replace(streamed, backbone_calibration={}))
    for features in (streamed, cached):
        with pytest.raises(
            SSNError, match=r"^the backbone has digest \w{12}, but these features are made for one with"
        ):
            features.with_backbone(other)


def test_corrupt_image_is_named(config: Config, search: SearchData, backbone: Backbone) -> None:
    held = hold_images(config, search, backbone, budget_bytes=budget_for("encoded", config, search))
    assert isinstance(held.train, StreamedSplit)
    images = held.train.images
    assert isinstance(images, EncodedImages)
    broken = replace(held.train, images=replace(images, data=np.zeros_like(images.data)), backbone=backbone)
    with pytest.raises(SSNError, match=r"^image widget/train/good/\d+\.png is corrupt or unreadable"):
        broken.gather(np.array([1]), CPU)


def test_budget_is_half_of_what_a_container_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = default_budget_bytes()
    assert whole > 2**27
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(streaming, "_CGROUP_LIMIT", limit)
    machine = default_budget_bytes()
    assert machine >= whole
    limit.write_text("max\n")
    assert default_budget_bytes() == machine
    limit.write_text(f"{2**27}\n")
    assert default_budget_bytes() == 2**26


@pytest.mark.parametrize(("count", "text"), [(3_240_000_000, "3.2 GB"), (10**9, "1.0 GB"), (48_540_000, "48.5 MB")])
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
