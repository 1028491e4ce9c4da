"""SuperSimpleNet, everything behind the frozen backbone (ICPR 2024, arXiv 2408.03143; JIMS 2025, arXiv 2508.19060).

The papers upsample each backbone map to twice the finest one's size, concatenate, average over 3x3, adapt with a 1x1
convolution, and feed two heads. Every step up to the heads' first batch norm is linear, so the steps commute, and this
module evaluates them where the maps are small:

* Upsampling U and the 3x3 mean P act on height and width separately. With R = P U, an [H, h] matrix per axis, the
  pooled map of a layer is ``R_H F R_W^T`` for each channel, and a 1x1 convolution can be taken before it.
* Segmentation head: ``W1 (A F + b_A) + b1`` becomes ``R_H (F (W1 A)^T) R_W^T + (W1 b_A + b1)``. The adaptor is folded
  into the head's first layer once a step.
* Classification head: a 5x5 convolution is a sum over 25 shifts. With K its weight, ``K A F`` is taken at the layer's
  size and the shifts become shifted copies of R: ``S[X, (x, dx)] = R[X + dx - 2, x]``, rows outside the map zero.
  The adaptor's bias meets the convolution's zero padding at the border, hence its own term.
* Training sees every image twice, with different noise. Noise is zero where its mask is, so both halves share the
  clean pre-activations; the noisy positions alone get their own rows.

The hidden activations of the segmentation head, [2B, H, W, 1024], never exist: the head is evaluated a slice of hidden
channels at a time (batch norm is per channel, and the map is a sum over them), and the backward pass recomputes it.

Shape suffixes:
    B images, V = 2B views (the batch, then the batch again), h/w a layer's height and width, H/W the map's,
    C feature channels (all layers), D hidden channels of the segmentation head, d a slice of them,
    E hidden channels of the classification head, N noisy positions over all views.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssn.config import ModelConfig, Size
from ssn.distributed import ALONE, Workers, merge_moments
from ssn.errors import SSNError

CLS_KERNEL = 5
LEAKY_SLOPE = 0.2
BLUR_SIGMA = 4.0
BLUR_KERNEL = 25

# A slice of hidden channels of one image (64 x 64 positions x 128 channels x 4 bytes = 2 MB) stays in a CPU's cache.
CPU_CHANNEL_SLICE = 128


# The number of noisy rows differs from step to step. oneDNN compiles a kernel for every shape of a bfloat16 product and
# keeps a thousand of them: with few different shapes, memory stays flat and no time goes into compiling.
ROW_MULTIPLE = 256


class Noise(NamedTuple):
    """Synthetic anomalies of one step, at the positions where there are any.

    Attributes:
        rows_NC: Noise, already scaled by sigma, one row per noisy position.
        index_N: Position of each row in the flattened [V, H, W], ascending.
    """

    rows_NC: Tensor
    index_N: Tensor


class BatchShare(NamedTuple):
    """This worker's part of a batch that several may share; batch norms see the whole of it.

    Attributes:
        workers: Who share it.
        counts: Positions (2B * H * W) of each; there are none where a batch has fewer images than workers.
    """

    workers: Workers
    counts: list[int]

    @property
    def total(self) -> int:
        """Positions of the whole batch."""
        return sum(self.counts)

    def merge(self, mean_D: Tensor, var_D: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of the whole batch from those of this part."""
        if len(self.counts) == 1:
            return mean_D, var_D
        stacked = self.workers.stack(torch.stack([mean_D, var_D]))
        return merge_moments(stacked[:, 0], stacked[:, 1], self.counts)


@dataclass(frozen=True)
class Resampling:
    """The matrices that take each layer's map to the pooled map (and, shifted, to the 5x5 convolution's output)."""

    size_HW: Size
    pool_W: tuple[Tensor, ...]
    """Per layer [W, w]."""
    pool_H: Tensor
    """All layers side by side, [H, sum of h]."""
    shift_W: tuple[Tensor, ...]
    """Per layer [W, w * 5], columns ordered (x, dx)."""
    shift_H: Tensor
    """All layers and vertical shifts side by side, [H, sum of 5 * h], columns ordered (layer, dy, y)."""
    valid_H: Tensor
    """[H, 5]: whether a vertical tap lies inside the map."""
    valid_W: Tensor


def map_size(feature_sizes: Sequence[Size]) -> Size:
    """Height and width of the anomaly map: twice the finest layer's."""
    height, width = feature_sizes[0]
    return 2 * height, 2 * width


