"""Which images an epoch draws."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssn.config import Config, TrainConfig
from ssn.data.sampling import Draws, attainable_ratios, epoch_draws, official_draws, shard, supervised_subset
from ssn.errors import SSNError


def make_pool(count: int) -> tuple[list[str], list[bool], list[str]]:
    types = ["oil" if index % 10 == 1 else "scratch" if index % 3 == 0 else "dent" for index in range(count)]
    return types, [index % 5 != 0 for index in range(count)], [f"id{index}" for index in range(count)]


@settings(deadline=None)
@given(st.integers(0, 60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
def test_a_larger_ratio_contains_the_smaller(count: int, one: float, other: float, seed: int) -> None:
    small, large = sorted((one, other))
    pool = make_pool(count)
    assert set(supervised_subset(*pool, small, seed)) <= set(supervised_subset(*pool, large, seed))


@settings(deadline=None)
@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 3))
def test_subset_is_stratified_and_masked(count: int, ratio: float, seed: int) -> None:
    types, has_mask, ids = make_pool(count)
    chosen = supervised_subset(types, has_mask, ids, ratio, seed)
    assert all(has_mask[index] for index in chosen)
    assert abs(len(chosen) - ratio * sum(has_mask)) <= 0.5
    available = Counter(kind for kind, masked in zip(types, has_mask, strict=True) if masked)
    taken = Counter(types[index] for index in chosen)
    assert all(abs(taken[kind] - ratio * available[kind]) <= 1.5 for kind in available)


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0, 1), st.randoms(use_true_random=False))
def test_subset_does_not_depend_on_order(count: int, ratio: float, shuffler: random.Random) -> None:
    types, has_mask, ids = make_pool(count)
    order = list(range(count))
    shuffler.shuffle(order)
    chosen = supervised_subset(types, has_mask, ids, ratio, 0)
    again = supervised_subset(
        [types[i] for i in order], [has_mask[i] for i in order], [ids[i] for i in order], ratio, 0
    )
    assert {ids[i] for i in chosen} == {ids[order[i]] for i in again}


@settings(deadline=None)
@given(st.integers(0, 40))
def test_every_attainable_ratio_uses_one_mask_more(num_masked: int) -> None:
    pool = ["dent"] * num_masked, [True] * num_masked, [f"{i}" for i in range(num_masked)]
    sizes = [len(supervised_subset(*pool, ratio, 0)) for ratio in attainable_ratios(num_masked)]
    assert sizes == list(range(num_masked + 1))


def test_label_seed_chooses_other_images() -> None:
    pool = make_pool(40)
    assert set(supervised_subset(*pool, 0.5, 0)) != set(supervised_subset(*pool, 0.5, 1))


def test_ratio_out_of_range_is_refused() -> None:
    with pytest.raises(SSNError, match=r"train.supervision_ratio is 1.5"):
        supervised_subset(["dent"], [True], ["a"], 1.5, 0)


def draw(num_normal: int = 10, num_masked: int = 4, used: int = 4, **kwargs: int | None) -> Draws:
    return epoch_draws(
        num_normal,
        num_masked,
        used,
        **{"num_flips": 4, "draws_per_epoch": None, "seed": 0, "epoch": 0, **kwargs},  # type: ignore[arg-type]
    )


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 10), st.integers(0, 30))
def test_epoch_has_its_length_and_half_are_defective(num_normal: int, num_masked: int, used: int) -> None:
    """Its length is a matter of the category, not of how many defective images are used, with masks or without."""
    draws = draw(num_normal, num_masked, used)
    length = max(num_normal, 8 * num_masked)
    assert len(draws.is_defect) == len(draws.index) == len(draws.flip) == len(draws.occurrence) == length
    assert draws.is_defect.sum() == (length // 2 if used else 0)
    assert not draws.flip[~draws.is_defect].any()
    assert set(draws.flip) <= {0, 1, 2, 3}
    unflipped = draw(num_normal, num_masked, used, num_flips=1)
    assert not unflipped.flip.any()
    assert np.array_equal(unflipped.index, draws.index)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 10), st.integers(1, 100), st.integers(0, 3), st.integers(0, 3))
def test_images_are_cycled_and_occurrences_counted(
    num_normal: int, num_defects: int, length: int, seed: int, epoch: int
) -> None:
    draws = draw(num_normal, num_defects, num_defects, draws_per_epoch=length, seed=seed, epoch=epoch)
    for kind, size in ((False, num_normal), (True, num_defects)):
        indices = draws.index[draws.is_defect == kind]
        seen: Counter[int] = Counter()
        for index, occurrence in zip(indices, draws.occurrence[draws.is_defect == kind], strict=True):
            assert 0 <= index < size
            assert occurrence == seen[index]
            seen[index] += 1
        if len(indices):
            assert max(seen.values()) - min(seen[i] for i in range(size)) <= 1


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first, again = draw(epoch=3), draw(epoch=3)
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in ("index", "flip", "occurrence"))
    assert not np.array_equal(first.index, draw(epoch=4).index)
    assert not np.array_equal(first.index, draw(epoch=3, seed=1).index)


def test_normals_are_the_same_whatever_defects_are_used() -> None:
    """Changing the ratio changes the defects drawn, not the normal images between them."""
    few, many = draw(used=1), draw(used=4)
    assert np.array_equal(few.index[~few.is_defect], many.index[~many.is_defect])


def test_no_normals_is_refused() -> None:
    with pytest.raises(SSNError, match="no normal training images"):
        draw(num_normal=0)
    with pytest.raises(SSNError, match="no normal training images"):
        official_draws(0, 1, num_flips=4, seed=0, epoch=0)


# What the papers' code draws.


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))
def test_official_epoch_without_defects_is_every_normal_image_once(num_normal: int, seed: int, epoch: int) -> None:
    draws = official_draws(num_normal, 0, num_flips=4, seed=seed, epoch=epoch)
    assert sorted(draws.index) == list(range(num_normal))
    for never in (draws.is_defect, draws.flip, draws.occurrence):
        assert not never.any()


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.sampled_from([1, 4]), st.integers(0, 3), st.integers(0, 4))
def test_official_epoch_is_every_defect_under_every_flip_and_as_many_normals(
    num_normal: int, used: int, flips: int, seed: int, epoch: int
) -> None:
    draws = official_draws(num_normal, used, num_flips=flips, seed=seed, epoch=epoch)
    defective = draws.is_defect
    assert len(defective) == 2 * flips * used
    views = sorted(zip(draws.index[defective], draws.flip[defective], strict=True))
    assert views == [(image, flip) for image in range(used) for flip in range(flips)]
    normals = draws.index[~defective]
    assert len(normals) == flips * used
    assert normals.max() < num_normal
    assert not draws.flip[~defective].any()
    if flips * used <= num_normal:
        assert len(set(normals)) == len(normals), "without replacement where there are enough"
    seen: Counter[tuple[bool, int]] = Counter()
    for is_defect, index, occurrence in zip(defective, draws.index, draws.occurrence, strict=True):
        assert occurrence == seen[is_defect, index]
        seen[is_defect, index] += 1


def test_official_epochs_prefer_the_normals_that_were_drawn_rarely() -> None:
    """20 of 50 an epoch: after two epochs 40 have been drawn, none of them twice; the third begins with the rest."""
    epochs = [official_draws(50, 5, num_flips=4, seed=7, epoch=epoch) for epoch in range(30)]
    normals = [set(draws.index[~draws.is_defect]) for draws in epochs]
    assert not normals[0] & normals[1]
    assert set(range(50)) - normals[0] - normals[1] <= normals[2]
    counts = Counter(image for drawn in normals for image in drawn)
    # 12 each on average; independent draws would have a standard deviation of 2.7
    assert 11 <= min(counts.values()) <= max(counts.values()) <= 13


def test_official_normals_are_balanced_in_the_long_run_where_there_are_too_few() -> None:
    """20 of 6 an epoch, with replacement."""
    counts = np.zeros(6, int)
    for epoch in range(60):
        draws = official_draws(6, 5, num_flips=4, seed=0, epoch=epoch)
        counts += np.bincount(draws.index[~draws.is_defect], minlength=6)
    assert counts.sum() == 1200
    # independent draws would have a standard deviation of 13
    assert np.abs(counts - 200).max() < 10


def test_official_epochs_are_shuffled_differ_and_repeat() -> None:
    first, again = (
        official_draws(30, 4, num_flips=4, seed=1, epoch=3),
        official_draws(30, 4, num_flips=4, seed=1, epoch=3),
    )
    for name in ("is_defect", "index", "flip", "occurrence"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    for other in (
        official_draws(30, 4, num_flips=4, seed=1, epoch=4),
        official_draws(30, 4, num_flips=4, seed=2, epoch=3),
    ):
        assert not np.array_equal(first.index, other.index)
    assert 0 < first.is_defect[:16].sum() < 16


def test_official_epochs_have_a_length_of_their_own() -> None:
    with pytest.raises(SSNError, match=r"^train.draws_per_epoch is 96, but must be null with train.sampling=official$"):
        Config(train=TrainConfig(sampling="official", draws_per_epoch=96))
    with pytest.raises(SSNError, match=r"^train.sampling is 'offical', but must be balanced or official$"):
        Config(train=TrainConfig(sampling="offical"))  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 9))
def test_shards_are_the_batch_in_order(length: int, world_size: int) -> None:
    batch = np.arange(length) * 3
    shards = [shard(batch, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shards), batch)
    sizes = [len(part) for part in shards]
    assert max(sizes) - min(sizes) <= 1
