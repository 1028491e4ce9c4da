"""Metrics of detection (one score per image) and localisation (one score per pixel).

Localisation metrics are exact, ties included, but need no sort of all pixels at once: every one of them changes only at
the scores of defective pixels, which are few. Those are sorted; normal pixels are only counted above and at each of
them, a block at a time. Memory beyond the maps is a block plus some 130 bytes per defective pixel, so maps may be
larger than memory: a memory map, or a :class:`ssn.spool.Spool`.

Shape suffixes: N images, T thresholds, R resamples, L distinct scores, H and W height and width of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from ssn.errors import SSNError

BLOCK_PIXELS = 1 << 24
_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)
_IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max", "image_f1_max_threshold")
_PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "aupro")
_RESAMPLED_SCORES = 1 << 20
"""Scores of all the resamples that are computed at a time."""


@dataclass(frozen=True)
class Metrics:
    """Metrics that are defined, and why the others are not."""

    values: dict[str, float] = field(default_factory=dict)
    """Shares in [0, 1], except for thresholds, which are scores."""
    undefined: dict[str, str] = field(default_factory=dict)
    """Metric to reason. A metric is in exactly one of the two."""


@dataclass(frozen=True)
class _Curve:
    """What lies above each distinct score of a positive, highest first; T thresholds."""

    threshold_T: np.ndarray
    true_T: np.ndarray
    """Positives at or above the threshold."""
    overlap_T: np.ndarray
    """Total weight of the positives at or above the threshold."""
    false_above_T: np.ndarray
    """Negatives above the threshold."""
    false_T: np.ndarray
    """Negatives at or above the threshold."""
    num_negatives: int


def image_metrics(scores: np.ndarray | Sequence[float], labels: np.ndarray | Sequence[int]) -> Metrics:
    """``image_auroc``, ``image_ap`` and ``image_f1_max`` with the threshold that attains it.

    An image is called defective at a threshold if its score is at or above it. Among thresholds of equal F1 the highest
    is given. With images of one class only, all are undefined.

    Args:
        scores: ``[N]``, higher is more anomalous; any monotone scale.
        labels: ``[N]``, positive is defective.

    Raises:
        SSNError: a score is not finite.
    """
    scores_N, positive_N = _image_vectors(scores, labels)
    reason = _one_class(int(positive_N.sum()), int((~positive_N).sum()), "image")
    if reason:
        return Metrics(undefined=dict.fromkeys(_IMAGE_METRICS, reason))
    positives, negatives = scores_N[positive_N], scores_N[~positive_N]
    curve = _curve(positives, np.ones(len(positives)), [negatives])
    f1_T = 2 * curve.true_T / (curve.true_T + curve.false_T + len(positives))
    best = int(f1_T.argmax())
    return Metrics(
        {
            "image_auroc": _area(curve, curve.true_T / len(positives)),
            "image_ap": _average_precision(curve),
            "image_f1_max": float(f1_T[best]),
            "image_f1_max_threshold": float(curve.threshold_T[best]),
        }
    )


def bootstrap_intervals(
    scores: np.ndarray | Sequence[float],
    labels: np.ndarray | Sequence[int],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of ``image_auroc``, ``image_ap`` and ``image_f1_max`` over resampled images.

    Defective and normal images are resampled apart, so that every resample has as many of each as there are: the
    two-sample bootstrap and the percentile interval of Efron and Tibshirani, An Introduction to the Bootstrap (1993),
    chapters 8 and 13. They say how far these images decide the metric, not how another training would end. Scores that
    separate the classes perfectly do so in every resample: the interval is then a point, however few the images.

    Args:
        scores: ``[N]``, higher is more anomalous.
        labels: ``[N]``, positive is defective.
        level: Share of the resamples inside the interval, in (0, 1).
        resamples: How many.
        seed: Of the resamples; the same seed gives the same intervals.

    Returns:
        Metric to its lower and upper bound; nothing where the images are of one class.

    Raises:
        SSNError: a score is not finite.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level} must be in (0, 1) and resamples {resamples} at least 1")
    scores_N, positive_N = _image_vectors(scores, labels)
    if _one_class(int(positive_N.sum()), int((~positive_N).sum()), "image"):
        return {}
    rng = np.random.default_rng(seed)
    at_a_time = max(1, _RESAMPLED_SCORES // len(scores_N))
    parts = [
        resampled_image_metrics(
            scores_N, positive_N, stratified_counts(positive_N, min(at_a_time, resamples - start), rng)
        )
        for start in range(0, resamples, at_a_time)
    ]
    bounds = ((1 - level) / 2, (1 + level) / 2)
    intervals = {}
    for name in parts[0]:
        low, high = np.quantile(np.concatenate([part[name] for part in parts]), bounds)
        intervals[name] = (float(low), float(high))
    return intervals


def stratified_counts(labels: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each image is drawn in each resample, ``[R, N]``: with replacement, defective and normal ones apart."""
    positive_N = np.asarray(labels) > 0
    count_RN = np.zeros((resamples, len(positive_N)), np.int64)
    for members_N in (positive_N, ~positive_N):
        size = int(members_N.sum())
        count_RN[:, members_N] = rng.multinomial(size, np.full(size, 1 / size), size=resamples)
    return count_RN