def build_resampling(feature_sizes: Sequence[Size], *, align_corners: bool, device: torch.device) -> Resampling:
    """Build the matrices for feature maps of the given (height, width), finest first."""
    size_HW = map_size(feature_sizes)

    def pooled_upsampling(source: int, target: int) -> Tensor:
        eye = torch.eye(source, dtype=torch.float64)[None]
        up = F.interpolate(eye, size=target, mode="linear", align_corners=align_corners)
        return F.avg_pool1d(up, kernel_size=3, stride=1, padding=1)[0].T

    def shifted(pooled: Tensor) -> Tensor:
        # [H, h] -> [5, H, h]; output row Y of tap d reads row Y + d - 2
        half = CLS_KERNEL // 2
        padded = F.pad(pooled, (0, 0, half, half))
        return torch.stack([padded[d : d + pooled.shape[0]] for d in range(CLS_KERNEL)])

    heights = [pooled_upsampling(h, size_HW[0]) for h, _ in feature_sizes]
    widths = [pooled_upsampling(w, size_HW[1]) for _, w in feature_sizes]

    def place(matrix: Tensor) -> Tensor:
        return matrix.to(device=device, dtype=torch.float32).contiguous()

    ones = [shifted(torch.ones(side, 1, dtype=torch.float64))[:, :, 0].T for side in size_HW]
    return Resampling(
        size_HW=size_HW,
        pool_W=tuple(place(r) for r in widths),
        pool_H=place(torch.cat(heights, dim=1)),
        shift_W=tuple(place(shifted(r).permute(1, 2, 0).flatten(1)) for r in widths),
        shift_H=place(torch.cat([shifted(r).permute(1, 0, 2).flatten(1) for r in heights], dim=1)),
        valid_H=place(ones[0]),
        valid_W=place(ones[1]),
    )


def _left_multiply(matrix_XY: Tensor, x_BYZ: Tensor, out: Tensor | None = None) -> Tensor:
    # bmm with a broadcast left side: matmul would copy the right side to fold the batch into it
    return torch.bmm(matrix_XY.expand(x_BYZ.shape[0], -1, -1), x_BYZ, out=out)


def _matmul(a_XY: Tensor, b_YZ: Tensor) -> Tensor:
    """Product in the coarser of the two precisions, accumulated and returned in float32."""
    dtype = torch.bfloat16 if torch.bfloat16 in (a_XY.dtype, b_YZ.dtype) else torch.float32
    return (a_XY.to(dtype) @ b_YZ.to(dtype)).float()


def _in_one_piece(device: torch.device) -> bool:
    """Whether to work on everything at once: on a GPU, and when the network is exported, with any number of images."""
    return device.type != "cpu" or torch.compiler.is_exporting()


def _channel_slices(channels: int, device: torch.device) -> list[slice]:
    step = channels if _in_one_piece(device) else CPU_CHANNEL_SLICE
    return [slice(i, min(i + step, channels)) for i in range(0, channels, step)]


class _SegmentationSlice:
    """One slice of the segmentation head's hidden channels over a whole batch."""

    def __init__(self, features_BhwC: Sequence[Tensor], resampling: Resampling) -> None:
        self.features = features_BhwC
        self.resampling = resampling
        self.batch = features_BhwC[0].shape[0]

    def expand(self, fold_dC: Tensor, bias_d: Tensor) -> Tensor:
        """Clean pre-activations, [B, H * W, d]."""
        r, batch, channels = self.resampling, self.batch, fold_dC.shape[0]
        height, width = r.size_HW
        rows = [f.shape[1] for f in self.features]
        stacked = r.pool_H.new_empty(batch, sum(rows), width, channels)
        offset, column = 0, 0
        for f_BhwC, pool_W, h in zip(self.features, r.pool_W, rows, strict=True):
            weight_dC = fold_dC[:, column : column + f_BhwC.shape[3]]
            low = _matmul(f_BhwC.flatten(0, 2), weight_dC.T)
            wide = _left_multiply(pool_W, low.view(batch * h, f_BhwC.shape[2], channels))
            stacked[:, offset : offset + h] = wide.view(batch, h, width, channels)
            offset += h
            column += f_BhwC.shape[3]
        out = _left_multiply(r.pool_H, stacked.flatten(2)).view(batch, height * width, channels)
        return out.add_(bias_d)

    def contract(self, grad_BPd: Tensor) -> Tensor:
        """Transpose of :meth:`expand`: the gradient with respect to the folded weight, [d, C]."""
        r, batch, channels = self.resampling, self.batch, grad_BPd.shape[2]
        height, width = r.size_HW
        stacked = _left_multiply(r.pool_H.T, grad_BPd.view(batch, height, width * channels))
        stacked = stacked.view(batch, r.pool_H.shape[1], width, channels)
        grads, offset = [], 0
        for f_BhwC, pool_W in zip(self.features, r.pool_W, strict=True):
            h = f_BhwC.shape[1]
            rows = stacked[:, offset : offset + h].reshape(batch * h, width, channels)
            low = _left_multiply(pool_W.T, rows)
            grads.append(_matmul(low.flatten(0, 1).T, f_BhwC.flatten(0, 2)))
            offset += h
        return torch.cat(grads, dim=1)


