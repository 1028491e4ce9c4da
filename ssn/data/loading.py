"""Samples to batches of normalised images, decoded in threads a bounded distance ahead."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ssn.config import Size
from ssn.data.preprocess import decode_image, preprocess
from ssn.data.records import Sample

BATCHES_AHEAD = 2


def load_batches(
    samples: Iterable[Sample], *, image_size: Size, antialias: bool, batch_size: int
) -> Iterator[tuple[list[Sample], Tensor]]:
    """Decode and preprocess samples in order.

    At most ``BATCHES_AHEAD`` batches are in memory beside the one in use.

    Args:
        samples: Any stream; it is read as batches are consumed.
        image_size: Height and width of the result.
        antialias: See ``data.antialias``.
        batch_size: Images per batch; the last one may be smaller.

    Yields:
        The batch's samples and its images, [B, 3, height, width] float32, normalised.

    Raises:
        SSNError: an image cannot be decoded; the message names it.
    """

    def load(sample: Sample) -> Tensor:
        return preprocess(decode_image(sample.image, source=sample.source_path), image_size, antialias=antialias)

    stream = iter(samples)
    pending: deque[tuple[list[Sample], list[Future[Tensor]]]] = deque()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        while True:
            while len(pending) <= BATCHES_AHEAD:
                batch = list(itertools.islice(stream, batch_size))
                if not batch:
                    break
                pending.append((batch, [pool.submit(load, sample) for sample in batch]))
            if not pending:
                return
            batch, futures = pending.popleft()
            yield batch, torch.stack([future.result() for future in futures])
