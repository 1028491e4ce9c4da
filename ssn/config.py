"""Every setting of a training run, as frozen dataclasses.

The flattened dotted names (``train.epochs``, ``synthesis.noise_sigma``) are the command line's ``--set`` keys, the
MLflow parameters and the keys of a search space. This module depends on the standard library alone, so that the model
runs where no validation library is installed; files and ``--set`` options are parsed and checked by ``ssn.loader``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ssn.errors import SSNError

# Raised whenever the same configuration, data and seeds would train to different numbers than before; part of every
# trial's identity, so that old results are never mistaken for new ones.
NUMERICS_VERSION = 3

Variant = Literal["icpr", "jims"]
Size = tuple[int, int]


@dataclass(frozen=True)
class ModelConfig:
    """The network (ICPR 2024, section 3; JIMS 2025, section 3)."""

    variant: Variant = "icpr"
    """``icpr``: the classification head sees adapted features; ``jims``: raw pooled features."""
    backbone: str = "wide_resnet50_2.tv_in1k"
    """Name of any timm model that supports ``features_only``."""
    weights: str = "timm"
    """``timm`` (the hub), ``random`` (seeded and calibrated), or the path or URI of a safetensors file."""
    layers: tuple[int, ...] = (2, 3)
    """timm ``out_indices`` of the feature maps used, finest first."""
    align_corners: bool | None = None
    """How feature maps are upsampled; None: as the variant's reference code (icpr true, jims false)."""
    seg_channels: int = 1024
    """Hidden channels of the segmentation head."""
    cls_channels: int = 128
    """Hidden channels of the classification head."""


@dataclass(frozen=True)
class DataConfig:
    """Preprocessing."""

    image_size: Size = (256, 256)
    """Height and width, in pixels, that images are resized to."""
    antialias: bool | None = None
    """Whether the bilinear resize filters first; None: as the variant's reference code (icpr false, jims true)."""
    feature_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """How backbone features are stored and so rounded; bf16 is coarser than fp16 and has fp32's range. Arithmetic is
    float32 in any case."""


@dataclass(frozen=True)
class SynthesisConfig:
    """Synthetic anomalies on features (ICPR 2024, section 3.3)."""

    noise_sigma: float = 0.015
    """Standard deviation of the Gaussian feature noise; 0.015 is tuned to WideResNet50's V1 weights."""
    perlin_threshold: float = 0.2
    """Perlin noise above it becomes anomalous; in [0, 1)."""
    perlin_rescale_empty: bool | None = None
    """Stretch noise that nowhere exceeds the threshold to [-1, 1]; None: as the variant (icpr false, jims true)."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, supervision and seeds (ICPR 2024, section 4.2)."""

    epochs: int = 300
    batch_size: int = 32
    """Images per optimiser step before features are duplicated."""
    lr_adaptor: float = 1e-4
    lr_heads: float = 2e-4
    weight_decay_adaptor: float = 1e-2
    weight_decay_heads: float = 1e-5
    lr_gamma: float = 0.4
    """Factor on both learning rates after 80 % and after 90 % of the epochs."""
    grad_clip_norm: float = 1.0
    """Largest gradient norm in supervised training; unsupervised training does not clip."""
    truncation: float = 0.5
    """Where the truncated L1 loss on the map is cut off."""
    focal_gamma: float = 4.0
    supervision_ratio: float = 0.0
    """Share, in [0, 1], of the defective training images with a mask whose masks are used."""
    weak_labels: Literal["drop", "use"] = "drop"
    """What happens to the defective training images whose masks are not used, or that have none: ``drop`` leaves them
    out, ``use`` trains on their label alone (JIMS 2025)."""
    flip_defects: bool = True
    """Whether defective training images are shown flipped too: horizontally, vertically and both. Without, their
    features take a quarter of the time and memory; better where flipped defects do not occur, or in short training."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of every matrix product with a weight but the noise's; bf16 is faster where the processor has bf16
    units, and changes gradients by some percent of their norm."""
    noise_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the synthetic noise's matrix products; bf16 is faster where the processor has bf16 units."""
    compile: bool = False
    """Whether ``torch.compile`` makes one kernel of the backward pass's elementwise arithmetic. It needs a C++ compiler
    (on GPUs, Triton), takes some seconds of a process's first step, and gains most where memory is slow."""
    sampling: Literal["balanced", "official"] = "balanced"
    """What an epoch is. ``balanced``: ``draws_per_epoch`` images, half of them defective where any is used.
    ``official``: what it is in the papers' code, every normal image once or, where defective images are used, each of
    them under each of its flips and as many normal images."""
    draws_per_epoch: int | None = None
    """Images drawn per epoch of ``balanced`` sampling; None: max(normals, 8 x defective images with a mask), which is
    the same for every ``supervision_ratio`` and ``weak_labels``."""
    label_seed: int = 0
    """Which defective images are the first to be used as ``supervision_ratio`` grows."""
    train_seed: int = 0
    """Initialisation, draws, masks and noise."""


@dataclass(frozen=True)
class EvalConfig:
    """How maps become metrics."""

    size: Size = (256, 256)
    """Height and width at which pixel metrics are computed, whatever ``data.image_size``, so that trials compare."""
    aupro_fpr_limit: float = 0.3
    batch_size: int = 16
    every_n_epochs: int = 1
    """How often training looks at the validation split; after the last epoch, and where a sweep compares trials, it
    always does. With few images an epoch, looking takes longer than training."""


