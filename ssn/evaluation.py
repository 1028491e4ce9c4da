"""Scoring a split with a finished model: metrics, and the cases worth looking at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ssn.data.preprocess import decode_image, decode_mask, resize_mask
from ssn.data.records import Sample
from ssn.engine import evaluation_maps
from ssn.errors import SSNError
from ssn.features import load_image_batches
from ssn.metrics import Metrics, image_metrics, pixel_metrics
from ssn.predictor import Predictor
from ssn.visualize import Case


@dataclass(frozen=True)
class Evaluation:
    """Scores and metrics of one split, in the order it was streamed."""

    metrics: Metrics
    ids: tuple[str, ...]
    source_paths: tuple[str, ...]
    labels: np.ndarray
    scores: np.ndarray
    maps: np.ndarray
    """float32 [N, height, width] at ``eval.size``."""
    masks: tuple[np.ndarray | None, ...]
    """Bool [height, width] at ``eval.size``; None: no mask."""
    images: tuple[np.ndarray, ...]
    """uint8 [height, width, 3] at ``eval.size``; empty unless they were asked for."""

    @property
    def num_masks(self) -> int:
        """Defective images with a mask."""
        return sum(mask is not None for mask in self.masks)

    def cases(self) -> list[Case]:
        """Every image as something to draw.

        Raises:
            ValueError: the images were not kept.
        """
        if len(self.images) != len(self.ids):
            raise ValueError("evaluate with keep_images=True to draw cases")
        return [
            Case(
                image_HW3=self.images[i],
                map_HW=self.maps[i],
                score=float(self.scores[i]),
                label=int(self.labels[i]),
                mask_HW=self.masks[i],
                title=self.source_paths[i],
            )
            for i in range(len(self.ids))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Metrics that are defined, why the others are not, and counts."""
        return {
            "metrics": dict(self.metrics.values),
            "undefined": dict(self.metrics.undefined),
            "num_images": len(self.ids),
            "num_defective": int(self.labels.sum()),
            "num_masks": self.num_masks,
        }


def evaluate_samples(
    predictor: Predictor,
    samples: Iterable[Sample],
    *,
    keep_images: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score a stream of labelled images.

    Args:
        predictor: The model.
        samples: One split's; maps at ``eval.size`` are kept for all of it.
        keep_images: Keep the images too, at ``eval.size``, for pictures.
        on_progress: Called with the number of images done.

    Raises:
        SSNError: there are no images, or one cannot be decoded.
    """
    config = predictor.config
    height, width = config.eval.size
    ids, paths, labels, scores, maps, masks, images = [], [], [], [], [], [], []
    for batch, x_BCHW in load_image_batches(samples, config):
        map_BHW, score_B = predictor.score_raw(x_BCHW)
        maps.append(evaluation_maps(map_BHW, config.data.image_size, config.eval.size).cpu().numpy())
        scores.extend(score_B.tolist())
        for sample in batch:
            ids.append(sample.id)
            paths.append(sample.source_path)
            labels.append(sample.label)
            mask = None if sample.mask is None else decode_mask(sample.mask, source=sample.source_path)
            masks.append(None if mask is None else resize_mask(mask, config.eval.size))
            if keep_images:
                picture = Image.fromarray(decode_image(sample.image, source=sample.source_path))
                images.append(np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)))
        if on_progress is not None:
            on_progress(len(ids))
    if not ids:
        raise SSNError("the split to evaluate has no images; choose another split or ingest more images")
    labels_N, maps_NHW = np.array(labels), np.concatenate(maps)
    # a defective image without a mask says nothing about its pixels
    known = [i for i in range(len(ids)) if labels[i] == 0 or masks[i] is not None]
    empty = np.zeros(config.eval.size, bool)
    pixels = pixel_metrics(
        [maps_NHW[i] for i in known],
        [empty if (mask := masks[i]) is None else mask for i in known] if any(m is not None for m in masks) else None,
        fpr_limit=config.eval.aupro_fpr_limit,
    )
    of_images = image_metrics(np.array(scores), labels_N)
    return Evaluation(
        metrics=Metrics(of_images.values | pixels.values, of_images.undefined | pixels.undefined),
        ids=tuple(ids),
        source_paths=tuple(paths),
        labels=labels_N,
        scores=np.array(scores),
        maps=maps_NHW,
        masks=tuple(masks),
        images=tuple(images),
    )
