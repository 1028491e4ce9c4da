"""Reading shards: streams of samples, split by rank, in bounded memory.

A category's folder holds ``category.json`` (what it is, and the train, pool and validation shards), ``test.json`` (the
test shards), ``assignments.json`` and the shards themselves. A search opens the first alone, so it cannot so much as
name a test shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from ssn.data.manifest import reject_unknown
from ssn.data.records import ARROW_SCHEMA, SCHEMA_VERSION, SEARCH_SPLITS, Sample, SearchSplit, Split
from ssn.data.splits import Protocol
from ssn.data.storage import (
    check_store,
    is_store_error,
    join_uri,
    open_filesystem,
    read_json,
    resolve_uri,
    storage_errors,
    with_retries,
)
from ssn.errors import SSNError

T = TypeVar("T")

CATEGORY_FILE = "category.json"
TEST_FILE = "test.json"


@dataclass(frozen=True)
class SplitCount:
    """How many images a split has."""

    normal: int
    defective: int
    masks: int
    """Defective images with a mask that marks something."""


@dataclass(frozen=True)
class CategoryInfo:
    """What is known of an ingested category without reading its images."""

    dataset: str
    category: str
    schema_version: int
    split_seed: int
    counts: dict[Split, SplitCount]
    search_fingerprint: str
    """Of the train, pool and validation images; part of a trial's identity."""
    test_fingerprint: str
    defaults: dict[str, Any]
    """Dotted configuration keys and values: the manifest's, as they were at ingest."""
    protocol: Protocol = "validation"
    """``official``: the published train and test split, without a validation split."""
    fold: int | None = None
    """The fold that is tested, for a dataset published in folds under the official protocol."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    name: str
    row_groups: tuple[int, ...]
    """Rows of each row group."""


@dataclass(frozen=True)
class _Shards:
    """Shards of one folder, opened lazily: pickles as names alone."""

    folder_uri: str
    shards: tuple[Shard, ...]

    def stream(self, rank: int, world_size: int) -> Iterator[Sample]:
        filesystem, folder = open_filesystem(self.folder_uri)
        plan = plan_row_groups([len(shard.row_groups) for shard in self.shards], rank, world_size)
        reader = _RowGroupReader(filesystem, folder, self.shards)
        for table in read_ahead([lambda at=at: reader.read(*at) for at in plan]):  # type: ignore[misc]
            yield from iterate_samples(table)

    def ids(self) -> Iterator[str]:
        filesystem, folder = open_filesystem(self.folder_uri)
        reader = _RowGroupReader(filesystem, folder, self.shards)
        for shard_index, row_group in plan_row_groups([len(shard.row_groups) for shard in self.shards], 0, 1):
            yield from reader.read(shard_index, row_group, columns=("id",)).column("id").to_pylist()


class SearchData:
    """The train, pool and validation images of a category. It has no handle on the test images."""

    def __init__(self, info: CategoryInfo, shards: Mapping[SearchSplit, _Shards]) -> None:
        self.info = info
        self._shards = dict(shards)

    def stream(self, split: SearchSplit, *, rank: int = 0, world_size: int = 1) -> Iterator[Sample]:
        """Samples of one split, in stored order; over all ranks together, each exactly once.

        One row group is held in memory while the next is read.

        Args:
            split: ``train``, ``pool`` or ``validation``.
            rank: This worker, in [0, world_size).
            world_size: Number of workers.

        Raises:
            SSNError: the split is none of the three, or a shard is missing, corrupt or out of reach.
        """
        if split not in SEARCH_SPLITS:
            raise SSNError(f"a search reads {', '.join(SEARCH_SPLITS)}, never {split!r}; use open_test_data for test")
        return self._shards[split].stream(rank, world_size)

    def ids(self) -> frozenset[str]:
        """SHA-256, in hex, of every train, pool and validation image; the images themselves are not read.

        Raises:
            SSNError: a shard is missing, corrupt or out of reach.
        """
        return frozenset(image_id for shards in self._shards.values() for image_id in shards.ids())


class TestData:
    """The test images of a category."""

    __test__ = False  # not a test case, whatever pytest thinks of its name

    def __init__(self, info: CategoryInfo, shards: _Shards) -> None:
        self.info = info
        self._shards = shards

    def stream(self, *, rank: int = 0, world_size: int = 1) -> Iterator[Sample]:
        """Test samples in stored order; over all ranks together, each exactly once.

        Raises:
            SSNError: a shard is missing, corrupt or out of reach.
        """
        return self._shards.stream(rank, world_size)

    def ids(self) -> frozenset[str]:
        """SHA-256, in hex, of every test image, those that the test fingerprint covers; no image is read.

        Raises:
            SSNError: a shard is missing, corrupt or out of reach.
        """
        return frozenset(self._shards.ids())


def open_search_data(uri: str, dataset: str, category: str) -> SearchData:
    """Open what a search may see of a category.

    Raises:
        SSNError: the category is not there, not fully ingested, or of another schema version.
    """
    folder_uri = join_uri(resolve_uri(uri), dataset, category)
    content = _read_metadata(uri, dataset, category, CATEGORY_FILE)
    shards = {split: _Shards(folder_uri, parse_shards(content["shards"][split])) for split in SEARCH_SPLITS}
    return SearchData(parse_info(content), shards)


def open_test_data(uri: str, dataset: str, category: str) -> TestData:
    """Open the test images of a category.

    Raises:
        SSNError: the category is not there, not fully ingested, or of another schema version.
    """
    info = parse_info(_read_metadata(uri, dataset, category, CATEGORY_FILE))
    content = _read_metadata(uri, dataset, category, TEST_FILE)
    return TestData(info, _Shards(join_uri(resolve_uri(uri), dataset, category), parse_shards(content["shards"])))


def list_categories(uri: str, dataset: str) -> list[str]:
    """Fully ingested categories of a dataset, sorted; none if the dataset is not there.

    Raises:
        SSNError: the URI cannot be opened.
    """
    filesystem, root = open_filesystem(join_uri(uri, dataset))
    with storage_errors(uri):
        folders = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        names = sorted(info.base_name for info in folders if info.type == pafs.FileType.Directory)
        if not names:  # a missing bucket lists as empty
            check_store(filesystem, root, uri)
        found = filesystem.get_file_info([f"{root}/{name}/{CATEGORY_FILE}" for name in names])
    return [name for name, info in zip(names, found, strict=True) if info.type == pafs.FileType.File]


def plan_row_groups(row_groups: Sequence[int], rank: int, world_size: int) -> list[tuple[int, int]]:
    """Which row groups a rank reads: every ``world_size``-th of all, counted through the shards.

    Args:
        row_groups: Number of row groups of each shard.
        rank: In [0, world_size).
        world_size: Number of workers.

    Returns:
        (shard, row group) pairs; over all ranks, each pair once.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in [0, {world_size})")
    every = [(shard, group) for shard, count in enumerate(row_groups) for group in range(count)]
    return every[rank::world_size]


