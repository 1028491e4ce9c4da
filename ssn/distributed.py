"""Workers that train one network together: every batch is sliced by rank, and what depends on all of it is summed.

A worker's gradients are its slice's share of the whole batch's gradient, so that summed over the workers they are the
gradient that one worker would have computed. Nothing here depends on what started the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssn.data.sampling import shard

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""Most time that workers wait for one of them. Pixel metrics of a large split take minutes; whoever started the workers
notices one that dies, and at once."""


class Workers:
    """A worker on its own, and what each method means for several."""

    rank = 0
    size = 1

    def slice(self, items: np.ndarray) -> np.ndarray:
        """This worker's part of what all workers have in common: contiguous, and empty where there are too few."""
        return shard(items, self.rank, self.size)

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all workers, in place; the sums are the same to the last bit on each."""

    def add_shares(self, sums: Tensor) -> Tensor:
        """Sum over all workers of what a loss is made of; backward gives each worker the gradient of its own share."""
        return sums

    def stack(self, values: Tensor) -> Tensor:
        """Tensors of one shape from all workers, in order of rank: ``[size, *values.shape]``."""
        return values[None]

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all workers in order of rank, of which each may have another number."""
        return rows

    def compute_once(self, compute: Callable[[], T]) -> T:
        """What ``compute`` returns on the first worker; the others do not call it, and wait."""
        return compute()


ALONE = Workers()


class ProcessGroup(Workers):
    """This process in torch's default process group.

    Args:
        device: Where this worker computes; also where nccl wants what it sends.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = torch.device(device)

    def add(self, *tensors: Tensor) -> None:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def add_shares(self, sums: Tensor) -> Tensor:
        total: Tensor = _AddShares.apply(sums)
        return total

    def stack(self, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    def gather(self, rows: Tensor) -> Tensor:
        counts = self.stack(torch.tensor([len(rows)], device=self._device)).flatten().tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat([part[:count] for part, count in zip(self.stack(padded), counts, strict=True)])

    def compute_once(self, compute: Callable[[], T]) -> T:
        box: list[Any] = [compute() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=self._device)
        value: T = box[0]
        return value


class _AddShares(torch.autograd.Function):
    """The sum is one number that all workers hold, not one each, so that its gradient is not summed on its way back."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        total = sums.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def merge_moments(means: Tensor, variances: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of several sets taken together (Chan, Golub, LeVeque 1983).

    Args:
        means: ``[K, channels]``, of each set.
        variances: Likewise.
        counts: Elements of each set; where there are none, its moments are not looked at.
    """
    total = sum(counts)
    mean, var = torch.zeros_like(means[0]), torch.zeros_like(means[0])
    sets = [(m, v, count / total) for m, v, count in zip(means, variances, counts, strict=True) if count]
    for m, _, share in sets:
        mean += share * m
    for m, v, share in sets:
        var += share * (v + (m - mean).square())
    return mean, var
