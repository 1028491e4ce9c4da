"""From a raw folder to shards: read and check every image, split, write, read back, and only then say it is there.

A check stops before anything is written.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from ssn.config import digest
from ssn.data.duplicates import link_near_duplicates, thumbnail
from ssn.data.layouts import LAYOUTS, RawItem
from ssn.data.manifest import Manifest, is_plain_name, reject_unknown
from ssn.data.preprocess import decode_image, decode_mask, decode_mask_levels, encode_mask
from ssn.data.reader import (
    CATEGORY_FILE,
    TEST_FILE,
    CategoryInfo,
    Shard,
    SplitCount,
    info_to_json,
    iterate_samples,
    parse_info,
    parse_shards,
)
from ssn.data.records import ARROW_SCHEMA, GOOD, SCHEMA_VERSION, SEARCH_SPLITS, SPLITS, Sample, Split
from ssn.data.splits import (
    FingerprintEntry,
    ImageKey,
    Protocol,
    assign_splits,
    connect,
    digest_fold,
    official_split,
    search_fingerprint,
    side_of,
    test_fingerprint,
)
from ssn.data.storage import (
    check_store,
    is_store_error,
    join_uri,
    open_filesystem,
    read_json,
    storage_errors,
    write_json,
)
from ssn.errors import SSNError

ASSIGNMENTS_FILE = "assignments.json"
ROW_GROUP_IMAGES = 32
SHARD_BYTES = 512 * 2**20
"""A shard that has grown past this is closed and the next one begun."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CategoryReport:
    """What ingest found and did for one category."""

    info: CategoryInfo
    status: Literal["written", "unchanged", "would be written"]
    num_images: int
    unreadable: tuple[str, ...]
    """Errors of the images that were skipped."""
    without_mask: tuple[str, ...]
    """Defective images that come without a mask."""
    empty_masks: tuple[str, ...]
    """Defective images whose mask marks nothing; they count as unmasked."""
    withheld_masks: tuple[str, ...]
    """Defective images whose mask the chosen published split does not train with; they count as unmasked."""
    duplicates: tuple[tuple[str, ...], ...]
    """Sets of identical or near-duplicate images; each lies on one side of the split, but for those in ``torn``."""
    torn: tuple[tuple[str, ...], ...]
    """Those of them that lie on several sides: as published, or as assigned before a new image linked them."""
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report as text, one finding a line."""
        info = self.info
        how = f"split seed {info.split_seed}" if info.protocol == "validation" else "official split"
        fold = "" if info.fold is None else f", fold {info.fold}"
        lines = [f"{info.dataset}/{info.category}: {self.num_images} images, {self.status} ({how}{fold})"]
        for split, count in info.counts.items():
            masks = f", {count.masks} with masks" if count.defective else ""
            lines.append(f"  {split:<10} {count.normal:>5} normal {count.defective:>5} defective{masks}")
        num_defective = sum(count.defective for count in info.counts.values())
        if not num_defective:
            lines.append("  no defective images: only normal ones can be scored")
        elif len(self.without_mask) == num_defective:
            lines.append("  no defective image has a mask: pixel metrics and supervised training are not available")
        elif self.without_mask:
            lines.append(f"  {_some(self.without_mask)} without a mask")
        if self.empty_masks:
            lines.append(f"  {_some(self.empty_masks)} with an empty mask, counted as unmasked")
        if self.withheld_masks:
            lines.append(f"  {_some(self.withheld_masks)} with a mask outside --masks, counted as unmasked")
        if self.duplicates:
            lines.append(f"  identical or near-duplicate images, kept together: {_groups(self.duplicates)}")
        if self.torn:
            why = (
                "published in train and in test" if info.protocol == "official" else "assigned before they were linked"
            )
            lines.append(f"  of these, on several sides of the split because {why}: {_groups(self.torn)}")
        if self.unreadable:
            lines.append(f"  skipped {_some(self.unreadable)}")
        return lines + [f"  {note}" for note in self.notes]


@dataclass(frozen=True)
class _Scanned:
    """An image that was read and checked."""

    item: RawItem
    id: str
    source_path: str
    width: int
    height: int
    mask_digest: str
    """Empty without a mask that marks something."""
    mask_state: Literal["none", "marked", "empty", "faint", "withheld"]
    """``faint``: nothing reaches the threshold, but something is above zero; ``withheld``: not one of the published
    split's masks."""
    thumbnail: np.ndarray