class _SegmentationTraining(torch.autograd.Function):
    """Segmentation head in training mode, from features to the map of both halves of the batch.

    Per channel, with z = scale * p + shift the batch-normalised pre-activation, the gradient of p is
    ``scale * (dz - mean(dz) - xhat * mean(dz * xhat))`` with means over all V * H * W positions. A clean position
    stands for as many views as leave it without noise (0, 1 or 2), so it is computed once and weighted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        fold_DC: Tensor,
        bias_D: Tensor,
        noise_ND: Tensor,
        gamma_D: Tensor,
        beta_D: Tensor,
        out_D: Tensor,
        index_N: Tensor,
        resampling: Resampling,
        eps: float,
        share: BatchShare,
        kernels: _Kernels,
        *features_BhwC: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = _SegmentationSlice(features_BhwC, resampling)
        height, width = resampling.size_HW
        batch, positions = head.batch, height * width
        views = max(1, 2 * batch * positions)  # one of none, whose moments nobody looks at
        source_N = index_N % (batch * positions)
        map_clean = fold_DC.new_zeros(batch * positions)
        map_noisy = fold_DC.new_zeros(index_N.shape[0])
        mean_D, var_D = torch.empty_like(bias_D), torch.empty_like(bias_D)
        for s in _channel_slices(fold_DC.shape[0], fold_DC.device):
            clean_BPd = head.expand(fold_DC[s], bias_D[s])
            clean_Pd = clean_BPd.view(batch * positions, clean_BPd.shape[2])
            at_noise_Nd = clean_Pd[source_N]
            noisy_Nd = at_noise_Nd + noise_ND[:, s]
            mean = (2 * clean_Pd.sum(0) - at_noise_Nd.sum(0) + noisy_Nd.sum(0)) / views
            # centred second moments: E[p^2] - mean^2 would cancel where the mean is large
            square = 2 * _centred_squares(clean_BPd, mean) - _centred_squares(at_noise_Nd[None], mean)
            var = (square + _centred_squares(noisy_Nd[None], mean)) / views
            mean, var = share.merge(mean, var)
            mean_D[s], var_D[s] = mean, var
            scale = gamma_D[s] * torch.rsqrt(var + eps)
            shift = beta_D[s] - mean * scale
            for tile in _tiles(clean_BPd):
                act = F.leaky_relu_(torch.addcmul(shift, clean_Pd[tile], scale), LEAKY_SLOPE)
                map_clean[tile] += act @ out_D[s]
            act = F.leaky_relu_(torch.addcmul(shift, noisy_Nd, scale), LEAKY_SLOPE)
            map_noisy += act @ out_D[s]
        ctx.save_for_backward(fold_DC, bias_D, noise_ND, gamma_D, beta_D, out_D, index_N, mean_D, var_D, *features_BhwC)
        ctx.resampling, ctx.eps, ctx.share, ctx.kernels = resampling, eps, share, kernels
        map_V = map_clean.repeat(2)
        map_V[index_N] = map_noisy
        ctx.mark_non_differentiable(mean_D, var_D)
        return map_V.view(2 * batch, height, width), mean_D, var_D

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        fold_DC, bias_D, noise_ND, gamma_D, beta_D, out_D, index_N, mean_D, var_D, *features = ctx.saved_tensors
        head = _SegmentationSlice(features, ctx.resampling)
        batch = head.batch
        height, width = ctx.resampling.size_HW
        accumulate, to_gradient = ctx.kernels
        views = ctx.share.total
        dmap_V = grads[0].reshape(-1)
        dmap_noisy = dmap_V[index_N]
        dmap_clean_V, weight_V = dmap_V.clone(), torch.ones_like(dmap_V)
        dmap_clean_V[index_N] = 0
        weight_V[index_N] = 0
        dmap_clean = dmap_clean_V.view(2, batch * height * width).sum(0)
        # how many views a clean position stands for: it carries that much of the batch statistics' gradient
        weight_P = weight_V.view(2, batch * height * width).sum(0)
        source_N = index_N % (batch * height * width)

        dfold_DC, dnoise_ND = torch.empty_like(fold_DC), torch.empty_like(noise_ND)
        dgamma_D, dbeta_D, dout_D = (torch.empty_like(bias_D) for _ in range(3))
        for s in _channel_slices(fold_DC.shape[0], fold_DC.device):
            clean_BPd = head.expand(fold_DC[s], bias_D[s])
            clean_Pd = clean_BPd.view(batch * height * width, clean_BPd.shape[2])
            noisy_Nd = clean_Pd[source_N] + noise_ND[:, s]
            mean, rstd, out = mean_D[s], torch.rsqrt(var_D[s] + ctx.eps), out_D[s]
            scale = gamma_D[s] * rstd
            shift = beta_D[s] - mean * scale

            # pass 1: dz in place of p would lose p, which pass 2 needs again, so only the sums are kept
            dout = torch.zeros_like(mean)
            dz_sum, dz_centred_sum = torch.zeros_like(mean), torch.zeros_like(mean)
            for tile in _tiles(clean_BPd):
                dout, dz_sum, dz_centred_sum = accumulate(
                    clean_Pd[tile], dmap_clean[tile], scale, shift, mean, (dout, dz_sum, dz_centred_sum)
                )
            dout, dz_sum, dz_centred_sum = accumulate(
                noisy_Nd, dmap_noisy, scale, shift, mean, (dout, dz_sum, dz_centred_sum)
            )
            dout_D[s] = dout
            dz_sum, dz_centred_sum = dz_sum * out, dz_centred_sum * out
            dbeta_D[s] = dz_sum
            dgamma_D[s] = dz_centred_sum * rstd
            ctx.share.workers.add(dz_sum, dz_centred_sum)

            # pass 2: dp = scale * dz - (a + b * p), the bracket being the batch statistics' share
            b = scale * dz_centred_sum * rstd.square() / views
            a = scale * dz_sum / views - b * mean
            for tile in _tiles(clean_BPd):
                to_gradient(clean_Pd[tile], dmap_clean[tile], weight_P[tile], scale, shift, out, a, b)
            to_gradient(noisy_Nd, dmap_noisy, None, scale, shift, out, a, b)
            dnoise_ND[:, s] = noisy_Nd
            clean_Pd.index_add_(0, source_N, noisy_Nd)
            dfold_DC[s] = head.contract(clean_BPd)
        return dfold_DC, None, dnoise_ND, dgamma_D, dbeta_D, dout_D, *(None for _ in range(5 + len(features)))


def _tiles(x_BPd: Tensor) -> list[slice]:
    """Row ranges of the flattened positions that are worked on at a time: an image on a CPU, everything on a GPU."""
    batch, positions = x_BPd.shape[:2]
    if _in_one_piece(x_BPd.device):
        return [slice(0, batch * positions)]
    return [slice(i * positions, (i + 1) * positions) for i in range(batch)]


def _centred_squares(x_BPd: Tensor, mean_d: Tensor) -> Tensor:
    if x_BPd.device.type != "cpu":
        return (x_BPd - mean_d).square().sum((0, 1))
    total = torch.zeros_like(mean_d)
    for x_Pd in x_BPd:
        centred = x_Pd - mean_d
        total += torch.mul(centred, centred, out=centred).sum(0)
    return total


def _accumulate(
    p_Pd: Tensor, dmap_P: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, sums: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a tile's part of: sum(dmap * act), sum(dmap * act'), sum(dmap * act' * (p - mean))."""
    z_Pd = torch.addcmul(shift, p_Pd, scale)
    slope_Pd = _through_leaky_relu(torch.ones((), device=z_Pd.device).expand_as(z_Pd), z_Pd)
    dout = sums[0] + dmap_P @ z_Pd.mul_(slope_Pd)
    dz = dmap_P @ slope_Pd
    dz_centred = dmap_P @ slope_Pd.mul_(torch.sub(p_Pd, mean, out=z_Pd))
    return dout, sums[1] + dz, sums[2] + dz_centred


