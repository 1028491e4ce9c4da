"""One trial: a plain dictionary in, a trained and validated model out. Nothing here can reach a test split."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssn.backbone import Backbone
from ssn.config import unflatten
from ssn.data.reader import CategoryInfo, SearchData
from ssn.distributed import ALONE, Workers
from ssn.engine import EpochReport, choose_supervision, fit
from ssn.errors import SSNError
from ssn.features import CategoryFeatures, prepare_backbone
from ssn.streaming import prepare_features
from tuning.search.costs import measure_excess
from tuning.search.rungs import Rungs
from tuning.settings import ObjectiveSettings

MEAN_METRIC = "mean(image_auroc, pixel_ap)"

CHECKPOINT_PERIOD_S = 300.0
"""A trial that dies loses no more than this, and an epoch, however far apart its rungs are."""

ReportResult = Callable[[dict[str, Any], Callable[[Path], None] | None], None]
"""Takes a result and, at the epochs whose checkpoint must be kept, a way to write it."""


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a category share; it crosses into Ray as it is."""

    data: SearchData
    objective: ObjectiveSettings | None
    """None: trials are not ranked, as in a benchmark, whose data may have no validation split."""
    rungs: Rungs | None
    """When trials are compared, before their last epoch; None: never."""

    def rung_epochs(self, epochs: int) -> tuple[int, ...]:
        """Epochs at which a trial of so many is compared with others, before the last."""
        return () if self.rungs is None else self.rungs.epochs(epochs)


def masks_available(info: CategoryInfo) -> bool:
    """Whether the validation split has masks to compute pixel metrics with."""
    return info.counts["validation"].masks > 0


def check_protocol(info: CategoryInfo) -> None:
    """Refuse to search on data without a split to search on.

    Raises:
        SSNError: the data has its published split, in which every image is for training or for the test.
    """
    if info.protocol == "official":
        raise SSNError(
            f"{info.dataset}/{info.category} was ingested with --protocol official, which leaves no validation images "
            "to search on; ingest it without, or score fixed settings (tuning benchmark)"
        )


def check_objective(objective: ObjectiveSettings, info: CategoryInfo) -> None:
    """Refuse a category whose validation split cannot rank trials.

    Raises:
        SSNError: naming the category and what it lacks.
    """
    counts, name = info.counts["validation"], f"{info.dataset}/{info.category}"
    if counts.normal == 0 or counts.defective == 0:
        missing = "normal" if counts.normal == 0 else "defective"
        raise SSNError(
            f"{name} has no {missing} validation images, so no metric can rank trials; add some and ingest again, or "
            "train with fixed settings (ssn train)"
        )
    if objective.metric in ("pixel_ap", "aupro") and not masks_available(info):
        raise SSNError(
            f"{name} has no validation masks, so objective.metric {objective.metric} is undefined; "
            f"use {MEAN_METRIC!r} or image_auroc"
        )


def compute_objective(
    settings: ObjectiveSettings, metrics: Mapping[str, float], *, has_masks: bool, masks_used: int
) -> float:
    """The number a search maximises, of validation metrics alone.

    Args:
        settings: Which metric, and the price of a mask.
        metrics: ``val_<metric>``.
        has_masks: Whether pixel metrics exist; without masks the mean is image AUROC alone.
        masks_used: Masks that the trial trained on.
    """
    if settings.metric == MEAN_METRIC:
        value = metrics["val_image_auroc"]
        if has_masks:
            value = (value + metrics["val_pixel_ap"]) / 2
    else:
        value = metrics[f"val_{settings.metric}"]
    return value - settings.cost_per_mask * masks_used


def build_features(
    flat_config: Mapping[str, Any],
    data: SearchData,
    *,
    device: str,
    budget_bytes: int,
    alive: Callable[[], None],
) -> CategoryFeatures:
    """Compute a category's features in this process, or hold its images if the features exceed the budget."""
    config = unflatten(flat_config)
    backbone: Backbone = prepare_backbone(config, data)
    alive()
    return prepare_features(
        config, data, backbone, budget_bytes=budget_bytes, device=device, on_progress=lambda done, total: alive()
    )


def run_trial(
    trial: Mapping[str, Any],
    context: TrialContext,
    features: CategoryFeatures,
    *,
    report: ReportResult,
    resume_from: Path | None,
    device: str,
    latency_ms: float | None = None,
    workers: Workers = ALONE,
) -> None:
    """Train one configuration and report every epoch.

    Args:
        trial: ``{"trial_key", "category", "index", "config"}``.
        context: Of its category.
        features: Of its category, ready for training.
        report: Takes ``epoch``, ``category``, ``hostname``, ``feature_source`` (``cached`` or ``streamed``),
            ``masks_used`` and ``weak_labels_used`` (defective images trained on with and without their masks),
            ``latency_ms`` if it is known, ``excess_<bound>`` for each bound of the objective, metrics and, at rungs and
            at the end, ``objective`` where the context has one.
        resume_from: Checkpoint folder of an earlier attempt.
        device: Where to train.
        latency_ms: Of its network, for one image; None: not measured.
        workers: Those who train the trial together; each calls this.

    Raises:
        SSNError: training diverged.
    """
    config = unflatten(trial["config"])
    has_masks = masks_available(context.data.info)
    supervision = choose_supervision(config, features.pool)
    masks_used = len(supervision.used)
    saved_s = time.monotonic()
    costs: dict[str, Any] = {"masks_used": masks_used, "weak_labels_used": len(supervision.weak)}
    if latency_ms is not None:
        costs["latency_ms"] = latency_ms
    if context.objective is not None:
        costs |= measure_excess(context.objective, costs)
    rung_epochs = context.rung_epochs(config.train.epochs)

    def on_epoch(epoch: EpochReport, save: Callable[..., None]) -> None:
        nonlocal saved_s
        result: dict[str, Any] = {
            "epoch": epoch.epoch,
            "category": trial["category"],
            **costs,
            "hostname": os.uname().nodename,
            "feature_source": features.source,
            **epoch.metrics,
        }
        last = epoch.epoch == config.train.epochs
        if last or epoch.epoch in rung_epochs:
            if context.objective is not None:
                objective = compute_objective(
                    context.objective, epoch.metrics, has_masks=has_masks, masks_used=masks_used
                )
                result["objective"] = objective if math.isfinite(objective) else math.nan
        elif time.monotonic() - saved_s < CHECKPOINT_PERIOD_S:
            report(result, None)
            return
        # nobody resumes a finished trial; what it leaves is its model
        report(result, functools.partial(save, resumable=not last))
        saved_s = time.monotonic()

    fit(
        config,
        features,
        report=on_epoch,
        resume_from=resume_from,
        pixel_epochs=rung_epochs,
        device=device,
        workers=workers,
    )


def use_threads(cpus: float) -> None:
    """Let torch use the CPUs that Ray gave this process; it would take all of the node's otherwise."""
    torch.set_num_threads(max(1, round(cpus)))
