"""Perlin masks against a literal one-image-at-a-time version, and the distribution and keying of what is drawn."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from ssn import synthesis
from ssn.synthesis import feature_noise, merge_masks, perlin_masks
from tests.tolerances import PERLIN_ATOL, STANDARD_ERRORS

WORD = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def _keys(num: int, seed: int = 0, epoch: int = 0, half: int = 0) -> np.ndarray:
    return np.array([(seed, epoch, occurrence, half) for occurrence in range(num)], dtype=np.int64)


def _splitmix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def _draw(key: np.ndarray, stream: int, counter: int) -> int:
    seed = stream
    for part in key.tolist():
        seed = _splitmix(((seed ^ (part & WORD)) + GAMMA) & WORD)
    return _splitmix((seed + (counter + 1) * GAMMA) & WORD)


def _literal_noise(shape: tuple[int, int], res: tuple[int, int], angle: Tensor) -> Tensor:
    """Gradient noise as the papers' code defines it: float64, one map, a corner at a time."""
    noise = torch.empty(shape, dtype=torch.float64)

    def fade(t: float) -> float:
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    def lerp(a: float, b: float, t: float) -> float:
        return a + (b - a) * t

    for p in range(shape[0]):
        for q in range(shape[1]):
            y, x = p * res[0] / shape[0], q * res[1] / shape[1]
            i, j = int(y), int(x)
            y, x = y - i, x - j
            corner = {
                (di, dj): math.cos(angle[i + di, j + dj]) * (y - di) + math.sin(angle[i + di, j + dj]) * (x - dj)
                for di in (0, 1)
                for dj in (0, 1)
            }
            left = lerp(corner[0, 0], corner[1, 0], fade(y))
            right = lerp(corner[0, 1], corner[1, 1], fade(y))
            noise[p, q] = math.sqrt(2) * lerp(left, right, fade(x))
    return noise


def _literal_map(key: np.ndarray, size: tuple[int, int], threshold: float, rescale_empty: bool) -> Tensor | None:
    """Noise at map size before the cut; None where the mask is emptied."""
    grid = tuple(2 ** math.ceil(math.log2(side)) for side in size)
    res = tuple(
        2 ** min((_draw(key, 1, counter) >> 32) * 6 >> 32, int(math.log2(side))) for counter, side in enumerate(grid)
    )
    if _draw(key, 1, 2) >> 63:
        return None
    angle = torch.tensor(
        [
            [2 * math.pi * (_draw(key, 1, 3 + 33 * i + j) >> 48) / 2**16 for j in range(res[1] + 1)]
            for i in range(res[0] + 1)
        ],
        dtype=torch.float64,
    )
    noise = _literal_noise(grid, res, angle)
    # All zero but for rounding where the lattice is as fine as the grid.
    if rescale_empty and not (noise > threshold).any() and noise.max() - noise.min() > 1e-9:
        noise = (noise - noise.min()) / (noise.max() - noise.min()) * 2 - 1
    return F.interpolate(noise[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (12, 40), (33, 9), (64, 64)])
@pytest.mark.parametrize(("threshold", "rescale_empty"), [(0.2, False), (0.6, True)])
def test_masks_are_the_literal_versions(size: tuple[int, int], threshold: float, rescale_empty: bool) -> None:
    keys = _keys(12, seed=5)
    masks_NHW = perlin_masks(keys, size, threshold=threshold, rescale_empty=rescale_empty)
    assert masks_NHW.shape == (12, *size)
    assert masks_NHW.dtype == torch.bool
    for key, mask_HW in zip(keys, masks_NHW, strict=True):
        noise_HW = _literal_map(key, size, threshold, rescale_empty)
        if noise_HW is None:
            assert not mask_HW.any()
        else:
            clear = (noise_HW - threshold).abs() > PERLIN_ATOL
            assert torch.equal(mask_HW[clear], (noise_HW > threshold)[clear])
            assert clear.float().mean() > 0.9


