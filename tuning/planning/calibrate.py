"""How long and how much memory a trial takes on this machine: a few images' features and a few steps at real shapes."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ssn.config import Config, Size
from ssn.data.reader import SearchData, SplitCount
from ssn.data.records import SEARCH_SPLITS, Sample, SearchSplit
from ssn.engine import Trainer
from ssn.features import extract, num_views, prepare_backbone
from tuning.execution.objective import use_threads
from tuning.tracking.environment import hardware_tags

NUM_IMAGES: Mapping[SearchSplit, int] = {"train": 8, "pool": 4, "validation": 8}
NUM_STEPS = 2
"""Timed, after one that is not."""
SCANNED_IMAGES = 256
"""Of a split, among which the few are looked for; large splits are not read to their end."""
CUDA_CONTEXT_BYTES = 500_000_000
"""About what a process takes of a GPU before its first tensor."""

Shape = tuple[str, tuple[int, ...], Size]
"""Backbone, layers and image size: what decides about a trial's speed more than anything else that is searched."""


@dataclass(frozen=True)
class Timing:
    """Seconds at one shape."""

    feature_s: float
    """Per view (an image under one flip): reading, decoding and the backbone."""
    draw_s: float
    """Per image of a training step, on stored features."""
    validate_s: float
    """Per validation image and epoch."""
    pixel_s: float
    """Per validation image more where pixel metrics are computed, at rungs and at the end."""


@dataclass(frozen=True)
class Calibration:
    """What was measured."""

    category: str
    timings: Mapping[Shape, Timing]
    peak_memory_bytes: int
    """Of a process that has computed features and trained at every shape."""
    peak_gpu_bytes: int
    """Likewise on its GPU, context included; 0 without one."""
    gpu_memory_bytes: int
    """Of the whole GPU."""
    device: str
    hardware: str
    duration_s: float


def shape_of(config: Config) -> Shape:
    """What a configuration is timed by."""
    return config.model.backbone, config.model.layers, config.data.image_size


def calibrate(configs: Sequence[Config], data: SearchData, *, device: str, cpus: float) -> Calibration:
    """Time every shape among some configurations; of each shape the first one stands for all.

    The backbone's weights are random ones, which compute as fast as any and need no download.

    Args:
        configs: As trials may have them.
        data: Of one category.
        device: Where trials run.
        cpus: Of a trial.

    Raises:
        SSNError: an image cannot be read, or a backbone cannot be built.
    """
    use_threads(cpus)
    start, timings = time.perf_counter(), {}
    _forget_peak()
    few = _FewImages(data)
    for config in configs:
        if shape_of(config) not in timings:
            timings[shape_of(config)] = _time(few.adapt(config), few, device)
    on_gpu = torch.device(device).type == "cuda"
    tags = hardware_tags()
    return Calibration(
        category=data.info.category,
        timings=timings,
        peak_memory_bytes=_peak_bytes(),
        peak_gpu_bytes=torch.cuda.max_memory_reserved() + CUDA_CONTEXT_BYTES if on_gpu else 0,
        gpu_memory_bytes=torch.cuda.mem_get_info()[1] if on_gpu else 0,
        device=device,
        hardware=tags["hardware_gpus"]
        if on_gpu
        else f"{tags['hardware_cpu']}, {cpus:g} of {tags['hardware_cores']} cores",
        duration_s=time.perf_counter() - start,
    )


class _FewImages(SearchData):
    """The first few images of a category, of both labels where there are any."""

    def __init__(self, data: SearchData) -> None:
        self._held = {split: _choose(data, split) for split in SEARCH_SPLITS}
        counts = dict(data.info.counts)
        counts.update({split: _count(samples) for split, samples in self._held.items()})
        super().__init__(replace(data.info, counts=counts), {})

    def stream(self, split: SearchSplit, *, rank: int = 0, world_size: int = 1) -> Iterator[Sample]:
        return iter(self._held[split][rank::world_size])

    def adapt(self, config: Config) -> Config:
        """The configuration, with one step an epoch, supervised where there are masks."""
        train = replace(
            config.train,
            epochs=1 + NUM_STEPS,
            draws_per_epoch=config.train.batch_size,
            sampling="balanced",
            supervision_ratio=1.0 if self.info.counts["pool"].masks else 0.0,
            weak_labels="drop",
        )
        return replace(config, train=train, model=replace(config.model, weights="random")).resolved()


def _choose(data: SearchData, split: SearchSplit) -> list[Sample]:
    scanned = list(itertools.islice(data.stream(split), SCANNED_IMAGES))
    limit = NUM_IMAGES[split]
    if split == "pool":
        return [sample for sample in scanned if sample.mask is not None][:limit]
    normal, defective = ([s for s in scanned if s.label == label] for label in (0, 1))
    return [*normal[: max(limit // 2, limit - len(defective))], *defective[: limit // 2]]


def _count(samples: Sequence[Sample]) -> SplitCount:
    defective = [sample for sample in samples if sample.label == 1]
    return SplitCount(len(samples) - len(defective), len(defective), sum(s.mask is not None for s in defective))


def _time(config: Config, few: SearchData, device: str) -> Timing:
    backbone = prepare_backbone(config, few)
    with _Watch(device) as extraction:
        features = extract(config, few, backbone, device=device)
    views = num_views(config, few.info)
    trainer = Trainer(config, features, device=device)
    trainer.run_epoch()
    with _Watch(device) as steps:
        for _ in range(NUM_STEPS):
            trainer.run_epoch()
    trainer.validate(pixel=False)
    with _Watch(device) as images:
        trainer.validate(pixel=False)
    with _Watch(device) as pixels:
        trainer.validate(pixel=True)
    scored = len(features.validation.ids)
    return Timing(
        feature_s=extraction.seconds / views,
        draw_s=steps.seconds / (NUM_STEPS * config.train.batch_size),
        validate_s=images.seconds / scored,
        pixel_s=max(0.0, pixels.seconds - images.seconds) / scored,
    )


class _Watch:
    """Takes the time of what is inside, the GPU's work included."""

    seconds = 0.0

    def __init__(self, device: str) -> None:
        self._wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None

    def __enter__(self) -> _Watch:
        self._wait()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._start


def _forget_peak() -> None:
    """Let the kernel's record of this process's memory start at what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """The most memory that this process has held; what a process inherits from its parent's record is not in it."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "Linux says so for every process"
    return int(found[1]) * 1024
