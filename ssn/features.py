"""Backbone features of a category's search splits, computed once and shared by every epoch and trial.

The backbone is frozen, so an image's features never change; a flipped image's are computed as well, because a network
does not commute with flips. Everything is a plain numpy array, which Ray's object store hands to any number of workers
without a copy; nobody may write to them. ``ssn.streaming`` is for features that do not fit, ``ssn.feature_cache`` keeps
them on a disk.

Shape suffixes: N images, V views (images times flips), B views of a batch, h/w a layer's height and width, H/W the
map's (of ``x_BCHW`` the image's), C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssn.backbone import Backbone, calibrate, calibration_state, load_backbone
from ssn.config import NUMERICS_VERSION, Config, Size, digest, flatten
from ssn.data.loading import load_batches
from ssn.data.preprocess import decode_mask, resize_mask
from ssn.data.reader import CategoryInfo, SearchData
from ssn.data.records import SEARCH_SPLITS, Sample, SearchSplit
from ssn.errors import SSNError
from ssn.model import map_size

NUM_FLIPS = 4
"""None, horizontal, vertical, both."""
CALIBRATION_IMAGES = 64
_TORCH_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NUMPY_DTYPE: dict[str, type[np.generic]] = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32}
"""How each is stored; numpy has no bfloat16, so its bits are."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class SplitFeatures(ABC):
    """Targets of one split and a way to its features; view ``v`` is image ``v // num_flips`` under flip
    ``v % num_flips``."""

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

    streamed: ClassVar[bool] = False
    """Whether the backbone runs in every :meth:`gather`."""

    @abstractmethod
    def gather(self, views_B: np.ndarray, device: torch.device) -> list[Tensor]:
        """Features of some views, in order: per layer, finest first, [B, h, w, C] in storage dtype on ``device``."""

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return self.masks_VHW.nbytes + self.eval_masks_N.nbytes

    def with_backbone(self, backbone: Backbone) -> SplitFeatures:
        """The split, ready to :meth:`gather`; one whose features are stored needs no backbone."""
        return self


@dataclass(frozen=True)
class CachedSplit(SplitFeatures):
    """A split whose features are stored."""

    maps_VhwC: tuple[np.ndarray, ...]
    """Per layer, finest first, in the storage dtype."""

    def gather(self, views_B: np.ndarray, device: torch.device) -> list[Tensor]:
        # indexing copies, and so gives torch an array it may write to, whatever this one is mapped from
        return [_from_stored(m[views_B]).to(device) for m in self.maps_VhwC]

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + sum(m.nbytes for m in self.maps_VhwC)


@dataclass(frozen=True)
class CategoryFeatures:
    """What a training run needs of a category. There is no test split in here, nor a way to reach one."""

    info: CategoryInfo
    train: SplitFeatures
    pool: SplitFeatures
    """Defective images: those with masks and, if the features are for ``train.weak_labels`` use, the others too."""
    validation: SplitFeatures
    backbone_digest: str
    backbone_calibration: dict[str, np.ndarray]
    """Batch-norm statistics by buffer name where the backbone is random and was calibrated here; otherwise empty."""
    channels: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return sum(split.num_bytes for split in (self.train, self.pool, self.validation))

    @property
    def source(self) -> Literal["cached", "streamed"]:
        """Whether features are stored, or computed from stored images whenever they are needed."""
        return "streamed" if self.train.streamed else "cached"

    def calibration(self) -> dict[str, Tensor]:
        """``backbone_calibration`` as ``ssn.backbone.apply_calibration`` takes it; copies, as the arrays may be
        read-only."""
        return {name: torch.tensor(value) for name, value in self.backbone_calibration.items()}

    def with_backbone(self, backbone: Backbone, *, device: torch.device | str = "cpu") -> CategoryFeatures:
        """The same features, ready for training; needed if they are streamed.

        Args:
            backbone: The one they are made for; moved to ``device``.
            device: Where it runs, and where training will be.

        Raises:
            SSNError: it is another backbone.
        """
        if backbone.digest != self.backbone_digest:
            raise SSNError(
                f"the backbone has digest {backbone.digest[:12]}, but these features are made for one with "
                f"{self.backbone_digest[:12]}; its weights have changed, so start afresh"
            )
        backbone = place_backbone(backbone, device)
        return replace(self, **{name: getattr(self, name).with_backbone(backbone) for name in SEARCH_SPLITS})


