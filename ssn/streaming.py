"""Features that do not fit into memory: images are kept instead, and the backbone runs on every batch.

Training computes the same numbers either way, because a streamed feature is rounded as a stored one would be; how much
memory there is changes how long a run takes and nothing else.

Shape suffixes: as in ``ssn.features``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ssn.backbone import Backbone, apply_calibration, load_backbone
from ssn.config import Config, Size
from ssn.data.preprocess import decode_image, preprocess
from ssn.data.reader import CategoryInfo, SearchData
from ssn.data.records import SEARCH_SPLITS, SearchSplit
from ssn.errors import SSNError
from ssn.features import (
    CategoryFeatures,
    OnProgress,
    Progress,
    SplitFeatures,
    TargetBuilder,
    as_stored,
    assemble,
    estimate_bytes,
    estimate_target_bytes,
    extract,
    flip,
    load_image_batches,
    measure_maps,
    num_images,
    place_backbone,
    run_backbone,
    stream_samples,
)
from ssn.model import map_size

OnNotice = Callable[[str], None]

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class HeldImages(Protocol):
    """The images of a split, in numpy arrays that processes can share."""

    @property
    def num_bytes(self) -> int:
        """Size in memory."""

    def load(self, image: int) -> Tensor:
        """One image as the backbone takes it, [3, height, width] float32."""


@dataclass(frozen=True)
class DecodedImages:
    """Images ready for the backbone.

    They are not kept as 8-bit pixels, a quarter of the size: rounding them after the resize would change what a run
    computes.
    """

    pixels_N3HW: np.ndarray
    """float32, resized and normalised."""

    @property
    def num_bytes(self) -> int:
        return self.pixels_N3HW.nbytes

    def load(self, image: int) -> Tensor:
        return torch.tensor(self.pixels_N3HW[image])  # a copy: the array may be read-only


@dataclass(frozen=True)
class EncodedImages:
    """Image files, decoded whenever they are needed."""

    data: np.ndarray
    """uint8, all files one after the other."""
    ends_N: np.ndarray
    """int64, where each ends."""
    names: tuple[str, ...]
    """For errors."""
    image_size: Size
    antialias: bool

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    def load(self, image: int) -> Tensor:
        start = self.ends_N[image - 1] if image else 0
        pixels = decode_image(self.data[start : self.ends_N[image]].tobytes(), source=self.names[image])
        return preprocess(pixels, self.image_size, antialias=self.antialias)


@dataclass(frozen=True)
class StreamedSplit(SplitFeatures):
    """A split whose features are computed whenever they are needed."""

    images: HeldImages
    feature_dtype: str
    backbone: Backbone | None = None
    """None until :meth:`with_backbone`, so that what processes share is arrays alone."""

    streamed: ClassVar[bool] = True

    def gather(self, views_B: np.ndarray, device: torch.device) -> list[Tensor]:
        if self.backbone is None:
            raise RuntimeError("streamed features have no backbone yet; call with_backbone first")
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
            x_BCHW = torch.stack(list(pool.map(self._load_view, views_B.tolist()))).to(device)
        return [as_stored(m, self.feature_dtype) for m in run_backbone(self.backbone, x_BCHW)]

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.images.num_bytes

    def with_backbone(self, backbone: Backbone) -> StreamedSplit:
        return replace(self, backbone=backbone)

    def _load_view(self, view: int) -> Tensor:
        return flip(self.images.load(view // self.num_flips), view % self.num_flips)


def prepare_features(
    config: Config,
    data: SearchData,
    backbone: Backbone,
    *,
    budget_bytes: int,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> CategoryFeatures:
    """A category's features, or its images if the features exceed the budget.

    Args:
        config: See :func:`ssn.features.extract`.
        data: The search splits.
        backbone: From :func:`ssn.features.prepare_backbone`; moved to ``device``.
        budget_bytes: Most memory the result may take.
        device: Where the backbone runs.
        on_progress: Called with images done and images in all.
        on_notice: Called with one line that says so if features do not fit.

    Returns:
        Ready for training once :meth:`~ssn.features.CategoryFeatures.with_backbone` was called.

    Raises:
        SSNError: as ``extract``; also if not even the images fit.
    """
    needed = estimate_bytes(config, data.info, feature_sizes(config, backbone, device))
    if needed <= budget_bytes:
        return extract(config, data, backbone, device=device, on_progress=on_progress)
    if on_notice is not None:
        on_notice(
            f"the features of {_name(data.info)} take {format_bytes(needed)}, more than the "
            f"{format_bytes(budget_bytes)} there is for them; its images are kept instead and the backbone runs on "
            "every batch, which is slower and computes the same"
        )
    return hold_images(config, data, backbone, budget_bytes=budget_bytes, device=device, on_progress=on_progress)


def hold_images(
    config: Config,
    data: SearchData,
    backbone: Backbone,
    *,
    budget_bytes: int,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> CategoryFeatures:
    """Streamed features: a category's images, decoded if that fits the budget and as files if not.

    Args:
        config, data, backbone, budget_bytes, device, on_progress: See :func:`prepare_features`.

    Raises:
        SSNError: not even the files fit, a split needed for training is empty, or an image cannot be decoded.
    """
    map_size_HW = map_size([size for _, size in feature_sizes(config, backbone, device)])
    height, width = config.data.image_size
    left = budget_bytes - estimate_target_bytes(config, data.info, map_size_HW)
    decoded = sum(num_images(config, data.info, name) for name in SEARCH_SPLITS) * 3 * height * width * 4 <= left
    advance = Progress(config, data.info, on_progress)

    def decode(split: SearchSplit, targets: TargetBuilder) -> HeldImages:
        pixels = np.empty((num_images(config, data.info, split), 3, height, width), np.float32)
        filled = 0
        for batch, x_BCHW in load_image_batches(stream_samples(config, data, split), config):
            targets.add(batch)
            pixels[filled : filled + len(batch)] = x_BCHW.numpy()
            filled += len(batch)
            advance(len(batch))
        return DecodedImages(pixels)

    def keep_files(split: SearchSplit, targets: TargetBuilder) -> HeldImages:
        nonlocal left
        files, ends, names = bytearray(), [], []
        for sample in stream_samples(config, data, split):
            targets.add([sample])
            left -= len(sample.image)
            if left < 0:
                raise SSNError(
                    f"neither the features nor the image files of {_name(data.info)} fit into the "
                    f"{format_bytes(budget_bytes)} there is for them; give more memory or use smaller images"
                )
            files += sample.image
            ends.append(len(files))
            names.append(sample.source_path)
            advance(1)
        return EncodedImages(
            data=np.frombuffer(files, np.uint8),
            ends_N=np.array(ends, np.int64),
            names=tuple(names),
            image_size=config.data.image_size,
            antialias=bool(config.resolved().data.antialias),
        )

    def run(split: SearchSplit) -> StreamedSplit:
        targets = TargetBuilder(config, data.info, split, map_size_HW)
        images = decode(split, targets) if decoded else keep_files(split, targets)
        return StreamedSplit(**targets.build(), images=images, feature_dtype=config.data.feature_dtype)

    return assemble(config, data, backbone, run)


def feature_sizes(config: Config, backbone: Backbone, device: torch.device | str) -> Sequence[tuple[int, Size]]:
    """Channels and (height, width) of each layer's maps, finest first; moves the backbone to ``device``."""
    return measure_maps(place_backbone(backbone, device), config.data.image_size, device)


def reload_backbone(config: Config, features: CategoryFeatures) -> Backbone:
    """The backbone that streamed features are for, in a process that did not make them.

    Raises:
        SSNError: see ``ssn.backbone.load_backbone``.
    """
    backbone = load_backbone(config.model)
    apply_calibration(backbone, features.calibration())
    return backbone


def default_budget_bytes() -> int:
    """Half of the machine's memory, or of what a container may use of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(_CGROUP_LIMIT.read_text())
    except (OSError, ValueError):  # no control groups, or no limit
        limit = total
    return min(total, limit) // 2


def format_bytes(count: int) -> str:
    """A size for people: ``3.2 GB``, ``48.5 MB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _name(info: CategoryInfo) -> str:
    return f"{info.dataset}/{info.category}"
