"""Streaming shards: sharding, errors, memory, and that a search cannot reach the test images."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssn.data import ingest as ingest_module
from ssn.data import reader as reader_module
from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from ssn.data.reader import list_categories, open_search_data, open_test_data, plan_row_groups, read_ahead
from ssn.data.records import SEARCH_SPLITS
from ssn.data.storage import with_retries
from ssn.errors import SSNError
from tests.raw_folders import write_mvtec

MANIFEST = Manifest(name="parts", layout="mvtec")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two categories in row groups of four, two groups to a file."""
    base = tmp_path_factory.mktemp("reader")
    write_mvtec(base / "raw", "widget", train=22, test_good=10, defects={"dent": 30})
    write_mvtec(base / "raw", "gadget", first_seed=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest_module, "ROW_GROUP_IMAGES", 4)
        patch.setattr(ingest_module, "SHARD_BYTES", 10_000)
        ingest(MANIFEST, base / "raw", str(base / "shards"))
    return base / "shards"


@pytest.fixture
def shards(stored: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(stored, tmp_path / "shards"))


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 9))
def test_ranks_share_row_groups_evenly(row_groups: list[int], world_size: int) -> None:
    plans = [plan_row_groups(row_groups, rank, world_size) for rank in range(world_size)]
    every = sorted(pair for plan in plans for pair in plan)
    assert every == [(shard, group) for shard, count in enumerate(row_groups) for group in range(count)]
    assert max(map(len, plans)) - min(map(len, plans)) <= 1


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_out_of_range_is_a_bug(rank: int) -> None:
    with pytest.raises(ValueError, match="is not in"):
        plan_row_groups([3], rank, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_over_all_ranks_each_sample_comes_once(stored: Path, world_size: int) -> None:
    search = open_search_data(str(stored), "parts", "widget")
    test = open_test_data(str(stored), "parts", "widget")
    ranks = range(world_size)
    for split in SEARCH_SPLITS:
        ids = [s.id for rank in ranks for s in search.stream(split, rank=rank, world_size=world_size)]
        count = search.info.counts[split]
        assert len(ids) == len(set(ids)) == count.normal + count.defective
        if world_size == 1:
            assert ids == [sample.id for sample in search.stream(split)]
    in_test = [s.id for rank in ranks for s in test.stream(rank=rank, world_size=world_size)]
    assert len(set(in_test)) == len(in_test) == test.info.counts["test"].normal + test.info.counts["test"].defective


def test_a_search_cannot_reach_the_test_images(shards: Path) -> None:
    """Everything a search needs is there when nothing of the test split is."""
    folder = shards / "parts/widget"
    for path in (*folder.glob("test*"), folder / "assignments.json"):
        path.unlink()
    search = open_search_data(str(shards), "parts", "widget")
    assert sum(1 for split in SEARCH_SPLITS for _ in search.stream(split)) == 22 + 4 + 9 + 9
    with pytest.raises(SSNError, match=r"a search reads train, pool, validation, never 'test'"):
        search.stream("test")  # type: ignore[arg-type]
    assert b"test-0" not in pickle.dumps(search)
    with pytest.raises(SSNError, match="not fully ingested"):
        open_test_data(str(shards), "parts", "widget")


def test_ids_are_read_without_the_images(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, test = open_search_data(str(stored), "parts", "widget"), open_test_data(str(stored), "parts", "widget")
    streamed = {sample.id for split in SEARCH_SPLITS for sample in search.stream(split)}
    in_test = {sample.id for sample in test.stream()}
    read: list[list[str]] = []
    original = reader_module._RowGroupReader.read

    def spy(*args: object, **kwargs: object) -> pa.Table:
        table = original(*args, **kwargs)  # type: ignore[arg-type]
        read.append(table.column_names)
        return table

    monkeypatch.setattr(reader_module._RowGroupReader, "read", spy)
    assert search.ids() == streamed
    assert test.ids() == in_test
    assert not streamed & in_test
    assert (len(streamed), len(in_test)) == (44, 18)
    assert {tuple(names) for names in read} == {("id",)}


def test_ids_of_a_search_need_nothing_of_the_test_split(shards: Path) -> None:
    expected = open_search_data(str(shards), "parts", "widget").ids()
    for path in (shards / "parts/widget").glob("test*"):
        path.unlink()
    assert open_search_data(str(shards), "parts", "widget").ids() == expected


def test_ids_of_a_damaged_shard_are_an_error(shards: Path) -> None:
    path = shards / "parts/widget/test-00000.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(SSNError, match=r"test-00000.parquet is corrupt at row group 0"):
        open_test_data(str(shards), "parts", "widget").ids()


def test_search_samples_are_of_their_split(stored: Path) -> None:
    search = open_search_data(str(stored), "parts", "widget")
    for split in SEARCH_SPLITS:
        assert {sample.split for sample in search.stream(split)} == {split}
    assert all(sample.label == 0 for sample in search.stream("train"))
    assert all(sample.label == 1 for sample in search.stream("pool"))
    assert {sample.split for sample in open_test_data(str(stored), "parts", "widget").stream()} == {"test"}


def test_handles_are_small_to_send(stored: Path) -> None:
    for data in (open_search_data(str(stored), "parts", "widget"), open_test_data(str(stored), "parts", "widget")):
        sent = pickle.dumps(data)
        assert len(sent) < 4000
        assert pickle.loads(sent).info == data.info
    ids = [
        sample.id
        for sample in pickle.loads(pickle.dumps(open_search_data(str(stored), "parts", "widget"))).stream("pool")
    ]
    assert ids == [sample.id for sample in open_search_data(str(stored), "parts", "widget").stream("pool")]


def test_handles_work_in_another_working_directory(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stored.parent)
    search, test = open_search_data("shards", "parts", "widget"), open_test_data("shards", "parts", "widget")
    monkeypatch.chdir(tmp_path)
    assert len(list(search.stream("pool"))) == 9
    assert len(list(test.stream())) == 18


def test_categories_are_listed_when_whole(shards: Path) -> None:
    assert list_categories(str(shards), "parts") == ["gadget", "widget"]
    (shards / "parts/gadget/category.json").unlink()
    assert list_categories(str(shards), "parts") == ["widget"]
    assert list_categories(str(shards), "nothing") == []
    with pytest.raises(SSNError, match="parts/gadget is not fully ingested; run"):
        open_search_data(str(shards), "parts", "gadget")


def test_unknown_names_are_refused(stored: Path) -> None:
    with pytest.raises(SSNError, match=r"unknown category of parts at .* 'widgit'; did you mean 'widget'\?"):
        open_search_data(str(stored), "parts", "widgit")
    with pytest.raises(SSNError, match=r"no ingested dataset 'part' at .*; run `python -m ssn ingest`"):
        open_test_data(str(stored), "part", "widget")


@pytest.mark.parametrize("name", ["category.json", "test.json"])
def test_another_schema_version_is_refused(shards: Path, name: str) -> None:
    path = shards / "parts/widget" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(
        SSNError, match=rf"{name} has schema version 99, this program reads 1; ingest the category again"
    ):
        open_test_data(str(shards), "parts", "widget")


def test_broken_metadata_is_named(shards: Path) -> None:
    (shards / "parts/widget/category.json").write_text("{")
    with pytest.raises(SSNError, match=r"widget/category.json is not valid JSON; ingest the category again"):
        open_search_data(str(shards), "parts", "widget")


def test_a_corrupt_row_group_is_named(shards: Path) -> None:
    path = shards / "parts/widget/train-00001.parquet"
    image = pa.parquet.read_table(path).column("image")[0].as_py()
    data = bytearray(path.read_bytes())
    data[data.index(image) + len(image) // 2] ^= 1  # one pixel: nothing but the page's checksum can tell
    path.write_bytes(data)
    stream = open_search_data(str(shards), "parts", "widget").stream("train")
    expected = r"train-00001.parquet is corrupt at row group 0 \(.*\); ingest the category again$"
    with pytest.raises(SSNError, match=expected) as error:
        list(stream)
    assert "\n" not in str(error.value)


def test_a_cut_shard_is_named(shards: Path) -> None:
    path = shards / "parts/widget/train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(SSNError, match=r"train-00000.parquet is corrupt at row group 0"):
        list(open_search_data(str(shards), "parts", "widget").stream("train"))


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "parts/widget/pool-00000.parquet").unlink()
    with pytest.raises(SSNError, match=r"shard .*pool-00000.parquet does not exist"):
        list(open_search_data(str(shards), "parts", "widget").stream("pool"))


def test_a_shard_with_other_rows_or_columns_is_refused(shards: Path) -> None:
    folder = shards / "parts/widget"
    shutil.copy(folder / "train-00002.parquet", folder / "train-00001.parquet")
    search = open_search_data(str(shards), "parts", "widget")
    with pytest.raises(SSNError, match=r"train-00001.parquet is corrupt at row group \d"):
        list(search.stream("train"))
    pa.parquet.write_table(pa.table({"id": ["a"]}), folder / "train-00000.parquet")
    with pytest.raises(SSNError, match=r"train-00000.parquet has other columns than schema version 1; ingest"):
        list(search.stream("train"))


def test_passing_failures_are_retried(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(reader_module, "with_retries", functools.partial(with_retries, sleep=waits.append))
    original = reader_module.pq.ParquetFile
    failures = iter([ConnectionResetError("reset"), OSError("AWS Error SLOW_DOWN"), OSError("curlCode: 28")])
    raised = []

    def flaky(*args: object, **kwargs: object) -> object:
        for failure in failures:
            raised.append(failure)
            raise failure
        return original(*args, **kwargs)

    monkeypatch.setattr(reader_module.pq, "ParquetFile", flaky)
    assert len(list(open_search_data(str(stored), "parts", "widget").stream("pool"))) == 9
    assert len(raised) == len(waits) == 3


def test_read_ahead_keeps_order_and_holds_two_results() -> None:
    alive = 0
    most = 0
    lock = threading.Lock()

    class Result:
        def __init__(self, value: int) -> None:
            nonlocal alive, most
            self.value = value
            with lock:
                alive += 1
                most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            with lock:
                alive -= 1

    values = []
    for result in read_ahead([lambda value=value: Result(value) for value in range(20)]):  # type: ignore[misc]
        values.append(result.value)
        del result
    assert values == list(range(20))
    assert most <= 2
    assert list(read_ahead([])) == []


def test_read_ahead_stops_when_its_consumer_does() -> None:
    calls = []

    def read(value: int) -> int:
        calls.append(value)
        return value

    stream = read_ahead([lambda value=value: read(value) for value in range(20)])  # type: ignore[misc]
    assert next(stream) == 0
    stream.close()  # type: ignore[attr-defined]
    assert len(calls) <= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ssn-read-ahead")]


def test_read_ahead_raises_what_a_read_raises() -> None:
    def fail() -> int:
        raise SSNError("shard x is corrupt")

    stream = read_ahead([lambda: 1, fail, lambda: 3])
    assert next(stream) == 1
    with pytest.raises(SSNError, match="shard x is corrupt"):
        next(stream)
