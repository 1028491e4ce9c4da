"""JSON files on a disk or in an object store: each whole or not there at all, and known to be intact.

What a sweep or a benchmark keeps of its progress is many small files, one for each thing that can be finished, so that
whoever comes next tells from the files alone what is left to do. A file that is damaged, or of another version, counts
as not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyarrow import fs as pafs

from ssn.config import digest
from ssn.data.storage import (
    check_store,
    join_uri,
    open_filesystem,
    read_bytes,
    resolve_uri,
    storage_errors,
    with_retries,
    write_bytes,
    write_json,
)


@dataclass
class JsonStore:
    """Files below a folder or an object-store URI, by name; a name may hold slashes. It pickles."""

    root_uri: str
    filesystem: pafs.FileSystem
    root: str
    damaged: list[str] = field(default_factory=list)
    """Files that were there and could not be used."""
    _folders: set[str] = field(default_factory=set, repr=False)
    """Those that were made: in an object store, making one costs requests."""

    @classmethod
    def open(cls, uri: str, *names: str) -> JsonStore:
        """Open the folder ``names`` below ``uri``, without reading or writing.

        Raises:
            SSNError: the URI's scheme is unknown, or its bucket does not exist.
        """
        joined = join_uri(resolve_uri(uri), *names)
        filesystem, root = open_filesystem(joined)
        check_store(filesystem, root, joined)
        return cls(joined, filesystem, root)

    @property
    def is_local(self) -> bool:
        """Whether the files lie on a file system of this machine."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def read(self, name: str, *, version: int) -> dict[str, Any] | None:
        """The content of a file, or None where there is none that can be used.

        Raises:
            SSNError: the store cannot be read.
        """
        with storage_errors(self.root_uri):
            data = self.read_bytes(name)
        if data is None:
            return None
        content = _unseal(data, version)
        if content is None:
            self.reject(name)
        return content

    def reject(self, name: str) -> None:
        """Note a file that is there and cannot be used."""
        self.damaged.append(self.path(name))

    def write(self, name: str, content: Mapping[str, Any], *, version: int) -> None:
        """Write a file, or replace it.

        Raises:
            SSNError: the store cannot be written to.
            ValueError: a number is not finite.
        """
        sealed = {"format_version": version, "sha256": digest(content), "content": content}
        with storage_errors(self.root_uri):
            self._make_folder(name)
            with_retries(lambda: write_json(self.filesystem, self.path(name), sealed))

    def write_bytes(self, name: str, data: bytes) -> str:
        """Keep any other file; returns where it is, as a URI without options.

        Raises:
            SSNError: the store cannot be written to.
        """
        with storage_errors(self.root_uri):
            self._make_folder(name)
            with_retries(lambda: write_bytes(self.filesystem, self.path(name), data))
        return join_uri(self.root_uri, name).partition("?")[0]

    def read_bytes(self, name: str) -> bytes | None:
        """A file's bytes, or None where there is no such file.

        Raises:
            OSError: it cannot be read.
        """
        try:
            return with_retries(lambda: read_bytes(self.filesystem, self.path(name)))
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Names of the JSON files below a folder, however deep, sorted; none where there is no such folder.

        Raises:
            SSNError: the store cannot be read.
        """
        selector = pafs.FileSelector(self.path(folder), recursive=True, allow_not_found=True)
        with storage_errors(self.root_uri):
            found = with_retries(lambda: self.filesystem.get_file_info(selector))
        paths = [info.path for info in found if info.type == pafs.FileType.File and info.path.endswith(".json")]
        # fsspec's handler gives back paths of its own making, with or without a slash in front
        start = self.root.strip("/") + "/"
        return sorted(path.strip("/").removeprefix(start) for path in paths)

    def path(self, name: str) -> str:
        """Of a file, on :attr:`filesystem`."""
        return f"{self.root}/{name}"

    def _make_folder(self, name: str) -> None:
        folder = self.path(name).rpartition("/")[0]
        if folder not in self._folders:
            self.filesystem.create_dir(folder, recursive=True)
            self._folders.add(folder)


def _unseal(data: bytes, version: int) -> dict[str, Any] | None:
    try:
        sealed = json.loads(data)
        content = sealed["content"]
        intact = sealed["format_version"] == version and sealed["sha256"] == digest(content)
    except (ValueError, TypeError, KeyError):  # not JSON; a NaN, which Python reads and JSON has not; another form
        return None
    return content if intact and isinstance(content, dict) else None
