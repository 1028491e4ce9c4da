"""Train, evaluate and predict on one machine, without Ray: what the ``ssn`` command line calls."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssn.backbone import Backbone, apply_calibration, load_backbone
from ssn.bundle import write_bundle
from ssn.checkpoint import META_FILE, load_checkpoint
from ssn.config import Config
from ssn.data.preprocess import decode_image
from ssn.data.reader import SearchData, open_search_data, open_test_data
from ssn.data.records import SEARCH_SPLITS
from ssn.data.storage import resolve_uri
from ssn.engine import EpochReport, fit, missing_labels
from ssn.errors import SSNError
from ssn.evaluation import evaluate_samples
from ssn.feature_cache import FeatureCache
from ssn.features import CategoryFeatures, MapStorage, calibrate_random, estimate_bytes, extract, feature_key
from ssn.inference import Precision
from ssn.predictor import Predictor, find_images
from ssn.streaming import OnNotice, default_budget_bytes, feature_sizes, format_bytes, prepare_features
from ssn.visualize import save_overlay

OnProgress = Callable[[str, int, int], None]


def train(
    config: Config,
    *,
    data_uri: str,
    dataset: str,
    category: str,
    out: Path,
    device: str = "cpu",
    cache: FeatureCache | None = None,
    memory_bytes: int | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> dict[str, Any]:
    """Train one model with fixed settings and write it to ``out`` with its backbone.

    Args:
        config: Settings.
        data_uri: Where the shards are.
        dataset: Whose.
        category: The one to train on.
        out: Folder of the model.
        device: Where backbone and heads run.
        cache: Features on a disk, to be used and added to; None: features are computed and kept in memory.
        memory_bytes: Most memory for features; beyond it, images are kept and the backbone runs on every batch. None:
            half of the machine's. Features in ``cache`` are mapped from the disk and do not count.
        on_progress: Called with what is done, steps done and steps in all.
        on_notice: Called with one line when features do not fit where they were to go, or when the category lacks the
            labels that ``config`` asks for.

    Returns:
        The last epoch's losses and validation metrics, why others are undefined, where the model is, and whether it
        was trained on features that were ``cached`` or ``streamed``.

    Raises:
        SSNError: the data, the weights or ``out`` cannot be used; nothing is written then.
    """
    if out.exists() and not (out / META_FILE).exists() and (out.is_file() or any(out.iterdir())):
        raise SSNError(f"{out} exists and is not a model directory; choose another --out")
    data = open_search_data(data_uri, dataset, category)
    missing = missing_labels(config, data.info)
    if missing is not None and on_notice is not None:
        on_notice(missing)

    def features_progress(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(f"features of {category}", done, total)

    backbone, features = load_features(
        config,
        data,
        data_uri=data_uri,
        device=device,
        cache=cache,
        memory_bytes=default_budget_bytes() if memory_bytes is None else memory_bytes,
        on_progress=features_progress,
        on_notice=on_notice,
    )
    last: list[EpochReport] = []

    def report(epoch_report: EpochReport, save: Callable[[Path], None]) -> None:
        last[:] = [epoch_report]
        if on_progress is not None:
            on_progress(f"training {category}", epoch_report.epoch, config.train.epochs)

    trainer = fit(config, features, report=report, device=device)
    with tempfile.TemporaryDirectory(prefix="train-") as scratch:
        trainer.save(Path(scratch, "heads"), resumable=False)
        write_bundle(load_checkpoint(Path(scratch, "heads")), backbone, out)
    return {
        "model": str(out),
        "dataset": dataset,
        "category": category,
        "masks_used": len(trainer.supervision.used),
        "weak_labels_used": len(trainer.supervision.weak),
        "feature_source": features.source,
        "metrics": last[0].metrics,
        "undefined": last[0].undefined,
    }


def load_features(
    config: Config,
    data: SearchData,
    *,
    data_uri: str,
    device: str,
    cache: FeatureCache | None,
    memory_bytes: int,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: OnNotice | None = None,
) -> tuple[Backbone, CategoryFeatures]:
    """The backbone, and features ready for training: from the cache, computed into it, in memory, or streamed.

    Raises:
        SSNError: see :func:`ssn.streaming.prepare_features` and :class:`ssn.feature_cache.FeatureCache`.
    """
    backbone = load_backbone(config.model)
    key = feature_key(config, data.info, data_uri=resolve_uri(data_uri), weights_digest=backbone.digest, device=device)
    features = cache.load(key, data.info) if cache is not None else None
    if features is not None:
        apply_calibration(backbone, features.calibration())
        return backbone, features.with_backbone(backbone, device=device)
    calibrate_random(backbone, config, data)
    if cache is not None:
        needed = estimate_bytes(config, data.info, feature_sizes(config, backbone, device))
        if needed <= cache.budget_bytes:

            def compute(storage: MapStorage) -> CategoryFeatures:
                return extract(config, data, backbone, device=device, storage=storage, on_progress=on_progress)

            return backbone, cache.build(key, needed, data.info, compute)
        if on_notice is not None:
            on_notice(
                f"the features of {data.info.category} take {format_bytes(needed)}, more than the "
                f"{format_bytes(cache.budget_bytes)} of the cache {cache.folder}; they are not kept there"
            )
    features = prepare_features(
        config,
        data,
        backbone,
        budget_bytes=memory_bytes,
        device=device,
        on_progress=on_progress,
        on_notice=on_notice,
    )
    return backbone, features.with_backbone(backbone, device=device)


def evaluate(model_dir: Path, *, data_uri: str, split: str = "test", device: str = "cpu") -> dict[str, Any]:
    """Every metric of a model on a split of the category it was trained on.

    Raises:
        SSNError: the model or the data cannot be read, or the split is unknown or empty.
    """
    predictor = Predictor.from_directory(model_dir, device=device)
    dataset, category = predictor.meta["dataset"], predictor.meta["category"]
    if split == "test":
        samples = open_test_data(data_uri, dataset, category).stream()
    else:
        known = next((name for name in SEARCH_SPLITS if name == split), None)
        if known is None:
            raise SSNError(f"unknown split {split!r}; choose test, {', '.join(SEARCH_SPLITS)}")
        samples = open_search_data(data_uri, dataset, category).stream(known)
    evaluation = evaluate_samples(predictor, samples)
    return {"model": str(model_dir), "dataset": dataset, "category": category, "split": split, **evaluation.to_dict()}


def predict(
    model_dir: Path,
    inputs: Sequence[str],
    *,
    heatmaps: Path | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Score images.

    Args:
        model_dir: A trained model with its backbone.
        inputs: Images, folders and glob patterns.
        heatmaps: Folder for an overlay per image; None: none.
        device: Where to run.
        precision: See :data:`ssn.inference.Precision`.
        on_progress: Called with what is done, images done and images in all.

    Returns:
        Per image: ``path``, ``score`` (logit), ``map_max`` (the highest logit of its anomaly map) and, if asked for,
        ``heatmap``.
    """
    paths = find_images(inputs)
    predictor = Predictor.from_directory(model_dir, device=device, precision=precision)
    names = unique_names(paths)
    rows: list[dict[str, Any]] = []
    for path, name, prediction in zip(paths, names, predictor.predict(paths), strict=True):
        row = {"path": str(path), "score": prediction.score, "map_max": float(prediction.map_HW.max())}
        if heatmaps is not None:
            target = heatmaps / name
            save_overlay(target, decode_image(path.read_bytes(), source=str(path)), prediction.map_HW)
            row["heatmap"] = str(target)
        rows.append(row)
        if on_progress is not None:
            on_progress("predicting", len(rows), len(paths))
    return rows


def unique_names(paths: Sequence[Path]) -> list[Path]:
    """One PNG name per image, relative to the folder all images share, so that equal file names do not collide.

    Where two images differ in their suffix alone, all names keep theirs: ``a.jpg.png`` beside ``a.bmp.png``.
    """
    common = Path(os.path.commonpath([path.absolute().parent for path in paths])) if paths else Path()
    relative = [path.absolute().relative_to(common) for path in paths]
    names = [path.with_suffix(".png") for path in relative]
    if len(set(names)) < len(set(relative)):
        names = [path.with_name(f"{path.name}.png") for path in relative]
    return names
