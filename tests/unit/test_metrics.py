"""Metrics against scikit-learn and against brute force over every threshold, ties included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from ssn.errors import SSNError
from ssn.metrics import image_metrics, pixel_metrics
from tests.tolerances import FLOAT64_RTOL


def _scene(seed: int, *, decimals: int | None, num: int = 6, size: tuple[int, int] = (20, 24)) -> tuple:
    """Maps that prefer defects, and masks with diagonal neighbours, several regions or none; rounding makes ties."""
    random = np.random.default_rng(seed)
    masks = ndimage.binary_dilation(random.random((num, *size)) > 0.985, structure=np.ones((1, 2, 2)))
    masks[0] = False
    masks[1, 3, 3] = masks[1, 4, 4] = masks[1, 5, 3] = True  # one region, held together by corners
    maps = random.normal(size=masks.shape) + masks * 0.8
    return (maps if decimals is None else maps.round(decimals)).astype(np.float32), masks


def _brute_force_aupro(maps: np.ndarray, masks: np.ndarray, fpr_limit: float) -> float:
    regions = []
    for i, mask in enumerate(masks):
        labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(i, labelled == r) for r in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        flagged = maps >= threshold
        pro = np.mean([flagged[i][region].mean() for i, region in regions])
        points.append((flagged[~masks].mean(), pro))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= fpr_limit:
            break
        if x1 > fpr_limit:
            x1, y1 = fpr_limit, y0 + (y1 - y0) * (fpr_limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / fpr_limit


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("fpr_limit", [0.05, 0.3, 1.0])
def test_pixel_metrics_are_the_independent_ones(decimals: int | None, fpr_limit: float) -> None:
    maps, masks = _scene(1, decimals=decimals)
    metrics = pixel_metrics(maps, masks, fpr_limit=fpr_limit)
    assert metrics.undefined == {}
    assert metrics.values == {
        "pixel_auroc": pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), rel=FLOAT64_RTOL),
        "pixel_ap": pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), rel=FLOAT64_RTOL),
        "aupro": pytest.approx(_brute_force_aupro(maps, masks, fpr_limit), rel=FLOAT64_RTOL),
    }


@pytest.mark.parametrize("block_pixels", [1, 700, 10**9])
def test_block_size_does_not_matter(block_pixels: int) -> None:
    maps, masks = _scene(2, decimals=1)
    assert pixel_metrics(maps, masks, block_pixels=block_pixels) == pixel_metrics(maps, masks)


def test_maps_may_be_iterators_or_memory_maps(tmp_path: Path) -> None:
    maps, masks = _scene(3, decimals=2)
    expected = pixel_metrics(maps, masks)

    def one_by_one(images: np.ndarray) -> Iterator[np.ndarray]:
        yield from images

    assert pixel_metrics(one_by_one(maps), one_by_one(masks.astype(np.uint8) * 255)) == expected
    np.save(tmp_path / "maps.npy", maps)
    assert pixel_metrics(np.load(tmp_path / "maps.npy", mmap_mode="r"), masks) == expected


def test_images_may_differ_in_size() -> None:
    maps, masks = [np.zeros((2, 3)), np.array([[0.0, 2.0]])], [np.zeros((2, 3)), np.array([[0, 1]])]
    assert pixel_metrics(maps, masks).values == {"pixel_auroc": 1.0, "pixel_ap": 1.0, "aupro": 1.0}


def test_aupro_by_hand() -> None:
    # Two regions, of sizes 1 and 3, and twelve normal pixels. The curve climbs to 1/2 at no false positive, to 2/3 at
    # 1/12 and, in a straight line because of the tie, to 1 between 1/12 and 5/12.
    maps = np.array([[9.0, 0, 5, 5, 7, 8, 5, 5, 5, 5, 0, 0, 0, 0, 0, 0]])
    masks = np.array([[1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    num_normal = 12
    assert (masks == 0).sum() == num_normal
    x = np.array([0, 0, 1, 1, 5]) / num_normal
    y = np.array([0, 1 / 2, 1 / 2, 2 / 3, 1])
    limit = 3 / num_normal
    area = x[2] * y[2] + (limit - x[3]) * (y[3] + (y[3] + y[4]) / 2) / 2
    assert pixel_metrics([maps], [masks], fpr_limit=limit).values["aupro"] == pytest.approx(area / limit)


@pytest.mark.parametrize("decimals", [None, 0])
def test_image_metrics_are_scikit_learns(decimals: int | None) -> None:
    random = np.random.default_rng(4)
    labels = random.integers(0, 2, 80)
    scores = random.normal(size=80) + labels
    scores = scores if decimals is None else scores.round(decimals)
    metrics = image_metrics(scores, labels)
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert metrics.undefined == {}
    assert metrics.values["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), rel=FLOAT64_RTOL)
    assert metrics.values["image_ap"] == pytest.approx(average_precision_score(labels, scores), rel=FLOAT64_RTOL)
    assert metrics.values["image_f1_max"] == pytest.approx(f1.max(), rel=FLOAT64_RTOL)
    attained = f1[:-1][thresholds == metrics.values["image_f1_max_threshold"]]
    assert attained == pytest.approx(f1.max(), rel=FLOAT64_RTOL)


@pytest.mark.parametrize("transform", [np.tanh, lambda s: 1e6 * s - 3, lambda s: (s * 10 + 100).astype(np.uint8)])
def test_only_the_order_of_scores_matters(transform: Callable[[np.ndarray], np.ndarray]) -> None:
    labels = np.array([0, 1, 0, 1, 1, 0])
    scores = np.array([-1.0, 0.5, 0.5, 2.0, -0.5, 0.0])
    expected, actual = image_metrics(scores, labels).values, image_metrics(transform(scores), labels).values
    for name in ("image_auroc", "image_ap", "image_f1_max"):
        assert actual[name] == expected[name]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0, 0, 0], "only one class: 3 normal images"),
        ([1, 1], "only one class: 2 defective images"),
        ([], "no images"),
    ],
)
def test_undefined_image_metrics_are_absent_and_say_why(labels: list[int], reason: str) -> None:
    metrics = image_metrics(np.zeros(len(labels)), labels)
    assert metrics.values == {}
    assert set(metrics.undefined) == {"image_auroc", "image_ap", "image_f1_max", "image_f1_max_threshold"}
    assert set(metrics.undefined.values()) == {reason}


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        (None, "no masks"),
        (np.zeros((2, 3, 4)), "only one class: 24 normal pixels"),
        (np.ones((2, 3, 4)), "only one class: 24 defective pixels"),
    ],
)
def test_undefined_pixel_metrics_are_absent_and_say_why(masks: np.ndarray | None, reason: str) -> None:
    metrics = pixel_metrics(np.zeros((2, 3, 4)), masks)
    assert metrics.values == {}
    assert metrics.undefined == dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro"), reason)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(SSNError, match="an image score is not finite"):
        image_metrics([0.0, bad], [0, 1])
    maps, masks = _scene(5, decimals=None)
    maps[3, 2, 1] = bad
    with pytest.raises(SSNError, match="image 3 is not finite"):
        pixel_metrics(maps, masks)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="equal length"):
        image_metrics([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="2 maps but 1 masks"):
        pixel_metrics(np.zeros((2, 3, 3)), np.zeros((1, 3, 3)))
    with pytest.raises(ValueError, match=r"map 0 is \(3, 3\), but its mask is \(3, 4\)"):
        pixel_metrics(np.zeros((1, 3, 3)), np.zeros((1, 3, 4)))
