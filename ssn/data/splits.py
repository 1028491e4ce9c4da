"""Who trains and who is held out: pure functions from labelled images to splits, and the fingerprints of the result.

Images that show the same thing form one group, and a group lies on one *side*: fit (``train`` for normal images,
``pool`` for defective ones), ``validation`` or ``test``. New groups are assigned in the order of a digest keyed by the
split seed, each to the side that is furthest below its quota for that kind of image. What was assigned once never
moves. The official protocol takes the published splits as they are instead, duplicates and all.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ssn.data.records import SEARCH_SPLITS, Split
from ssn.errors import SSNError

Kind = Literal["test_defects", "train_defects", "unsplit"]
Protocol = Literal["validation", "official"]
"""``validation``: this project's own splits, with a validation split to search on; ``official``: the published ones."""
Side = Literal["fit", "validation", "test"]
Fractions = Mapping[Side, float]

# From the most to the least held out; also the order in which equal deficits are served.
SIDES: tuple[Side, ...] = ("test", "validation", "fit")
_PUBLISHED_ORDER = {"test": 0, "": 1, "train": 2}
MIN_GROUPS = 3
"""Strata with fewer groups cannot fill three splits and are merged."""

_UNSPLIT: dict[str, Fractions] = {
    "unsplit_normal": {"fit": 0.6, "validation": 0.2, "test": 0.2},
    "unsplit_defective": {"fit": 0.6, "validation": 0.2, "test": 0.2},
}
TABLES: dict[Kind, dict[str, Fractions]] = {
    # No published training image is defective (MVTec AD, VisA, BTAD): test lends what the others lack.
    "test_defects": {
        "train_normal": {"fit": 1.0},
        "train_defective": {"fit": 0.8, "validation": 0.2},
        "test_normal": {"validation": 0.4, "test": 0.6},
        "test_defective": {"fit": 0.3, "validation": 0.3, "test": 0.4},
        **_UNSPLIT,
    },
    # Some are: the published test split stays as it is.
    "train_defects": {
        "train_normal": {"fit": 0.8, "validation": 0.2},
        "train_defective": {"fit": 0.8, "validation": 0.2},
        "test_normal": {"test": 1.0},
        "test_defective": {"test": 1.0},
        **_UNSPLIT,
    },
    # No split is published.
    "unsplit": {
        "train_normal": {"fit": 0.6, "validation": 0.2, "test": 0.2},
        "train_defective": {"fit": 0.6, "validation": 0.2, "test": 0.2},
        "test_normal": {"fit": 0.6, "validation": 0.2, "test": 0.2},
        "test_defective": {"fit": 0.6, "validation": 0.2, "test": 0.2},
        **_UNSPLIT,
    },
}


@dataclass(frozen=True)
class SplitPolicy:
    """How a dataset's images are divided: a kind's table of fractions, with rows of one's own in place of its."""

    kind: Kind | Literal["auto"] = "auto"
    """``auto``: told from which images are published in which split."""
    rows: Mapping[str, Fractions] = field(default_factory=dict)
    """Row name, such as ``test_defective``, to the share of each side."""

    @staticmethod
    def parse(content: Any, *, source: str) -> SplitPolicy:
        """Read a manifest's ``splits``: ``kind``, and rows such as ``test_defective: {pool: 0.3, test: 0.7}``.

        Raises:
            SSNError: a name is unknown, or fractions do not add up to 1.
        """
        if not isinstance(content, Mapping):
            raise SSNError(f"{source}: splits must be a mapping of keys")
        kinds = ("auto", *get_args(Kind))
        kind = content.get("kind", "auto")
        if kind not in kinds:
            raise SSNError(f"{source}: splits.kind is {kind!r}, but must be one of {', '.join(kinds)}")
        rows = {}
        for name, fractions in content.items():
            if name == "kind":
                continue
            if name not in TABLES["unsplit"]:
                near = difflib.get_close_matches(str(name), ["kind", *TABLES["unsplit"]], n=1, cutoff=0)
                raise SSNError(f"{source}: unknown key splits.{name}; did you mean {near[0]!r}?")
            rows[name] = _parse_row(name, fractions, source)
        return SplitPolicy(kind=kind, rows=rows)

    def table(self, kind: Kind) -> dict[str, Fractions]:
        """The fractions of every row, for a resolved kind."""
        return {**TABLES[kind], **self.rows}

    def resolve_kind(self, images: Iterable[ImageKey]) -> Kind:
        """The kind: the declared one, or what the images' published splits tell."""
        if self.kind != "auto":
            return self.kind
        published = {(image.published_split, image.label) for image in images}
        if not any(split == "test" for split, _ in published):
            return "unsplit"
        return "train_defects" if ("train", 1) in published else "test_defects"