def feature_key(config: Config, info: CategoryInfo, *, data_uri: str, weights_digest: str, device: str) -> str:
    """A digest of what features depend on, and of nothing else.

    Args:
        config: Of which the preprocessing, the backbone's layers and the evaluation size matter;
            ``train.flip_defects`` where the pool has images, and ``train.weak_labels`` where it has some without masks.
        info: Of the category; its fingerprint stands for the images.
        data_uri: Where its shards are: their order is not part of the fingerprint.
        weights_digest: Of the backbone as it was loaded, before calibration.
        device: Where the backbone runs; its kind matters, because kinds round differently.
    """
    flat, pool, num_pool = flatten(config.resolved()), info.counts["pool"], num_images(config, info, "pool")
    parts = ("model.backbone", "model.layers", "data.", "eval.size", "eval.batch_size")
    return digest(
        {
            "config": {key: value for key, value in flat.items() if key.startswith(parts)},
            "calibrated": config.model.weights == "random",
            "data": [data_uri, info.dataset, info.category, info.split_seed, info.search_fingerprint],
            # only where they make a difference, so that runs share features elsewhere
            **({"pool": "whole"} if pool.masks < num_pool else {}),
            **({"flips": "none"} if num_pool and not config.train.flip_defects else {}),
            "weights_digest": weights_digest,
            "device": torch.device(device).type,
            # what decodes, resizes and convolves; another release may round differently
            "versions": {"numerics": NUMERICS_VERSION} | {name: version(name) for name in ("pillow", "timm", "torch")},
        }
    )


def prepare_backbone(config: Config, data: SearchData) -> Backbone:
    """Load the configured backbone; random weights are calibrated on the category's first training images.

    Raises:
        SSNError: see ``ssn.backbone.load_backbone``.
    """
    backbone = load_backbone(config.model)
    calibrate_random(backbone, config, data)
    return backbone


def calibrate_random(backbone: Backbone, config: Config, data: SearchData) -> None:
    """The second half of :func:`prepare_backbone`: calibrates weights that are random and leaves others alone."""
    if config.model.weights == "random":
        calibrate(backbone, _calibration_batches(data.stream("train"), config))


def place_backbone(backbone: Backbone, device: torch.device | str) -> Backbone:
    """Move a backbone to where it will run, in the memory format it is fed with."""
    return backbone.to(device).to(memory_format=torch.channels_last)


def measure_maps(backbone: Backbone, image_size: Size, device: torch.device | str) -> list[tuple[int, Size]]:
    """Channels and (height, width) of each layer's map of an image, finest first.

    Args:
        backbone: On ``device``.
        image_size: Height and width of the image.
        device: Of the image to try.
    """
    with torch.no_grad():
        return [(m.shape[1], (m.shape[2], m.shape[3])) for m in backbone(torch.zeros(1, 3, *image_size, device=device))]


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
        config: Decides the storage dtype, the size of evaluation masks and whether the whole pool is read.
        info: Counts of the category.
        feature_sizes: Channels and (height, width) of each layer, finest first.
    """
    itemsize = np.dtype(_NUMPY_DTYPE[config.data.feature_dtype]).itemsize
    per_view = itemsize * sum(c * h * w for c, (h, w) in feature_sizes)
    return num_views(config, info) * per_view + estimate_target_bytes(
        config, info, map_size([size for _, size in feature_sizes])
    )


def estimate_target_bytes(config: Config, info: CategoryInfo, map_size_HW: Size) -> int:
    """The part of :func:`estimate_bytes` that is masks, which are kept in memory whatever becomes of the features."""
    scored = num_images(config, info, "validation") * config.eval.size[0] * config.eval.size[1]
    return num_views(config, info) * map_size_HW[0] * map_size_HW[1] + scored


def num_images(config: Config, info: CategoryInfo, split: SearchSplit) -> int:
    """Images of a split that training reads: the pool's without masks only for their labels."""
    counts = info.counts[split]
    pool = counts.defective if config.train.weak_labels == "use" else counts.masks
    return {"train": counts.normal, "pool": pool, "validation": counts.normal + counts.defective}[split]


def num_views(config: Config, info: CategoryInfo) -> int:
    """Images of all search splits, each under all of its flips: what the backbone sees."""
    return sum(num_images(config, info, split) * num_flips(config, split) for split in SEARCH_SPLITS)


def num_flips(config: Config, split: SearchSplit) -> int:
    """Views of each of a split's images."""
    return NUM_FLIPS if split == "pool" and config.train.flip_defects else 1