def read_ahead(reads: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Results of ``reads`` in order, while the next one runs in a thread; at most two results exist at once."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ssn-read-ahead") as executor:
        pending = executor.submit(reads[0]) if reads else None
        for following in [*reads[1:], None]:
            if pending is None:
                return
            result = pending.result()
            pending = executor.submit(following) if following is not None else None
            yield result
            del result


def iterate_samples(table: pa.Table) -> Iterator[Sample]:
    """The rows of a table in the shards' schema."""
    columns = [table.column(name) for name in ARROW_SCHEMA.names]
    for row in range(table.num_rows):
        yield Sample(*(column[row].as_py() for column in columns))


def info_to_json(info: CategoryInfo) -> dict[str, Any]:
    """The inverse of :func:`parse_info`."""
    return asdict(info)


def parse_info(content: Mapping[str, Any]) -> CategoryInfo:
    """A category's metadata from its JSON."""
    return CategoryInfo(
        dataset=content["dataset"],
        category=content["category"],
        schema_version=content["schema_version"],
        split_seed=content["split_seed"],
        counts={split: SplitCount(**count) for split, count in content["counts"].items()},
        search_fingerprint=content["search_fingerprint"],
        test_fingerprint=content["test_fingerprint"],
        defaults=content["defaults"],
        # shards of earlier versions know neither
        protocol=content.get("protocol", "validation"),
        fold=content.get("fold"),
    )


