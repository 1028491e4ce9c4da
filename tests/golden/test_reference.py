"""The official code's numbers, reproduced: forward, loss, gradient norms, batch-norm statistics and inference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssn.config import ModelConfig
from ssn.losses import total_loss
from ssn.model import Noise, SuperSimpleNet, image_map
from tests.tolerances import GOLDEN_ATOL, GOLDEN_RTOL, GRAD_NORM_ATOL_OF_TOTAL, GRAD_NORM_RTOL

CASES = ["icpr_unsupervised_square", "icpr_supervised_rect", "jims_unsupervised_square", "jims_supervised_rect"]

# our parameter name -> the name in each reference
NAMES = {
    "icpr": {
        "adaptor": "feature_adaptor.projection",
        "seg_conv": "discriminator.seg.0",
        "seg_bn": "discriminator.seg.1",
        "seg_out": "discriminator.seg.3",
        "cls_conv": "discriminator.dec_head.0",
        "cls_bn": "discriminator.dec_head.1",
        "cls_score": "discriminator.fc_score",
    },
    "jims": {
        "adaptor": "adaptor.projection",
        "seg_conv": "segdec.seg_head.0",
        "seg_bn": "segdec.seg_head.1",
        "seg_out": "segdec.seg_head.3",
        "cls_conv": "segdec.cls_conv.0",
        "cls_bn": "segdec.cls_conv.1",
        "cls_score": "segdec.cls_fc",
    },
}


def reference_name(variant: str, name: str) -> str:
    module, _, leaf = name.partition(".")
    return f"{NAMES[variant][module]}.{leaf}"


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest, shared_dir: Path) -> tuple[str, dict[str, np.ndarray], SuperSimpleNet]:
    variant = request.param.split("_")[0]
    with np.load(shared_dir / "reference" / "golden" / f"{request.param}.npz") as file:
        arrays = dict(file)
    with np.load(shared_dir / "reference" / "golden" / f"{variant}_head_weights.npz") as file:
        weights = dict(file)
    net = SuperSimpleNet((16, 32), ModelConfig(variant=variant))
    net.load_state_dict(
        {name: torch.from_numpy(weights[reference_name(variant, name)]) for name in net.state_dict()}, strict=True
    )
    return variant, arrays, net


def features_of(arrays: dict[str, np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(arrays[k]).permute(0, 2, 3, 1).contiguous() for k in ("layer2", "layer3")]


def close(actual: torch.Tensor, expected: np.ndarray, scale_atol: float = GOLDEN_ATOL) -> None:
    reference = torch.from_numpy(np.asarray(expected))
    torch.testing.assert_close(
        actual.detach(), reference, rtol=GOLDEN_RTOL, atol=scale_atol * reference.abs().max().item()
    )


def test_training_step(golden: tuple[str, dict[str, np.ndarray], SuperSimpleNet]) -> None:
    variant, arrays, net = golden
    supervised = bool(arrays["label_in"].any())
    masks = torch.from_numpy(arrays["mask_in"]).float()
    masks = masks if masks.dim() == 4 else masks[:, None]
    size = arrays["perlin"].shape[-2:]
    if masks.shape[-2:] != size:  # the jims code is given masks at image size
        masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
    defects = (masks[:, 0] >= 0.5).repeat(2, 1, 1)
    synthetic = (torch.from_numpy(arrays["perlin"])[:, 0] > 0) & ~defects
    index = synthetic.flatten().nonzero().squeeze(1)
    noise_rows = torch.from_numpy(arrays["noise"]).permute(0, 2, 3, 1).flatten(0, 2)[index]

    net.train()
    map_VHW, score_V = net.forward_train(features_of(arrays), Noise(noise_rows, index), stop_grad=not supervised)
    target = defects | synthetic
    labels = torch.from_numpy(arrays["label_in"]).repeat(2).bool() | synthetic.flatten(1).any(1)
    close(map_VHW, arrays["train_map"][:, 0])
    close(score_V, arrays["train_score"])
    np.testing.assert_array_equal(target.numpy(), arrays["train_mask"][:, 0] > 0.5)
    np.testing.assert_array_equal(labels.numpy(), arrays["train_label"] > 0.5)

    loss = total_loss(map_VHW, score_V, target, labels.float(), truncation=0.5, gamma=4.0).total
    close(loss, arrays["train_loss"])
    loss.backward()
    total = float(arrays["grad_total_norm"])
    norms = {name: float(p.grad.norm()) if p.grad is not None else 0.0 for name, p in net.named_parameters()}
    assert np.sqrt(sum(n**2 for n in norms.values())) == pytest.approx(total, rel=GRAD_NORM_RTOL)
    for name, norm in norms.items():
        expected = float(arrays[f"grad_norm/{reference_name(variant, name)}"])
        assert norm == pytest.approx(expected, rel=GRAD_NORM_RTOL, abs=GRAD_NORM_ATOL_OF_TOTAL * total), name
    for name, buffer in net.named_buffers():
        key = f"bn_after/{reference_name(variant, name)}"
        if key in arrays:
            close(buffer, arrays[key])


def test_inference(golden: tuple[str, dict[str, np.ndarray], SuperSimpleNet]) -> None:
    variant, arrays, net = golden
    net.eval()
    map_BHW, score_B = net(features_of(arrays))
    close(map_BHW, arrays["eval_raw_map"][:, 0])
    height, width = 4 * map_BHW.shape[1], 4 * map_BHW.shape[2]
    full = image_map(map_BHW, (height, width))
    if variant == "jims":
        close(full.sigmoid(), arrays["eval_map_sigmoid"][:, 0])
        close(score_B.sigmoid(), arrays["eval_score_sigmoid"])
    else:
        close(full, arrays["eval_map"][:, 0])
        close(score_B, arrays["eval_score"])
