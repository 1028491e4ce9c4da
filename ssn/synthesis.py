"""Synthetic anomalies on features: Perlin masks and the Gaussian noise inside them (ICPR 2024, section 3.3).

Every random number is a pure function of its image's key, so that neither the batch an image happens to be in nor the
number of workers changes what is drawn. Masks are bitwise the same on every device. Noise comes from the device's own
generator: bitwise the same on one kind of device, to rounding on CPUs with other vector instructions.

Shape legend: N images of the doubled batch, H W position in the map, P Q position in the Perlin grid (the map's sides
rounded up to powers of two), L M lattice points, C channels, R rows of noise.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

PARALLEL_NORMALS = 1 << 18
"""Fewer normals than this are drawn on one thread: starting others costs more."""
MAX_SCALE_EXPONENT = 5
"""Perlin scales are 2^0 to 2^5 lattice cells per axis."""

_LATTICE = 2**MAX_SCALE_EXPONENT + 1
_ANGLE_BITS = 16
# One stream of random numbers per purpose, and in the mask's stream one counter per number.
_MASK_STREAM, _NOISE_STREAM = 1, 2
_ROW_EXPONENT, _COLUMN_EXPONENT, _EMPTY, _FIRST_ANGLE = 0, 1, 2, 3


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def perlin_masks(
    keys: np.ndarray | Tensor,
    size: tuple[int, int],
    *,
    threshold: float,
    rescale_empty: bool,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Masks of synthetic anomalies.

    Gradient noise with 2^e cells per axis, e uniform in {0..5} (but at most the axis's length), on the next powers of
    two of the map's sides, resized bilinearly to the map and cut at ``threshold``; half of the masks are then emptied.

    Args:
        keys: ``[N, K]`` integers, one row per image of the doubled batch: (seed, epoch, sample occurrence, half).
        size: Height and width of the anomaly map.
        threshold: Noise above it is anomalous; noise lies within [-1, 1].
        rescale_empty: Stretch the noise of a map to [-1, 1] where nothing exceeds the threshold (JIMS 2025); otherwise
            such a mask stays empty.
        device: Where to compute, and of the result.

    Returns:
        ``[N, H, W]`` bool.
    """
    # Only sums and products, one per kernel, and table look-ups: unlike fused or transcendental kernels they round the
    # same whatever the device, the vector width and the position in the batch.
    seed_N = _absorb(keys, _MASK_STREAM, device)
    draws_N3 = _draws(seed_N, torch.arange(3, device=device))
    masks_NHW = torch.zeros(len(seed_N), *size, dtype=torch.bool, device=device)
    kept = (draws_N3[:, _EMPTY] >= 0).nonzero().squeeze(1)  # by the top bit
    seed_N, draws_N3 = seed_N[kept], draws_N3[kept]
    grid_P, grid_Q = (1 << (side - 1).bit_length() for side in size)
    noise_NPQ = _gradient_noise(
        _scale_exponent(draws_N3[:, _ROW_EXPONENT], grid_P),
        _scale_exponent(draws_N3[:, _COLUMN_EXPONENT], grid_Q),
        _gradients(seed_N),
        (grid_P, grid_Q),
    )
    if rescale_empty:
        noise_NPQ = _rescale_where_below(noise_NPQ, threshold)
    noise_NHW = _resize(_resize(noise_NPQ, size[0], dim=1), size[1], dim=2)
    masks_NHW[kept] = noise_NHW > threshold
    return masks_NHW


def merge_masks(truth_BHW: Tensor, synthetic_NHW: Tensor) -> tuple[Tensor, Tensor]:
    """Where noise goes, and the ground truth that results.

    Args:
        truth_BHW: Real defects at map size; positive is defective.
        synthetic_NHW: From :func:`perlin_masks`, N = 2B: first halves of all images, then second halves.

    Returns:
        ``noise_NHW``, bool, the synthetic masks without the pixels already defective, and ``mask_NHW``, bool, the union
        of both.
    """
    truth_NHW = (truth_BHW > 0).repeat(2, 1, 1)
    return synthetic_NHW & ~truth_NHW, synthetic_NHW | truth_NHW


