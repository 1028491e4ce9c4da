"""From a raw folder to shards: read and check every image, split, write, read back, and only then say it is there."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
from ssn.data.records import ARROW_SCHEMA, SCHEMA_VERSION, SEARCH_SPLITS, SPLITS, Sample, Split
from ssn.data.splits import (
    Assignment,
    FingerprintEntry,
    ImageKey,
    assign_splits,
    search_fingerprint,
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
    status: Literal["written", "unchanged"]
    num_images: int
    unreadable: tuple[str, ...]
    """Errors of the images that were skipped."""
    without_mask: tuple[str, ...]
    """Defective images that come without a mask."""
    empty_masks: tuple[str, ...]
    """Defective images whose mask marks nothing; they count as unmasked."""
    groups_of_duplicates: int
    """Sets of identical or near-duplicate images; each lies on one side of the split."""
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report as text, one finding a line."""
        info = self.info
        head = f"{info.dataset}/{info.category}: {self.num_images} images, {self.status}"
        lines = [f"{head} (split seed {info.split_seed})"]
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
        if self.groups_of_duplicates:
            lines.append(f"  identical or near-duplicate images, kept together: {self.groups_of_duplicates} group(s)")
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
    mask_state: Literal["none", "marked", "empty", "faint"]
    """``faint``: nothing reaches the threshold, but something is above zero."""
    thumbnail: np.ndarray


@dataclass(frozen=True)
class _Scan:
    images: tuple[_Scanned, ...]
    unreadable: tuple[str, ...]