def _to_gradient(
    p_Pd: Tensor,
    dmap_P: Tensor,
    weight_P: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    a: Tensor,
    b: Tensor,
) -> None:
    """Replace pre-activations by their gradient, in place."""
    z_Pd = torch.addcmul(shift, p_Pd, scale)
    dz_Pd = _through_leaky_relu(torch.outer(dmap_P, scale * out), z_Pd)
    statistics_Pd = torch.addcmul(a, p_Pd, b, out=z_Pd)
    if weight_P is not None:
        statistics_Pd.mul_(weight_P[:, None])
    torch.sub(dz_Pd, statistics_Pd, out=p_Pd)


class _Kernels(NamedTuple):
    """What the backward pass does to a tile."""

    accumulate: Callable[..., tuple[Tensor, Tensor, Tensor]] = _accumulate
    to_gradient: Callable[..., None] = _to_gradient


def check_compiler(device: torch.device) -> None:
    """Refuse ``compiled`` where nothing compiles.

    Raises:
        SSNError: on a CPU, there is no C++ compiler where ``torch.compile`` looks for one.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise SSNError(
            f"train.compile needs a C++ compiler, {compiler}; install it, set CXX, or leave train.compile out"
        )


@functools.cache
def _compiled_kernels() -> _Kernels:
    # the last tile, of noisy positions, has another length in every step
    return _Kernels(torch.compile(_accumulate, dynamic=True), torch.compile(_to_gradient, dynamic=True))


def _through_leaky_relu(grad: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.leaky_relu_backward(grad, z, LEAKY_SLOPE, False)


class FoldedHeads(NamedTuple):
    """Weights folded for inference: adaptor and batch norms merged into the heads' first layers."""

    seg_fold_DC: Tensor
    seg_bias_D: Tensor
    seg_out_D: Tensor
    cls_fold: tuple[Tensor, ...]
    """Per layer [5, 5 * E, C_l], first axis dy, rows ordered (dx, e)."""
    cls_map: Tensor
    """[25, E]: the map's own channel."""
    cls_bias_HWE: Tensor

    def to(self, dtype: torch.dtype) -> FoldedHeads:
        """With the large matrices in another precision; biases and what acts on the map stay as they are."""
        return self._replace(
            seg_fold_DC=self.seg_fold_DC.to(dtype), cls_fold=tuple(weight.to(dtype) for weight in self.cls_fold)
        )


