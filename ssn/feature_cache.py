"""Features on a disk: computed once, mapped into memory by every later run on the same data.

One folder per key (:func:`ssn.features.feature_key`): an ``.npy`` file per split and layer, the masks beside them, and
``meta.json``, written last. It is filled under another name and renamed when it is whole, so that whoever finds it
finds all of it. How recently features were used is the time stamp of their ``meta.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ssn.data.reader import CategoryInfo
from ssn.data.records import SEARCH_SPLITS
from ssn.errors import SSNError
from ssn.features import CachedSplit, CategoryFeatures, MapStorage, MapWriter

FORMAT_VERSION = 1
META_FILE = "meta.json"
ABANDONED_S = 24 * 3600.0
"""A folder being filled that nobody has touched for this long belongs to a run that has died."""
_FRESH_PREFIX = ".fresh-"
_CALIBRATION_PREFIX = "calibration."
_ARRAYS = ("masks_VHW", "eval_masks_N", "labels_N", "has_mask_N")
"""Of a split, beside its maps; small enough to be read into memory."""


class FeatureCache:
    """A folder of features that keeps to a size.

    Args:
        folder: Made if it is not there.
        budget_bytes: Features that were not used for longest are removed beyond it.

    Raises:
        SSNError: ``folder`` cannot be made or is a file.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self.folder, self.budget_bytes = folder, budget_bytes
        with self._errors():
            folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str, info: CategoryInfo) -> CategoryFeatures | None:
        """Features from the disk, mapped rather than read; None: there are none, or not in this format.

        Args:
            key: Of the features.
            info: Of the category as it is now.
        """
        folder = self.folder / key
        try:
            meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
            if meta["format_version"] != FORMAT_VERSION or meta["key"] != key:
                return None
            splits = {split: _load_split(folder, split, meta) for split in SEARCH_SPLITS}
            calibration = {
                name: _open(folder, f"{_CALIBRATION_PREFIX}{name}", meta, mapped=False) for name in meta["calibration"]
            }
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return None  # absent, damaged, or being removed by another process
        with contextlib.suppress(OSError):  # a folder that others fill may be read-only here
            os.utime(folder / META_FILE)
        return CategoryFeatures(
            info=info,
            **splits,
            backbone_digest=meta["backbone_digest"],
            backbone_calibration=calibration,
            channels=tuple(meta["channels"]),
        )

    def build(
        self, key: str, needed_bytes: int, info: CategoryInfo, extract: Callable[[MapStorage], CategoryFeatures]
    ) -> CategoryFeatures:
        """Compute features into the folder.

        Args:
            key: Of the features.
            needed_bytes: What they will take, at most ``budget_bytes``.
            info: Of the category.
            extract: Computes them and puts the maps into the storage that it is given.

        Raises:
            SSNError: the folder cannot be written, or the disk is full.
        """
        with self._errors():
            self._make_room(key, needed_bytes)
            free = shutil.disk_usage(self.folder).free
            if needed_bytes > free:
                raise SSNError(
                    f"the feature cache {self.folder} needs {needed_bytes / 1e9:.2f} GB, but its disk has "
                    f"{free / 1e9:.2f} GB left; free some, choose another --cache or leave it out"
                )
            fresh = Path(tempfile.mkdtemp(prefix=f"{_FRESH_PREFIX}{key[:12]}-", dir=self.folder))
        try:
            with contextlib.closing(_Files(fresh, self._errors)) as storage:
                features = extract(storage)
            with self._errors():
                _write_rest(fresh, key, features)
                try:
                    os.rename(fresh, self.folder / key)
                except OSError:  # unless another process was faster, whose features are as good
                    if not (self.folder / key / META_FILE).is_file():
                        raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        loaded = self.load(key, info)
        if loaded is None:
            raise SSNError(f"the features just written to {self.folder / key} cannot be read back; check the disk")
        return loaded

    def _make_room(self, key: str, needed_bytes: int) -> None:
        _remove(self.folder / key)  # if it is there, it cannot be used
        for path in self.folder.glob(f"{_FRESH_PREFIX}*"):
            if time.time() - max([_modified_s(path), *map(_modified_s, path.glob("*"))]) > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
        oldest_first = sorted(self.folder.glob(f"*/{META_FILE}"), key=_modified_s)
        sizes = {meta.parent: sum(map(_size, meta.parent.glob("*"))) for meta in oldest_first}
        while sizes and sum(sizes.values()) + needed_bytes > self.budget_bytes:
            oldest = next(iter(sizes))
            _remove(oldest)
            del sizes[oldest]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SSNError(
                f"cannot write to the feature cache {self.folder}: {error.strerror or error}; "
                "choose another --cache or leave it out"
            ) from error