def stream_samples(config: Config, data: SearchData, split: SearchSplit) -> Iterator[Sample]:
    """The samples that :func:`num_images` counts."""
    whole = split != "pool" or config.train.weak_labels == "use"
    return (sample for sample in data.stream(split) if whole or sample.mask is not None)


class MapWriter(Protocol):
    """Takes the maps of one layer of one split, in the order of the views."""

    def append(self, block_VhwC: np.ndarray) -> None:
        """The next views."""

    def close(self) -> np.ndarray:
        """All views, once the last one is in."""


class MapStorage(Protocol):
    """Where :func:`extract` puts what it computes."""

    def create(self, name: str, shape_VhwC: tuple[int, ...], dtype: type[np.generic]) -> MapWriter:
        """A place for the maps called ``name``."""


class InMemory:
    """Maps in arrays allocated beforehand, so that nothing is held twice."""

    def create(self, name: str, shape_VhwC: tuple[int, ...], dtype: type[np.generic]) -> MapWriter:
        return _ArrayWriter(np.empty(shape_VhwC, dtype))


class _ArrayWriter:
    def __init__(self, array_VhwC: np.ndarray) -> None:
        self._array, self._filled = array_VhwC, 0

    def append(self, block_VhwC: np.ndarray) -> None:
        self._array[self._filled : self._filled + len(block_VhwC)] = block_VhwC
        self._filled += len(block_VhwC)

    def close(self) -> np.ndarray:
        return self._array


def extract(
    config: Config,
    data: SearchData,
    backbone: Backbone,
    *,
    device: torch.device | str = "cpu",
    storage: MapStorage | None = None,
    on_progress: OnProgress | None = None,
) -> CategoryFeatures:
    """Run the backbone over a category's train, pool and validation images.

    Args:
        config: Image size, storage dtype and evaluation size.
        data: The search splits.
        backbone: From :func:`prepare_backbone`; moved to ``device``.
        device: Where the backbone runs.
        storage: Where the maps go; None: into memory, however much they take (``ssn.streaming`` minds a budget).
        on_progress: Called with images done and images in all.

    Raises:
        SSNError: a split needed for training is empty, or an image cannot be decoded.
    """
    backbone = place_backbone(backbone, device)
    sizes = measure_maps(backbone, config.data.image_size, device)
    dtype = config.data.feature_dtype
    storage = storage or InMemory()
    advance = Progress(config, data.info, on_progress)

    def run(split: SearchSplit) -> CachedSplit:
        targets = TargetBuilder(config, data.info, split, map_size([size for _, size in sizes]))
        views = num_images(config, data.info, split) * num_flips(config, split)
        writers = [
            storage.create(f"{split}.{layer}", (views, h, w, c), _NUMPY_DTYPE[dtype])
            for layer, (c, (h, w)) in enumerate(sizes)
        ]
        for batch, x_BCHW in load_image_batches(stream_samples(config, data, split), config):
            targets.add(batch)
            per_flip = [
                [_to_stored(as_stored(m, dtype)) for m in run_backbone(backbone, flip(x_BCHW.to(device), which))]
                for which in range(num_flips(config, split))
            ]
            for writer, *maps in zip(writers, *per_flip, strict=True):
                writer.append(np.stack(maps, 1).reshape(-1, *maps[0].shape[1:]))
            advance(len(batch))
        return CachedSplit(**targets.build(), maps_VhwC=tuple(writer.close() for writer in writers))

    return assemble(config, data, backbone, run)


def assemble(
    config: Config, data: SearchData, backbone: Backbone, make_split: Callable[[SearchSplit], SplitFeatures]
) -> CategoryFeatures:
    """Features of a category from its splits.

    Raises:
        SSNError: there is nothing to train on.
    """
    if data.info.counts["train"].normal == 0:
        raise SSNError(f"{data.info.dataset}/{data.info.category} has no normal training images; ingest some")
    calibrated = config.model.weights == "random"
    return CategoryFeatures(
        info=data.info,
        train=make_split("train"),
        pool=make_split("pool"),
        validation=make_split("validation"),
        backbone_digest=backbone.digest,
        backbone_calibration=(
            {name: value.numpy() for name, value in calibration_state(backbone).items()} if calibrated else {}
        ),
        channels=backbone.channels,
    )


@torch.no_grad()
def run_backbone(backbone: Backbone, x_BCHW: Tensor) -> list[Tensor]:
    """Features of normalised images on the backbone's device: per layer, finest first, [B, h, w, C] float32."""
    maps = backbone(x_BCHW.contiguous(memory_format=torch.channels_last))
    return [m.permute(0, 2, 3, 1).contiguous() for m in maps]


