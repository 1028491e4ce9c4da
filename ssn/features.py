"""Backbone features of a category's search splits, computed once and shared by every epoch and trial.

The backbone is frozen, so an image's features never change; a flipped image's are computed as well, because a network
does not commute with flips. Everything is a plain numpy array, which Ray's object store hands to any number of workers
without a copy; nobody may write to them.

Shape suffixes: N images, V views (images times flips), h/w a layer's height and width, H/W the map's, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssn.backbone import Backbone, calibrate, calibration_state, load_backbone
from ssn.config import Config, Size
from ssn.data.loading import load_batches
from ssn.data.preprocess import decode_mask, resize_mask
from ssn.data.reader import CategoryInfo, SearchData
from ssn.data.records import Sample
from ssn.errors import SSNError
from ssn.model import map_size

NUM_FLIPS = 4
"""None, horizontal, vertical, both."""
CALIBRATION_IMAGES = 64
_NUMPY_DTYPE = {"fp16": np.float16, "fp32": np.float32}

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class SplitFeatures:
    """Features and targets of one split; view ``v`` is image ``v // num_flips`` under flip ``v % num_flips``."""

    maps_VhwC: tuple[np.ndarray, ...]
    """Per layer, finest first, in the storage dtype."""
    masks_VHW: np.ndarray
    """Bool, ground truth at map size; empty for normal images and where there is no mask."""
    eval_masks_N: np.ndarray
    """Bool [N, height, width] at ``eval.size``; [0, height, width] where the split is never scored."""
    labels_N: np.ndarray
    """int64, 1 defective."""
    has_mask_N: np.ndarray
    """Bool: a defective image with a mask."""
    defect_types: tuple[str, ...]
    ids: tuple[str, ...]
    num_flips: int


@dataclass(frozen=True)
class CategoryFeatures:
    """What a training run needs of a category. There is no test split in here, nor a way to reach one."""

    info: CategoryInfo
    train: SplitFeatures
    pool: SplitFeatures
    """The labelled defective images that have masks."""
    validation: SplitFeatures
    backbone_digest: str
    backbone_calibration: dict[str, np.ndarray]
    """Batch-norm statistics by buffer name where the backbone is random and was calibrated here; otherwise empty."""
    channels: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        splits = (self.train, self.pool, self.validation)
        return sum(a.nbytes for s in splits for a in (*s.maps_VhwC, s.masks_VHW, s.eval_masks_N))


def prepare_backbone(config: Config, data: SearchData) -> Backbone:
    """Load the configured backbone; random weights are calibrated on the category's first training images.

    Raises:
        SSNError: see ``ssn.backbone.load_backbone``.
    """
    backbone = load_backbone(config.model)
    if config.model.weights == "random":
        calibrate(backbone, _calibration_batches(data.stream("train"), config))
    return backbone


def _calibration_batches(samples: Iterator[Sample], config: Config) -> Iterable[Tensor]:
    """The first ``CALIBRATION_IMAGES`` images, in batches."""
    seen = 0
    for batch, x_BCHW in load_image_batches(samples, config):
        yield x_BCHW
        seen += len(batch)
        if seen >= CALIBRATION_IMAGES:
            return


def load_image_batches(samples: Iterable[Sample], config: Config) -> Iterator[tuple[list[Sample], Tensor]]:
    """:func:`ssn.data.loading.load_batches` with a configuration's preprocessing and evaluation batch size."""
    resolved = config.resolved()
    return load_batches(
        samples,
        image_size=resolved.data.image_size,
        antialias=bool(resolved.data.antialias),
        batch_size=resolved.eval.batch_size,
    )


def estimate_bytes(config: Config, info: CategoryInfo, feature_sizes: Sequence[tuple[int, Size]]) -> int:
    """Memory that :func:`extract` will need.

    Args:
        config: Decides the storage dtype and the size of evaluation masks.
        info: Counts of the category.
        feature_sizes: Channels and (height, width) of each layer, finest first.
    """
    itemsize = np.dtype(_NUMPY_DTYPE[config.data.feature_dtype]).itemsize
    height, width = map_size([size for _, size in feature_sizes])
    per_view = height * width + itemsize * sum(c * h * w for c, (h, w) in feature_sizes)
    counts = info.counts
    views = counts["train"].normal + NUM_FLIPS * counts["pool"].masks
    validation = counts["validation"].normal + counts["validation"].defective
    return (views + validation) * per_view + validation * config.eval.size[0] * config.eval.size[1]


