"""The fast formulation of the network against the plain one, and what the maps become."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ssn.config import ModelConfig, Size
from ssn.errors import SSNError
from ssn.losses import total_loss
from ssn.model import CPU_CHANNEL_SLICE, Noise, SuperSimpleNet, image_map, map_size
from tests import oracle
from tests.tolerances import (
    BF16_GRADIENT_RTOL,
    BF16_INFERENCE_ATOL,
    FLOAT32_ATOL,
    FLOAT32_RTOL,
    GOLDEN_RTOL,
    GRAD_NORM_ATOL_OF_TOTAL,
    GRAD_NORM_RTOL,
)

MARGIN = 1e-6
"""Closer to a kink of an activation than this, float32 and float64 may fall on different sides of it."""

side = st.integers(2, 5)


@dataclass(frozen=True)
class Case:
    """One network on one batch."""

    model: ModelConfig
    channels: tuple[int, ...]
    sizes: tuple[Size, ...]
    batch: int
    mask: str
    stop_grad: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layers = draw(st.integers(1, 3))
    finest = (draw(side), draw(side))
    # not only halves: any ratio, also a "coarser" map that is larger along an axis
    coarser = [(draw(st.integers(1, 6)), draw(st.integers(1, 6))) for _ in range(layers - 1)]
    return Case(
        model=ModelConfig(
            variant=draw(st.sampled_from(["icpr", "jims"])),
            align_corners=draw(st.booleans()),
            # one slice of channels, one that is exactly full, one more, and three
            seg_channels=draw(st.sampled_from([8, CPU_CHANNEL_SLICE, CPU_CHANNEL_SLICE + 1, 300])),
            cls_channels=draw(st.integers(4, 8)),
        ),
        channels=tuple(draw(st.lists(st.integers(1, 6), min_size=layers, max_size=layers))),
        sizes=(finest, *coarser),
        batch=draw(st.integers(1, 3)),
        mask=draw(st.sampled_from(["nowhere", "everywhere", "random"])),
        stop_grad=draw(st.booleans()),
        seed=draw(st.integers(0, 10_000)),
    )


def draw_features(case: Case, generator: torch.Generator) -> list[Tensor]:
    return [
        torch.randn(case.batch, *size, channels, generator=generator)
        for size, channels in zip(case.sizes, case.channels, strict=True)
    ]


def draw_noise(case: Case, generator: torch.Generator, sigma: float = 0.5) -> Noise:
    height, width = map_size(case.sizes)
    positions = 2 * case.batch * height * width
    mask = {
        "nowhere": torch.zeros(positions, dtype=torch.bool),
        "everywhere": torch.ones(positions, dtype=torch.bool),
        "random": torch.rand(positions, generator=generator) < 0.3,
    }[case.mask]
    index = mask.nonzero().squeeze(1)
    return Noise(sigma * torch.randn(len(index), sum(case.channels), generator=generator), index)


def build(case: Case, generator: torch.Generator) -> SuperSimpleNet:
    """A network whose batch norms are away from their initial values."""
    net = SuperSimpleNet(case.channels, case.model, generator_seed=case.seed)
    with torch.no_grad():
        for norm in (net.seg_bn, net.cls_bn):
            norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
            norm.bias.copy_(torch.randn(norm.num_features, generator=generator) / 2)
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return net


@dataclass
class Watch:
    """What one forward pass of the plain formulation came across."""

    nearest_kink: float = math.inf
    """Smallest magnitude of what entered an activation."""
    gain: float = 1.0
    """Largest factor by which a batch norm scaled a channel up, and so its gradient's rounding errors."""

    def __call__(self, norm: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.nearest_kink = min(self.nearest_kink, float(output.detach().abs().min()))
        variance = inputs[0].detach().var((0, 2, 3), correction=0)
        self.gain = max(self.gain, float((variance.min() + 1e-5) ** -0.5))


def in_float64(net: SuperSimpleNet) -> tuple[SuperSimpleNet, Watch]:
    """A copy all of which learns, and a watch on its batch norms."""
    plain, watch = copy.deepcopy(net).double().requires_grad_(True), Watch()
    for norm in (plain.seg_bn, plain.cls_bn):
        norm.register_forward_hook(watch)
    return plain, watch


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), rtol=GOLDEN_RTOL, atol=FLOAT32_RTOL * scale
    )