@dataclass(frozen=True)
class Config:
    """Everything that determines what a training run computes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check = _Checker()
        m, d, s, t, e = self.model, self.data, self.synthesis, self.train, self.eval
        check("model.variant", m.variant in ("icpr", "jims"), m.variant, "icpr or jims")
        check(
            "model.layers",
            len(m.layers) > 0 and list(m.layers) == sorted(set(m.layers)),
            m.layers,
            "increasing indices",
        )
        check("model.seg_channels", m.seg_channels >= 1, m.seg_channels, "at least 1")
        check("model.cls_channels", m.cls_channels >= 1, m.cls_channels, "at least 1")
        check("data.image_size", min(d.image_size) >= 16, d.image_size, "at least 16 pixels a side")
        check("data.feature_dtype", d.feature_dtype in ("fp16", "bf16", "fp32"), d.feature_dtype, "fp16, bf16 or fp32")
        check("train.precision", t.precision in ("fp32", "bf16"), t.precision, "fp32 or bf16")
        check("train.noise_precision", t.noise_precision in ("fp32", "bf16"), t.noise_precision, "fp32 or bf16")
        check("eval.size", min(e.size) >= 16, e.size, "at least 16 pixels a side")
        check("eval.batch_size", e.batch_size >= 1, e.batch_size, "at least 1")
        check("eval.every_n_epochs", e.every_n_epochs >= 1, e.every_n_epochs, "at least 1")
        check("eval.aupro_fpr_limit", 0 < e.aupro_fpr_limit <= 1, e.aupro_fpr_limit, "in (0, 1]")
        check("synthesis.noise_sigma", 0 < s.noise_sigma <= 10, s.noise_sigma, "in (0, 10]")
        check("synthesis.perlin_threshold", 0 <= s.perlin_threshold < 1, s.perlin_threshold, "in [0, 1)")
        check("train.epochs", t.epochs >= 1, t.epochs, "at least 1")
        check("train.batch_size", t.batch_size >= 1, t.batch_size, "at least 1")
        check("train.supervision_ratio", 0 <= t.supervision_ratio <= 1, t.supervision_ratio, "in [0, 1]")
        check("train.weak_labels", t.weak_labels in ("drop", "use"), t.weak_labels, "drop or use")
        check("train.sampling", t.sampling in ("balanced", "official"), t.sampling, "balanced or official")
        check("train.lr_adaptor", t.lr_adaptor > 0, t.lr_adaptor, "positive")
        check("train.lr_heads", t.lr_heads > 0, t.lr_heads, "positive")
        check("train.grad_clip_norm", t.grad_clip_norm > 0, t.grad_clip_norm, "positive")
        check("train.truncation", t.truncation > 0, t.truncation, "positive")
        check("train.focal_gamma", t.focal_gamma >= 0, t.focal_gamma, "at least 0")
        check("train.draws_per_epoch", t.draws_per_epoch is None or t.draws_per_epoch >= 1, t.draws_per_epoch, ">= 1")
        fixed = t.sampling == "official" and t.draws_per_epoch is not None
        check("train.draws_per_epoch", not fixed, t.draws_per_epoch, "null with train.sampling=official")

    def resolved(self) -> Config:
        """This configuration with every variant-dependent None filled in; its hash is the canonical one."""
        icpr = self.model.variant == "icpr"

        def pick(value: bool | None, default: bool) -> bool:
            return default if value is None else value

        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, align_corners=pick(self.model.align_corners, icpr)),
            data=dataclasses.replace(self.data, antialias=pick(self.data.antialias, not icpr)),
            synthesis=dataclasses.replace(
                self.synthesis, perlin_rescale_empty=pick(self.synthesis.perlin_rescale_empty, not icpr)
            ),
        )


class _Checker:
    def __call__(self, key: str, ok: bool, value: object, allowed: str) -> None:
        if not ok:
            raise SSNError(f"{key} is {value!r}, but must be {allowed}")


def flatten(config: Any) -> dict[str, Any]:
    """Dotted keys of a configuration in declaration order; tuples become lists, so that the result is plain JSON."""

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for f in dataclasses.fields(value):
                walk(f"{prefix}.{f.name}" if prefix else f.name, getattr(value, f.name))
        else:
            flat[prefix] = list(value) if isinstance(value, tuple) else value

    flat: dict[str, Any] = {}
    walk("", config)
    return flat


def unflatten(flat: Mapping[str, Any]) -> Config:
    """The inverse of :func:`flatten` for a :class:`Config`.

    Raises:
        SSNError: a key is unknown or a value out of range.
    """
    sections: dict[str, dict[str, Any]] = {f.name: {} for f in dataclasses.fields(Config)}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        if section not in sections or not name:
            raise SSNError(f"unknown config key {key!r}; sections are {', '.join(sections)}")
        sections[section][name] = tuple(value) if isinstance(value, list) else value
    defaults = Config()
    built = {}
    for name, values in sections.items():
        section_default = getattr(defaults, name)
        unknown = set(values) - {f.name for f in dataclasses.fields(section_default)}
        if unknown:
            raise SSNError(f"unknown config key {name}.{sorted(unknown)[0]}")
        built[name] = dataclasses.replace(section_default, **values)
    return Config(**built)


def digest(value: Any) -> str:
    """SHA-256, in hex, of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def trial_identity(config: Config, *, search_fingerprint: str, weights_digest: str, split_seed: int) -> str:
    """Identity of a training run: two runs with the same identity compute the same thing.

    Args:
        config: Settings, label and train seeds included.
        search_fingerprint: Of the train, pool and validation samples (see ``ssn.data.splits``).
        weights_digest: SHA-256 of the backbone's weights.
        split_seed: Seed of the split assignment.
    """
    return digest(
        {
            "config": flatten(config.resolved()),
            "search_fingerprint": search_fingerprint,
            "weights_digest": weights_digest,
            "split_seed": split_seed,
            "numerics_version": NUMERICS_VERSION,
        }
    )
