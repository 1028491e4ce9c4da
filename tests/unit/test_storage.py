"""URIs, one-line errors, retries and whole-file writes, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs as pafs

from ssn.data.storage import (
    is_transient,
    join_uri,
    open_filesystem,
    read_bytes,
    read_json,
    storage_errors,
    with_retries,
    write_bytes,
    write_json,
)
from ssn.errors import SSNError


def test_local_paths_and_file_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("a/b", str(tmp_path / "a/b"), tmp_path / "a/b", f"file://{tmp_path}/a/b", f"file://{tmp_path}/a/b/"):
        filesystem, path = open_filesystem(uri)
        assert isinstance(filesystem, pafs.LocalFileSystem)
        assert path == str(tmp_path / "a/b")
    assert open_filesystem(f"file://{tmp_path}/a%20b")[1] == str(tmp_path / "a b")


def test_s3_endpoint_comes_from_the_uri_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    expected, path = open_filesystem("s3://bucket/some/prefix/?endpoint_override=http://host:9000&region=eu-west-1")
    assert path == "bucket/some/prefix"
    assert expected.region == "eu-west-1"
    split, _ = open_filesystem("s3://bucket?endpoint_override=host:9000&scheme=http&region=eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://host:9000")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    from_environment, _ = open_filesystem("s3://bucket")
    other, _ = open_filesystem("s3://bucket?endpoint_override=http://other:9000")
    assert expected.equals(split)
    assert expected.equals(from_environment)
    assert not expected.equals(other)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "s3://bucket/x?endpoint=http://host",
            "s3://bucket/x: unknown option 'endpoint'; an s3 URI takes endpoint_over",
        ),
        ("s3:///x", "must read s3://bucket/prefix"),
        ("s3://key:secret@bucket/x", "with credentials in the environment"),
        ("nosuch://bucket/x", "cannot open nosuch://bucket/x"),
    ],
)
def test_a_malformed_uri_is_refused(uri: str, message: str) -> None:
    with pytest.raises(SSNError) as error:
        open_filesystem(uri)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_fsspec_opens_what_pyarrow_does_not() -> None:
    filesystem, path = open_filesystem("memory://shards/x")
    write_json(filesystem, f"{path}.json", {"a": 1})
    assert read_json(filesystem, f"{path}.json") == {"a": 1}


@pytest.mark.parametrize(
    ("uri", "joined"),
    [
        ("shards", "shards/a/b"),
        ("/x/shards/", "/x/shards/a/b"),
        ("/odd?name", "/odd?name/a/b"),
        ("s3://bucket/x/?region=r&scheme=http", "s3://bucket/x/a/b?region=r&scheme=http"),
        ("gs://bucket", "gs://bucket/a/b"),
    ],
)
def test_join_uri_keeps_the_query_last(uri: str, joined: str) -> None:
    assert join_uri(uri, "a", "b") == joined


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "AWS Error NETWORK_CONNECTION during HeadObject: curlCode: 7, Could not connect",
            "the server cannot be reached",
        ),
        ("When getting x: AWS Error NO_SUCH_BUCKET during PutObject", "the bucket does not exist"),
        ("AWS Error ACCESS_DENIED during HeadBucket operation: No response body.", "access is denied; check AWS_ACC"),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during ListObjectsV2", "access is denied; check AWS_ACC"),
        ("something\nelse", "something else"),
    ],
)
def test_errors_become_one_line_that_names_the_uri(text: str, reason: str) -> None:
    with pytest.raises(SSNError) as error, storage_errors("s3://bucket/x?region=r"):
        raise OSError(text)
    assert str(error.value).startswith(f"s3://bucket/x: {reason}")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SSNError, match=r"^/a/b does not exist$"), storage_errors("/a/b"):
        raise FileNotFoundError(2, "No such file", "/a/b")


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError(), True),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during GetObject"), True),
        (OSError("AWS Error NETWORK_CONNECTION"), True),
        (FileNotFoundError("x"), False),
        (PermissionError("x"), False),
        (OSError("AWS Error NO_SUCH_BUCKET"), False),
        (OSError("AWS Error ACCESS_DENIED"), False),
        (OSError("Couldn't deserialize thrift: corrupt"), False),
    ],
)
def test_what_may_pass_and_what_will_not(error: OSError, transient: bool) -> None:
    assert is_transient(error) is transient


def test_retries_are_bounded_and_back_off() -> None:
    waits: list[float] = []
    calls = 0

    def fail() -> int:
        nonlocal calls
        calls += 1
        raise ConnectionResetError("reset")

    with pytest.raises(ConnectionResetError):
        with_retries(fail, attempts=4, first_delay_s=0.5, sleep=waits.append)
    assert calls == 4
    assert waits == [0.5, 1.0, 2.0]


def test_lasting_failures_are_not_retried() -> None:
    def fail() -> int:
        raise FileNotFoundError("x")

    def sleep(delay_s: float) -> None:
        raise AssertionError("waited for a failure that lasts")

    with pytest.raises(FileNotFoundError):
        with_retries(fail, sleep=sleep)


def test_a_write_replaces_the_whole_file_and_leaves_no_other(tmp_path: Path) -> None:
    filesystem = pafs.LocalFileSystem()
    path = tmp_path / "x.json"
    write_bytes(filesystem, str(path), b"a long first content")
    write_json(filesystem, str(path), {"b": [1], "a": None})
    assert path.read_text() == '{\n "a": null,\n "b": [\n  1\n ]\n}\n'
    assert read_bytes(filesystem, str(path)) == path.read_bytes()
    assert [child.name for child in tmp_path.iterdir()] == ["x.json"]
