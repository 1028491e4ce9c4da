"""Losses against published implementations' values, a literal formula and their own invariants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssn.losses import Loss, sigmoid_focal, total_loss, truncated_l1
from tests.tolerances import FLOAT32_ATOL, FLOAT32_RTOL, GOLDEN_RTOL

SETTINGS = {"truncation": 0.5, "gamma": 4.0}


def _batch(seed: int = 0, size: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    map_BHW = torch.randn(4, *size, generator=generator) * 2
    score_B = torch.randn(4, generator=generator)
    mask_BHW = torch.rand(4, *size, generator=generator) < 0.3
    mask_BHW[0] = False
    return map_BHW, score_B, mask_BHW, mask_BHW.flatten(1).any(dim=1)


def _literal_focal(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    targets = targets.to(logits.dtype)
    p = torch.sigmoid(logits)
    p_t = p * targets + (1 - p) * (1 - targets)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * (1 - p_t) ** gamma


@pytest.mark.parametrize(
    "name", ["icpr_unsupervised_square", "icpr_supervised_rect", "jims_unsupervised_square", "jims_supervised_rect"]
)
def test_total_is_the_reference_codes(shared_dir: Path, name: str) -> None:
    with np.load(shared_dir / "reference" / "golden" / f"{name}.npz") as golden:
        map_BHW, score_B, mask_BHW, label_B = (
            torch.from_numpy(golden[key]) for key in ("train_map", "train_score", "train_mask", "train_label")
        )
        expected = float(golden["train_loss"])
    loss = total_loss(map_BHW.squeeze(1), score_B, mask_BHW.squeeze(1), label_B, **SETTINGS)
    assert float(loss.total) == pytest.approx(expected, rel=GOLDEN_RTOL)


def test_total_is_the_sum_of_its_terms() -> None:
    map_BHW, score_B, mask_BHW, label_B = _batch()
    loss = total_loss(map_BHW, score_B, mask_BHW, label_B, **SETTINGS)
    torch.testing.assert_close(loss.map_l1, truncated_l1(map_BHW, mask_BHW, truncation=0.5))
    torch.testing.assert_close(loss.map_focal, sigmoid_focal(map_BHW, mask_BHW, gamma=4.0))
    torch.testing.assert_close(loss.score_focal, sigmoid_focal(score_B, label_B, gamma=4.0))
    torch.testing.assert_close(loss.total, loss.map_l1 + loss.map_focal + loss.score_focal)


def test_truncated_l1_by_hand() -> None:
    map_BHW = torch.tensor([[[-2.0, 0.25, -0.25, 3.0, 0.0]]])
    mask_BHW = torch.tensor([[[False, False, True, True, True]]])
    # normal: 0, 0.75; anomalous: 0.75, 0, 0.5
    expected = (0 + 0.75) / 2 + (0.75 + 0 + 0.5) / 3
    assert float(truncated_l1(map_BHW, mask_BHW, truncation=0.5)) == pytest.approx(expected, rel=FLOAT32_RTOL)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 4.0])
def test_focal_and_its_gradient_are_the_literal_formulas(gamma: float) -> None:
    map_BHW, _, mask_BHW, _ = _batch()
    ours, literal = map_BHW.clone().requires_grad_(), map_BHW.double().requires_grad_()
    loss = sigmoid_focal(ours, mask_BHW, gamma=gamma)
    expected = _literal_focal(literal, mask_BHW, gamma).mean()
    torch.testing.assert_close(loss, expected.float(), rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, literal.grad.float(), rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 4.0])
def test_focal_stays_finite_at_saturated_logits(gamma: float) -> None:
    logits = torch.tensor([-1e4, -200.0, 200.0, 1e4] * 2, requires_grad=True)
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    loss = sigmoid_focal(logits, targets, gamma=gamma)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert loss.item() == pytest.approx((200 + 1e4) * 2 / 8, rel=FLOAT32_RTOL)


@pytest.mark.parametrize("anomalous", [False, True])
def test_a_class_without_positions_contributes_nothing(anomalous: bool) -> None:
    map_BHW, score_B, _, _ = _batch()
    map_BHW.requires_grad_()
    mask_BHW = torch.full(map_BHW.shape, anomalous)
    loss = total_loss(map_BHW, score_B, mask_BHW, mask_BHW[:, 0, 0], **SETTINGS)
    sign = -1 if anomalous else 1
    torch.testing.assert_close(loss.map_l1, F.relu(0.5 + sign * map_BHW).mean())
    loss.total.backward()
    assert torch.isfinite(map_BHW.grad).all()


def test_positions_without_weight_leave_numerator_and_denominator() -> None:
    map_BHW, score_B, mask_BHW, label_B = _batch()
    weight_B11 = torch.tensor([1, 0, 1, 1])[:, None, None]
    kept = torch.tensor([0, 2, 3])
    weighted = total_loss(map_BHW, score_B, mask_BHW, label_B, **SETTINGS, weight_BHW=weight_B11)
    removed = total_loss(map_BHW[kept], score_B, mask_BHW[kept], label_B, **SETTINGS)
    torch.testing.assert_close(weighted.map_l1, removed.map_l1)
    torch.testing.assert_close(weighted.map_focal, removed.map_focal)
    assert float(weighted.score_focal) == float(total_loss(map_BHW, score_B, mask_BHW, label_B, **SETTINGS).score_focal)


def test_no_weight_at_all_is_zero_with_zero_gradient() -> None:
    map_BHW, score_B, mask_BHW, label_B = _batch()
    map_BHW.requires_grad_()
    loss = total_loss(map_BHW, score_B, mask_BHW, label_B, **SETTINGS, weight_BHW=torch.zeros(4, 1, 1))
    assert loss.map_l1.item() == 0
    assert loss.map_focal.item() == 0
    loss.total.backward()
    assert not map_BHW.grad.any()


def test_workers_that_share_a_batch_compute_the_whole_batchs_loss_and_gradient() -> None:
    map_BHW, score_B, mask_BHW, label_B = _batch()
    whole_map, whole_score = map_BHW.clone().requires_grad_(), score_B.clone().requires_grad_()
    whole = total_loss(whole_map, whole_score, mask_BHW, label_B, **SETTINGS)
    whole.total.backward()

    # Uneven shares, the second without a normal image: means of means would be wrong.
    shares = [slice(0, 3), slice(3, 4)]
    maps = [map_BHW[s].clone().requires_grad_() for s in shares]
    scores = [score_B[s].clone().requires_grad_() for s in shares]

    def run(rank: int, others: Tensor) -> tuple[Loss, Tensor]:
        seen: list[Tensor] = []

        def all_reduce(sums: Tensor) -> Tensor:
            seen.append(sums.detach())
            return sums + others

        s = shares[rank]
        return total_loss(maps[rank], scores[rank], mask_BHW[s], label_B[s], **SETTINGS, all_reduce=all_reduce), seen[0]

    own = [run(rank, torch.zeros(8))[1] for rank in (0, 1)]
    for rank in (0, 1):
        loss, _ = run(rank, own[1 - rank])
        torch.testing.assert_close(loss.total, whole.total, rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)
        loss.total.backward()
        for ours, expected in ((maps[rank], whole_map), (scores[rank], whole_score)):
            torch.testing.assert_close(ours.grad, expected.grad[shares[rank]], rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)


def test_half_precision_inputs_are_summed_in_float32() -> None:
    map_BHW, score_B, mask_BHW, label_B = _batch(size=(64, 64))
    map_BHW, score_B = map_BHW.bfloat16(), score_B.bfloat16()
    half = total_loss(map_BHW, score_B, mask_BHW, label_B, **SETTINGS)
    full = total_loss(map_BHW.float(), score_B.float(), mask_BHW, label_B, **SETTINGS)
    assert half.total.dtype == torch.float32
    assert float(half.total) == float(full.total)
