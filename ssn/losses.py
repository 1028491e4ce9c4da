"""Training losses: truncated L1 and focal loss (ICPR 2024, section 3.4).

Every term is a sum over a count. Both are handed to ``all_reduce`` before they are divided, so that any number of
workers that share a batch compute the loss of the whole batch.

Shape legend: B images, H W position in the anomaly map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Elementwise sum of a 1-D float32 tensor over all workers; see :meth:`ssn.distributed.Workers.add_shares`."""


@dataclass(frozen=True)
class Loss:
    """The total, to call ``backward`` on, and its terms; every one a float32 scalar."""

    total: Tensor
    map_l1: Tensor
    map_focal: Tensor
    score_focal: Tensor


def _alone(sums: Tensor) -> Tensor:
    return sums


def _focal(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    # With z the logit of the true class, p_t = sigmoid(z): -log p_t = softplus(-z) and 1 - p_t = exp(-softplus(z)).
    # No power of a difference is taken, so neither the loss nor its gradient degenerates at saturated logits.
    z = torch.where(targets > 0, logits, -logits)
    return F.softplus(-z) * torch.exp(-gamma * F.softplus(z))


def _sum_and_count(values: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    if weight is None:
        return values.sum(), values.new_tensor(values.numel())
    weight = weight.to(values.dtype).expand_as(values)
    return (values * weight).sum(), weight.sum()


def _truncated_l1_sums(map_BHW: Tensor, mask_BHW: Tensor, truncation: float, weight_BHW: Tensor | None) -> list[Tensor]:
    anomalous_BHW = (mask_BHW > 0).to(map_BHW.dtype)
    normal_BHW = 1 - anomalous_BHW
    if weight_BHW is not None:
        weight_BHW = weight_BHW.to(map_BHW.dtype).expand_as(map_BHW)
        anomalous_BHW, normal_BHW = anomalous_BHW * weight_BHW, normal_BHW * weight_BHW
    return [
        *_sum_and_count(F.relu(truncation + map_BHW), normal_BHW),
        *_sum_and_count(F.relu(truncation - map_BHW), anomalous_BHW),
    ]


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count.clamp(min=torch.finfo(count.dtype).tiny)


def truncated_l1(map_BHW: Tensor, mask_BHW: Tensor, *, truncation: float, weight_BHW: Tensor | None = None) -> Tensor:
    """Mean of relu(truncation + map) over normal plus mean of relu(truncation - map) over anomalous positions.

    Args:
        map_BHW: Anomaly map, logits.
        mask_BHW: Anomalous where positive.
        truncation: Margin past which a position costs nothing.
        weight_BHW: Weight of each position, broadcastable to the map; 0 leaves a position out of sums and counts.

    Returns:
        Scalar. A class without positions contributes 0.
    """
    normal_sum, normal_count, anomalous_sum, anomalous_count = _truncated_l1_sums(
        map_BHW.float(), mask_BHW, truncation, weight_BHW
    )
    return _mean(normal_sum, normal_count) + _mean(anomalous_sum, anomalous_count)


def sigmoid_focal(logits: Tensor, targets: Tensor, *, gamma: float, weight: Tensor | None = None) -> Tensor:
    """Mean of -(1 - p_t)^gamma log p_t, without class weights.

    Args:
        logits: Any shape.
        targets: Same shape; the positive class where positive.
        gamma: Focusing exponent; 0 is binary cross-entropy.
        weight: Weight of each element, broadcastable to ``logits``; 0 leaves it out of sum and count.

    Returns:
        Scalar; 0 if nothing has weight.
    """
    return _mean(*_sum_and_count(_focal(logits.float(), targets, gamma), weight))


def total_loss(
    map_BHW: Tensor,
    score_B: Tensor,
    mask_BHW: Tensor,
    label_B: Tensor,
    *,
    truncation: float,
    gamma: float,
    weight_BHW: Tensor | None = None,
    all_reduce: AllReduce = _alone,
) -> Loss:
    """Truncated L1 and focal loss on the map plus focal loss on the score.

    Args:
        map_BHW: Anomaly map, logits.
        score_B: Image score, logits.
        mask_BHW: Anomalous where positive, synthetic anomalies included.
        label_B: Anomalous where positive.
        truncation: Margin of the truncated L1 loss.
        gamma: Focusing exponent of both focal losses.
        weight_BHW: Weight of each position in both map losses, broadcastable to the map (``[B, 1, 1]`` leaves out whole
            images); the score always counts.
        all_reduce: Sums over the workers that share the batch. Every worker then returns the loss of the whole batch,
            and backward gives the gradients of its own share: summed over the workers they are the whole.
    """
    map_BHW, score_B = map_BHW.float(), score_B.float()
    sums = all_reduce(
        torch.stack(
            [
                *_truncated_l1_sums(map_BHW, mask_BHW, truncation, weight_BHW),
                *_sum_and_count(_focal(map_BHW, mask_BHW, gamma), weight_BHW),
                *_sum_and_count(_focal(score_B, label_B, gamma), None),
            ]
        )
    )
    normal_l1, anomalous_l1, map_focal, score_focal = (_mean(sums[2 * i], sums[2 * i + 1]) for i in range(4))
    map_l1 = normal_l1 + anomalous_l1
    return Loss(map_l1 + map_focal + score_focal, map_l1, map_focal, score_focal)