def gradient_errors(net: SuperSimpleNet, plain: SuperSimpleNet, gain: float) -> dict[str, tuple[float, float]]:
    """Per parameter, the norm of the difference of both gradients, and what it may be."""
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert set(expected) == {name for name, p in net.named_parameters() if p.grad is not None or not p.requires_grad}
    total = float(torch.stack([g.norm() for g in expected.values()]).norm())
    errors = {}
    for name, parameter in net.named_parameters():
        allowed = GRAD_NORM_RTOL * float(expected[name].norm()) + GRAD_NORM_ATOL_OF_TOTAL * gain * total
        # what is held at its initial value has no gradient: the plain formulation's must be next to nothing
        actual = torch.zeros(()) if parameter.grad is None else parameter.grad
        errors[name] = float((actual - expected[name]).norm()), allowed
    return errors


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_training_step_is_that_of_the_plain_formulation(case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    net = build(case, generator)
    plain, watch = in_float64(net)
    features, noise = draw_features(case, generator), draw_noise(case, generator)
    net.train()
    plain.train()

    expected_map, expected_score = oracle.forward_train(
        plain, [f.double() for f in features], Noise(noise.rows_NC.double(), noise.index_N), stop_grad=case.stop_grad
    )
    assume(watch.nearest_kink > MARGIN)
    map_VHW, score_V = net.forward_train(features, noise, stop_grad=case.stop_grad)
    assert_close(map_VHW, expected_map)
    assert_close(score_V, expected_score)

    on_map = torch.randn(map_VHW.shape, generator=generator)
    on_score = torch.randn(score_V.shape, generator=generator)
    ((map_VHW * on_map).sum() + (score_V * on_score).sum()).backward()
    ((expected_map * on_map.double()).sum() + (expected_score * on_score.double()).sum()).backward()
    for name, (error, allowed) in gradient_errors(net, plain, watch.gain).items():
        assert error <= allowed, name
    for (name, buffer), expected in zip(net.named_buffers(), plain.buffers(), strict=True):
        if name.endswith("num_batches_tracked"):
            assert buffer == expected == 1
        else:
            assert_close(buffer, expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_inference_is_that_of_the_plain_formulation(case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    net = build(case, generator).eval()
    plain, _ = in_float64(net)
    features = draw_features(case, generator)
    before = copy.deepcopy(net.state_dict())
    map_BHW, score_B = net(features)
    expected_map, expected_score = oracle.forward_eval(plain, [f.double() for f in features])
    assert_close(map_BHW, expected_map)
    assert_close(score_B, expected_score)
    assert not map_BHW.requires_grad
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


CASE = Case(
    model=ModelConfig(seg_channels=160, cls_channels=8),
    channels=(6, 10),
    sizes=((5, 4), (3, 2)),
    batch=4,
    mask="random",
    stop_grad=False,
    seed=3,
)


def random_truth(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mask_VHW = torch.rand(2 * case.batch, *map_size(case.sizes), generator=generator) < 0.2
    mask_VHW[::2] = False
    return mask_VHW, mask_VHW.flatten(1).any(1)


@pytest.mark.parametrize("variant", ["icpr", "jims"])
def test_a_hundred_optimiser_steps_stay_together(variant: str) -> None:
    case = replace(CASE, model=replace(CASE.model, variant=variant))
    generator = torch.Generator().manual_seed(case.seed)
    net = build(case, generator)
    plain, _ = in_float64(net)
    curves: list[list[float]] = [[], []]
    optimizers = [torch.optim.AdamW(n.parameters(), lr=1e-3, weight_decay=1e-2) for n in (net, plain)]
    for _ in range(100):
        features, noise = draw_features(case, generator), draw_noise(case, generator)
        truth = random_truth(case, generator)
        for n, optimizer, curve, forward in zip(
            (net, plain), optimizers, curves, (SuperSimpleNet.forward_train, oracle.forward_train), strict=True
        ):
            dtype = n.seg_out.weight.dtype
            map_VHW, score_V = forward(
                n, [f.to(dtype) for f in features], Noise(noise.rows_NC.to(dtype), noise.index_N), stop_grad=False
            )
            loss = total_loss(map_VHW, score_V, *truth, truncation=0.5, gamma=4.0).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-3)
    assert curves[0][-1] != pytest.approx(curves[0][0], rel=1e-2), "nothing was learnt, so nothing was compared"


def test_bf16_noise_changes_next_to_nothing() -> None:
    """Only the product of the noise is rounded, and the noise is a hundredth of the features."""
    case = replace(CASE, seed=4)
    generator = torch.Generator().manual_seed(case.seed)
    exact = build(case, generator).train()
    rounded = copy.deepcopy(exact)
    features, noise = draw_features(case, generator), draw_noise(case, generator, sigma=0.015)
    truth = random_truth(case, generator)
    maps = []
    for net, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
        map_VHW, score_V = net.forward_train(features, noise, stop_grad=False, noise_dtype=dtype)
        total_loss(map_VHW, score_V, *truth, truncation=0.5, gamma=4.0).total.backward()
        maps.append(map_VHW.detach())
    assert not torch.equal(*maps), "bf16 was not used"
    # bf16 has 8 significant bits
    assert float((maps[0] - maps[1]).abs().max()) < 2**-8 * 0.05 * float(maps[0].abs().max())
    difference, total = 0.0, 0.0
    learning = [[p for p in net.parameters() if p.requires_grad] for net in (exact, rounded)]
    for a, b in zip(*learning, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert b.grad.dtype == torch.float32
        difference += float((a.grad - b.grad).square().sum())
        total += float(a.grad.square().sum())
    assert difference**0.5 < 1e-3 * total**0.5


@pytest.mark.parametrize("variant", ["icpr", "jims"])
def test_bf16_features_round_products_and_nothing_else(variant: str) -> None:
    case = replace(CASE, model=replace(CASE.model, variant=variant), seed=4)
    generator = torch.Generator().manual_seed(case.seed)
    exact = build(case, generator).train()
    rounded = copy.deepcopy(exact)
    features, noise = draw_features(case, generator), draw_noise(case, generator, sigma=0.015)
    truth = random_truth(case, generator)
    maps = []
    for net, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
        map_VHW, score_V = net.forward_train([f.to(dtype) for f in features], noise, stop_grad=False)
        assert map_VHW.dtype == score_V.dtype == torch.float32
        total_loss(map_VHW, score_V, *truth, truncation=0.5, gamma=4.0).total.backward()
        maps.append(map_VHW.detach())
    error = float((maps[0] - maps[1]).abs().max()) / float(maps[0].abs().max())
    assert 0 < error < BF16_INFERENCE_ATOL
    gradients = [
        torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]) for net in (exact, rounded)
    ]
    assert gradients[1].dtype == torch.float32
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < BF16_GRADIENT_RTOL


def test_other_channels_are_refused() -> None:
    net = SuperSimpleNet((4, 6), ModelConfig(seg_channels=8, cls_channels=4))
    with pytest.raises(SSNError, match=r"feature maps have \(4, 5\) channels, but this network was made for \(4, 6\)$"):
        net([torch.zeros(1, 4, 4, 4), torch.zeros(1, 2, 2, 5)])
    with pytest.raises(SSNError, match=r"have \(4,\) channels"):
        net.forward_train(
            [torch.zeros(1, 4, 4, 4)], Noise(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64)), stop_grad=True
        )


def test_sizes_may_change_between_calls() -> None:
    """Resampling is cached per size, folded weights are not."""
    net = SuperSimpleNet((3,), ModelConfig(seg_channels=8, cls_channels=4)).eval()
    small, large = torch.randn(1, 3, 4, 3), torch.randn(1, 5, 3, 3)
    first = net([small])
    assert net([large])[0].shape == (1, 10, 6)
    again = net([small])
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize(("variant", "align_corners"), [("icpr", True), ("jims", False)])
def test_upsampling_follows_the_variant(variant: str, align_corners: bool) -> None:
    config = ModelConfig(variant=variant, seg_channels=8, cls_channels=4)  # type: ignore[arg-type]
    assert SuperSimpleNet((3,), config).align_corners is align_corners
    assert SuperSimpleNet((3,), replace(config, align_corners=not align_corners)).align_corners is not align_corners


def test_initialisation_is_seeded_and_leaves_the_global_generator_alone() -> None:
    config = ModelConfig(seg_channels=8, cls_channels=4)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    net = SuperSimpleNet((3, 5), config, generator_seed=7)
    assert torch.equal(torch.rand(3), expected)
    same = SuperSimpleNet((3, 5), config, generator_seed=7)
    other = SuperSimpleNet((3, 5), config, generator_seed=8)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters(), strict=True))
    assert not torch.equal(net.adaptor.weight, other.adaptor.weight)


