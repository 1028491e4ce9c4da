"""Opening files and folders by URI: a local path, ``file://``, ``s3://``, ``gs://``, whatever pyarrow or fsspec opens.

An S3-alike is named in the URI (``s3://bucket/prefix?endpoint_override=http://host:9000&region=eu-west-1``) or by the
environment (``AWS_ENDPOINT_URL``, ``AWS_REGION``); credentials come from wherever the AWS SDK finds them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from ssn.errors import SSNError

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
S3_ATTEMPTS = 3
READ_ATTEMPTS = 4
FIRST_DELAY_S = 0.25

_S3_OPTIONS = ("endpoint_override", "region", "scheme", "anonymous")
# What the messages of pyarrow's S3 client hold, and what it means to a user; the first that matches is told.
_REASONS = (
    (
        ("NETWORK_CONNECTION", "curlCode", "resolve host", "connect to", "timed out", "TIMEOUT", "Unable to resolve"),
        "the server cannot be reached; check the network and the endpoint (AWS_ENDPOINT_URL, or ?endpoint_override=)",
    ),
    (
        ("NO_SUCH_BUCKET", "Bucket '"),
        "the bucket does not exist; create it or correct its name",
    ),
    (
        (
            "ACCESS_DENIED",
            "SIGNATURE",
            "INVALID_ACCESS_KEY",
            "INVALID_CLIENT_TOKEN",
            "status 400",
            "status 403",
        ),
        "access is denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
    ),
)
_TRANSIENT = (
    *_REASONS[0][0],
    *(f"HTTP status {code}" for code in (429, 500, 502, 503, 504)),
    *("SLOW_DOWN", "INTERNAL_FAILURE", "SERVICE_UNAVAILABLE", "THROTTLING"),
)


def open_filesystem(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """Open the file system a URI lies on; nothing is read yet, so a wrong host shows on first use.

    Args:
        uri: A local path or a URI.

    Returns:
        The file system, and the path on it, without a trailing slash.

    Raises:
        SSNError: the scheme is unknown or the URI malformed.
    """
    text = resolve_uri(uri)
    parts = urlsplit(text)
    if not parts.scheme:
        return pafs.LocalFileSystem(), text
    if parts.scheme == "file":
        return pafs.LocalFileSystem(), unquote(parts.path).rstrip("/") or "/"
    if parts.scheme == "s3":
        return _open_s3(text)
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        return _open_fsspec(text, error)
    return filesystem, path.rstrip("/")


def check_store(filesystem: pafs.FileSystem, path: str, uri: str) -> None:
    """Find out at once whether S3 can be reached and the bucket exists; other stores show on first use.

    Raises:
        SSNError: it cannot, or does not.
    """
    if not isinstance(filesystem, pafs.S3FileSystem):
        return
    bucket = path.partition("/")[0]
    with storage_errors(uri):
        if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
            raise SSNError(f"{_bare(uri)}: the bucket {bucket!r} does not exist; create it or correct its name")


def resolve_uri(uri: str | Path) -> str:
    """A URI that means the same whatever the working directory: a local path is made absolute, the rest is kept."""
    return str(uri) if "://" in str(uri) else str(Path(uri).expanduser().absolute())


def join_uri(uri: str | Path, *names: str) -> str:
    """Append path segments to a URI, before its query if it has one."""
    base, mark, query = str(uri).partition("?") if "://" in str(uri) else (str(uri), "", "")
    return "/".join([base.rstrip("/"), *names]) + mark + query


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn what goes wrong on a file system into one line.

    Args:
        what: The file or URI at work.

    Raises:
        SSNError: in place of any OSError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise SSNError(f"{_bare(what)} does not exist") from error
    except OSError as error:
        raise SSNError(f"{_bare(what)}: {_explain(error)}") from error


def with_retries(
    read: Callable[[], T],
    *,
    attempts: int = READ_ATTEMPTS,
    first_delay_s: float = FIRST_DELAY_S,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call ``read`` until it succeeds, waiting twice as long after each failure.

    Only failures that may pass are retried; a missing file, refused credentials or corrupt data are not.

    Raises:
        OSError: the last failure, or at once one that will not pass.
    """
    for attempt in range(attempts):
        try:
            return read()
        except OSError as error:
            if attempt == attempts - 1 or not is_transient(error):
                raise
        sleep(first_delay_s * 2**attempt)
    raise ValueError(f"attempts must be at least 1, not {attempts}")


