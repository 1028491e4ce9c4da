"""A trained model and its backbone, ready to score images."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ssn.backbone import Backbone
from ssn.bundle import find_backbone, head_tensors
from ssn.checkpoint import Checkpoint, load_checkpoint
from ssn.config import Config
from ssn.data.preprocess import decode_image, preprocess
from ssn.errors import SSNError
from ssn.inference import CudaGraphs, InferenceNetwork, Precision
from ssn.model import SuperSimpleNet, image_map

ImageLike = Image.Image | np.ndarray | Path | str | bytes


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image."""

    score: float
    """Logit of the image being defective."""
    map_HW: np.ndarray
    """float32 logits, at ``data.image_size``."""
    source: str
    """The image's path, or its position among the inputs."""


class Predictor:
    """Scores images with a trained network.

    Args:
        net: Trained heads.
        backbone: The one they were trained on.
        config: Preprocessing and batch size.
        meta: Of the checkpoint; what the model is of.
        device: Where both run.
        precision: See :data:`ssn.inference.Precision`.
        cuda_graphs: Launch a batch's kernels together, see :class:`ssn.inference.CudaGraphs`; for small batches.

    Raises:
        SSNError: CUDA graphs are asked for on another device.
    """

    def __init__(
        self,
        net: SuperSimpleNet,
        backbone: Backbone,
        config: Config,
        *,
        meta: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        cuda_graphs: bool = False,
    ) -> None:
        self.config = config.resolved()
        self.meta = dict(meta or {})
        self.device = torch.device(device)
        if cuda_graphs and self.device.type != "cuda":
            raise SSNError(f"CUDA graphs need a GPU, but the device is {self.device}; leave cuda_graphs out")
        self.network = InferenceNetwork(
            backbone, net, self.config.data.image_size, precision=precision, device=self.device
        )
        self._run = CudaGraphs(self.network) if cuda_graphs else self.network

    @classmethod
    def from_directory(
        cls, directory: Path | str, *, device: torch.device | str = "cpu", precision: Precision = "fp32"
    ) -> Predictor:
        """Load a self-contained model directory, as ``train`` and the model registry write it.

        Raises:
            SSNError: the directory is not one, or holds heads without their backbone.
        """
        checkpoint = load_checkpoint(Path(directory))
        if checkpoint.backbone is None:
            raise SSNError(
                f"{directory} holds a trial's heads without their backbone; promote the trial or use a champion's model"
            )
        return cls.from_checkpoint(checkpoint, find_backbone(checkpoint), device=device, precision=precision)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        backbone: Backbone,
        *,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
    ) -> Predictor:
        """Put a checkpoint's heads on the backbone they were trained on."""
        net = SuperSimpleNet(backbone.channels, checkpoint.config.model)
        net.load_state_dict(head_tensors(checkpoint))
        return cls(net, backbone, checkpoint.config, meta=checkpoint.meta, device=device, precision=precision)

    @torch.inference_mode()
    def score_raw(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Map logits at map size [B, H, W] and scores [B] of preprocessed images."""
        map_BHW, score_B = self._run(x_BCHW.to(self.device))
        return map_BHW, score_B

    def predict(self, images: Iterable[ImageLike], *, batch_size: int | None = None) -> Iterator[Prediction]:
        """Score images of any size, a batch at a time.

        Args:
            images: PIL images, [H, W, 3] or [H, W] uint8 arrays, paths, or encoded bytes.
            batch_size: None: ``eval.batch_size``.

        Raises:
            SSNError: an image cannot be read; the message names it.
        """
        stream = enumerate(images)
        data = self.config.data
        while batch := list(itertools.islice(stream, batch_size or self.config.eval.batch_size)):
            decoded = [_decode(image, index) for index, image in batch]
            x_BCHW = torch.stack(
                [preprocess(image, data.image_size, antialias=bool(data.antialias)) for image, _ in decoded]
            )
            map_BHW, score_B = self.score_raw(x_BCHW)
            full = image_map(map_BHW, data.image_size).cpu().numpy()
            for (_, source), map_HW, score in zip(decoded, full, score_B.tolist(), strict=True):
                yield Prediction(score=score, map_HW=map_HW, source=source)


def _decode(image: ImageLike, index: int) -> tuple[np.ndarray, str]:
    """[H, W, 3] uint8 RGB, and what to call it."""
    if isinstance(image, str | Path):
        try:
            content = Path(image).read_bytes()
        except OSError as error:
            raise SSNError(f"cannot read image {image}: {error.strerror or error}; check the path") from error
        return decode_image(content, source=str(image)), str(image)
    source = f"image {index}"
    if isinstance(image, bytes):
        return decode_image(image, source=source), source
    if isinstance(image, Image.Image):
        return _decode_picture(image, source), source
    array = np.asarray(image)
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise SSNError(f"{source} is {array.dtype} {array.shape}, but must be uint8 [H, W, 3] or [H, W]")
    return array, source


def _decode_picture(image: Image.Image, source: str) -> np.ndarray:
    """What ``decode_image`` makes of the file that a picture was opened from, its EXIF orientation included."""
    try:
        upright = ImageOps.exif_transpose(image)
    except OSError as error:  # opened, but not yet read
        raise SSNError(f"{source} is corrupt ({error}); replace or remove it") from error
    if upright.mode == "F":
        raise SSNError(f"{source} holds floating-point pixels; convert it to 8 or 16 bits")
    if not upright.mode.startswith("I"):
        return np.array(upright.convert("RGB"))
    buffer = io.BytesIO()
    upright.convert("I;16").save(buffer, format="PNG")
    return decode_image(buffer.getvalue(), source=source)


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Files, folders (searched recursively) and glob patterns, as image paths in order.

    Raises:
        SSNError: an input matches nothing.
    """
    suffixes = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
    found: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
        elif path.exists():
            matches = [path]
        else:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            pattern = str(path.relative_to(anchor)) if path.is_absolute() else given
            matches = sorted(p for p in anchor.glob(pattern) if p.suffix.lower() in suffixes)
        if not matches:
            raise SSNError(f"no image at {given}; give an image, a folder with images, or a quoted pattern")
        found.extend(matches)
    return found