class SuperSimpleNet(nn.Module):
    """Adaptor, segmentation head and classification head over a frozen backbone's feature maps.

    Args:
        channels: Channels of each feature map, finest first.
        config: Variant, upsampling rule and hidden sizes.
        generator_seed: Seed of the Xavier-normal initialisation (biases keep PyTorch's default).
    """

    def __init__(self, channels: Sequence[int], config: ModelConfig, *, generator_seed: int = 0) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.adapt_cls = config.variant == "icpr"
        self.align_corners = self.adapt_cls if config.align_corners is None else config.align_corners
        total, hidden, cls = sum(self.channels), config.seg_channels, config.cls_channels
        self._resampling: dict[tuple[Any, ...], Resampling] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_seed)
            self.adaptor = nn.Conv2d(total, total, 1)
            self.seg_conv = nn.Conv2d(total, hidden, 1)
            self.seg_bn = nn.BatchNorm2d(hidden)
            self.seg_out = nn.Conv2d(hidden, 1, 1, bias=False)
            self.cls_conv = nn.Conv2d(total + 1, cls, CLS_KERNEL, padding=CLS_KERNEL // 2)
            self.cls_bn = nn.BatchNorm2d(cls)
            self.cls_score = nn.Linear(2 * cls + 2, 1)
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.xavier_normal_(module.weight)
        # A batch norm subtracts the bias in front of it, whose gradient is therefore zero but for rounding. AdamW
        # divides that by its size: steps of a whole learning rate, in a direction that threads, workers and precision
        # decide. Evaluation would see them, since running means lag behind. So these biases keep their first values.
        for layer in (self.seg_conv, self.cls_conv) if self.adapt_cls else (self.seg_conv, self.cls_conv, self.adaptor):
            _bias(layer).requires_grad_(False)

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Adaptor parameters and head parameters, which are optimised differently (ICPR 2024, section 4.2)."""
        adaptor = list(self.adaptor.parameters())
        ids = {id(p) for p in adaptor}
        return adaptor, [p for p in self.parameters() if id(p) not in ids]

    def resampling(self, features_BhwC: Sequence[Tensor]) -> Resampling:
        """The matrices for these feature maps, built once per size and device.

        Raises:
            SSNError: the maps do not have the channels this network was made for.
        """
        channels = tuple(f.shape[3] for f in features_BhwC)
        if channels != self.channels:
            raise SSNError(f"feature maps have {channels} channels, but this network was made for {self.channels}")
        sizes = [(f.shape[1], f.shape[2]) for f in features_BhwC]
        key = (*sizes, features_BhwC[0].device)
        if key not in self._resampling:
            self._resampling[key] = build_resampling(
                sizes, align_corners=self.align_corners, device=features_BhwC[0].device
            )
        return self._resampling[key]

    def forward_train(
        self,
        features_BhwC: Sequence[Tensor],
        noise: Noise,
        *,
        stop_grad: bool,
        noise_dtype: torch.dtype = torch.float32,
        workers: Workers = ALONE,
        compiled: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Both halves of a training batch: the images, and the images again, each view with its own noise.

        Args:
            features_BhwC: Feature maps per layer, channels last; their precision, float32 or bfloat16, is that of
                every matrix product with a weight but the noise's. Sums, batch norms and activations are float32.
            noise: Synthetic anomalies over the 2B views.
            stop_grad: Whether the classification head's loss stops at the map (unsupervised training).
            noise_dtype: Precision of the noise's matrix product (accumulation is float32); the rounding touches only
                a perturbation of size sigma.
            workers: Those who share the batch, if this is a slice of it, possibly empty: batch norms are over all of
                it, and gradients are the slice's share. All of them must call this, and backward, at the same time.
            compiled: Whether the backward pass's elementwise arithmetic goes through ``torch.compile``.

        Returns:
            Map logits [2B, H, W] and score logits [2B]. Batch-norm buffers are updated.
        """
        r = self.resampling(features_BhwC)
        positions = 2 * features_BhwC[0].shape[0] * r.size_HW[0] * r.size_HW[1]
        counts = workers.stack(torch.tensor(positions, device=r.pool_H.device)).tolist() if workers.size > 1 else None
        share = BatchShare(workers, counts or [positions])
        noise_NC = _pad_rows(noise.rows_NC.to(noise_dtype))
        seg_noise_ND = (noise_NC @ self.seg_conv.weight.flatten(1).to(noise_dtype).T)[: len(noise.index_N)].float()
        dtype = features_BhwC[0].dtype
        fold_DC, bias_D = self._seg_fold(dtype)
        map_VHW, mean_D, var_D = _SegmentationTraining.apply(
            fold_DC,
            bias_D,
            seg_noise_ND,
            self.seg_bn.weight,
            self.seg_bn.bias,
            self.seg_out.weight.flatten(),
            noise.index_N,
            r,
            self.seg_bn.eps,
            share,
            _compiled_kernels() if compiled else _Kernels(),
            *features_BhwC,
        )
        _update_running_stats(self.seg_bn, mean_D, var_D, share.total)

        clean_BPE = self._cls_clean(features_BhwC, r, self._cls_fold(dtype)) + self._cls_bias(r).flatten(0, 1)
        map_cls_VHW = map_VHW.detach() if stop_grad else map_VHW
        hidden_VPE = self._add_map(clean_BPE.repeat(2, 1, 1), map_cls_VHW)
        kernel_25EC = self.cls_conv.weight[:, :-1].permute(2, 3, 0, 1).flatten(0, 1)
        hidden_VPE = _NoisyConvolution.apply(hidden_VPE, kernel_25EC, noise_NC, noise.index_N, r.size_HW)
        normed = _batch_norm(self.cls_bn, hidden_VPE.flatten(0, 1), share)
        return map_VHW, self._pool_and_score(F.relu(normed).view_as(hidden_VPE), map_cls_VHW)

    def fold(self, size_features: Sequence[Tensor]) -> FoldedHeads:
        """Merge adaptor and batch norms (running statistics) into the heads' first layers, for :meth:`score`.

        Args:
            size_features: Feature maps of the sizes that will be scored (only their shapes and device are used).
        """
        r = self.resampling(size_features)
        with torch.no_grad():
            seg_scale, seg_shift = _bn_affine(self.seg_bn)
            cls_scale, cls_shift = _bn_affine(self.cls_bn)
            fold_DC, bias_D = self._seg_fold()
            tap_scale = cls_scale.repeat(CLS_KERNEL)[None, :, None]
            return FoldedHeads(
                seg_fold_DC=fold_DC * seg_scale[:, None],
                seg_bias_D=bias_D * seg_scale + seg_shift,
                seg_out_D=self.seg_out.weight.flatten(),
                cls_fold=tuple(weight * tap_scale for weight in self._cls_fold()),
                cls_map=self._cls_map_weight() * cls_scale,
                cls_bias_HWE=self._cls_bias(r) * cls_scale + cls_shift,
            )

    @torch.no_grad()
    def score(self, features_BhwC: Sequence[Tensor], folded: FoldedHeads) -> tuple[Tensor, Tensor]:
        """Map logits [B, H, W] and score logits [B] of images without synthetic anomalies, with running statistics."""
        r = self.resampling(features_BhwC)
        head = _SegmentationSlice(features_BhwC, r)
        map_BHW = r.pool_H.new_zeros(head.batch, *r.size_HW)
        flat = map_BHW.view(-1)
        for s in _channel_slices(folded.seg_fold_DC.shape[0], map_BHW.device):
            hidden_BPd = head.expand(folded.seg_fold_DC[s], folded.seg_bias_D[s])
            for tile in _tiles(hidden_BPd):
                act = F.leaky_relu_(hidden_BPd.flatten(0, 1)[tile], LEAKY_SLOPE)
                flat[tile] += act @ folded.seg_out_D[s]
        clean_BPE = self._cls_clean(features_BhwC, r, folded.cls_fold).add_(folded.cls_bias_HWE.flatten(0, 1))
        hidden_BPE = self._add_map(clean_BPE, map_BHW, folded.cls_map)
        return map_BHW, self._pool_and_score(hidden_BPE.relu_(), map_BHW)

    def forward(self, features_BhwC: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """:meth:`score` with weights folded for this call."""
        return self.score(features_BhwC, self.fold(features_BhwC))

    # --- pieces, in the order of the module's docstring ---

    def _seg_fold(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        weight_DC = self.seg_conv.weight.flatten(1)
        fold_DC = _matmul(weight_DC.to(dtype), self.adaptor.weight.flatten(1))
        with torch.no_grad():  # the batch norm behind it takes the bias out again
            bias_D = weight_DC @ _bias(self.adaptor) + _bias(self.seg_conv)
        return fold_DC, bias_D

    def _cls_fold(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Per layer [5, 5 * E, C_l]: the 5x5 kernel, through the adaptor in the icpr variant."""
        kernel = self.cls_conv.weight[:, :-1].permute(2, 3, 0, 1).flatten(0, 2)  # [(dy, dx, e), C]
        if self.adapt_cls:
            kernel = _matmul(kernel.to(dtype), self.adaptor.weight.flatten(1))
        return tuple(part.unflatten(0, (CLS_KERNEL, -1)) for part in kernel.split(self.channels, dim=1))

    def _cls_map_weight(self) -> Tensor:
        return self.cls_conv.weight[:, -1].flatten(1).T  # [25, E]

    def _cls_bias(self, r: Resampling) -> Tensor:
        """[H, W, E]: the convolution's bias and, in the icpr variant, the adaptor's seen through the convolution."""
        bias_HWE = _bias(self.cls_conv).expand(*r.size_HW, -1)
        if not self.adapt_cls:
            return bias_HWE
        taps_55E = torch.einsum("ecij,c->ije", self.cls_conv.weight[:, :-1], _bias(self.adaptor))
        return bias_HWE + torch.einsum("hi,wj,ije->hwe", r.valid_H, r.valid_W, taps_55E)

    def _cls_clean(self, features_BhwC: Sequence[Tensor], r: Resampling, fold: Sequence[Tensor]) -> Tensor:
        """The 5x5 convolution of the pooled maps without biases, [B, H * W, E]."""
        batch, width = features_BhwC[0].shape[0], r.size_HW[1]
        channels = fold[0].shape[1] // CLS_KERNEL
        stacked = []
        for f_BhwC, weight, shift_W in zip(features_BhwC, fold, r.shift_W, strict=True):
            h = f_BhwC.shape[1]
            for dy in range(CLS_KERNEL):
                low = _matmul(f_BhwC.flatten(0, 2), weight[dy].T)  # rows (b, y, x), columns (dx, e)
                wide = _left_multiply(shift_W, low.view(batch * h, f_BhwC.shape[2] * CLS_KERNEL, channels))
                stacked.append(wide.view(batch, h, width * channels))
        out = _left_multiply(r.shift_H, torch.cat(stacked, dim=1))
        return out.view(batch, r.size_HW[0] * width, channels)

    def _add_map(self, hidden_BPE: Tensor, map_BHW: Tensor, weight: Tensor | None = None) -> Tensor:
        """Add the 5x5 convolution of the map's own channel."""
        patches = F.unfold(map_BHW[:, None], CLS_KERNEL, padding=CLS_KERNEL // 2)
        kernel = self._cls_map_weight() if weight is None else weight
        return torch.baddbmm(hidden_BPE, patches.mT, kernel.expand(hidden_BPE.shape[0], -1, -1))

    def _pool_and_score(self, hidden_BPE: Tensor, map_BHW: Tensor) -> Tensor:
        flat = map_BHW.flatten(1)
        pooled = [hidden_BPE.amax(1), hidden_BPE.mean(1), flat.amax(1, keepdim=True), flat.mean(1, keepdim=True)]
        return self.cls_score(torch.cat(pooled, dim=1)).squeeze(1)


class _NoisyConvolution(torch.autograd.Function):
    """Add the 5x5 convolution of the noise, which is zero but for N positions, to the hidden activations in place.

    A noisy row at (y, x), seen through tap (dy, dx), lands at output (y + 2 - dy, x + 2 - dx). The sums run over a
    frame two positions wider on each side, which takes what the taps push over the border.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_VPE: Tensor, kernel_25EC: Tensor, noise_NC: Tensor, index_N: Tensor, size_HW: Size
    ) -> Tensor:
        (height, width), half = size_HW, CLS_KERNEL // 2
        views, _, channels = hidden_VPE.shape
        framed_N, shifts, shape = _frame(index_N, views, size_HW)
        frame = hidden_VPE.new_zeros(shape[0] * shape[1] * shape[2], channels)
        weight = kernel_25EC.to(noise_NC.dtype)
        for dy in range(CLS_KERNEL):  # a row of taps at a time: [N, 5 * E] instead of [N, 25 * E]
            taps = slice(dy * CLS_KERNEL, (dy + 1) * CLS_KERNEL)
            rows = (noise_NC @ weight[taps].flatten(0, 1).T)[: len(index_N)].to(frame.dtype)
            rows = rows.unflatten(1, (CLS_KERNEL, channels))
            for dx in range(CLS_KERNEL):
                frame.index_add_(0, framed_N + shifts[dy][dx], rows[:, dx])
        ctx.save_for_backward(noise_NC, framed_N)
        ctx.shifts, ctx.shape, ctx.size_HW = shifts, shape, size_HW
        ctx.mark_dirty(hidden_VPE)
        inner = frame.view(*shape, channels)[:, half:-half, half:-half]
        hidden_VPE.view(views, height, width, channels).add_(inner)
        return hidden_VPE

    @staticmethod
    def backward(ctx: Any, grad_VPE: Tensor) -> Any:
        noise_NC, framed_N = ctx.saved_tensors
        (height, width), half = ctx.size_HW, CLS_KERNEL // 2
        channels = grad_VPE.shape[2]
        frame = grad_VPE.new_zeros(*ctx.shape, channels, dtype=noise_NC.dtype)
        frame[:, half:-half, half:-half] = grad_VPE.view(-1 if len(grad_VPE) else 0, height, width, channels)
        flat = frame.flatten(0, 2)
        kernel_grads = []
        for dy in range(CLS_KERNEL):
            rows = _pad_rows(torch.cat([flat[framed_N + shift] for shift in ctx.shifts[dy]], dim=1))
            kernel_grads.append((rows.T @ noise_NC).unflatten(0, (CLS_KERNEL, channels)))
        return grad_VPE, torch.cat(kernel_grads).to(grad_VPE.dtype), None, None, None


class _SharedBatchNorm(torch.autograd.Function):
    """Batch norm in training mode over the rows of all workers; a row's gradient is this worker's share."""

    @staticmethod
    def forward(
        ctx: Any, x_PE: Tensor, gamma_E: Tensor, beta_E: Tensor, share: BatchShare, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = max(1, len(x_PE))
        mean_E = x_PE.sum(0) / rows
        mean_E, var_E = share.merge(mean_E, _centred_squares(x_PE[None], mean_E) / rows)
        rstd_E = torch.rsqrt(var_E + eps)
        normed_PE = (x_PE - mean_E).mul_(rstd_E)
        ctx.save_for_backward(normed_PE, gamma_E, rstd_E)
        ctx.share = share
        ctx.mark_non_differentiable(mean_E, var_E)
        return torch.addcmul(beta_E, normed_PE, gamma_E), mean_E, var_E

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        normed_PE, gamma_E, rstd_E = ctx.saved_tensors
        grad_PE = grads[0]
        dbeta_E, dgamma_E = grad_PE.sum(0), (grad_PE * normed_PE).sum(0)
        grad_sum_E, centred_sum_E = dbeta_E.clone(), dgamma_E.clone()
        ctx.share.workers.add(grad_sum_E, centred_sum_E)
        dx_PE = grad_PE - torch.addcmul(grad_sum_E, normed_PE, centred_sum_E).div_(ctx.share.total)
        return dx_PE.mul_(gamma_E * rstd_E), dgamma_E, dbeta_E, None, None


def _batch_norm(bn: nn.BatchNorm2d, x_PE: Tensor, share: BatchShare) -> Tensor:
    """Normalise by the whole batch's moments and keep them in the running ones."""
    if len(share.counts) > 1:
        normed_PE, mean_E, var_E = _SharedBatchNorm.apply(x_PE, bn.weight, bn.bias, share, bn.eps)
        _update_running_stats(bn, mean_E, var_E, share.total)
        return normed_PE
    normed_PE = F.batch_norm(
        x_PE,
        bn.running_mean,
        bn.running_var,
        bn.weight,
        bn.bias,
        training=True,
        momentum=bn.momentum or 0.0,
        eps=bn.eps,
    )
    _count_batch(bn)
    return normed_PE


def _pad_rows(x_NC: Tensor) -> Tensor:
    """Append rows of zeros up to a multiple of ``ROW_MULTIPLE``; they add nothing to any product."""
    return F.pad(x_NC, (0, 0, 0, -len(x_NC) % ROW_MULTIPLE))


def _frame(index_N: Tensor, views: int, size_HW: Size) -> tuple[Tensor, list[list[int]], tuple[int, int, int]]:
    """Positions in the framed map before any shift, the shift of each tap, and the framed map's shape."""
    (height, width), border = size_HW, 2 * (CLS_KERNEL // 2)
    shape = (views, height + border, width + border)
    view_N, inside_N = index_N // (height * width), index_N % (height * width)
    framed_N = (view_N * shape[1] + inside_N // width) * shape[2] + inside_N % width
    shifts = [[(border - dy) * shape[2] + border - dx for dx in range(CLS_KERNEL)] for dy in range(CLS_KERNEL)]
    return framed_N, shifts, shape


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _bn_affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    return scale, bn.bias - bn.running_mean * scale


def _update_running_stats(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    assert bn.running_mean is not None
    assert bn.running_var is not None
    momentum = bn.momentum or 0.0
    with torch.no_grad():
        bn.running_mean.lerp_(mean, momentum)
        bn.running_var.lerp_(var * (count / (count - 1)), momentum)
    _count_batch(bn)


def _count_batch(bn: nn.BatchNorm2d) -> None:
    assert bn.num_batches_tracked is not None
    bn.num_batches_tracked.add_(1)


def image_map(map_BHW: Tensor, image_size: Size) -> Tensor:
    """Bring map logits to image size and smooth them (ICPR 2024, section 3.4).

    Args:
        map_BHW: Logits at map size.
        image_size: Height and width of the result; bilinear with ``align_corners=False`` in both variants.

    Returns:
        [B, height, width]: blurred with sigma 4, kernel 25, reflected at the border.
    """
    up = F.interpolate(map_BHW[:, None], size=image_size, mode="bilinear", align_corners=False)
    offsets = torch.arange(BLUR_KERNEL, dtype=up.dtype, device=up.device) - BLUR_KERNEL // 2
    kernel = torch.exp(-0.5 * (offsets / BLUR_SIGMA).square())
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    pad = BLUR_KERNEL // 2
    # a border wider than the image allows no reflection: tiny images repeat their edge instead
    mode = "reflect" if min(image_size) > pad else "replicate"
    padded = F.pad(up, (pad, pad, pad, pad), mode=mode)
    return F.conv2d(F.conv2d(padded, kernel), kernel.mT)[:, 0]