def test_generator_is_splitmix64() -> None:
    # First outputs of the published generator with seed 0.
    draws = synthesis._draws(torch.zeros(1, dtype=torch.int64), torch.arange(3))[0].tolist()
    assert [d & WORD for d in draws] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_masks_of_given_keys_never_change() -> None:
    # Masks are the same bits on every machine. If this digest has to change, so must ssn.config.NUMERICS_VERSION.
    masks_NHW = perlin_masks(_keys(64), (24, 32), threshold=0.2, rescale_empty=True)
    digest = hashlib.sha256(np.packbits(masks_NHW.numpy()).tobytes()).hexdigest()
    assert digest == "57335f6a64492d52e7986ce08dafe13506b9a06f3a7f2e271308af633148bcf1"


@pytest.mark.parametrize(
    ("threshold", "coverage", "rounding"), [(0.0, 0.24, 0.005), (0.2, 0.129, 0.0005), (0.6, 0.012, 0.0005)]
)
def test_coverage_is_the_reference_codes(threshold: float, coverage: float, rounding: float) -> None:
    share_N = perlin_masks(_keys(4000), (64, 64), threshold=threshold, rescale_empty=False).float().mean(dim=(1, 2))
    standard_error = float(share_N.std()) / math.sqrt(len(share_N))
    assert abs(float(share_N.mean()) - coverage) < STANDARD_ERRORS * standard_error + rounding


def test_half_of_the_masks_are_emptied() -> None:
    num = 4000
    masks_NHW = perlin_masks(_keys(num), (8, 8), threshold=-2.0, rescale_empty=False)
    kept_N = masks_NHW.flatten(1).any(dim=1)
    assert torch.equal(kept_N, masks_NHW.flatten(1).all(dim=1))
    assert abs(float(kept_N.float().mean()) - 0.5) < STANDARD_ERRORS * 0.5 / math.sqrt(num)


def test_scales_are_uniform_and_independent_per_axis() -> None:
    num = 6000
    seeds = synthesis._absorb(_keys(num), 1, "cpu")
    draws_N2 = synthesis._draws(seeds, torch.arange(2))
    rows, columns = (synthesis._scale_exponent(draws_N2[:, axis], 64) for axis in (0, 1))
    counts = torch.bincount(rows * 6 + columns, minlength=36).numpy()
    assert counts.size == 36
    assert stats.chisquare(counts).pvalue > 1e-4
    assert synthesis._scale_exponent(draws_N2[:, 0], 8).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 16), (17, 5), (8, 100)])
def test_small_and_odd_maps_are_supported(size: tuple[int, int]) -> None:
    for rescale_empty in (False, True):
        masks_NHW = perlin_masks(_keys(40), size, threshold=0.2, rescale_empty=rescale_empty)
        assert masks_NHW.shape == (40, *size)


def test_rescaling_fills_only_masks_that_nothing_reached() -> None:
    settings = {"threshold": 0.6}
    plain = perlin_masks(_keys(400), (32, 32), **settings, rescale_empty=False)
    rescaled = perlin_masks(_keys(400), (32, 32), **settings, rescale_empty=True)
    reached = plain.flatten(1).any(dim=1)
    assert torch.equal(plain[reached], rescaled[reached])
    assert rescaled[~reached].any()


def test_an_images_mask_and_noise_do_not_depend_on_its_batch() -> None:
    keys = np.concatenate((_keys(20), _keys(20, half=1)))
    settings = {"size": (24, 20), "threshold": 0.2, "rescale_empty": True}
    masks_NHW = perlin_masks(keys, **settings)
    noise_RC = feature_noise(keys, masks_NHW, 6, 0.015)
    image_R = masks_NHW.nonzero()[:, 0]
    order = np.random.default_rng(0).permutation(40)[:13]
    part_NHW = perlin_masks(keys[order], **settings)
    assert torch.equal(part_NHW, masks_NHW[order])
    part_RC = feature_noise(keys[order], part_NHW, 6, 0.015)
    assert torch.equal(part_RC, torch.cat([noise_RC[image_R == int(i)] for i in order]))


@pytest.mark.parametrize("column", range(4))
def test_every_part_of_the_key_matters(column: int) -> None:
    keys, other = _keys(16, seed=3, epoch=4, half=1), _keys(16, seed=3, epoch=4, half=1)
    other[:, column] += 17
    settings = {"threshold": 0.1, "rescale_empty": False}
    mask_NHW = torch.ones(16, 4, 4, dtype=torch.bool)
    assert not torch.equal(perlin_masks(keys, (16, 16), **settings), perlin_masks(other, (16, 16), **settings))
    noise, other_noise = feature_noise(keys, mask_NHW, 8, 1.0), feature_noise(other, mask_NHW, 8, 1.0)
    assert not (noise == other_noise).all(dim=1).any()