@dataclass(frozen=True)
class ImageKey:
    """What an image's assignment depends on."""

    id: str
    label: int
    defect_type: str
    published_split: str


@dataclass(frozen=True)
class Assignment:
    """Where every image went."""

    splits: dict[str, Split]
    """Image id to split."""
    groups: dict[str, str]
    """Image id to its group: the smallest id among the images that are linked."""
    notes: tuple[str, ...]
    """What a reader of a report should know, one line each."""


def assign_splits(
    images: Sequence[ImageKey],
    links: Iterable[tuple[str, str]],
    table: Mapping[str, Fractions],
    *,
    split_seed: int,
    existing: Mapping[str, Split],
) -> Assignment:
    """Assign every image to a split.

    The result does not depend on the order of ``images`` or ``links``. Identical images share an id and so a split.
    A group whose images were assigned to different sides earlier (a new image may link two groups) draws its new
    images to the most held-out of those.

    Args:
        images: All images of a category; an id may occur more than once, with one label.
        links: Pairs of ids that belong on one side: near-duplicates, or photographs of one part.
        table: Row name to the share of each side.
        split_seed: Keys the order of assignment.
        existing: Earlier assignments, by id. A relabelled image stays on its side.
    """
    components = connect({image.id for image in images}, links)
    members: dict[str, list[ImageKey]] = defaultdict(list)
    for image in sorted(images, key=lambda image: (image.id, image.published_split, image.defect_type)):
        members[components[image.id]].append(image)
    governing = {group: _governing(group_images, table) for group, group_images in members.items()}
    merged, notes = _merge_small_strata([(_row(image), image.defect_type) for image, _ in governing.values()])

    def stratum(image: ImageKey) -> tuple[str, str]:
        key = (_row(image), image.defect_type)
        return merged.get(key, key)

    totals = Counter(stratum(image) for image in images)
    filled: Counter[tuple[tuple[str, str], Side]] = Counter()
    sides: dict[str, Side] = {}
    for image in images:
        if image.id in existing:
            sides[image.id] = side_of(existing[image.id])
            filled[stratum(image), sides[image.id]] += 1
    for group in sorted(members, key=lambda group: _keyed(split_seed, group)):
        fresh = [image for image in members[group] if image.id not in existing]
        settled = {sides[image.id] for image in members[group] if image.id in existing}
        if not fresh:
            continue
        if settled:
            side = next(side for side in SIDES if side in settled)
        else:
            governor, allowed = governing[group]
            key = stratum(governor)
            fractions = table[_row(governor)]
            deficits = {
                side: round(fractions.get(side, 0.0) * totals[key] - filled[key, side], 9)
                for side in SIDES
                if side in allowed
            }
            side = max(deficits, key=lambda side: deficits[side])
        for image in fresh:
            sides[image.id] = side
            filled[stratum(image), side] += 1
    return Assignment(
        splits={image.id: split_of(sides[image.id], image.label) for image in images},
        groups=components,
        notes=tuple(notes),
    )


