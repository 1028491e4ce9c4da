"""Scoring a split with a finished model: metrics, and the cases worth looking at.

What has a value per pixel goes to temporary files as it comes, so that memory does not grow with the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ssn.data.preprocess import decode_image, decode_mask, resize_mask
from ssn.data.records import Sample
from ssn.engine import evaluation_maps
from ssn.errors import SSNError
from ssn.features import load_image_batches
from ssn.metrics import Metrics, bootstrap_intervals, image_metrics, pixel_metrics
from ssn.predictor import Predictor
from ssn.spool import Spool
from ssn.visualize import Case


@dataclass(frozen=True)
class Evaluation:
    """Scores and metrics of one split, in the order it was streamed.

    Maps, masks and images are mapped from temporary files, which are gone when nothing refers to them any more.
    """

    metrics: Metrics
    ids: tuple[str, ...]
    source_paths: tuple[str, ...]
    labels: np.ndarray
    scores: np.ndarray
    maps: np.ndarray
    """float32 [N, height, width] at ``eval.size``."""
    masks: tuple[np.ndarray | None, ...]
    """Bool [height, width] at ``eval.size``; None: no mask."""
    images: np.ndarray
    """uint8 [N, height, width, 3] at ``eval.size``; N is 0 unless they were asked for."""

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
        """Metrics that are defined, 95 % intervals of those of images, why others are undefined, and counts."""
        intervals = bootstrap_intervals(self.scores, self.labels, level=0.95)
        return {
            "metrics": dict(self.metrics.values),
            "intervals_95": {name: list(bounds) for name, bounds in intervals.items()},
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
        samples: One split's. Maps at ``eval.size`` take 4 bytes per pixel in a temporary file, masks 1.
        keep_images: Keep the images too, at ``eval.size``, for pictures: 3 bytes per pixel.
        on_progress: Called with the number of images done.

    Raises:
        SSNError: there are no images, one cannot be decoded, or the disk with the temporary files is full.
    """
    config = predictor.config
    height, width = config.eval.size
    ids, paths, labels, scores = [], [], [], []
    mask_at: list[int | None] = []  # each image's place among the masks
    with (
        Spool((height, width), np.float32) as maps,
        Spool((height, width), bool) as masks,
        Spool((height, width, 3), np.uint8) as images,
    ):
        for batch, x_BCHW in load_image_batches(samples, config):
            map_BHW, score_B = predictor.score_raw(x_BCHW)
            for map_HW in evaluation_maps(map_BHW, config.data.image_size, config.eval.size).cpu().numpy():
                maps.append(map_HW)
            scores.extend(score_B.tolist())
            for sample in batch:
                ids.append(sample.id)
                paths.append(sample.source_path)
                labels.append(sample.label)
                mask_at.append(None if sample.mask is None else len(masks))
                if sample.mask is not None:
                    mask_HW = decode_mask(sample.mask, source=sample.source_path)
                    masks.append(resize_mask(mask_HW, config.eval.size))
                if keep_images:
                    picture = Image.fromarray(decode_image(sample.image, source=sample.source_path))
                    images.append(np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)))
            if on_progress is not None:
                on_progress(len(ids))
        if not ids:
            raise SSNError("the split to evaluate has no images; choose another split or ingest more images")
        # a defective image without a mask says nothing about its pixels
        known = [i for i in range(len(ids)) if labels[i] == 0 or mask_at[i] is not None]
        pixels = pixel_metrics(
            _Selected(maps, known),
            _Selected(masks, [mask_at[i] for i in known]) if len(masks) else None,
            fpr_limit=config.eval.aupro_fpr_limit,
        )
        of_images = image_metrics(scores, labels)
        mapped_masks = masks.mapped()
        return Evaluation(
            metrics=Metrics(of_images.values | pixels.values, of_images.undefined | pixels.undefined),
            ids=tuple(ids),
            source_paths=tuple(paths),
            labels=np.array(labels),
            scores=np.array(scores),
            maps=maps.mapped(),
            masks=tuple(None if at is None else mapped_masks[at] for at in mask_at),
            images=images.mapped(),
        )


class _Selected(Sequence[np.ndarray]):
    """Some of a spool's arrays, read when they are asked for; zeros in the place of None."""

    def __init__(self, spool: Spool, index: Sequence[int | None]) -> None:
        self._spool, self._index = spool, index
        self._zeros = np.zeros_like(spool[0])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: Any) -> Any:
        at = self._index[position]
        return self._zeros if at is None else self._spool[at]
