"""The folded network: the same numbers as the parts it was made of, in any precision and for any backbone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssn.backbone import Backbone, fold_batch_norms, load_backbone
from ssn.config import ModelConfig
from ssn.inference import InferenceNetwork
from ssn.model import SuperSimpleNet
from tests import oracle
from tests.tolerances import BF16_INFERENCE_ATOL, FOLDED_ATOL

SIZE = (64, 96)


def unsettled(name: str, layers: tuple[int, ...]) -> Backbone:
    """Random weights whose batch norms are far from the identity."""
    backbone = load_backbone(ModelConfig(backbone=name, weights="random", layers=layers))
    generator = torch.Generator().manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return backbone


# residual, its norm and activation in one module, dense, none at all, one that cannot be traced
@pytest.mark.parametrize(
    ("name", "layers", "folds"),
    [
        ("resnet18", (1, 2), True),
        ("efficientnet_b0", (2, 3), False),
        ("vgg11_bn", (2, 3), True),
        ("convnext_atto", (0, 1), False),
        ("dm_nfnet_f0", (1, 2), False),
    ],
)
def test_folding_keeps_what_a_backbone_computes(name: str, layers: tuple[int, ...], folds: bool) -> None:
    backbone = unsettled(name, layers)
    x_BCHW = torch.rand(2, 3, *SIZE)
    folded = fold_batch_norms(backbone)
    for found, expected in zip(folded(x_BCHW), backbone(x_BCHW), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=FOLDED_ATOL * float(expected.abs().max()))
    if folds:
        assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert folded is not backbone
    assert not {id(p) for p in folded.parameters()} & {id(p) for p in backbone.parameters()}


@pytest.mark.parametrize("variant", ["icpr", "jims"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_get_the_scores_of_the_plain_formulation(variant: str, precision: str) -> None:
    backbone = unsettled("resnet18", (1, 2))
    config = ModelConfig(variant=variant, seg_channels=160, cls_channels=8)  # type: ignore[arg-type]
    net = SuperSimpleNet(backbone.channels, config).eval()
    net.seg_bn.running_mean.normal_()  # type: ignore[union-attr]
    x_BCHW = torch.rand(3, 3, *SIZE)
    with torch.no_grad():
        map_BHW, score_B = oracle.forward_eval(net, [m.permute(0, 2, 3, 1) for m in backbone(x_BCHW)])
        network = InferenceNetwork(backbone, net, SIZE, precision=precision)  # type: ignore[arg-type]
        found_map, found_score = network(x_BCHW)
    assert found_map.dtype == found_score.dtype == torch.float32
    atol, scale = BF16_INFERENCE_ATOL if precision == "bf16" else FOLDED_ATOL, float(map_BHW.abs().max())
    torch.testing.assert_close(found_map, map_BHW, rtol=0, atol=atol * scale)
    torch.testing.assert_close(found_score, score_B, rtol=0, atol=atol * max(1.0, scale))
    assert next(backbone.parameters()).dtype == torch.float32