def test_keys_are_not_interchangeable() -> None:
    swapped = np.array([[1, 2, 3, 4], [2, 1, 3, 4], [1, 2, 4, 3], [-1, 2, 3, 4]], dtype=np.int64)
    assert len(set(synthesis._absorb(swapped, 1, "cpu").tolist())) == 4


def test_noise_is_standard_normal_times_sigma() -> None:
    mask_NHW = torch.ones(8, 16, 16, dtype=torch.bool)
    noise = feature_noise(_keys(8), mask_NHW, 32, 0.25).numpy().astype(np.float64) / 0.25
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert abs(noise.mean()) < STANDARD_ERRORS / math.sqrt(noise.size)
    images = noise.reshape(8, -1)
    correlation = np.corrcoef(images)[np.triu_indices(8, 1)]
    assert np.abs(correlation).max() < STANDARD_ERRORS / math.sqrt(images.shape[1])


def test_noise_has_a_row_per_masked_position_in_row_major_order() -> None:
    keys = _keys(3)
    mask_NHW = torch.zeros(3, 4, 5, dtype=torch.bool)
    mask_NHW[0, 1, 2] = mask_NHW[2, 0, 0] = mask_NHW[2, 3, 4] = True
    noise_RC = feature_noise(keys, mask_NHW, 7, 1.0)
    assert noise_RC.shape == (3, 7)
    assert noise_RC.dtype == torch.float32
    assert torch.equal(noise_RC[:1], feature_noise(keys[:1], mask_NHW[:1], 7, 1.0))
    assert torch.equal(noise_RC[1:], feature_noise(keys[2:], mask_NHW[2:], 7, 1.0))


def test_no_masked_position_draws_no_noise() -> None:
    assert feature_noise(_keys(2), torch.zeros(2, 3, 3, dtype=torch.bool), 5, 1.0).shape == (0, 5)


def test_threads_do_not_change_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, mask_NHW = _keys(9), torch.rand(9, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = feature_noise(keys, mask_NHW, 33, 0.1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(synthesis, "PARALLEL_NORMALS", 1)
    assert torch.equal(feature_noise(keys, mask_NHW, 33, 0.1), alone)


def test_global_random_state_is_neither_used_nor_changed() -> None:
    mask_NHW = torch.ones(4, 8, 8, dtype=torch.bool)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        masks_NHW = perlin_masks(_keys(4), (8, 8), threshold=0.0, rescale_empty=False)
        results.append((masks_NHW, feature_noise(_keys(4), mask_NHW, 8, 1.0)))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_merged_masks_keep_noise_off_real_defects() -> None:
    truth_BHW = torch.tensor([[[1, 0, 0]], [[0, 0, 0]]])
    synthetic_NHW = torch.tensor([[[1, 1, 0]], [[0, 0, 1]], [[0, 1, 1]], [[0, 0, 0]]]).bool()
    noise_NHW, mask_NHW = merge_masks(truth_BHW, synthetic_NHW)
    assert noise_NHW.int().tolist() == [[[0, 1, 0]], [[0, 0, 1]], [[0, 1, 1]], [[0, 0, 0]]]
    assert mask_NHW.int().tolist() == [[[1, 1, 0]], [[0, 0, 1]], [[1, 1, 1]], [[0, 0, 0]]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_masks_are_the_same_bits_on_a_gpu() -> None:
    settings = {"threshold": 0.2, "rescale_empty": True}
    on_cpu = perlin_masks(_keys(64), (50, 70), **settings)
    on_gpu = perlin_masks(_keys(64), (50, 70), **settings, device="cuda")
    assert torch.equal(on_cpu, on_gpu.cpu())
    noise_RC = feature_noise(_keys(64), on_gpu, 16, 1.0)
    assert noise_RC.device.type == "cuda"
    assert abs(float(noise_RC.std()) - 1) < STANDARD_ERRORS / math.sqrt(2 * noise_RC.numel())