class _Files:
    """Maps in ``.npy`` files."""

    def __init__(self, folder: Path, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._folder, self._errors = folder, errors
        self._writers: list[_FileWriter] = []

    def create(self, name: str, shape_VhwC: tuple[int, ...], dtype: type[np.generic]) -> MapWriter:
        with self._errors():
            self._writers.append(_FileWriter(self._folder / f"{name}.npy", shape_VhwC, dtype, self._errors))
        return self._writers[-1]

    def close(self) -> None:
        """Let go of what a failed extraction has left open."""
        for writer in self._writers:
            writer.abandon()


class _FileWriter:
    """Written piece by piece: through a mapping, a full disk would be a fatal signal instead of an error."""

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: type[np.generic],
        errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._path, self._errors = path, errors
        self._file = path.open("wb")
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, block_VhwC: np.ndarray) -> None:
        with self._errors():
            self._file.write(block_VhwC.data)

    def close(self) -> np.ndarray:
        with self._errors(), self._file:
            _sync(self._file)
        mapped: np.ndarray = np.load(self._path, mmap_mode="r")
        return mapped

    def abandon(self) -> None:
        """Close the file, whatever is in it."""
        with contextlib.suppress(OSError):
            self._file.close()


def _write_rest(folder: Path, key: str, features: CategoryFeatures) -> None:
    """Everything but the maps, and ``meta.json`` at the very end."""
    arrays = {f"{_CALIBRATION_PREFIX}{name}": value for name, value in features.backbone_calibration.items()}
    for split in SEARCH_SPLITS:
        arrays |= {f"{split}.{name}": getattr(getattr(features, split), name) for name in _ARRAYS}
    for name, value in arrays.items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, value)
            _sync(file)
    maps = {
        f"{split}.{layer}": m for split in SEARCH_SPLITS for layer, m in enumerate(getattr(features, split).maps_VhwC)
    }
    meta = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "dataset": features.info.dataset,
        "category": features.info.category,
        "backbone_digest": features.backbone_digest,
        "channels": list(features.channels),
        "calibration": sorted(features.backbone_calibration),
        "splits": {split: _describe(getattr(features, split)) for split in SEARCH_SPLITS},
        "shapes": {name: list(value.shape) for name, value in (arrays | maps).items()},
    }
    with (folder / META_FILE).open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        _sync(file)


def _describe(split: CachedSplit) -> dict[str, Any]:
    return {
        "layers": len(split.maps_VhwC),
        "num_flips": split.num_flips,
        "ids": list(split.ids),
        "defect_types": list(split.defect_types),
    }


def _load_split(folder: Path, split: str, meta: dict[str, Any]) -> CachedSplit:
    described = meta["splits"][split]
    return CachedSplit(
        **{name: _open(folder, f"{split}.{name}", meta, mapped=False) for name in _ARRAYS},
        maps_VhwC=tuple(_open(folder, f"{split}.{layer}", meta, mapped=True) for layer in range(described["layers"])),
        ids=tuple(described["ids"]),
        defect_types=tuple(described["defect_types"]),
        num_flips=described["num_flips"],
    )


def _open(folder: Path, name: str, meta: dict[str, Any], *, mapped: bool) -> np.ndarray:
    """An array of the shape that it was written with; numpy raises ValueError for a file that is too short."""
    array: np.ndarray = np.load(folder / f"{name}.npy", mmap_mode="r" if mapped else None)
    if list(array.shape) != meta["shapes"][name]:
        raise ValueError(f"{name} has shape {array.shape}")
    return array


def _sync(file: Any) -> None:
    """Onto the disk before the folder gets its name, so that not even a power cut leaves half of it under that."""
    file.flush()
    os.fsync(file.fileno())


def _modified_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has just removed it
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _remove(folder: Path) -> None:
    """Remove features; ``meta.json`` goes first, so that they are never taken for whole meanwhile."""
    (folder / META_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