def parse_shards(content: Sequence[Mapping[str, Any]]) -> tuple[Shard, ...]:
    """Shards from their JSON."""
    return tuple(Shard(entry["name"], tuple(entry["row_groups"])) for entry in content)


class _RowGroupReader:
    """Reads row groups of shards, keeping the current file open."""

    def __init__(self, filesystem: pafs.FileSystem, folder: str, shards: Sequence[Shard]) -> None:
        self._filesystem = filesystem
        self._folder = folder
        self._shards = shards
        self._open: tuple[int, pq.ParquetFile] | None = None

    def read(self, shard_index: int, row_group: int, columns: Sequence[str] | None = None) -> pa.Table:
        shard = self._shards[shard_index]
        path = f"{self._folder}/{shard.name}"

        def attempt() -> pa.Table:
            try:
                return self._file(shard_index, path).read_row_group(row_group, columns=columns)
            except OSError:
                self._open = None
                raise

        corrupt = f"shard {path} is corrupt at row group {row_group}"
        with storage_errors(f"shard {path}"):
            try:
                table = with_retries(attempt)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise SSNError(f"{corrupt} ({_one_line(error)}); ingest the category again") from error
            except OSError as error:
                if isinstance(error, FileNotFoundError | PermissionError) or is_store_error(error):
                    raise
                raise SSNError(f"{corrupt} ({_one_line(error)}); ingest the category again") from error
        if table.num_rows != shard.row_groups[row_group]:
            raise SSNError(
                f"{corrupt} ({table.num_rows} rows, {shard.row_groups[row_group]} expected); ingest the category again"
            )
        return table

    def _file(self, shard_index: int, path: str) -> pq.ParquetFile:
        if self._open is None or self._open[0] != shard_index:
            file = pq.ParquetFile(
                self._filesystem.open_input_file(path), pre_buffer=True, page_checksum_verification=True
            )
            if not file.schema_arrow.equals(ARROW_SCHEMA):
                raise SSNError(f"shard {path} has other columns than schema version {SCHEMA_VERSION}; ingest again")
            self._open = (shard_index, file)
        return self._open[1]


def _read_metadata(uri: str, dataset: str, category: str, name: str) -> dict[str, Any]:
    where = join_uri(uri, dataset, category)
    filesystem, folder = open_filesystem(where)
    path = f"{folder}/{name}"
    with storage_errors(where):
        try:
            content: dict[str, Any] = read_json(filesystem, path)
        except FileNotFoundError:
            content = {}
    if not content:
        _explain_missing(uri, dataset, category, folder, filesystem)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise SSNError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; ingest the category again"
        )
    return content


def _explain_missing(uri: str, dataset: str, category: str, folder: str, filesystem: pafs.FileSystem) -> None:
    shown = uri.partition("?")[0] if "://" in uri else uri
    with storage_errors(uri):
        begun = filesystem.get_file_info(folder).type == pafs.FileType.Directory
    if begun:
        raise SSNError(f"{shown}/{dataset}/{category} is not fully ingested; run `python -m ssn ingest` again")
    known = list_categories(uri, dataset)
    if not known:
        raise SSNError(
            f"no ingested dataset {dataset!r} at {shown}; run `python -m ssn ingest` first, or correct the URI"
        )
    reject_unknown([category], known, f"category of {dataset} at {shown}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