@dataclass(frozen=True)
class _Scan:
    images: tuple[_Scanned, ...]
    unreadable: tuple[str, ...]


@dataclass(frozen=True)
class _Options:
    split_seed: int
    skip_unreadable: bool
    check: bool
    protocol: Protocol
    fold: int | None
    masks: int | None


def ingest(
    manifest: Manifest,
    raw: Path,
    out_uri: str | None,
    categories: Sequence[str] | None = None,
    *,
    split_seed: int = 0,
    skip_unreadable: bool = False,
    check: bool = False,
    protocol: Protocol = "validation",
    fold: int | None = None,
    masks: int | None = None,
    on_progress: Progress | None = None,
) -> list[CategoryReport]:
    """Write the shards of a dataset's categories to ``<out_uri>/<dataset>/<category>/``.

    Doing it again changes nothing; with more images in ``raw``, earlier ones keep their split.

    Args:
        manifest: What the dataset is.
        raw: The folder as the dataset's authors publish it; for a table of one's own, the table.
        out_uri: A local folder, or a URI such as ``s3://bucket/shards``. None: nowhere, which a check alone allows.
        categories: Which; None: all that ``raw`` holds.
        split_seed: Keys the assignment to splits.
        skip_unreadable: Leave out corrupt images and count them, rather than refuse the category.
        check: Read and check everything, assign splits, honouring assignments in ``out_uri``, and write nothing.
        protocol: ``official``: take the published train and test split as it is, without a validation split.
        fold: Of a dataset published in folds, the one to test on; the official protocol needs it.
        masks: Of the published choices of masks to train with, the one of this many; None: every mask.
        on_progress: Called with the category, steps done and steps in all; every image is two steps, reading and
            writing, or just the first in a check.

    Returns:
        One report per category, in order.

    Raises:
        SSNError: the raw folder, an image, a mask, the resulting splits or the store is at fault.
    """
    if out_uri is None and not check:
        raise SSNError("give --out, the folder or URI to write shards to; or --check, to write nothing")
    raw = Path(raw).expanduser()
    items = _find_items(manifest, raw)
    chosen = _choose_categories(manifest, raw, sorted(items), categories)
    options = _Options(split_seed, skip_unreadable, check, protocol, fold, masks)
    for category in chosen:
        _check_published(manifest, items[category], options)
    base = raw.parent if raw.is_file() else raw
    if out_uri is not None:
        filesystem, root = open_filesystem(out_uri)
        check_store(filesystem, root, out_uri)
    reports = []
    for category in chosen:
        where = join_uri(out_uri, manifest.name, category) if out_uri is not None else ""
        target = _Target(*open_filesystem(where)) if where else None
        with storage_errors(where or str(raw)):
            reports.append(
                _ingest_category(
                    manifest,
                    base,
                    items[category],
                    target,
                    options,
                    on_progress or (lambda category, done, total: None),
                )
            )
    return reports