def feature_noise(keys: np.ndarray | Tensor, mask_NHW: Tensor, channels: int, sigma: float) -> Tensor:
    """Gaussian noise for the masked positions only.

    Args:
        keys: As for :func:`perlin_masks`.
        mask_NHW: Where noise goes; its device draws the noise.
        channels: Of the features.
        sigma: Standard deviation.

    Returns:
        ``noise_RC``, float32: a row for each position of ``mask_NHW.nonzero()``, in its order. An image's rows depend
        on its key and on how many there are.
    """
    device = mask_NHW.device
    counts = mask_NHW.flatten(1).sum(dim=1).tolist()
    seeds = _absorb(keys, _NOISE_STREAM, "cpu").tolist()
    noise_RC = torch.empty(sum(counts), channels, device=device)
    parts = [(seed, part) for seed, part in zip(seeds, torch.split(noise_RC, counts), strict=True) if len(part)]

    def draw(seed: int, part_RC: Tensor) -> None:
        part_RC.normal_(0.0, sigma, generator=torch.Generator(device=device).manual_seed(seed))

    # A generator fills on one thread, without the interpreter's lock: several images at a time.
    num_threads = min(torch.get_num_threads(), len(parts)) if device.type == "cpu" else 1
    if num_threads > 1 and noise_RC.numel() >= PARALLEL_NORMALS:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(lambda job: draw(*job), parts))
    else:
        for job in parts:
            draw(*job)
    return noise_RC


def _shift_right(value: Tensor, bits: int) -> Tensor:
    # Logical: torch's own shift of int64 copies the sign.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64 bits; each input bit flips each output bit half of the time."""
    value = (value ^ _shift_right(value, 30)) * _MULTIPLIER_1
    value = (value ^ _shift_right(value, 27)) * _MULTIPLIER_2
    return value ^ _shift_right(value, 31)


def _absorb(keys: np.ndarray | Tensor, stream: int, device: torch.device | str) -> Tensor:
    """One 64-bit seed per key, int64 ``[N]``."""
    keys_NK = torch.as_tensor(keys).to(device=device, dtype=torch.int64)
    seed_N = torch.full((len(keys_NK),), stream, dtype=torch.int64, device=device)
    for column_N in keys_NK.unbind(dim=1):
        seed_N = _mix((seed_N ^ column_N) + _GAMMA)
    return seed_N


def _draws(seed_N: Tensor, counters: Tensor) -> Tensor:
    """The numbers at ``counters`` of each image's SplitMix64 sequence, 64 bits each, ``[N, *counters.shape]``."""
    return _mix(seed_N.view(-1, *(1,) * counters.dim()) + (counters + 1) * _GAMMA)


def _scale_exponent(draws_N: Tensor, side: int) -> Tensor:
    exponent_N = (_shift_right(draws_N, 32) * (MAX_SCALE_EXPONENT + 1)) >> 32
    return exponent_N.clamp(max=side.bit_length() - 1)


@functools.lru_cache(maxsize=8)
def _unit_vectors(device: torch.device) -> Tensor:
    angles = np.arange(2**_ANGLE_BITS) * (2 * math.pi / 2**_ANGLE_BITS)
    return torch.from_numpy(np.stack((np.cos(angles), np.sin(angles))).astype(np.float32)).to(device)


