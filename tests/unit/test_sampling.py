"""Which images an epoch draws."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssn.data.sampling import Draws, attainable_ratios, epoch_draws, shard, supervised_subset
from ssn.errors import SSNError


def make_pool(count: int) -> tuple[list[str], list[bool], list[str]]:
    types = ["oil" if index % 10 == 1 else "scratch" if index % 3 == 0 else "dent" for index in range(count)]
    return types, [index % 5 != 0 for index in range(count)], [f"id{index}" for index in range(count)]


@given(st.integers(0, 60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
def test_a_larger_ratio_contains_the_smaller(count: int, one: float, other: float, seed: int) -> None:
    small, large = sorted((one, other))
    pool = make_pool(count)
    assert set(supervised_subset(*pool, small, seed)) <= set(supervised_subset(*pool, large, seed))


@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 3))
def test_subset_is_stratified_and_masked(count: int, ratio: float, seed: int) -> None:
    types, has_mask, ids = make_pool(count)
    chosen = supervised_subset(types, has_mask, ids, ratio, seed)
    assert all(has_mask[index] for index in chosen)
    assert abs(len(chosen) - ratio * sum(has_mask)) <= 0.5
    available = Counter(kind for kind, masked in zip(types, has_mask, strict=True) if masked)
    taken = Counter(types[index] for index in chosen)
    assert all(abs(taken[kind] - ratio * available[kind]) <= 1.5 for kind in available)


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


def draw(num_normal: int = 10, num_labelled: int = 4, used: int = 4, **kwargs: int | None) -> Draws:
    return epoch_draws(
        num_normal,
        num_labelled,
        used,
        **{"draws_per_epoch": None, "seed": 0, "epoch": 0, **kwargs},  # type: ignore[arg-type]
    )


@given(st.integers(1, 50), st.integers(0, 10), st.data())
def test_epoch_has_its_length_and_half_are_defective(num_normal: int, num_labelled: int, data: st.DataObject) -> None:
    used = data.draw(st.integers(0, num_labelled))
    draws = draw(num_normal, num_labelled, used)
    length = max(num_normal, 8 * num_labelled)
    assert len(draws.is_defect) == len(draws.index) == len(draws.flip) == len(draws.occurrence) == length
    assert draws.is_defect.sum() == (length // 2 if used else 0)
    assert not draws.flip[~draws.is_defect].any()
    assert set(draws.flip) <= {0, 1, 2, 3}


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


@given(st.integers(0, 40), st.integers(1, 9))
def test_shards_are_the_batch_in_order(length: int, world_size: int) -> None:
    batch = np.arange(length) * 3
    shards = [shard(batch, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shards), batch)
    sizes = [len(part) for part in shards]
    assert max(sizes) - min(sizes) <= 1