def ingest(
    manifest: Manifest,
    raw: Path,
    out_uri: str,
    categories: Sequence[str] | None = None,
    *,
    split_seed: int = 0,
    skip_unreadable: bool = False,
    on_progress: Progress | None = None,
) -> list[CategoryReport]:
    """Write the shards of a dataset's categories to ``<out_uri>/<dataset>/<category>/``.

    Doing it again changes nothing; with more images in ``raw``, earlier ones keep their split.

    Args:
        manifest: What the dataset is.
        raw: The folder as the dataset's authors publish it.
        out_uri: A local folder, or a URI such as ``s3://bucket/shards``.
        categories: Which; None: all that ``raw`` holds.
        split_seed: Keys the assignment to splits.
        skip_unreadable: Leave out corrupt images and count them, rather than refuse the category.
        on_progress: Called with the category, steps done and steps in all; every image is two steps, reading and
            writing.

    Returns:
        One report per category, in order.

    Raises:
        SSNError: the raw folder, an image, a mask, the resulting splits or the store is at fault.
    """
    raw = Path(raw).expanduser()
    items = _find_items(manifest, raw)
    chosen = _choose_categories(manifest, raw, sorted(items), categories)
    filesystem, root = open_filesystem(out_uri)
    check_store(filesystem, root, out_uri)
    reports = []
    for category in chosen:
        folder = open_filesystem(join_uri(out_uri, manifest.name, category))[1]
        with storage_errors(join_uri(out_uri, manifest.name, category)):
            reports.append(
                _ingest_category(
                    manifest,
                    raw,
                    items[category],
                    _Target(filesystem, folder),
                    split_seed,
                    skip_unreadable,
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
    if not raw.is_dir():
        raise SSNError(f"raw folder {raw} does not exist; give the folder that holds {manifest.title or manifest.name}")
    layout = LAYOUTS[manifest.layout]
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


def _ingest_category(
    manifest: Manifest,
    raw: Path,
    items: Sequence[RawItem],
    target: _Target,
    split_seed: int,
    skip_unreadable: bool,
    on_progress: Progress,
) -> CategoryReport:
    category = items[0].category
    ledger = target.read_json(ASSIGNMENTS_FILE) or {}
    if ledger and ledger["split_seed"] != split_seed:
        raise SSNError(
            f"{target.path(ASSIGNMENTS_FILE)} was made with split seed {ledger['split_seed']}, not {split_seed};"
            " use that seed, or another output folder"
        )
    scan = _scan(manifest, raw, items, skip_unreadable, on_progress)
    _check_labels(scan.images)
    _check_faint_masks(manifest, scan.images)
    assignment, new_ledger, notes = _assign(manifest, scan.images, ledger, split_seed)
    rows = _order_rows(scan.images, assignment, split_seed)
    info = _describe(manifest, category, rows, split_seed)
    _check_splits(raw, info)
    num_steps = 2 * len(items)
    content_digest = _digest_rows(rows)
    unchanged = _is_unchanged(target, rows, info, content_digest)
    if not unchanged:
        written = len(items)

        def advance() -> None:
            nonlocal written
            written += 1
            on_progress(category, written, num_steps)

        _write_category(target, rows, info, content_digest, manifest, new_ledger, advance)
    on_progress(category, num_steps, num_steps)
    sizes = Counter(assignment.groups[image.id] for image in scan.images)
    return CategoryReport(
        info=info,
        status="unchanged" if unchanged else "written",
        num_images=len(scan.images),
        unreadable=scan.unreadable,
        without_mask=_paths(scan.images, "none"),
        empty_masks=_paths(scan.images, "empty", "faint"),
        groups_of_duplicates=sum(size > 1 for size in sizes.values()),
        notes=(*assignment.notes, *notes),
    )


def _scan(
    manifest: Manifest, raw: Path, items: Sequence[RawItem], skip_unreadable: bool, on_progress: Progress
) -> _Scan:
    images: list[_Scanned] = []
    unreadable: list[str] = []

    def read(item: RawItem) -> _Scanned | _UnreadableError:
        try:
            return _scan_image(manifest, raw, item)
        except _UnreadableError as error:
            if not skip_unreadable:
                raise
            return error

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as executor:
        try:
            for done, result in enumerate(executor.map(read, items), start=1):
                if isinstance(result, _Scanned):
                    images.append(result)
                else:
                    unreadable.append(str(result))
                on_progress(items[0].category, done, 2 * len(items))
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    return _Scan(tuple(images), tuple(unreadable))


class _UnreadableError(SSNError):
    """An image or mask that cannot be decoded: the only fault that ``skip_unreadable`` forgives."""


def _scan_image(manifest: Manifest, raw: Path, item: RawItem) -> _Scanned:
    source_path = _relative(item.image_path, raw)
    data = _read_raw(item.image_path, raw)
    try:
        image_HW3 = decode_image(data, source=source_path)
    except SSNError as error:
        raise _UnreadableError(str(error)) from error
    height, width = image_HW3.shape[:2]
    mask_digest, mask_state = "", "none"
    if item.label and manifest.masks != "none":
        if item.mask_path is not None:
            levels_HW = _read_mask_levels(item.mask_path, raw)
            mask_source = _relative(item.mask_path, raw)
            if levels_HW.shape != (height, width):
                mask_height, mask_width = levels_HW.shape
                raise SSNError(
                    f"mask {mask_source} is {mask_width}x{mask_height} but its image is {width}x{height};"
                    " fix or remove it"
                )
            mask_HW = levels_HW >= manifest.mask_threshold
            mask_state = "marked" if mask_HW.any() else "faint" if levels_HW.any() else "empty"
            mask_digest = _mask_digest(mask_HW) if mask_state == "marked" else ""
        elif manifest.masks == "required":
            raise SSNError(
                f"defective image {source_path} has no mask, and {manifest.name} requires one; add it, remove the"
                " image, or set `masks: optional` in the manifest"
            )
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


def _assign(
    manifest: Manifest, images: Sequence[_Scanned], ledger: Mapping[str, Any], split_seed: int
) -> tuple[Assignment, dict[str, Any], list[str]]:
    keys = [
        ImageKey(image.id, image.item.label, image.item.defect_type, image.item.published_split) for image in images
    ]
    kind = ledger["kind"] if ledger else manifest.splits.resolve_kind(keys)
    table = {row: dict(fractions) for row, fractions in manifest.splits.table(kind).items()}
    pairs = link_near_duplicates(np.stack([image.thumbnail for image in images])) if images else []
    assigned = ledger.get("images", {})
    existing: dict[str, Split] = {image_id: entry["split"] for image_id, entry in assigned.items()}
    assignment = assign_splits(
        keys,
        [(images[i].id, images[j].id) for i, j in pairs],
        table,
        split_seed=split_seed,
        existing=existing,
    )
    notes = []
    if ledger and ledger["fractions"] != table:
        notes.append("the manifest's split fractions have changed: they apply to new images, assigned ones stay")
    entries = {
        image_id: {"split": split, "group": assignment.groups[image_id]}
        for image_id, split in assignment.splits.items()
    }
    new_ledger = {
        "schema_version": SCHEMA_VERSION,
        "split_seed": split_seed,
        "kind": kind,
        "fractions": table,
        # Images that are gone keep their entry, so that they return to where they were.
        "images": {**assigned, **entries},
    }
    return assignment, new_ledger, notes


def _order_rows(images: Sequence[_Scanned], assignment: Assignment, split_seed: int) -> list[tuple[Split, _Scanned]]:
    """Rows in stored order: by split, then by a keyed digest, so that every row group holds a mixture."""

    def key(row: tuple[Split, _Scanned]) -> tuple[int, str, str]:
        split, image = row
        keyed = hashlib.sha256(f"{split_seed}|{image.id}".encode()).hexdigest()
        return SPLITS.index(split), keyed, image.source_path

    return sorted(((assignment.splits[image.id], image) for image in images), key=key)


def _describe(
    manifest: Manifest, category: str, rows: Sequence[tuple[Split, _Scanned]], split_seed: int
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
        split_seed=split_seed,
        counts=counts,
        search_fingerprint=search_fingerprint(entries),
        test_fingerprint=test_fingerprint(entries),
        defaults=dict(manifest.defaults),
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


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})"
