"""Which images a training epoch draws: pure functions of counts and seeds.

Nothing here depends on the number of workers: the whole epoch is drawn first and every batch is then sliced by rank.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssn.errors import SSNError

# Distinct streams of one (seed, epoch), so that adding draws to one does not shift another.
_NORMALS, _DEFECTS, _FLIPS = 0, 1, 2


@dataclass(frozen=True)
class Draws:
    """The N images of one epoch, in order."""

    is_defect: np.ndarray
    """``[N]`` bool: drawn from the defective images in use, rather than from the normal ones."""
    index: np.ndarray
    """``[N]`` int64: position within the normal images, or within the defective images in use."""
    flip: np.ndarray
    """``[N]`` int64: 0 none, 1 horizontal, 2 vertical, 3 both (180 degrees)."""
    occurrence: np.ndarray
    """``[N]`` int64: how many times the same image was drawn before in this epoch."""


def supervised_subset(
    defect_types: Sequence[str], has_mask: Sequence[bool], ids: Sequence[str], ratio: float, label_seed: int
) -> np.ndarray:
    """Choose the defective images whose masks are used.

    Stratified by defect type, and nested: a larger ratio contains the smaller one's images. The choice depends on the
    images' ids and types, not on their order.

    Args:
        defect_types: Of each labelled defective image.
        has_mask: Whether it has a mask; the others are never chosen.
        ids: Its id.
        ratio: Share, in [0, 1], of the images with a mask.
        label_seed: Which images come first.

    Returns:
        Increasing indices into the arguments, int64.

    Raises:
        SSNError: ``ratio`` is out of range.
    """
    if not 0 <= ratio <= 1:
        raise SSNError(f"train.supervision_ratio is {ratio}, but must be in [0, 1]")
    by_type: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for index, (defect_type, masked, sample_id) in enumerate(zip(defect_types, has_mask, ids, strict=True)):
        if masked:
            key = hashlib.sha256(f"{label_seed}|{sample_id}".encode()).hexdigest()
            by_type[defect_type].append((key, index))
    # The r-th of a type's n images comes at (r + 1/2) / n of the way: every prefix holds each type in proportion.
    order = sorted(
        ((rank + 0.5) / len(keyed), key, index)
        for keyed in by_type.values()
        for rank, (key, index) in enumerate(sorted(keyed))
    )
    count = int(np.floor(ratio * len(order) + 0.5))
    return np.array(sorted(index for _, _, index in order[:count]), dtype=np.int64)


def attainable_ratios(num_masked: int) -> list[float]:
    """Every supervision ratio that means a different number of masks: 0, 1/n, ..., 1; just 0 without masks."""
    if num_masked == 0:
        return [0.0]
    return [count / num_masked for count in range(num_masked + 1)]


def epoch_draws(
    num_normal: int,
    num_labelled: int,
    num_defects_used: int,
    *,
    draws_per_epoch: int | None,
    seed: int,
    epoch: int,
) -> Draws:
    """Draw one epoch.

    Every second draw is defective when any defective image is used. Normal and defective images are each cycled
    through seeded permutations, so that no image is drawn again before all others of its kind.

    Args:
        num_normal: Normal training images.
        num_labelled: Labelled defective images available at ratio 1; it sets the length of the epoch, so that every
            ratio takes the same number of steps.
        num_defects_used: Labelled defective images in use.
        draws_per_epoch: N; None: max(num_normal, 8 * num_labelled).
        seed: The training seed.
        epoch: Counted from 0.

    Raises:
        SSNError: there are no normal images.
    """
    if num_normal < 1:
        raise SSNError("there are no normal training images; a detector is trained on at least one")
    num_draws = draws_per_epoch if draws_per_epoch is not None else max(num_normal, 8 * num_labelled)
    is_defect = np.zeros(num_draws, dtype=bool)
    if num_defects_used > 0:
        is_defect[1::2] = True
    index = np.empty(num_draws, dtype=np.int64)
    occurrence = np.empty(num_draws, dtype=np.int64)
    flip = np.zeros(num_draws, dtype=np.int64)
    for members, num_items, stream in ((~is_defect, num_normal, _NORMALS), (is_defect, num_defects_used, _DEFECTS)):
        num_members = int(members.sum())
        if num_members:
            index[members] = _cycle(num_items, num_members, np.random.default_rng([seed, epoch, stream]))
            occurrence[members] = np.arange(num_members) // num_items
    if num_defects_used > 0:
        flip[is_defect] = np.random.default_rng([seed, epoch, _FLIPS]).integers(0, 4, size=int(is_defect.sum()))
    return Draws(is_defect=is_defect, index=index, flip=flip, occurrence=occurrence)


def shard(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The slice of a globally sampled batch that ``rank`` of ``world_size`` workers computes.

    Slices are contiguous, their sizes differ by at most one, and together, in rank order, they are ``indices``.
    """
    start = rank * len(indices) // world_size
    stop = (rank + 1) * len(indices) // world_size
    return indices[start:stop]


def _cycle(num_items: int, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    num_rounds = -(-num_draws // num_items)
    return np.concatenate([rng.permutation(num_items) for _ in range(num_rounds)])[:num_draws]
