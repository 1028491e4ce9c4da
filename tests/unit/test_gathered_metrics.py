"""A split that several processes score: metrics of what they gather are those of one process, to the last bit.

Each process imports this module, so it imports little.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from ssn.metrics import bootstrap_intervals, image_metrics, pixel_metrics

NUM_IMAGES = 11


def _draw() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores, labels, maps and masks, with ties."""
    random = np.random.default_rng(0)
    labels = np.arange(NUM_IMAGES) % 3 == 0
    masks = labels[:, None, None] & (random.random((NUM_IMAGES, 20, 30)) < 0.1)
    scores = (random.normal(size=NUM_IMAGES) + labels).round(1)
    return scores, labels, (random.normal(size=masks.shape) + masks).astype(np.float32).round(2), masks


def _metrics(
    scores: np.ndarray, labels: np.ndarray, maps: np.ndarray, masks: np.ndarray
) -> dict[str, float | tuple[float, float]]:
    values = image_metrics(scores, labels).values | pixel_metrics(maps, masks).values
    intervals = bootstrap_intervals(scores, labels, resamples=100)
    return values | {f"{name}_interval": bounds for name, bounds in intervals.items()}


def _gather(rank: int, world_size: int, folder: str) -> None:
    """One of the processes: it has every ``world_size``-th image, and learns of the others'."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        own = list(zip(*(array[rank::world_size] for array in _draw()), strict=True))
        shares: list[Any] = [None] * world_size
        dist.all_gather_object(shares, own)
    finally:
        dist.destroy_process_group()
    dealt = [shares[i % world_size][i // world_size] for i in range(sum(map(len, shares)))]
    metrics = _metrics(*(np.stack(column) for column in zip(*dealt, strict=True)))
    Path(folder, f"rank{rank}.json").write_text(json.dumps([len(dealt), metrics]))


@pytest.mark.integration
@pytest.mark.parametrize("world_size", [2, 3])
def test_metrics_of_gathered_scores_are_those_of_one_process(tmp_path: Path, world_size: int) -> None:
    mp.spawn(_gather, (world_size, str(tmp_path)), nprocs=world_size)  # shares differ in size
    expected = json.loads(json.dumps([NUM_IMAGES, _metrics(*_draw())]))
    for rank in range(world_size):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == expected