def _gradients(seed_N: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column component of a unit vector at each lattice point, ``[N, L, M]`` each."""
    counters_LM = torch.arange(_LATTICE**2, device=seed_N.device).view(_LATTICE, _LATTICE) + _FIRST_ANGLE
    angle_NLM = _shift_right(_draws(seed_N, counters_LM), 64 - _ANGLE_BITS)
    cos_A, sin_A = _unit_vectors(seed_N.device)
    return cos_A[angle_NLM], sin_A[angle_NLM]


def _cells(exponent_N: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lattice cell, position within it in [0, 1) and the fade of that position, for each grid line; ``[N, side]``."""
    line = torch.arange(side, device=exponent_N.device)
    cell_bits_N1 = (side.bit_length() - 1 - exponent_N)[:, None]
    cell = line >> cell_bits_N1
    position = (line - (cell << cell_bits_N1)).float() * torch.pow(0.5, cell_bits_N1.double()).float()
    fade = position * position * position * (position * (position * 6 - 15) + 10)
    return cell, position, fade


def _gradient_noise(
    row_exponent_N: Tensor, column_exponent_N: Tensor, gradients: tuple[Tensor, Tensor], grid: tuple[int, int]
) -> Tensor:
    """Perlin noise ``[N, P, Q]`` in [-1, 1]; interpolated along rows at the lattice's columns, then along columns."""
    row_NLM, column_NLM = gradients
    cell_NP, position_NP, fade_NP = _cells(row_exponent_N, grid[0])
    cell_NQ, position_NQ, fade_NQ = _cells(column_exponent_N, grid[1])

    def at_rows(values_NLM: Tensor, cell_NP: Tensor) -> Tensor:
        return values_NLM.gather(1, cell_NP[:, :, None].expand(-1, -1, _LATTICE))

    def at_columns(values_NPM: Tensor, cell_NQ: Tensor) -> Tensor:
        return values_NPM.gather(2, cell_NQ[:, None, :].expand(-1, grid[0], -1))

    def mix(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
        return start + (end - start) * weight

    position_NP1, fade_NP1 = position_NP[:, :, None], fade_NP[:, :, None]
    along_rows_NPM = mix(
        at_rows(row_NLM, cell_NP) * position_NP1, at_rows(row_NLM, cell_NP + 1) * (position_NP1 - 1), fade_NP1
    )
    along_columns_NPM = mix(at_rows(column_NLM, cell_NP), at_rows(column_NLM, cell_NP + 1), fade_NP1)
    position_N1Q = position_NQ[:, None, :]

    def corner(cell_NQ: Tensor, offset: int) -> Tensor:
        return at_columns(along_rows_NPM, cell_NQ) + at_columns(along_columns_NPM, cell_NQ) * (position_N1Q - offset)

    return mix(corner(cell_NQ, 0), corner(cell_NQ + 1, 1), fade_NQ[:, None, :]) * math.sqrt(2)


def _rescale_where_below(noise_NPQ: Tensor, threshold: float) -> Tensor:
    low_N11, high_N11 = noise_NPQ.amin(dim=(1, 2), keepdim=True), noise_NPQ.amax(dim=(1, 2), keepdim=True)
    span_N11 = high_N11 - low_N11
    # A scale as fine as the grid samples the noise at its zeros: nothing to stretch.
    rescaled_NPQ = (noise_NPQ - low_N11) / torch.where(span_N11 > 0, span_N11, 1.0) * 2 - 1
    return torch.where((high_N11 <= threshold) & (span_N11 > 0), rescaled_NPQ, noise_NPQ)


def _resize(noise: Tensor, side: int, *, dim: int) -> Tensor:
    """Bilinear along one axis, align_corners=False."""
    grid = noise.shape[dim]
    if grid == side:
        return noise
    centre = ((torch.arange(side, dtype=torch.float64) + 0.5) * (grid / side) - 0.5).clamp(min=0)
    low = centre.long()
    high = (low + 1).clamp(max=grid - 1)
    weight = (centre - low).float().view(-1, *(1,) * (noise.dim() - 1 - dim)).to(noise.device)
    start = noise.index_select(dim, low.to(noise.device))
    return start + (noise.index_select(dim, high.to(noise.device)) - start) * weight
