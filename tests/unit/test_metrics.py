"""Metrics against scikit-learn and against brute force over every threshold, ties included."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from scipy.stats import norm
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from ssn.errors import SSNError
from ssn.metrics import (
    bootstrap_intervals,
    image_metrics,
    pixel_metrics,
    resampled_image_metrics,
    stratified_counts,
)
from ssn.spool import Spool
from tests.tolerances import FLOAT64_RTOL, STANDARD_ERRORS

BYTES_PER_DEFECTIVE_PIXEL = 130
"""What ``ssn.metrics`` says that it needs."""


def _scene(seed: int, *, decimals: int | None, num: int = 6, size: tuple[int, int] = (20, 24)) -> tuple:
    """Maps that prefer defects, and masks with diagonal neighbours, several regions or none; rounding makes ties."""
    random = np.random.default_rng(seed)
    masks = ndimage.binary_dilation(random.random((num, *size)) > 0.985, structure=np.ones((1, 2, 2)))
    masks[0] = False
    masks[1, 3, 3] = masks[1, 4, 4] = masks[1, 5, 3] = True  # one region, held together by corners
    maps = random.normal(size=masks.shape) + masks * 0.8
    return (maps if decimals is None else maps.round(decimals)).astype(np.float32), masks


def _flood(mask: np.ndarray) -> list[np.ndarray]:
    """Regions of a mask, held together by sides and corners."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        border, region = [left.pop()], np.zeros(mask.shape, bool)
        while border:
            y, x = border.pop()
            region[y, x] = True
            neighbours = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= neighbours
            border += neighbours
        regions.append(region)
    return regions


def _brute_force_aupro(maps: np.ndarray, masks: np.ndarray, fpr_limit: float) -> float:
    regions = [(i, region) for i, mask in enumerate(masks) for region in _flood(mask)]
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


def _masks(*pictures: str) -> np.ndarray:
    """Bool masks from rows of dots and hashes."""
    return np.array([[[pixel == "#" for pixel in row] for row in picture.split()] for picture in pictures])


NORMAL = "..... ..... ..... ....."
EDGE_CASES = {
    "one pixel": _masks(NORMAL, "..... ..#.. ..... ....."),
    "regions of one pixel": _masks("#...# ..... ..#.. .....", "..... .#... ...#. #...."),
    "borders": _masks("##### ..... ..... .....", "#.... #.... #.... #....", "....# ..... ..... #####"),
    "corners hold a region together": _masks("#.... .#... ..#.. .#...", NORMAL),
    "regions that would touch in the next image": _masks("..... ..... ..... ##...", "##... ..... ..... ....."),
    "an image all defective": _masks("##### ##### ##### #####", NORMAL, "...#. ...#. ..... ....."),
    "one normal pixel": _masks("##### ##### ##.## #####"),
    "a ring and its middle": _masks("##### #...# #.#.# #...# #####", "..... ..... ..... ..... ....."),
}


def _assert_independent_values(maps: np.ndarray, masks: np.ndarray, fpr_limit: float) -> None:
    metrics = pixel_metrics(maps, masks, fpr_limit=fpr_limit)
    assert metrics.undefined == {}
    assert metrics.values == {
        "pixel_auroc": pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), rel=FLOAT64_RTOL),
        "pixel_ap": pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), rel=FLOAT64_RTOL),
        "aupro": pytest.approx(_brute_force_aupro(maps, masks, fpr_limit), rel=FLOAT64_RTOL),
    }


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("fpr_limit", [0.05, 0.3, 1.0])
def test_pixel_metrics_are_the_independent_ones(decimals: int | None, fpr_limit: float) -> None:
    _assert_independent_values(*_scene(1, decimals=decimals), fpr_limit)