@pytest.mark.parametrize(
    ("variant", "held"),
    [("icpr", {"seg_conv.bias", "cls_conv.bias"}), ("jims", {"adaptor.bias", "seg_conv.bias", "cls_conv.bias"})],
)
def test_biases_that_a_batch_norm_subtracts_again_are_held(variant: str, held: set[str]) -> None:
    """The adaptor's reaches the classification head's zero padding in the icpr variant, and matters there."""
    net = SuperSimpleNet((3,), ModelConfig(variant=variant, seg_channels=8, cls_channels=4))  # type: ignore[arg-type]
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == held


def test_every_parameter_is_in_one_group() -> None:
    net = SuperSimpleNet((3, 5), ModelConfig(seg_channels=8, cls_channels=4))
    adaptor, heads = net.parameter_groups()
    assert {id(p) for p in adaptor} == {id(p) for p in net.adaptor.parameters()}
    assert sorted(map(id, [*adaptor, *heads])) == sorted(map(id, net.parameters()))


@pytest.mark.parametrize(
    ("size", "border"), [((32, 48), "mirror"), ((13, 40), "mirror"), ((12, 40), "nearest"), ((5, 3), "nearest")]
)
def test_image_map_is_upsampled_and_blurred(size: Size, border: str) -> None:
    map_BHW = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    up = F.interpolate(map_BHW[:, None].double(), size=size, mode="bilinear", align_corners=False)[:, 0].numpy()
    expected = [gaussian_filter(m, sigma=4, radius=12, mode=border) for m in up]
    np.testing.assert_allclose(image_map(map_BHW, size).numpy(), expected, rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)


def test_image_map_keeps_a_constant() -> None:
    full = image_map(torch.full((1, 4, 4), 2.5), (32, 20))
    assert full.shape == (1, 32, 20)
    torch.testing.assert_close(full, torch.full((1, 32, 20), 2.5))
