"""Arrays of one shape, one after another in a temporary file: what a split's images add up to may exceed memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ssn.errors import SSNError


class Spool(Sequence[np.ndarray]):
    """A sequence that is appended to, and read from its file one array at a time.

    The file has no name, so that its space is free again once it is closed and nothing maps it any more, however the
    process ends. Use as a context manager, or call :meth:`close`.

    Args:
        shape: Of every array.
        dtype: Likewise.

    Raises:
        SSNError: there is no folder for temporary files.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._item_bytes = int(np.prod(shape)) * self._dtype.itemsize
        self._length = 0
        with _explained():
            self._file = tempfile.TemporaryFile(prefix="ssn-", buffering=0)  # noqa: SIM115 (close() closes it)

    def append(self, array: np.ndarray) -> None:
        """Add an array at the end.

        Raises:
            SSNError: the disk is full.
        """
        if array.shape != self._shape:
            raise ValueError(f"an array of shape {array.shape} in a spool of {self._shape}")
        left = np.ascontiguousarray(array, self._dtype).data.cast("B")
        with _explained():
            self._file.seek(self._length * self._item_bytes)
            while left:  # a disk that fills up takes a part first
                left = left[self._file.write(left) :]
        self._length += 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        """The array at ``index``, as a copy in memory."""
        array = np.empty(self._shape, self._dtype)
        self._file.seek(range(self._length)[index] * self._item_bytes)
        if self._file.readinto(array.data) != self._item_bytes:
            raise OSError(f"a temporary file of {self._length} arrays ends before number {index}")
        return array

    def mapped(self) -> np.ndarray:
        """Everything as ``[N, *shape]``, mapped read-only from the file; it outlives the spool, and keeps the file."""
        if not self._length:
            return np.empty((0, *self._shape), self._dtype)
        return np.memmap(self._file, self._dtype, "r", shape=(self._length, *self._shape))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SSNError(
            f"cannot keep results in the folder for temporary files ({error.strerror or error}); "
            "set TMPDIR to a writable folder with room"
        ) from error
