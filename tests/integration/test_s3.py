"""Shards on S3, against real HTTP servers: moto for the whole path, rclone for signatures that are checked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from ssn.data.reader import list_categories, open_search_data, open_test_data
from ssn.data.records import SEARCH_SPLITS
from ssn.errors import SSNError
from tests.raw_folders import write_mvtec
from tests.servers import KEY, SECRET, TIMEOUT_S, free_port, moto_s3, wait_for

pytestmark = pytest.mark.integration

MANIFEST = Manifest(name="parts", layout="mvtec")


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # what opening a store sets, undone after


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mvtec(tmp_path_factory.mktemp("raw"), train=40)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """Endpoint of an S3 server with the empty bucket ``shards``."""
    with moto_s3("shards") as endpoint:
        yield endpoint


@pytest.fixture
def rclone(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Endpoint and process of an S3 server that checks signatures, with the empty bucket ``shards``."""
    program = Path(sys.executable).parent / "rclone"
    if not program.exists():
        pytest.skip(f"no rclone at {program}; install the dev dependencies")
    (tmp_path / "store/shards").mkdir(parents=True)
    address = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen(
        [program, "serve", "s3", tmp_path / "store", "--addr", address, "--auth-key", f"{KEY},{SECRET}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(address)
        yield f"http://{address}", server
    finally:
        server.terminate()
        server.wait(TIMEOUT_S)


def _uri(endpoint: str, bucket: str = "shards", prefix: str = "a/b") -> str:
    return f"s3://{bucket}/{prefix}?endpoint_override={endpoint}&region=us-east-1"


@pytest.mark.parametrize("server", ["moto", "rclone"])
def test_ingest_then_stream(server: str, raw: Path, request: pytest.FixtureRequest) -> None:
    value = request.getfixturevalue(server)
    uri = _uri(value if isinstance(value, str) else value[0])
    (report,) = ingest(MANIFEST, raw, uri)
    assert report.status == "written"
    assert ingest(MANIFEST, raw, uri)[0].status == "unchanged"
    assert list_categories(uri, "parts") == ["widget"]
    search = open_search_data(uri, "parts", "widget")
    samples = [sample for split in SEARCH_SPLITS for sample in search.stream(split)]
    ranks = [sample.id for rank in range(2) for sample in search.stream("train", rank=rank, world_size=2)]
    assert sorted(ranks) == sorted(sample.id for sample in samples if sample.split == "train")
    samples += open_test_data(uri, "parts", "widget").stream()
    assert len(samples) == report.num_images == 65
    assert all(sample.image == (raw / sample.source_path).read_bytes() for sample in samples)


def test_endpoint_from_the_environment(moto: str, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    ingest(MANIFEST, raw, "s3://shards/from-environment")
    assert list_categories(_uri(moto, prefix="from-environment"), "parts") == ["widget"]


def test_the_same_shards_as_on_disk(moto: str, raw: Path, tmp_path: Path) -> None:
    (local,) = ingest(MANIFEST, raw, str(tmp_path))
    (remote,) = ingest(MANIFEST, raw, _uri(moto, prefix="same"))
    assert remote == local
    for split in SEARCH_SPLITS:
        on_disk = list(open_search_data(str(tmp_path), "parts", "widget").stream(split))
        assert list(open_search_data(_uri(moto, prefix="same"), "parts", "widget").stream(split)) == on_disk


Operation = Callable[[str, Path], object]
OPERATIONS: dict[str, Operation] = {
    "ingest": lambda uri, raw: ingest(MANIFEST, raw, uri),
    "open_search_data": lambda uri, raw: open_search_data(uri, "parts", "widget"),
    "open_test_data": lambda uri, raw: open_test_data(uri, "parts", "widget"),
    "list_categories": lambda uri, raw: list_categories(uri, "parts"),
}


def _refusal(operation: str, uri: str, raw: Path) -> str:
    with pytest.raises(SSNError) as error:
        OPERATIONS[operation](uri, raw)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("s3://")
    return message


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_missing_bucket_is_named(operation: str, moto: str, raw: Path) -> None:
    message = _refusal(operation, _uri(moto, bucket="no-such-bucket"), raw)
    assert "the bucket 'no-such-bucket' does not exist; create it or correct its name" in message


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_endpoint_out_of_reach_is_named(operation: str, raw: Path) -> None:
    message = _refusal(operation, _uri(f"http://127.0.0.1:{free_port()}"), raw)
    assert "the server cannot be reached; check the network and the endpoint (AWS_ENDPOINT_URL" in message


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told(
    wrong: str, rclone: tuple[str, object], raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(wrong, "wrong")
    for operation in OPERATIONS:
        message = _refusal(operation, _uri(rclone[0]), raw)
        assert "access is denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy" in message


def test_a_server_that_goes_away_while_streaming(rclone: tuple[str, subprocess.Popen[bytes]], raw: Path) -> None:
    endpoint, server = rclone
    ingest(MANIFEST, raw, _uri(endpoint))
    search = open_search_data(_uri(endpoint), "parts", "widget")
    server.terminate()
    server.wait(TIMEOUT_S)
    with pytest.raises(
        SSNError, match=r"shard shards/a/b/parts/widget/train-00000.parquet: the server cannot be reach"
    ):
        list(search.stream("train"))


EXITS = """
import sys
from pathlib import Path
from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from ssn.data.reader import open_search_data
uri, raw = sys.argv[1:]
ingest(Manifest(name="parts", layout="mvtec"), Path(raw), uri)
stream = open_search_data(uri, "parts", "widget").stream("train")
next(stream)  # and leave with the stream open
print("done")
"""


def test_the_process_exits(moto: str, raw: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", EXITS, _uri(moto, prefix="exits"), str(raw)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "done\n"
    assert finished.stderr == ""