def resampled_image_metrics(scores: np.ndarray, labels: np.ndarray, count_RN: np.ndarray) -> dict[str, np.ndarray]:
    """``image_auroc``, ``image_ap`` and ``image_f1_max`` of resamples, each ``[R]``.

    Args:
        scores: ``[N]``, higher is more anomalous.
        labels: ``[N]``, positive is defective.
        count_RN: How often each image counts in each resample, of either class at least one.
    """
    order = np.argsort(scores)[::-1]
    descending, positive_N = scores[order], np.asarray(labels)[order] > 0
    first_L = np.flatnonzero(np.append(True, descending[1:] != descending[:-1]))
    count_RN = count_RN[:, order]
    positive_RL = np.add.reduceat(count_RN * positive_N, first_L, axis=1)
    negative_RL = np.add.reduceat(count_RN * ~positive_N, first_L, axis=1)
    true_RL, false_RL = positive_RL.cumsum(axis=1), negative_RL.cumsum(axis=1)
    positive_R1, negative_R1 = true_RL[:, -1:], false_RL[:, -1:]
    flagged_RL = true_RL + false_RL
    # an image wins over the negatives below it, and half over those that tie with it
    wins_R = (positive_RL * (negative_R1 - false_RL + negative_RL / 2)).sum(axis=1)
    return {
        "image_auroc": wins_R / (positive_R1 * negative_R1)[:, 0],
        "image_ap": (positive_RL * (true_RL / np.maximum(flagged_RL, 1))).sum(axis=1) / positive_R1[:, 0],
        "image_f1_max": (2 * true_RL / (flagged_RL + positive_R1)).max(axis=1),
    }


def pixel_metrics(
    maps: np.ndarray | Iterable[np.ndarray],
    masks: np.ndarray | Iterable[np.ndarray] | None,
    *,
    fpr_limit: float = 0.3,
    block_pixels: int = BLOCK_PIXELS,
) -> Metrics:
    """``pixel_auroc``, ``pixel_ap`` and ``aupro`` over all pixels of all images.

    AUPRO is the area under the per-region overlap, averaged over the 8-connected components of all masks, as a function
    of the false positive rate, from 0 to ``fpr_limit`` and divided by it; interpolated linearly at the limit.

    Args:
        maps: ``[N, H, W]`` or images one by one; higher is more anomalous. Arrays, memory maps and other sequences are
            read twice, image by image; anything else is first made a list.
        masks: Same shape, positive is defective; None where a dataset has no masks. Leave defective images without a
            mask out of both.
        fpr_limit: In (0, 1].
        block_pixels: Normal pixels sorted at a time.

    Raises:
        SSNError: a pixel's score is not finite.
    """
    if masks is None:
        return Metrics(undefined=dict.fromkeys(_PIXEL_METRICS, "no masks"))
    maps, masks = _as_sequence(maps), _as_sequence(masks)
    if len(maps) != len(masks):
        raise ValueError(f"{len(maps)} maps but {len(masks)} masks")
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit {fpr_limit} must be in (0, 1]")
    scores, weights, dtypes, normal_count, region_count = [], [], set(), 0, 0
    for i, (map_HW, mask_HW) in enumerate(zip(maps, masks, strict=True)):
        map_HW, mask_HW = np.asarray(map_HW), np.asarray(mask_HW) > 0
        if map_HW.shape != mask_HW.shape or map_HW.ndim != 2:
            raise ValueError(f"map {i} is {map_HW.shape}, but its mask is {mask_HW.shape}")
        _check_finite(map_HW, f"the anomaly map of image {i}")
        dtypes.add(map_HW.dtype)
        normal_count += mask_HW.size
        if mask_HW.any():
            regions_HW, count = ndimage.label(mask_HW, structure=_EIGHT_CONNECTED)
            region = regions_HW[mask_HW]
            scores.append(map_HW[mask_HW])
            weights.append(1.0 / np.bincount(region)[region])
            normal_count -= len(region)
            region_count += count
    reason = _one_class(sum(map(len, scores)), normal_count, "pixel")
    if reason:
        return Metrics(undefined=dict.fromkeys(_PIXEL_METRICS, reason))

    normals = (np.asarray(m)[~(np.asarray(k) > 0)] for m, k in zip(maps, masks, strict=True))
    blocks = _blocks(normals, min(block_pixels, normal_count), np.result_type(*dtypes))
    curve = _curve(np.concatenate(scores), np.concatenate(weights) / region_count, blocks)
    return Metrics(
        {
            "pixel_auroc": _area(curve, curve.true_T / curve.true_T[-1]),
            "pixel_ap": _average_precision(curve),
            "aupro": _area(curve, curve.overlap_T, fpr_limit=fpr_limit),
        }
    )