@dataclass(frozen=True)
class _Target:
    filesystem: pafs.FileSystem
    folder: str

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, or None if it is not there."""
        if self.filesystem.get_file_info(self.path(name)).type == pafs.FileType.NotFound:
            return None
        return read_json(self.filesystem, self.path(name))

    def delete(self, name: str) -> None:
        if self.filesystem.get_file_info(self.path(name)).type != pafs.FileType.NotFound:
            self.filesystem.delete_file(self.path(name))


def _find_items(manifest: Manifest, raw: Path) -> dict[str, list[RawItem]]:
    layout = LAYOUTS[manifest.layout]
    if not raw.is_dir() and not (layout.takes_file and raw.is_file()):
        raise SSNError(f"raw folder {raw} does not exist; give the folder that holds {manifest.title or manifest.name}")
    items: dict[str, list[RawItem]] = defaultdict(list)
    for item in layout.list_items(raw, manifest.name):
        if not manifest.categories or item.category in manifest.categories:
            items[item.category].append(item)
    if not items:
        raise SSNError(f"raw folder {raw} has no images of layout {manifest.layout!r}; it should hold {layout.expects}")
    return dict(items)


def _choose_categories(manifest: Manifest, raw: Path, found: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    chosen = list(dict.fromkeys(wanted if wanted is not None else found))
    reject_unknown(chosen, manifest.categories or found, f"category of {manifest.name}")
    for category in chosen:
        if category not in found:
            raise SSNError(f"raw folder {raw} holds no images of category {category!r}; it holds {', '.join(found)}")
        if not is_plain_name(category):
            raise SSNError(f"folder {category!r} in {raw} may hold only letters, digits, _, - and .; rename it")
    return chosen


def _check_published(manifest: Manifest, items: Sequence[RawItem], options: _Options) -> None:
    """Refuse what the dataset does not publish, before any image is read."""
    num_folds = LAYOUTS[manifest.layout].num_folds
    folds = ", ".join(map(str, range(num_folds)))
    name = f"{manifest.name}/{items[0].category}"
    if options.fold is not None and options.protocol != "official":
        raise SSNError(f"--fold {options.fold} belongs to --protocol official; give both, or neither")
    if options.fold is not None and not num_folds:
        raise SSNError(f"{name} is not published in folds; leave --fold out")
    if options.protocol == "official" and num_folds and options.fold not in range(num_folds):
        given = "" if options.fold is None else f", not {options.fold}"
        raise SSNError(f"{name} is published in {num_folds} folds; choose one with --fold {folds}{given}")
    if options.protocol == "official" and not num_folds and not any(item.published_split for item in items):
        raise SSNError(
            f"{name} publishes no train and test split here, which --protocol official takes; leave --protocol out"
        )
    if options.masks is not None:
        published = {number for item in items for number in item.mask_budgets or ()}
        if options.masks not in published:
            valid = f"it does for {', '.join(map(str, sorted(published)))}" if published else "leave --masks out"
            raise SSNError(f"{name} publishes no choice of {options.masks} masks here; {valid}")


def _ingest_category(
    manifest: Manifest,
    raw: Path,
    items: Sequence[RawItem],
    target: _Target | None,
    options: _Options,
    on_progress: Progress,
) -> CategoryReport:
    category = items[0].category
    ledger = (target.read_json(ASSIGNMENTS_FILE) or {}) if target else {}
    if target and ledger:
        _check_ledger(target.path(ASSIGNMENTS_FILE), ledger, options)
    num_steps = len(items) * (1 if options.check else 2)
    scan = _scan(manifest, raw, items, options, lambda done: on_progress(category, done, num_steps))
    _check_labels(scan.images)
    _check_faint_masks(manifest, scan.images)
    placed = _place(manifest, scan.images, ledger, options)
    rows = _order_rows(placed.rows, options.split_seed)
    info = _describe(manifest, category, rows, options)
    _check_splits(raw, info)
    content_digest = _digest_rows(rows)
    unchanged = target is not None and _is_unchanged(target, rows, info, content_digest)
    if target is not None and not unchanged and not options.check:
        written = len(items)

        def advance() -> None:
            nonlocal written
            written += 1
            on_progress(category, written, num_steps)

        _write_category(target, rows, info, content_digest, manifest, placed.ledger, advance)
    on_progress(category, num_steps, num_steps)
    images = [image for _, image in placed.rows]
    return CategoryReport(
        info=info,
        status="unchanged" if unchanged else "would be written" if options.check else "written",
        num_images=len(images),
        unreadable=scan.unreadable,
        without_mask=_paths(images, "none"),
        empty_masks=_paths(images, "empty", "faint"),
        withheld_masks=_paths(images, "withheld"),
        duplicates=placed.duplicates,
        torn=placed.torn,
        notes=placed.notes,
    )


def _check_ledger(path: str, ledger: Mapping[str, Any], options: _Options) -> None:
    protocol = ledger.get("protocol", "validation")  # earlier versions knew no other
    if protocol != options.protocol:
        raise SSNError(
            f"{path} was made with --protocol {protocol}, not {options.protocol}; use that protocol, or another output"
            " folder"
        )
    if ledger["split_seed"] != options.split_seed:
        raise SSNError(
            f"{path} was made with split seed {ledger['split_seed']}, not {options.split_seed};"
            " use that seed, or another output folder"
        )
    if ledger.get("fold") != options.fold:
        raise SSNError(
            f"{path} was made with --fold {ledger.get('fold')}, not {options.fold}; use that fold, or another output"
            " folder"
        )


def _scan(
    manifest: Manifest,
    raw: Path,
    items: Sequence[RawItem],
    options: _Options,
    advance: Callable[[int], None],
) -> _Scan:
    """Read every image; a check goes on after a fault, to name all that are at fault."""
    images: list[_Scanned] = []
    unreadable: list[str] = []
    faults: list[tuple[str, _FaultError]] = []

    def read(item: RawItem) -> _Scanned | _FaultError:
        try:
            return _scan_image(manifest, raw, item, options.masks)
        except _FaultError as error:
            if options.check or (options.skip_unreadable and isinstance(error, _UnreadableError)):
                return error
            raise

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as executor:
        try:
            for done, (item, result) in enumerate(zip(items, executor.map(read, items), strict=True), start=1):
                if isinstance(result, _Scanned):
                    images.append(result)
                elif options.skip_unreadable and isinstance(result, _UnreadableError):
                    unreadable.append(str(result))
                else:
                    faults.append((_relative(item.image_path, raw), result))
                if done < len(items):  # a check that found faults must not look finished
                    advance(done)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    if faults:
        _, first = faults[0]
        others = [path for path, _ in faults[1:]]
        raise SSNError(f"{first}; at fault as well: {_some(others, 20)}" if others else str(first)) from first
    return _Scan(tuple(images), tuple(unreadable))


class _FaultError(SSNError):
    """Something is wrong with one image or its mask."""


class _UnreadableError(_FaultError):
    """An image or mask that cannot be decoded: the only fault that ``skip_unreadable`` forgives."""


def _scan_image(manifest: Manifest, raw: Path, item: RawItem, masks: int | None) -> _Scanned:
    source_path = _relative(item.image_path, raw)
    data = _read_raw(item.image_path, raw)
    try:
        image_HW3 = decode_image(data, source=source_path)
    except SSNError as error:
        raise _UnreadableError(str(error)) from error
    height, width = image_HW3.shape[:2]
    levels_HW = None
    if item.label and item.mask_path is not None and (manifest.masks != "none" or item.label_from_mask):
        levels_HW = _read_mask_levels(item.mask_path, raw)
        if levels_HW.shape != (height, width):
            mask_height, mask_width = levels_HW.shape
            raise _FaultError(
                f"mask {_relative(item.mask_path, raw)} is {mask_width}x{mask_height} but its image is"
                f" {width}x{height}; fix or remove it"
            )
        if item.label_from_mask and not levels_HW.any():
            item = replace(item, label=0, defect_type=GOOD, mask_path=None)
    mask_digest, mask_state = "", "none"
    if item.label and manifest.masks != "none":
        if levels_HW is None:
            if manifest.masks == "required":
                raise _FaultError(
                    f"defective image {source_path} has no mask, and {manifest.name} requires one; add it, remove the"
                    " image, or set `masks: optional` in the manifest"
                )
        elif masks is not None and item.mask_budgets is not None and masks not in item.mask_budgets:
            mask_state = "withheld"
        else:
            mask_HW = levels_HW >= manifest.mask_threshold
            mask_state = "marked" if mask_HW.any() else "faint" if levels_HW.any() else "empty"
            mask_digest = _mask_digest(mask_HW) if mask_state == "marked" else ""
    return _Scanned(
        item=item,
        id=hashlib.sha256(data).hexdigest(),
        source_path=source_path,
        width=width,
        height=height,
        mask_digest=mask_digest,
        mask_state=mask_state,  # type: ignore[arg-type]
        thumbnail=thumbnail(image_HW3),
    )


def _read_raw(path: Path, raw: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise _UnreadableError(f"{_relative(path, raw)} cannot be read ({reason}); restore or remove it") from error


def _read_mask_levels(path: Path, raw: Path) -> np.ndarray:
    source = _relative(path, raw)
    data = _read_raw(path, raw)
    try:
        return decode_mask_levels(data, source=source)
    except SSNError as error:
        raise _UnreadableError(str(error)) from error


def _check_labels(images: Iterable[_Scanned]) -> None:
    first: dict[str, _Scanned] = {}
    for image in images:
        twin = first.setdefault(image.id, image)
        if twin.item.label != image.item.label:
            raise SSNError(
                f"{twin.source_path} and {image.source_path} are the same image, labelled {twin.item.defect_type} and"
                f" {image.item.defect_type}; remove one"
            )


def _check_faint_masks(manifest: Manifest, images: Sequence[_Scanned]) -> None:
    """Refuse masks that are all below the threshold: they hold class indices, not grey levels."""
    states = Counter(image.mask_state for image in images)
    if states["faint"] and not states["marked"]:
        example = next(image for image in images if image.mask_state == "faint")
        raise SSNError(
            f"no mask of category {example.item.category} reaches level {manifest.mask_threshold}, though"
            f" {example.item.mask_path} is not black; if masks hold class numbers, set `mask_threshold: 1`"
        )


@dataclass(frozen=True)
class _Placed:
    """Images with their splits."""

    rows: tuple[tuple[Split, _Scanned], ...]
    ledger: dict[str, Any]
    duplicates: tuple[tuple[str, ...], ...]
    torn: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def _place(manifest: Manifest, images: Sequence[_Scanned], ledger: Mapping[str, Any], options: _Options) -> _Placed:
    """Give every image a split, as the protocol has it."""
    notes: list[str] = []
    if options.fold is not None:
        images, notes = _take_fold(manifest, images, options.fold)
    if options.protocol == "official":
        left_out = [image.source_path for image in images if not image.item.published_split]
        if left_out:
            images = [image for image in images if image.item.published_split]
            notes.append(f"{_some(left_out)} left out: in neither of the published train and test splits")
    pairs = link_near_duplicates(np.stack([image.thumbnail for image in images])) if images else []
    links = [(images[i].id, images[j].id) for i, j in pairs]
    if options.protocol == "official":
        rows = [(official_split(image.item.published_split, image.item.label), image) for image in images]
        splits, groups = _keep_published(rows), connect((image.id for image in images), links)
        settings: dict[str, Any] = {"fold": options.fold}
        _check_moved(ledger, rows)
    else:
        keys = [
            ImageKey(image.id, image.item.label, image.item.defect_type, image.item.published_split) for image in images
        ]
        kind = ledger["kind"] if ledger else manifest.splits.resolve_kind(keys)
        table = {row: dict(fractions) for row, fractions in manifest.splits.table(kind).items()}
        existing: dict[str, Split] = {name: entry["split"] for name, entry in ledger.get("images", {}).items()}
        assignment = assign_splits(
            keys, [*links, *_link_groups(images)], table, split_seed=options.split_seed, existing=existing
        )
        splits, groups = assignment.splits, assignment.groups
        rows = [(splits[image.id], image) for image in images]
        settings = {"kind": kind, "fractions": table}
        notes += assignment.notes
        if ledger and ledger["fractions"] != table:
            notes.append("the manifest's split fractions have changed: they apply to new images, assigned ones stay")
    new_ledger = {
        "schema_version": SCHEMA_VERSION,
        "protocol": options.protocol,
        "split_seed": options.split_seed,
        **settings,
        # Images that are gone keep their entry, so that they return to where they were.
        "images": {
            **ledger.get("images", {}),
            **{name: {"split": split, "group": groups[name]} for name, split in splits.items()},
        },
    }
    duplicates, torn = _find_duplicates(rows, connect((image.id for image in images), links))
    return _Placed(tuple(rows), new_ledger, duplicates, torn, tuple(notes))


def _take_fold(manifest: Manifest, images: Sequence[_Scanned], fold: int) -> tuple[list[_Scanned], list[str]]:
    """Images with the published split of a fold; where no folds come with the images, those of a digest."""
    if any(image.item.folds for image in images):
        return [_publish(image, image.item.folds[fold] if image.item.folds else "") for image in images], []
    num_folds = LAYOUTS[manifest.layout].num_folds
    note = f"the published folds are not in the raw folder: {num_folds} folds by image digest stand in for them"
    taken = [_publish(image, "test" if digest_fold(image.id, num_folds) == fold else "train") for image in images]
    return taken, [note]


def _publish(image: _Scanned, published_split: str) -> _Scanned:
    return replace(image, item=replace(image.item, published_split=published_split))


def _keep_published(rows: Iterable[tuple[Split, _Scanned]]) -> dict[str, Split]:
    """By id, the split of each image; an image published in both counts as a test image."""
    splits: dict[str, Split] = {}
    for split, image in rows:
        if splits.get(image.id) != "test":
            splits[image.id] = split
    return splits


def _check_moved(ledger: Mapping[str, Any], rows: Sequence[tuple[Split, _Scanned]]) -> None:
    """Refuse images that were published on the other side when they were ingested before."""
    splits = _keep_published(rows)
    before = ledger.get("images", {})
    for _, image in rows:
        old = before.get(image.id, {}).get("split")
        if old is not None and side_of(old) != side_of(splits[image.id]):
            raise SSNError(
                f"{image.source_path} was ingested into {old} and now stands in the published"
                f" {image.item.published_split} split; put it back, or use another output folder"
            )


def _link_groups(images: Iterable[_Scanned]) -> list[tuple[str, str]]:
    """Pairs of ids that connect the images of each group the layout names."""
    first: dict[str, str] = {}
    return [(first.setdefault(image.item.group, image.id), image.id) for image in images if image.item.group]


def _find_duplicates(
    rows: Iterable[tuple[Split, _Scanned]], groups: Mapping[str, str]
) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """Paths of the images in every group of two or more, sorted; and of those groups that lie on several sides."""
    members: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for split, image in rows:
        members[groups[image.id]].append((image.source_path, side_of(split)))
    several = sorted(sorted(group) for group in members.values() if len(group) > 1)
    torn = [group for group in several if len({side for _, side in group}) > 1]
    return tuple(map(_first_of_each, several)), tuple(map(_first_of_each, torn))


def _first_of_each(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(first for first, _ in pairs)


def _order_rows(rows: Iterable[tuple[Split, _Scanned]], split_seed: int) -> list[tuple[Split, _Scanned]]:
    """Rows in stored order: by split, then by a keyed digest, so that every row group holds a mixture."""

    def key(row: tuple[Split, _Scanned]) -> tuple[int, str, str]:
        split, image = row
        keyed = hashlib.sha256(f"{split_seed}|{image.id}".encode()).hexdigest()
        return SPLITS.index(split), keyed, image.source_path

    return sorted(rows, key=key)


def _describe(
    manifest: Manifest, category: str, rows: Sequence[tuple[Split, _Scanned]], options: _Options
) -> CategoryInfo:
    entries = [
        FingerprintEntry(image.id, image.mask_digest, image.item.label, image.item.defect_type, split)
        for split, image in rows
    ]
    counts = {
        split: SplitCount(
            normal=sum(entry.split == split and entry.label == 0 for entry in entries),
            defective=sum(entry.split == split and entry.label == 1 for entry in entries),
            masks=sum(entry.split == split and bool(entry.mask_digest) for entry in entries),
        )
        for split in SPLITS
    }
    return CategoryInfo(
        dataset=manifest.name,
        category=category,
        schema_version=SCHEMA_VERSION,
        split_seed=options.split_seed,
        counts=counts,
        search_fingerprint=search_fingerprint(entries),
        test_fingerprint=test_fingerprint(entries),
        defaults=manifest.defaults_of(category),
        protocol=options.protocol,
        fold=options.fold,
    )


def _digest_rows(rows: Sequence[tuple[Split, _Scanned]]) -> str:
    """Of everything that shards hold, in stored order."""
    fields: list[list[str | int]] = []
    for split, image in rows:
        item = image.item
        fields.append([image.id, image.mask_digest, split, image.source_path])
        fields.append([item.label, item.defect_type, item.published_split])
    return digest(fields)


def _check_splits(raw: Path, info: CategoryInfo) -> None:
    required: tuple[tuple[Split, str], ...] = (("train", "normal "), ("validation", ""), ("test", ""))
    for split, what in required:
        if split == "validation" and info.protocol == "official":
            continue
        count = info.counts[split]
        if not count.normal + count.defective:
            raise SSNError(
                f"category {info.category} in {raw} leaves no {what}image for {split};"
                f" add {what}images or change `splits` in the manifest"
            )


def _is_unchanged(
    target: _Target, rows: Sequence[tuple[Split, _Scanned]], info: CategoryInfo, content_digest: str
) -> bool:
    """Whether what is stored is what would be written, down to every byte of every image."""
    stored = target.read_json(CATEGORY_FILE)
    if not stored or stored.get("schema_version") != SCHEMA_VERSION or stored["content_digest"] != content_digest:
        return False
    test = target.read_json(TEST_FILE)
    if parse_info(stored) != info or not test:
        return False
    shards = {**stored["shards"], "test": test["shards"]}
    try:
        for split in SPLITS:
            _verify_shards(target, parse_shards(shards[split]), _images_of(rows, split))
    except (SSNError, pa.ArrowInvalid):
        return False
    except OSError as error:
        if is_store_error(error):
            raise
        return False
    return True


def _write_category(
    target: _Target,
    rows: Sequence[tuple[Split, _Scanned]],
    info: CategoryInfo,
    content_digest: str,
    manifest: Manifest,
    ledger: Mapping[str, Any],
    advance: Callable[[], None],
) -> None:
    """Shards, then the assignments, then the metadata that says they are whole."""
    if isinstance(target.filesystem, pafs.LocalFileSystem):
        target.filesystem.create_dir(target.folder, recursive=True)
    target.delete(CATEGORY_FILE)
    target.delete(TEST_FILE)
    shards = {}
    for split in SPLITS:
        images = _images_of(rows, split)
        written = _write_shards(target, info, split, images, manifest, advance)
        _verify_shards(target, written, images)
        shards[split] = [asdict(shard) for shard in written]
    _delete_stale_shards(target, {entry["name"] for entries in shards.values() for entry in entries})
    write_json(target.filesystem, target.path(ASSIGNMENTS_FILE), ledger)
    test = {"schema_version": SCHEMA_VERSION, "shards": shards["test"]}
    write_json(target.filesystem, target.path(TEST_FILE), test)
    category = {
        **info_to_json(info),
        "title": manifest.title,
        "license": manifest.license,
        "homepage": manifest.homepage,
        "content_digest": content_digest,
        "shards": {split: shards[split] for split in SEARCH_SPLITS},
    }
    write_json(target.filesystem, target.path(CATEGORY_FILE), category)


def _images_of(rows: Iterable[tuple[Split, _Scanned]], split: Split) -> list[_Scanned]:
    return [image for row_split, image in rows if row_split == split]


def _write_shards(
    target: _Target,
    info: CategoryInfo,
    split: Split,
    images: Sequence[_Scanned],
    manifest: Manifest,
    advance: Callable[[], None],
) -> list[Shard]:
    schema = ARROW_SCHEMA.with_metadata(
        {"schema_version": str(SCHEMA_VERSION), "dataset": info.dataset, "category": info.category, "split": split}
    )
    shards: list[Shard] = []
    groups = [images[start : start + ROW_GROUP_IMAGES] for start in range(0, len(images), ROW_GROUP_IMAGES)]
    while groups:
        name = f"{split}-{len(shards):05d}.parquet"
        row_groups: list[int] = []
        num_bytes = 0
        # Images are compressed already; checksums tell a damaged page from a strange image.
        with pq.ParquetWriter(
            target.path(name), schema, filesystem=target.filesystem, compression="none", write_page_checksum=True
        ) as writer:
            while groups and num_bytes < SHARD_BYTES:
                group = groups.pop(0)
                table = _to_table([_to_sample(image, split, manifest) for image in group], schema)
                writer.write_table(table, row_group_size=len(group))
                row_groups.append(len(group))
                num_bytes += table.nbytes
                for _ in group:
                    advance()
        shards.append(Shard(name, tuple(row_groups)))
    return shards


def _to_sample(image: _Scanned, split: Split, manifest: Manifest) -> Sample:
    data = image.item.image_path.read_bytes()
    if hashlib.sha256(data).hexdigest() != image.id:
        raise SSNError(f"{image.item.image_path} changed while it was being ingested; run the command again")
    mask = None
    if image.mask_digest and image.item.mask_path is not None:
        levels_HW = decode_mask_levels(image.item.mask_path.read_bytes(), source=str(image.item.mask_path))
        mask = encode_mask(levels_HW >= manifest.mask_threshold)
    return Sample(
        id=image.id,
        image=data,
        mask=mask,
        label=image.item.label,
        defect_type=image.item.defect_type,
        split=split,
        published_split=image.item.published_split,
        source_path=image.source_path,
        width=image.width,
        height=image.height,
    )


def _to_table(samples: Sequence[Sample], schema: pa.Schema) -> pa.Table:
    columns = {name: [getattr(sample, name) for sample in samples] for name in schema.names}
    return pa.table(columns, schema=schema)


def _verify_shards(target: _Target, shards: Sequence[Shard], images: Sequence[_Scanned]) -> None:
    """Read back what was written and compare every image and mask with what was scanned."""
    expected = iter(images)
    for shard in shards:
        path = target.path(shard.name)
        for sample in _read_back(target.filesystem, path):
            image = next(expected, None)
            mask_digest = _mask_digest(decode_mask(sample.mask, source=path)) if sample.mask is not None else ""
            if (
                image is None
                or hashlib.sha256(sample.image).hexdigest() != image.id
                or sample.source_path != image.source_path
                or mask_digest != image.mask_digest
            ):
                raise SSNError(f"{path} does not read back as written; check the disk or store and ingest again")
    if next(expected, None) is not None:
        raise SSNError(f"{target.folder} lost images while writing; check the disk or store and ingest again")


def _read_back(filesystem: pafs.FileSystem, path: str) -> Iterator[Sample]:
    with filesystem.open_input_file(path) as file:
        parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
        for group in range(parquet.num_row_groups):
            yield from iterate_samples(parquet.read_row_group(group))


def _delete_stale_shards(target: _Target, names: set[str]) -> None:
    for file in target.filesystem.get_file_info(pafs.FileSelector(target.folder)):
        if file.base_name.endswith(".parquet") and file.base_name not in names:
            target.filesystem.delete_file(file.path)


def _mask_digest(mask_HW: np.ndarray) -> str:
    """SHA-256 over a mask's size and pixels, whatever encodes them."""
    return hashlib.sha256(f"{mask_HW.shape}".encode() + np.packbits(mask_HW).tobytes()).hexdigest()


def _paths(images: Iterable[_Scanned], *states: str) -> tuple[str, ...]:
    return tuple(image.source_path for image in images if image.item.label and image.mask_state in states)


def _relative(path: Path, raw: Path) -> str:
    return path.relative_to(raw).as_posix()


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return f"{len(names)} ({shown}{', ...' if len(names) > most else ''})"


def _groups(groups: Sequence[Sequence[str]]) -> str:
    shown = "; ".join(", ".join(group[:3]) + (", ..." if len(group) > 3 else "") for group in groups[:3])
    return f"{len(groups)} group(s) ({shown}{'; ...' if len(groups) > 3 else ''})"