@pytest.mark.parametrize("scores", ["distinct", "ties", "constant", "constant but for one normal pixel", "perfect"])
@pytest.mark.parametrize("fpr_limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("case", EDGE_CASES)
def test_pixel_metrics_of_edge_cases(case: str, fpr_limit: float, scores: str) -> None:
    masks = EDGE_CASES[case]
    random = np.random.default_rng(7)
    maps = {
        "distinct": random.normal(size=masks.shape) + masks,
        "ties": (random.normal(size=masks.shape) + masks).round(),
        "constant": np.full(masks.shape, -3.5),
        "constant but for one normal pixel": np.zeros(masks.shape),
        "perfect": masks + random.random(masks.shape) / 2,
    }[scores].astype(np.float32)
    if scores == "constant but for one normal pixel":
        maps[tuple(np.argwhere(~masks)[0])] = 1
    _assert_independent_values(maps, masks, fpr_limit)
    if scores == "perfect":
        assert pixel_metrics(maps, masks, fpr_limit=fpr_limit).values["aupro"] == pytest.approx(1, rel=FLOAT64_RTOL)
    if scores == "constant":  # a straight line from (0, 0) to (1, 1)
        assert pixel_metrics(maps, masks, fpr_limit=fpr_limit).values["aupro"] == pytest.approx(fpr_limit / 2)


SCORES = 7


@st.composite
def scenes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Maps of a few distinct integers from 0, so that ties abound, and masks with both classes of pixel."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    maps = draw(arrays(np.int64, shape, elements=st.integers(0, SCORES - 1)))
    masks = draw(arrays(bool, shape))
    assume(masks.any() and not masks.all())
    return maps, masks


@settings(deadline=None, derandomize=True)
@given(scenes(), st.sampled_from([0.05, 0.3, 1.0]))
def test_any_scene_has_the_independent_metrics(scene: tuple[np.ndarray, np.ndarray], fpr_limit: float) -> None:
    _assert_independent_values(*scene, fpr_limit)


@settings(deadline=None, derandomize=True)
@given(scenes(), st.randoms(use_true_random=False))
def test_order_of_images_does_not_matter(scene: tuple[np.ndarray, np.ndarray], random: Random) -> None:
    maps, masks = scene
    order = random.sample(range(len(maps)), len(maps))
    assert pixel_metrics(maps[order], masks[order]).values == pytest.approx(
        pixel_metrics(maps, masks).values, rel=FLOAT64_RTOL
    )
    labels, scores = masks.ravel(), maps.ravel()  # any scores and labels do
    order = random.sample(range(len(labels)), len(labels))
    assert image_metrics(scores[order], labels[order]) == image_metrics(scores, labels)


@settings(deadline=None, derandomize=True)
@given(
    scenes(),
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=SCORES, max_size=SCORES, unique=True),
)
def test_monotone_transforms_do_not_matter(scene: tuple[np.ndarray, np.ndarray], levels: list[float]) -> None:
    maps, masks = scene
    other = np.array(sorted(levels), np.float32)[maps]
    assert pixel_metrics(other, masks).values == pytest.approx(pixel_metrics(maps, masks).values, rel=FLOAT64_RTOL)
    expected = image_metrics(maps.ravel(), masks.ravel()).values
    found = image_metrics(other.ravel(), masks.ravel()).values
    assert {**found, "image_f1_max_threshold": 0} == {**expected, "image_f1_max_threshold": 0}
    assert found["image_f1_max_threshold"] == sorted(levels)[int(expected["image_f1_max_threshold"])]


@settings(deadline=None, derandomize=True)
@given(scenes(), st.integers(1, 150))
def test_blocks_do_not_matter(scene: tuple[np.ndarray, np.ndarray], block_pixels: int) -> None:
    assert pixel_metrics(*scene, block_pixels=block_pixels) == pixel_metrics(*scene)


def test_memory_does_not_grow_with_normal_pixels() -> None:
    side, block_pixels = 64, 1 << 13
    random = np.random.default_rng(0)
    mask = np.zeros((side, side), bool)
    mask[3:23, 5:30] = True

    def peak_bytes(num_images: int) -> int:
        with Spool((side, side), np.float32) as maps, Spool((side, side), bool) as masks:
            for index in range(num_images):
                maps.append(random.random((side, side), np.float32))
                masks.append(mask & (index < 4))
            tracemalloc.start()
            try:
                assert pixel_metrics(maps, masks, block_pixels=block_pixels).undefined == {}
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    peak_bytes(4)  # whatever is allocated once
    few, many = peak_bytes(20), peak_bytes(200)
    of_maps = side * side * 4
    assert many < few + of_maps
    assert many < 4 * block_pixels + BYTES_PER_DEFECTIVE_PIXEL * 4 * mask.sum() + 4 * of_maps


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


