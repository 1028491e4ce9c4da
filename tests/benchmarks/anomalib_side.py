"""anomalib's SuperSimpleNet with our weights: its model, loss, optimiser settings and exporter, not Lightning's loop.

The names are those of anomalib 2.7.0, ``anomalib.models.image.supersimplenet``.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import timm
import torch
from torch import Tensor

from ssn.config import ModelConfig
from tests.golden.reference import published_name
from tests.tolerances import GOLDEN_RTOL

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations within anomalib and its dependencies
    from anomalib.models.image.supersimplenet import Supersimplenet


class AnomalibSide:
    """anomalib's model, its loss and its optimiser.

    Args:
        model: Backbone, layers and variant; the heads' sizes must be the papers'.
        threshold: Of the Perlin noise.
        noise_sigma: Of the features' noise; None: anomalib's default.
        backbone_state: Our backbone's weights.
        heads_state: Our heads' weights.
        epochs: Where its learning rate schedule ends.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        threshold: float,
        backbone_state: Mapping[str, Tensor],
        heads_state: Mapping[str, Tensor],
        epochs: int = 300,
        noise_sigma: float | None = None,
    ) -> None:
        with _without_download():
            self.module = Supersimplenet(
                perlin_threshold=threshold,
                backbone=model.backbone,
                layers=[f"layer{index}" for index in model.layers],
                supervised=False,
                adapt_cls_features=model.variant == "icpr",
                pre_processor=False,
                post_processor=False,
                evaluator=False,
                visualizer=False,
            )
        self.model = self.module.model
        if noise_sigma is not None:
            self.model.anomaly_generator.noise_std = noise_sigma
        self.model.feature_extractor.feature_extractor.feature_extractor.load_state_dict(dict(backbone_state))
        own = self.model.state_dict()
        for name, tensor in heads_state.items():
            own[_anomalib_name(name)].copy_(tensor)
        self._trainer = _Epochs(epochs)
        self.module.trainer = self._trainer  # type: ignore[assignment]
        (self.optimizer,), (self.scheduler,) = self.module.configure_optimizers()  # type: ignore[misc]
        self._heads_names = tuple(heads_state)

    def heads_state(self) -> dict[str, Tensor]:
        """Its heads' weights by our names."""
        own = self.model.state_dict()
        return {name: own[_anomalib_name(name)].clone() for name in self._heads_names}

    def hold(self, names: Sequence[str]) -> None:
        """Train everything but these parameters of the heads, by our names."""
        own = dict(self.model.named_parameters())
        for name in names:
            own[_anomalib_name(name)].requires_grad_(False)

    def gradient_norms(self) -> dict[str, float]:
        """Of the heads' parameters after a step, by our names."""
        own = dict(self.model.named_parameters())
        found = {name: own.get(_anomalib_name(name)) for name in self._heads_names}
        return {name: float(p.grad.norm()) for name, p in found.items() if p is not None and p.grad is not None}

    def training_step(
        self, images_BCHW: Tensor, *, autocast: bool = False, draws: tuple[Tensor, Tensor] | None = None
    ) -> float:
        """What Lightning's automatic optimisation does with ``Supersimplenet.training_step``; returns the loss.

        All images are normal, with the empty masks that anomalib's datasets give them; no clipping, as it has it for
        unsupervised training.

        Args:
            images_BCHW: As the backbone takes them.
            autocast: Whether in bf16.
            draws: Noise [2B, C, h, w] and Perlin masks [2B, 1, h, w] in the place of its own; None: its own.
        """
        with contextlib.nullcontext() if draws is None else self._drawing(*draws):
            return self._training_step(images_BCHW, autocast=autocast)

    @contextlib.contextmanager
    def _drawing(self, noise_VCHW: Tensor, perlin_V1HW: Tensor) -> Iterator[None]:
        """Its generator finds this noise and these masks where it draws its own; what it makes of them is its own."""
        generator = self.model.anomaly_generator
        with (
            mock.patch.object(generator, "generate_perlin", return_value=perlin_V1HW),
            mock.patch.object(torch, "normal", return_value=noise_VCHW),
        ):
            yield

    def _training_step(self, images_BCHW: Tensor, *, autocast: bool) -> float:
        self.model.train()
        masks = torch.zeros(len(images_BCHW), *images_BCHW.shape[2:], dtype=torch.bool)
        labels = torch.zeros(len(images_BCHW))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            anomaly_map, score, target_mask, target_label = self.model(images_BCHW, masks=masks, labels=labels)
            loss = self.module.loss(
                pred_map=anomaly_map, pred_score=score, target_mask=target_mask, target_label=target_label
            )
        logged = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return logged

    def run_epoch(self, images_NCHW: Tensor, batch_size: int) -> float:
        """Train on all images in a random order, then move the learning rates' schedule; returns the mean loss."""
        batches = torch.randperm(len(images_NCHW)).split(batch_size)
        return self.run_batches((images_NCHW[batch], None) for batch in batches)

    def run_batches(self, batches: Iterable[tuple[Tensor, tuple[Tensor, Tensor] | None]]) -> float:
        """Train an epoch on these images and draws (see :meth:`training_step`); returns the mean loss."""
        total, count = 0.0, 0
        for images_BCHW, draws in batches:
            total += self.training_step(images_BCHW, draws=draws) * len(images_BCHW)
            count += len(images_BCHW)
        self.scheduler.step()
        return total / count

    @torch.inference_mode()
    def predict(self, images_BCHW: Tensor, *, autocast: bool = False) -> tuple[Tensor, Tensor]:
        """Smoothed map [B, height, width] and score [B], as probabilities."""
        self.model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = self.model(images_BCHW)
        return out.anomaly_map[:, 0], out.pred_score

    def export(self, folder: Path, size: tuple[int, int], format: Literal["onnx", "openvino"]) -> Path:
        """Write the model with anomalib's exporter, for images of this height and width and any number of them.

        Without its pre- and post-processing: it takes normalised images.
        """
        self.module.eval()
        with warnings.catch_warnings(), _quiet(), torch.no_grad():
            warnings.simplefilter("ignore")
            path: Path = getattr(self.module, f"to_{format}")(folder, input_size=size)
        return path


def largest_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of the logits of two sides' maps and scores, given as probabilities; as a share of the largest logit."""
    errors = []
    for own, theirs in zip(actual, expected, strict=True):
        own_logit, their_logit = own.double().logit(), theirs.double().logit()
        errors.append(float((own_logit - their_logit).abs().max() / their_logit.abs().max()))
    return max(errors)


def check_agreement(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """:func:`largest_difference` of two float32 sides.

    Raises:
        AssertionError: they do not compute the same network.
    """
    worst = largest_difference(actual, expected)
    if not worst <= GOLDEN_RTOL:  # NaN too
        raise AssertionError(f"the two sides differ by {worst:.1e} of the largest logit")
    return worst


def _anomalib_name(name: str) -> str:
    return published_name("jims", name)  # in both variants


class _Epochs:
    """As much of a trainer as ``configure_optimizers`` asks for."""

    def __init__(self, max_epochs: int) -> None:
        self.max_epochs = max_epochs


@contextlib.contextmanager
def _without_download() -> Iterator[None]:
    """anomalib always asks timm for pretrained weights; ours replace them anyway."""
    create = timm.create_model

    def without_weights(*arguments: Any, **keywords: Any) -> Any:
        return create(*arguments, **{**keywords, "pretrained": False})

    with mock.patch.object(timm, "create_model", without_weights):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell what they do, on standard output too."""
    with contextlib.redirect_stdout(None):
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