def _as_sequence(images: np.ndarray | Iterable[np.ndarray]) -> np.ndarray | Sequence[np.ndarray]:
    return images if isinstance(images, np.ndarray | Sequence) else list(images)


def _image_vectors(
    scores: np.ndarray | Sequence[float], labels: np.ndarray | Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    scores_N, positive_N = np.asarray(scores), np.asarray(labels) > 0
    if scores_N.shape != positive_N.shape or scores_N.ndim != 1:
        raise ValueError(f"scores {scores_N.shape} and labels {positive_N.shape} must be one vector of equal length")
    _check_finite(scores_N, "an image score")
    return scores_N, positive_N


def _blocks(pieces: Iterable[np.ndarray], size: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Pieces joined and cut into vectors of ``size`` and a rest; each overwrites the one before."""
    block, used = np.empty(size, dtype), 0
    for piece in pieces:
        while len(piece):
            part = piece[: size - used]
            block[used : used + len(part)] = part
            used, piece = used + len(part), piece[len(part) :]
            if used == size:
                yield block
                used = 0
    if used:
        yield block[:used]


def _check_finite(scores: np.ndarray, what: str) -> None:
    if not np.isfinite(scores).all():
        raise SSNError(f"{what} is not finite: training has diverged; lower train.lr_adaptor and train.lr_heads")


def _one_class(num_positive: int, num_negative: int, what: str) -> str | None:
    if num_positive and num_negative:
        return None
    if not num_positive and not num_negative:
        return f"no {what}s"
    return f"only one class: {max(num_positive, num_negative)} {'defective' if num_positive else 'normal'} {what}s"


def _curve(positives: np.ndarray, weights: np.ndarray, negative_blocks: Iterable[np.ndarray]) -> _Curve:
    """The curve of positives with their weights; the blocks are sorted in place."""
    order = np.argsort(positives)[::-1]
    descending = positives[order]
    last_T = np.append(np.flatnonzero(descending[1:] != descending[:-1]), len(descending) - 1)
    ascending_T = descending[last_T][::-1]
    false_T = np.zeros(len(last_T), dtype=np.int64)
    false_above_T = np.zeros(len(last_T), dtype=np.int64)
    num_negatives = 0
    for block in negative_blocks:
        block.sort()
        num_negatives += len(block)
        false_T += len(block) - np.searchsorted(block, ascending_T, side="left")[::-1]
        false_above_T += len(block) - np.searchsorted(block, ascending_T, side="right")[::-1]
    return _Curve(
        threshold_T=descending[last_T],
        true_T=last_T + 1,
        overlap_T=np.cumsum(weights[order])[last_T],
        false_above_T=false_above_T,
        false_T=false_T,
        num_negatives=num_negatives,
    )


def _average_precision(curve: _Curve) -> float:
    recall_T = curve.true_T / curve.true_T[-1]
    precision_T = curve.true_T / (curve.true_T + curve.false_T)
    return float(np.sum(np.diff(recall_T, prepend=0.0) * precision_T))


def _area(curve: _Curve, share_T: np.ndarray, *, fpr_limit: float = 1.0) -> float:
    """Area under ``share_T`` as a function of the false positive rate up to ``fpr_limit``, divided by it.

    Between two thresholds of the curve only negatives are passed, so the share is constant there; negatives that tie
    with positives make it climb in a straight line.
    """
    before_T = np.append(0.0, share_T[:-1])
    x = np.concatenate(([0.0], np.stack((curve.false_above_T, curve.false_T), 1).ravel() / curve.num_negatives, [1.0]))
    y = np.concatenate(([0.0], np.stack((before_T, share_T), 1).ravel(), [share_T[-1]]))
    inside = int(np.searchsorted(x, fpr_limit, side="right"))
    if inside < len(x):
        rise = (y[inside] - y[inside - 1]) * (fpr_limit - x[inside - 1]) / (x[inside] - x[inside - 1])
        x = np.append(x[:inside], fpr_limit)
        y = np.append(y[:inside], y[inside - 1] + rise)
    return float(np.trapezoid(y, x) / fpr_limit)