@pytest.mark.parametrize("fpr_limit", [0.0, -0.1, 1.1, float("nan")])
def test_limits_outside_of_0_to_1_are_refused(fpr_limit: float) -> None:
    with pytest.raises(ValueError, match="fpr_limit"):
        pixel_metrics(*_scene(1, decimals=None), fpr_limit=fpr_limit)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="equal length"):
        image_metrics([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="2 maps but 1 masks"):
        pixel_metrics(np.zeros((2, 3, 3)), np.zeros((1, 3, 3)))
    with pytest.raises(ValueError, match=r"map 0 is \(3, 3\), but its mask is \(3, 4\)"):
        pixel_metrics(np.zeros((1, 3, 3)), np.zeros((1, 3, 4)))


def _drawn(num_normal: int, num_defective: int, seed: int, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two normal distributions, ``shift`` apart, and labels."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat([0, 1], [num_normal, num_defective]))
    return random.normal(size=len(labels)) + shift * labels, labels


@pytest.mark.parametrize("decimals", [None, 0])
def test_resampled_metrics_are_those_of_repeated_images(decimals: int | None) -> None:
    scores, labels = _drawn(9, 6, seed=1)
    scores = scores if decimals is None else scores.round(decimals)
    counts = stratified_counts(labels, 50, np.random.default_rng(2))
    assert (counts[:, labels == 0].sum(axis=1) == 9).all()
    assert (counts[:, labels == 1].sum(axis=1) == 6).all()
    counts[0] = 1
    found = resampled_image_metrics(scores, labels, counts)
    for resample, count in enumerate(counts):
        repeated = np.repeat(np.arange(len(labels)), count)
        expected = image_metrics(scores[repeated], labels[repeated]).values
        for name, values in found.items():
            assert values[resample] == pytest.approx(expected[name], rel=FLOAT64_RTOL)


def test_images_are_drawn_with_equal_chances() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    resamples = 20_000
    counts = stratified_counts(labels, resamples, np.random.default_rng(3))
    # an image's count in a resample is binomial with mean 1 and variance 1 - 1/n
    errors = np.sqrt((1 - 1 / np.array([3, 3, 3, 2, 2])) / resamples)
    assert (np.abs(counts.mean(axis=0) - 1) < STANDARD_ERRORS * errors).all()


def test_intervals_are_quantiles_of_scikit_learns_metrics_over_resamples() -> None:
    scores, labels = _drawn(12, 8, seed=4)
    counts = stratified_counts(labels, 300, np.random.default_rng(5))
    metrics = {"image_auroc": roc_auc_score, "image_ap": average_precision_score}
    values = {name: [metric(labels, scores, sample_weight=c) for c in counts] for name, metric in metrics.items()}
    found = bootstrap_intervals(scores, labels, level=0.9, resamples=300, seed=5)
    assert list(found) == ["image_auroc", "image_ap", "image_f1_max"]
    for name, of_resamples in values.items():
        assert found[name] == pytest.approx(np.quantile(of_resamples, [0.05, 0.95]), rel=FLOAT64_RTOL)


def test_intervals_cover_the_true_auroc() -> None:
    shift, experiments = 1.0, 200
    true = norm.cdf(shift / np.sqrt(2))
    covered = 0
    for seed in range(experiments):
        low, high = bootstrap_intervals(*_drawn(60, 60, seed, shift), resamples=400)["image_auroc"]
        covered += low <= true <= high
    error = np.sqrt(0.95 * 0.05 / experiments)
    assert abs(covered / experiments - 0.95) < STANDARD_ERRORS * error


def test_intervals_are_of_the_seed_and_widen_with_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = _drawn(20, 20, seed=6)
    found = bootstrap_intervals(scores, labels)
    assert bootstrap_intervals(scores, labels) == found
    assert bootstrap_intervals(scores, labels, seed=1) != found
    assert bootstrap_intervals(scores, labels.astype(bool), level=0.95, resamples=2000, seed=0) == found
    wider = bootstrap_intervals(scores, labels, level=0.99)
    for name, (low, high) in found.items():
        assert wider[name][0] < low < image_metrics(scores, labels).values[name] < high < wider[name][1] <= 1
    monkeypatch.setattr("ssn.metrics._RESAMPLED_SCORES", 1000)  # other parts, other random numbers
    parts = bootstrap_intervals(scores, labels, resamples=2000)
    for name, bounds in found.items():
        assert parts[name] == pytest.approx(bounds, abs=0.03)


def test_intervals_without_two_classes_are_absent() -> None:
    assert bootstrap_intervals([], []) == {}
    assert bootstrap_intervals([1.0, 2.0], [0, 0]) == {}
    assert bootstrap_intervals([1.0, 2.0], [1, 1]) == {}


def test_intervals_of_perfect_and_of_constant_scores_are_points() -> None:
    labels = [0, 0, 0, 1, 1]
    assert bootstrap_intervals([1, 2, 3, 4, 5], labels) == dict.fromkeys(
        ("image_auroc", "image_ap", "image_f1_max"), (1.0, 1.0)
    )
    constant = bootstrap_intervals([0, 0, 0, 0, 0], labels)
    assert constant["image_auroc"] == (0.5, 0.5)
    assert constant["image_ap"] == pytest.approx((0.4, 0.4))


def test_intervals_refuse_what_makes_no_sense() -> None:
    with pytest.raises(SSNError, match="not finite"):
        bootstrap_intervals([0.0, np.nan], [0, 1])
    for level, resamples in ((0.0, 10), (1.0, 10), (0.95, 0)):
        with pytest.raises(ValueError, match="must be in"):
            bootstrap_intervals([0.0, 1.0], [0, 1], level=level, resamples=resamples)
