"""The network as the papers write it: upsample, concatenate, pool, adapt, then the heads. Slow, and obviously right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssn.model import Noise, SuperSimpleNet


def pooled_features(net: SuperSimpleNet, features_BhwC: Sequence[Tensor]) -> Tensor:
    """[B, C, H, W]: every layer at twice the finest one's size, averaged over 3x3."""
    height, width = features_BhwC[0].shape[1:3]
    ups = [
        F.interpolate(
            f.permute(0, 3, 1, 2), size=(2 * height, 2 * width), mode="bilinear", align_corners=net.align_corners
        )
        for f in features_BhwC
    ]
    return F.avg_pool2d(torch.cat(ups, dim=1), kernel_size=3, stride=1, padding=1)


def heads(net: SuperSimpleNet, raw: Tensor, noise: Tensor | None, *, stop_grad: bool) -> tuple[Tensor, Tensor]:
    """Map [V, H, W] and score [V] from pooled features and noise [V, C, H, W]; batch norms as ``net.training`` says."""
    adapted = net.adaptor(raw)
    if noise is not None:
        adapted, raw = adapted + noise, raw + noise
    hidden = F.leaky_relu(net.seg_bn(net.seg_conv(adapted)), 0.2)
    map_V1HW = net.seg_out(hidden)
    map_cls = map_V1HW.detach() if stop_grad else map_V1HW
    x = torch.cat([adapted if net.adapt_cls else raw, map_cls], dim=1)
    x = F.relu(net.cls_bn(net.cls_conv(x)))
    pooled = [x.amax((2, 3)), x.mean((2, 3)), map_cls.amax((2, 3)), map_cls.mean((2, 3))]
    return map_V1HW[:, 0], net.cls_score(torch.cat(pooled, dim=1)).squeeze(1)


def forward_train(
    net: SuperSimpleNet, features_BhwC: Sequence[Tensor], noise: Noise, *, stop_grad: bool
) -> tuple[Tensor, Tensor]:
    raw = pooled_features(net, features_BhwC).repeat(2, 1, 1, 1)
    views, channels, height, width = raw.shape
    dense = raw.new_zeros(views * height * width, channels)
    dense[noise.index_N] = noise.rows_NC
    return heads(net, raw, dense.view(views, height, width, channels).permute(0, 3, 1, 2), stop_grad=stop_grad)


def forward_eval(net: SuperSimpleNet, features_BhwC: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return heads(net, pooled_features(net, features_BhwC), None, stop_grad=False)
