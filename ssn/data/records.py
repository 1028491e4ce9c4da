"""What one labelled image is, and the Parquet schema it is stored in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import pyarrow as pa

# Raised whenever shards written before can no longer be read; readers refuse any other version.
SCHEMA_VERSION = 1

Split = Literal["train", "pool", "validation", "test"]
SearchSplit = Literal["train", "pool", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)
SEARCH_SPLITS: tuple[SearchSplit, ...] = get_args(SearchSplit)

GOOD = "good"
"""The defect type of a normal image."""


@dataclass(frozen=True)
class Sample:
    """One image with its label, as stored."""

    id: str
    """SHA-256, in hex, of the encoded image."""
    image: bytes
    """The image file as found; Pillow can decode it."""
    mask: bytes | None
    """PNG, one channel, 0 or 255, as large as the image. None: no mask, or one that marks nothing."""
    label: int
    """0 normal, 1 defective."""
    defect_type: str
    """``good`` for a normal image."""
    split: Split
    """The split this image is assigned to."""
    published_split: str
    """``train`` or ``test`` as the dataset publishes it; empty if it publishes none."""
    source_path: str
    """Path of the image relative to the raw folder."""
    width: int
    height: int


ARROW_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("mask", pa.binary(), nullable=True),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("defect_type", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("published_split", pa.string(), nullable=False),
        pa.field("source_path", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
"""Columns of a shard: the fields of :class:`Sample`, in order."""