def as_stored(m_BhwC: Tensor, feature_dtype: str) -> Tensor:
    """Features rounded as ``data.feature_dtype`` stores them.

    Raises:
        SSNError: they exceed its range.
    """
    rounded = m_BhwC.to(_TORCH_DTYPE[feature_dtype])
    if feature_dtype == "fp16" and not torch.isfinite(rounded).all():
        raise SSNError(
            "backbone features exceed float16's range; use --set data.feature_dtype=fp32, or bf16 at half its size"
        )
    return rounded


def _to_stored(m_BhwC: Tensor) -> np.ndarray:
    m_BhwC = m_BhwC.cpu()
    array: np.ndarray = (m_BhwC.view(torch.uint16) if m_BhwC.dtype == torch.bfloat16 else m_BhwC).numpy()
    return array


def _from_stored(m_BhwC: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(m_BhwC)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


class Progress:
    """Counts images over all splits and passes the count on."""

    def __init__(self, config: Config, info: CategoryInfo, on_progress: OnProgress | None) -> None:
        self._total = sum(num_images(config, info, name) for name in SEARCH_SPLITS)
        self._done = 0
        self._on_progress = on_progress

    def __call__(self, images: int) -> None:
        self._done += images
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)


def flip(x: Tensor, which: int) -> Tensor:
    """Flip the last two axes (height, width): 0 none, 1 horizontally, 2 vertically, 3 both."""
    axes = [axis for axis, bit in ((-1, 1), (-2, 2)) if which & bit]
    return x.flip(axes) if axes else x


def downsample_mask(mask_HW: np.ndarray, image_size: Size, target: Size) -> np.ndarray:
    """A bool mask at map size: nearest to the network's image size, then bilinear, then cut at 0.5 (design of both
    reference codes)."""
    at_image = torch.from_numpy(resize_mask(mask_HW, image_size)).float()[None, None]
    return (F.interpolate(at_image, size=target, mode="bilinear", align_corners=False)[0, 0] >= 0.5).numpy()


class TargetBuilder:
    """Collects everything of a split but its features.

    Args:
        config: Image and evaluation size, and whether the whole pool is read.
        info: How many images to expect.
        split: Which.
        map_size_HW: Of the anomaly map.
    """

    def __init__(self, config: Config, info: CategoryInfo, split: SearchSplit, map_size_HW: Size) -> None:
        self._config, self._map_size = config, map_size_HW
        self._num_images, self._num_flips = num_images(config, info, split), num_flips(config, split)
        self._scored = split == "validation"
        self._masks = np.zeros((self._num_images * self._num_flips, *map_size_HW), bool)
        self._eval_masks = np.zeros((self._num_images if self._scored else 0, *config.eval.size), bool)
        self._samples: list[tuple[str, int, bool, str]] = []

    def add(self, batch: Sequence[Sample]) -> None:
        """Take the next images.

        Raises:
            SSNError: there are more than the metadata says, or a mask cannot be decoded.
        """
        if len(self._samples) + len(batch) > self._num_images:
            raise SSNError(
                f"the shards of split {batch[0].split} hold more images than their metadata says; ingest again"
            )
        for sample in batch:
            if sample.mask is not None:
                image = len(self._samples)
                mask = decode_mask(sample.mask, source=sample.source_path)
                small = torch.from_numpy(downsample_mask(mask, self._config.data.image_size, self._map_size))
                for which in range(self._num_flips):
                    self._masks[image * self._num_flips + which] = flip(small, which).numpy()
                if self._scored:
                    self._eval_masks[image] = resize_mask(mask, self._config.eval.size)
            self._samples.append((sample.id, sample.label, sample.mask is not None, sample.defect_type))

    def build(self) -> dict[str, Any]:
        """The fields of :class:`SplitFeatures`.

        Raises:
            SSNError: there were fewer images than the metadata says.
        """
        if len(self._samples) != self._num_images:
            raise SSNError("the shards hold fewer images than their metadata says; ingest again")
        ids, labels, has_mask, types = zip(*self._samples, strict=True) if self._samples else ((), (), (), ())
        return {
            "masks_VHW": self._masks,
            "eval_masks_N": self._eval_masks,
            "labels_N": np.array(labels, np.int64),
            "has_mask_N": np.array(has_mask, bool),
            "defect_types": tuple(types),
            "ids": tuple(ids),
            "num_flips": self._num_flips,
        }