def is_transient(error: OSError) -> bool:
    """Whether another attempt may succeed: the network or the server failed, not the request."""
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    return any(sign in str(error) for sign in _TRANSIENT)


def is_store_error(error: OSError) -> bool:
    """Whether the store is at fault, rather than what was read from it: pyarrow raises OSError for both."""
    return is_transient(error) or "AWS Error" in str(error)


def read_bytes(filesystem: pafs.FileSystem, path: str) -> bytes:
    """The whole content of a file.

    Raises:
        OSError: it cannot be read.
    """
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_bytes(filesystem: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write a whole file so that a reader sees the old content or the new, never half of it.

    Raises:
        OSError: it cannot be written.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        partial = f"{path}.{os.getpid()}.partial"
        with filesystem.open_output_stream(partial) as stream:
            stream.write(data)
        os.replace(partial, path)
    else:  # an object appears whole when its upload ends
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)


def read_json(filesystem: pafs.FileSystem, path: str) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: it cannot be read.
        SSNError: it is not JSON.
    """
    data = read_bytes(filesystem, path)
    try:
        return json.loads(data)
    except ValueError as error:
        raise SSNError(f"{path} is not valid JSON; ingest the category again") from error


def write_json(filesystem: pafs.FileSystem, path: str, value: Any) -> None:
    """Write a JSON file, sorted and indented, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_bytes(filesystem, path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def _open_s3(uri: str) -> tuple[pafs.FileSystem, str]:
    parts = urlsplit(uri)
    query = dict(parse_qsl(parts.query))
    unknown = sorted(set(query) - set(_S3_OPTIONS))
    if unknown:
        raise SSNError(f"{_bare(uri)}: unknown option {unknown[0]!r}; an s3 URI takes {', '.join(_S3_OPTIONS)}")
    if not parts.netloc or "@" in parts.netloc:
        raise SSNError("an s3 URI must read s3://bucket/prefix, with credentials in the environment, not in the URI")
    endpoint = query.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL")
    scheme = query.get("scheme")
    if endpoint and "://" in endpoint:
        endpoint_scheme, _, endpoint = endpoint.partition("://")
        scheme = scheme or endpoint_scheme
    region = query.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "request_timeout": REQUEST_TIMEOUT_S,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        "scheme": scheme or "https",
    }
    if query.get("anonymous", "false").lower() == "true":
        options["anonymous"] = True
    if endpoint:
        options["endpoint_override"] = endpoint.rstrip("/")
        # The SDK's newer checksums come as trailers that most S3-alikes do not understand; it reads no other setting.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    with storage_errors(uri):
        if not region and not endpoint:
            region = pafs.resolve_s3_region(parts.netloc)
        filesystem = pafs.S3FileSystem(region=region or "us-east-1", **options)
    return filesystem, (parts.netloc + unquote(parts.path)).rstrip("/")


def _open_fsspec(uri: str, first_error: Exception) -> tuple[pafs.FileSystem, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error or first_error).split())
        raise SSNError(f"cannot open {uri}: {reason}; use a local folder, s3:// or gs://") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path.rstrip("/")


def _bare(uri: str) -> str:
    return uri.partition("?")[0] if "://" in uri else uri


def _explain(error: OSError) -> str:
    text = " ".join(str(error).split())
    for signs, reason in _REASONS:
        if any(sign in text for sign in signs):
            return reason
    return error.strerror or text[:300] or type(error).__name__