def extract(
    config: Config,
    data: SearchData,
    backbone: Backbone,
    *,
    device: torch.device | str = "cpu",
    budget_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> CategoryFeatures:
    """Run the backbone over a category's train, pool and validation images.

    Args:
        config: Image size, storage dtype and evaluation size.
        data: The search splits.
        backbone: From :func:`prepare_backbone`; moved to ``device``.
        device: Where the backbone runs.
        budget_bytes: Most memory the result may take; None: no limit.
        on_progress: Called with images done and images in all.

    Raises:
        SSNError: a split needed for training is empty, the features exceed the budget, or an image cannot be decoded.
    """
    counts = data.info.counts
    where = f"{data.info.dataset}/{data.info.category}"
    if counts["train"].normal == 0:
        raise SSNError(f"{where} has no normal training images; ingest some")
    backbone = backbone.to(device).to(memory_format=torch.channels_last)
    probe = torch.zeros(1, 3, *config.data.image_size, device=device)
    with torch.no_grad():
        feature_sizes = [(m.shape[1], (m.shape[2], m.shape[3])) for m in backbone(probe)]
    needed = estimate_bytes(config, data.info, feature_sizes)
    if budget_bytes is not None and needed > budget_bytes:
        raise SSNError(
            f"the features of {where} take {needed / 1e9:.1f} GB, more than the {budget_bytes / 1e9:.1f} GB there is "
            "for them; lower data.image_size or choose a smaller model.backbone"
        )
    validation = counts["validation"].normal + counts["validation"].defective
    total = counts["train"].normal + counts["pool"].masks + validation
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        if on_progress is not None:
            on_progress(done, total)

    def run(samples: Iterator[Sample], num_images: int, num_flips: int, scored: bool) -> SplitFeatures:
        builder = _Builder(config, feature_sizes, num_images, num_flips, scored)
        for batch, x_BCHW in load_image_batches(samples, config):
            builder.add(batch, x_BCHW.to(device), backbone)
            advance(len(batch))
        return builder.build()

    with_masks = (sample for sample in data.stream("pool") if sample.mask is not None)
    return CategoryFeatures(
        info=data.info,
        train=run(data.stream("train"), counts["train"].normal, 1, scored=False),
        pool=run(with_masks, counts["pool"].masks, NUM_FLIPS, scored=False),
        validation=run(data.stream("validation"), validation, 1, scored=True),
        backbone_digest=backbone.digest,
        backbone_calibration=(
            {name: value.numpy() for name, value in calibration_state(backbone).items()}
            if config.model.weights == "random"
            else {}
        ),
        channels=backbone.channels,
    )


def flip(x: Tensor, which: int) -> Tensor:
    """Flip the last two axes (height, width): 0 none, 1 horizontally, 2 vertically, 3 both."""
    axes = [axis for axis, bit in ((-1, 1), (-2, 2)) if which & bit]
    return x.flip(axes) if axes else x


def downsample_mask(mask_HW: np.ndarray, image_size: Size, target: Size) -> np.ndarray:
    """A bool mask at map size: nearest to the network's image size, then bilinear, then cut at 0.5 (design of both
    reference codes)."""
    at_image = torch.from_numpy(resize_mask(mask_HW, image_size)).float()[None, None]
    return (F.interpolate(at_image, size=target, mode="bilinear", align_corners=False)[0, 0] >= 0.5).numpy()


class _Builder:
    """Fills preallocated arrays, so that nothing is held twice."""

    def __init__(
        self,
        config: Config,
        feature_sizes: Sequence[tuple[int, Size]],
        num_images: int,
        num_flips: int,
        scored: bool,
    ) -> None:
        self.config, self.num_flips, self.scored = config, num_flips, scored
        self.map_size = map_size([size for _, size in feature_sizes])
        views = num_images * num_flips
        dtype = _NUMPY_DTYPE[config.data.feature_dtype]
        self.maps = tuple(np.empty((views, h, w, c), dtype) for c, (h, w) in feature_sizes)
        self.masks = np.zeros((views, *self.map_size), bool)
        self.eval_masks = np.zeros((num_images if scored else 0, *config.eval.size), bool)
        self.samples: list[tuple[str, int, bool, str]] = []
        self.num_images = num_images

    def add(self, batch: Sequence[Sample], x_BCHW: Tensor, backbone: Backbone) -> None:
        first = len(self.samples)
        if first + len(batch) > self.num_images:
            raise SSNError(
                f"the shards of split {batch[0].split} hold more images than their metadata says; ingest again"
            )
        rows = (np.arange(first, first + len(batch)) * self.num_flips)[:, None] + np.arange(self.num_flips)
        with torch.inference_mode():
            for which in range(self.num_flips):
                flipped = flip(x_BCHW, which).contiguous(memory_format=torch.channels_last)
                for stored, m_BChw in zip(self.maps, backbone(flipped), strict=True):
                    stored[rows[:, which]] = m_BChw.permute(0, 2, 3, 1).cpu().numpy()
        for i, sample in enumerate(batch):
            if sample.mask is not None:
                mask = decode_mask(sample.mask, source=sample.source_path)
                small = torch.from_numpy(downsample_mask(mask, self.config.data.image_size, self.map_size))
                for which in range(self.num_flips):
                    self.masks[rows[i, which]] = flip(small, which).numpy()
                if self.scored:
                    self.eval_masks[first + i] = resize_mask(mask, self.config.eval.size)
            self.samples.append((sample.id, sample.label, sample.mask is not None, sample.defect_type))

    def build(self) -> SplitFeatures:
        if len(self.samples) != self.num_images:
            raise SSNError("the shards hold fewer images than their metadata says; ingest again")
        ids, labels, has_mask, types = zip(*self.samples, strict=True) if self.samples else ((), (), (), ())
        overflow = [m for m in self.maps if m.dtype == np.float16 and not np.isfinite(m).all()]
        if overflow:
            raise SSNError("backbone features exceed float16's range; use --set data.feature_dtype=fp32")
        return SplitFeatures(
            maps_VhwC=self.maps,
            masks_VHW=self.masks,
            eval_masks_N=self.eval_masks,
            labels_N=np.array(labels, np.int64),
            has_mask_N=np.array(has_mask, bool),
            defect_types=tuple(types),
            ids=tuple(ids),
            num_flips=self.num_flips,
        )
