"""Assignment to splits and fingerprints, as properties of pure functions."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssn.data.duplicates import link_near_duplicates, thumbnail
from ssn.data.splits import (
    TABLES,
    Assignment,
    FingerprintEntry,
    ImageKey,
    SplitPolicy,
    assign_splits,
    digest_fold,
    official_split,
    search_fingerprint,
    side_of,
    test_fingerprint,
)
from ssn.errors import SSNError
from tests.raw_folders import draw_image

KINDS = tuple(TABLES)


def keys(count: int, label: int, defect_type: str, published_split: str, prefix: str = "") -> list[ImageKey]:
    return [
        ImageKey(f"{prefix}{published_split}-{defect_type}-{index:04d}", label, defect_type, published_split)
        for index in range(count)
    ]


@st.composite
def categories(draw: st.DrawFn) -> tuple[list[ImageKey], list[tuple[str, str]]]:
    """Images of a category and near-duplicate links among them, across labels, types and published splits."""
    images = [
        ImageKey(f"{index:04d}", int(kind != "good"), kind, published)
        for index, (kind, published) in enumerate(
            draw(
                st.lists(
                    st.tuples(st.sampled_from(["good", "dent", "scratch"]), st.sampled_from(["", "train", "test"])),
                    min_size=1,
                    max_size=60,
                )
            )
        )
    ]
    position = st.integers(0, len(images) - 1)
    links = draw(st.lists(st.tuples(position, position), max_size=12))
    return images, [(images[i].id, images[j].id) for i, j in links]


def assign(
    images: list[ImageKey],
    links: list[tuple[str, str]] | None = None,
    *,
    kind: str = "test_defects",
    seed: int = 0,
    existing: dict[str, str] | None = None,
) -> Assignment:
    return assign_splits(images, links or [], TABLES[kind], split_seed=seed, existing=existing or {})  # type: ignore[index,arg-type]


@given(categories(), st.sampled_from(KINDS), st.integers(0, 3), st.randoms(use_true_random=False))
def test_assignment_does_not_depend_on_order(
    category: tuple[list[ImageKey], list[tuple[str, str]]], kind: str, seed: int, shuffler: random.Random
) -> None:
    images, links = category
    expected = assign(images, links, kind=kind, seed=seed)
    shuffled, turned = list(images), [(second, first) for first, second in links]
    shuffler.shuffle(shuffled)
    shuffler.shuffle(turned)
    result = assign(shuffled, turned, kind=kind, seed=seed)
    assert result.splits == expected.splits
    assert result.groups == expected.groups
    assert result.notes == expected.notes


@given(categories(), st.sampled_from(KINDS), st.data())
def test_growth_never_moves_what_was_assigned(
    category: tuple[list[ImageKey], list[tuple[str, str]]], kind: str, data: st.DataObject
) -> None:
    images, links = category
    count = data.draw(st.integers(0, len(images)))
    early = images[:count]
    known = {image.id for image in early}
    before = assign(early, [link for link in links if known.issuperset(link)], kind=kind)
    after = assign(images, links, kind=kind, existing=before.splits)
    assert {image_id: after.splits[image_id] for image_id in known} == before.splits


@given(categories(), st.sampled_from(KINDS), st.randoms(use_true_random=False), st.data())
def test_growth_in_any_order_and_batches_never_moves_anything(
    category: tuple[list[ImageKey], list[tuple[str, str]]], kind: str, shuffler: random.Random, data: st.DataObject
) -> None:
    images, links = category
    waiting = list(images)
    shuffler.shuffle(waiting)
    here: list[ImageKey] = []
    assigned: dict[str, str] = {}
    while waiting:
        size = data.draw(st.integers(1, len(waiting)))
        here, waiting = here + waiting[:size], waiting[size:]
        known = {image.id for image in here}
        grown = assign(here, [link for link in links if known.issuperset(link)], kind=kind, existing=assigned).splits
        assert {name: grown[name] for name in assigned} == assigned
        assert set(grown) == known
        assigned = dict(grown)


@given(categories(), st.sampled_from(KINDS), st.integers(0, 3))
def test_no_group_lies_on_two_sides(
    category: tuple[list[ImageKey], list[tuple[str, str]]], kind: str, seed: int
) -> None:
    images, links = category
    result = assign(images, links, kind=kind, seed=seed)
    sides: dict[str, set[str]] = {}
    for image in images:
        sides.setdefault(result.groups[image.id], set()).add(side_of(result.splits[image.id]))
    assert all(len(side) == 1 for side in sides.values())
    assert all(result.groups[first] == result.groups[second] for first, second in links)


@given(categories(), st.sampled_from(KINDS), st.data())
def test_train_holds_no_defect_and_pool_nothing_else(
    category: tuple[list[ImageKey], list[tuple[str, str]]], kind: str, data: st.DataObject
) -> None:
    images, links = category
    splits = st.sampled_from(["train", "pool", "validation", "test"])
    existing = {image.id: data.draw(splits) for image in images if data.draw(st.booleans())}  # may be relabelled since
    result = assign(images, links, kind=kind, existing=existing)
    for image in images:
        assert result.splits[image.id] != ("train" if image.label else "pool")


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 4), min_size=3, max_size=60),
    st.sampled_from(["test_defects", "unsplit"]),
    st.integers(0, 5),
)
def test_quotas_are_met_within_one_group(sizes: list[int], kind: str, seed: int) -> None:
    published = "" if kind == "unsplit" else "test"
    images, links = [], []
    for group, size in enumerate(sizes):
        members = [ImageKey(f"{group:03d}-{index}", 1, "dent", published) for index in range(size)]
        images += members
        links += [(members[0].id, member.id) for member in members[1:]]
    result = assign(images, links, kind=kind, seed=seed)
    fractions = TABLES[kind]["unsplit_defective" if kind == "unsplit" else "test_defective"]  # type: ignore[index]
    counts = Counter(side_of(split) for split in result.splits.values())
    for side, fraction in fractions.items():
        assert abs(counts[side] - fraction * len(images)) <= max(sizes)


def test_test_defects_kind_has_the_published_fractions() -> None:
    images = (
        keys(40, 0, "good", "train")
        + keys(12, 0, "good", "test")
        + keys(30, 1, "defective", "test")
        + keys(20, 1, "crack", "test")
    )
    splits = assign(images).splits
    counts = Counter((image.defect_type, image.published_split, splits[image.id]) for image in images)
    assert counts == {
        ("good", "train", "train"): 40,
        ("good", "test", "validation"): 5,
        ("good", "test", "test"): 7,
        ("defective", "test", "pool"): 9,
        ("defective", "test", "validation"): 9,
        ("defective", "test", "test"): 12,
        ("crack", "test", "pool"): 6,
        ("crack", "test", "validation"): 6,
        ("crack", "test", "test"): 8,
    }


def test_train_defects_kind_leaves_the_published_test_alone() -> None:
    images = (
        keys(50, 0, "good", "train")
        + keys(20, 1, "dent", "train")
        + keys(10, 0, "good", "test")
        + keys(10, 1, "dent", "test")
    )
    splits = assign(images, kind="train_defects").splits
    counts = Counter((image.published_split, splits[image.id]) for image in images)
    assert counts == {
        ("train", "train"): 40,
        ("train", "pool"): 16,
        ("train", "validation"): 14,
        ("test", "test"): 20,
    }


def test_seed_changes_who_but_not_how_many() -> None:
    images = keys(30, 1, "dent", "test")
    first, second = assign(images, seed=0).splits, assign(images, seed=1).splits
    assert first != second
    assert Counter(first.values()) == Counter(second.values())


def test_a_training_image_repeated_in_test_never_reaches_training() -> None:
    images = keys(6, 0, "good", "train") + keys(6, 0, "good", "test")
    twin = ("train-good-0000", "test-good-0000")
    for seed in range(5):
        splits = assign(images, [twin], seed=seed).splits
        assert splits[twin[0]] == splits[twin[1]] != "train"


def test_a_test_image_linked_to_a_defect_never_reaches_training() -> None:
    """Defects of the test split may go to the pool; a normal image beside one must not follow it into train."""
    normals, defects = keys(30, 0, "good", "test"), keys(30, 1, "dent", "test")
    links = [(normal.id, defect.id) for normal, defect in zip(normals, defects, strict=True)]
    assert set(assign(normals + defects, links).splits.values()) == {"validation", "test"}


def test_a_new_image_that_links_two_groups_goes_to_the_most_held_out() -> None:
    images = keys(3, 0, "good", "")
    ids = [image.id for image in images]
    result = assign(
        images, [(ids[0], ids[2]), (ids[1], ids[2])], kind="unsplit", existing={ids[0]: "train", ids[1]: "test"}
    )
    assert result.splits == {ids[0]: "train", ids[1]: "test", ids[2]: "test"}


def test_small_strata_are_merged_and_reported() -> None:
    images = keys(10, 1, "dent", "test") + keys(2, 1, "rust", "test") + keys(1, 1, "oil", "test")
    result = assign(images)
    assert result.notes == ("oil, rust: fewer than 3 distinct images each; split together as oil + rust",)
    together = Counter(result.splits[image.id] for image in images if image.defect_type != "dent")
    assert together == {"pool": 1, "validation": 1, "test": 1}


def test_a_stratum_too_small_even_together_joins_the_smallest_other() -> None:
    images = keys(10, 1, "dent", "test") + keys(5, 1, "scratch", "test") + keys(1, 1, "oil", "test")
    assert assign(images).notes == ("oil: fewer than 3 distinct images each; split together as oil + scratch",)


@given(categories())
def test_official_splits_are_the_published_ones(category: tuple[list[ImageKey], list[tuple[str, str]]]) -> None:
    for image in category[0]:
        split = official_split(image.published_split or "train", image.label)
        assert split == ("test" if image.published_split == "test" else "pool" if image.label else "train")


def test_digest_folds_are_about_even_and_depend_on_the_image_alone() -> None:
    folds = [digest_fold(f"{index:04d}", 3) for index in range(900)]
    assert Counter(folds).keys() == {0, 1, 2}
    assert all(250 < count < 350 for count in Counter(folds).values())
    assert folds[:10] == [digest_fold(f"{index:04d}", 3) for index in range(10)]


def test_parts_of_mixed_labels_fill_the_quotas_of_their_defects() -> None:
    """Eight surfaces a part, one of them defective, as in KolektorSDD: a part never lies on two sides."""
    images = [ImageKey(f"{part:02d}-{index}", int(not index), "x", "") for part in range(50) for index in range(8)]
    links = [(image.id, f"{image.id[:2]}-0") for image in images]
    counts = Counter(assign(images, links, kind="unsplit").splits.values())
    assert counts == {"train": 210, "pool": 30, "validation": 80, "test": 80}


@pytest.mark.parametrize(
    ("published", "kind"),
    [
        ({("train", 0), ("test", 0), ("test", 1)}, "test_defects"),
        ({("train", 0), ("train", 1), ("test", 1)}, "train_defects"),
        ({("", 0), ("", 1)}, "unsplit"),
        ({("train", 0)}, "unsplit"),
    ],
)
def test_kind_is_told_from_what_is_published(published: set[tuple[str, int]], kind: str) -> None:
    images = [ImageKey(f"{split}{label}", label, "x", split) for split, label in published]
    assert SplitPolicy().resolve_kind(images) == kind
    assert SplitPolicy(kind="train_defects").resolve_kind(images) == "train_defects"


def test_policy_rows_replace_the_kind_s() -> None:
    policy = SplitPolicy.parse(
        {"kind": "unsplit", "unsplit_defective": {"pool": 0.5, "validation": 0.5}}, source="x.yaml"
    )
    assert policy.table("unsplit")["unsplit_defective"] == {"fit": 0.5, "validation": 0.5}
    assert policy.table("unsplit")["unsplit_normal"] == TABLES["unsplit"]["unsplit_normal"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "random"}, "x.yaml: splits.kind is 'random'"),
        ({"tset_normal": {"test": 1}}, "unknown key splits.tset_normal; did you mean 'test_normal'"),
        ({"test_normal": {"pool": 1}}, "may name train, validation, test, not 'pool'"),
        ({"train_defective": {"train": 1}}, "may name pool, validation, test, not 'train'"),
        ({"test_normal": {"validation": 0.4, "test": 0.4}}, "add up to 0.8, but must make 1"),
        ({"test_normal": {"test": "all"}}, "is 'all', but must be a number"),
        ({"test_normal": 1}, "must map"),
        (["kind"], "must be a mapping"),
    ],
)
def test_a_wrong_policy_is_refused(content: object, message: str) -> None:
    with pytest.raises(SSNError) as error:
        SplitPolicy.parse(content, source="x.yaml")
    assert message in str(error.value)


entries = st.builds(
    FingerprintEntry,
    image_digest=st.sampled_from(["a", "b", "c"]),
    mask_digest=st.sampled_from(["", "m", "n"]),
    label=st.integers(0, 1),
    defect_type=st.sampled_from(["good", "dent"]),
    split=st.sampled_from(["train", "pool", "validation", "test"]),
)


@given(st.lists(entries, max_size=12), st.lists(entries, max_size=4), st.randoms(use_true_random=False))
def test_fingerprints_are_independent_of_each_other_and_of_order(
    images: list[FingerprintEntry], more: list[FingerprintEntry], shuffler: random.Random
) -> None:
    more_test = [entry for entry in more if entry.split == "test"]
    more_search = [entry for entry in more if entry.split != "test"]
    shuffled = list(images)
    shuffler.shuffle(shuffled)
    assert search_fingerprint(shuffled + more_test) == search_fingerprint(images)
    assert test_fingerprint(shuffled + more_search) == test_fingerprint(images)
    assert (search_fingerprint(images + more_search) == search_fingerprint(images)) == (not more_search)
    assert (test_fingerprint(images + more_test) == test_fingerprint(images)) == (not more_test)


@pytest.mark.parametrize(
    "change",
    [{"image_digest": "z"}, {"mask_digest": "z"}, {"label": 0}, {"defect_type": "z"}, {"split": "validation"}],
)
def test_every_field_enters_the_fingerprint(change: dict[str, object]) -> None:
    entry = FingerprintEntry("a", "m", 1, "dent", "pool")
    changed = FingerprintEntry(**{**entry.__dict__, **change})  # type: ignore[arg-type]
    assert search_fingerprint([entry]) != search_fingerprint([changed])


def test_near_duplicates_finds_recoded_and_brightened_copies_only() -> None:
    rng = np.random.default_rng(0)
    smooth = [np.kron(rng.integers(60, 200, size=(8, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8) for _ in range(6)]
    noisy = np.clip(smooth[2].astype(int) + rng.integers(-6, 7, size=smooth[2].shape), 0, 255).astype(np.uint8)
    brighter = smooth[4] + np.uint8(1)
    pictures = [*smooth, noisy, brighter]
    thumbnails = np.stack([thumbnail(picture) for picture in pictures])
    assert link_near_duplicates(thumbnails) == [(2, 6), (4, 7)]


def test_plain_surfaces_are_not_all_duplicates() -> None:
    """Two photographs of an even surface in the same light differ by noise alone, yet are two photographs."""
    rng = np.random.default_rng(0)
    pictures = [(light + rng.normal(0, 2, size=(64, 64, 3))).astype(np.uint8) for light in (90, 90, 140, 140, 200)]
    assert link_near_duplicates(np.stack([thumbnail(picture) for picture in pictures])) == []


def test_parts_on_a_fixture_are_not_all_duplicates() -> None:
    """The same contrasty scene every time: a recoded copy is told from another photograph even there."""
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(20, 236, size=(8, 8, 3)), np.ones((8, 8, 1)))
    shots = [np.clip(scene + rng.normal(0, 3, size=scene.shape), 0, 255).astype(np.uint8) for _ in range(8)]
    copy = np.clip(shots[5].astype(int) + rng.integers(-1, 2, size=scene.shape), 0, 255).astype(np.uint8)
    assert link_near_duplicates(np.stack([thumbnail(shot) for shot in [*shots, copy]])) == [(5, 8)]


def test_many_copies_are_linked_by_few_pairs() -> None:
    thumbnails = np.stack([thumbnail(draw_image(seed % 3)) for seed in range(60)])
    assert link_near_duplicates(thumbnails) == sorted((seed, seed + 3) for seed in range(57))


def test_near_duplicates_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    thumbnails = np.stack([thumbnail(draw_image(seed)) for seed in (0, 1, 2, 3, 0, 1, 4)])
    monkeypatch.setattr("ssn.data.duplicates._BLOCK", 3)
    assert link_near_duplicates(thumbnails) == [(0, 4), (1, 5)]