def connect(ids: Iterable[str], links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Each id's group, everything that links connect with it, named by its smallest id."""
    parent = {name: name for name in ids}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for first, second in links:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    return {name: root(name) for name in parent}


def official_split(published_split: str, label: int) -> Split:
    """The split of an image under the official protocol, which has no validation split.

    Args:
        published_split: ``train`` or ``test``.
        label: 0 normal, 1 defective.
    """
    return "test" if published_split == "test" else split_of("fit", label)


def digest_fold(image_id: str, num_folds: int) -> int:
    """The fold whose test images an image is one of, where none are published; it depends on the image alone."""
    return int(hashlib.sha256(f"fold|{image_id}".encode()).hexdigest(), 16) % num_folds


def side_of(split: Split) -> Side:
    """The side a split lies on: train and pool are both fitted to."""
    return "fit" if split == "train" or split == "pool" else split


def split_of(side: Side, label: int) -> Split:
    """The split of an image of a label on a side; train never holds a defective image, pool never a normal one."""
    if side == "fit":
        return "pool" if label else "train"
    return side


@dataclass(frozen=True)
class FingerprintEntry:
    """What a fingerprint covers of one image."""

    image_digest: str
    mask_digest: str
    """Of the binarised mask's pixels; empty without a mask."""
    label: int
    defect_type: str
    split: Split


def search_fingerprint(entries: Iterable[FingerprintEntry]) -> str:
    """SHA-256 over everything a search may see: the train, pool and validation images, in any order."""
    return _fingerprint(entry for entry in entries if entry.split in SEARCH_SPLITS)


def test_fingerprint(entries: Iterable[FingerprintEntry]) -> str:
    """SHA-256 over the test images, in any order."""
    return _fingerprint(entry for entry in entries if entry.split == "test")


test_fingerprint.__test__ = False  # type: ignore[attr-defined]  # a test module that imports it must not collect it


def _fingerprint(entries: Iterable[FingerprintEntry]) -> str:
    lines = sorted(
        json.dumps([entry.image_digest, entry.mask_digest, entry.label, entry.defect_type, entry.split])
        for entry in entries
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _parse_row(name: str, fractions: Any, source: str) -> Fractions:
    fit = "pool" if name.endswith("defective") else "train"
    valid = {fit: "fit", "validation": "validation", "test": "test"}
    if not isinstance(fractions, Mapping) or not fractions:
        raise SSNError(f"{source}: splits.{name} must map {', '.join(valid)} to fractions")
    row: dict[Side, float] = {}
    for split, fraction in fractions.items():
        if split not in valid:
            raise SSNError(f"{source}: splits.{name} may name {', '.join(valid)}, not {split!r}")
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            raise SSNError(f"{source}: splits.{name}.{split} is {fraction!r}, but must be a number in [0, 1]")
        if fraction > 0:
            row[valid[split]] = float(fraction)  # type: ignore[index]
    if abs(sum(row.values()) - 1) > 1e-6:
        raise SSNError(f"{source}: the fractions of splits.{name} add up to {sum(row.values()):g}, but must make 1")
    return row


def _row(image: ImageKey) -> str:
    return f"{image.published_split or 'unsplit'}_{'defective' if image.label else 'normal'}"


def _governing(images: Sequence[ImageKey], table: Mapping[str, Fractions]) -> tuple[ImageKey, set[Side]]:
    """The image whose quotas a group counts toward, and the sides open to the group.

    Where images published apart show the same thing, and no side is open to all of them, the most held-out ones
    decide: a training image that also stands in test goes to the test image's side, never the other way.
    """
    ranked = sorted(images, key=lambda i: (_PUBLISHED_ORDER[i.published_split], -i.label, i.defect_type, i.id))
    for considered in (ranked, [i for i in ranked if i.published_split == ranked[0].published_split]):
        allowed = set.intersection(*(set(table[_row(image)]) for image in considered))
        if allowed:
            return ranked[0], allowed
    return ranked[0], set(table[_row(ranked[0])])


def _merge_small_strata(
    strata_of_groups: Sequence[tuple[str, str]],
) -> tuple[dict[tuple[str, str], tuple[str, str]], list[str]]:
    """Map each stratum with too few groups to the one it is split with, and say so."""
    sizes = Counter(strata_of_groups)
    merged: dict[tuple[str, str], tuple[str, str]] = {}
    notes = []
    for row in sorted({row for row, _ in sizes}):
        kinds = {kind: size for (stratum_row, kind), size in sorted(sizes.items()) if stratum_row == row}
        small = [kind for kind, size in kinds.items() if size < MIN_GROUPS]
        if not small or len(kinds) == 1:
            continue
        together = list(small)
        rest = sorted((size, kind) for kind, size in kinds.items() if kind not in small)
        if sum(kinds[kind] for kind in small) < MIN_GROUPS and rest:
            together.append(rest[0][1])
        if len(together) > 1:
            joint = (row, " + ".join(sorted(together)))
            merged.update({(row, kind): joint for kind in together})
            notes.append(
                f"{', '.join(small)}: fewer than {MIN_GROUPS} distinct images each; split together as {joint[1]}"
            )
    return merged, notes


def _keyed(split_seed: int, group: str) -> str:
    return hashlib.sha256(f"{split_seed}|{group}".encode()).hexdigest()
