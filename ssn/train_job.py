"""Train, evaluate and predict on one machine, without Ray: what the ``ssn`` command line calls."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssn.bundle import write_bundle
from ssn.checkpoint import META_FILE, load_checkpoint
from ssn.config import Config
from ssn.data.preprocess import decode_image
from ssn.data.reader import open_search_data, open_test_data
from ssn.data.records import SEARCH_SPLITS
from ssn.engine import EpochReport, fit
from ssn.errors import SSNError
from ssn.evaluation import evaluate_samples
from ssn.features import extract, prepare_backbone
from ssn.predictor import Predictor, find_images
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
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train one model with fixed settings and write it to ``out`` with its backbone.

    Returns:
        The last epoch's losses and validation metrics, why others are undefined, and where the model is.

    Raises:
        SSNError: the data, the weights or ``out`` cannot be used; nothing is written then.
    """
    if out.exists() and not (out / META_FILE).exists() and (out.is_file() or any(out.iterdir())):
        raise SSNError(f"{out} exists and is not a model directory; choose another --out")
    data = open_search_data(data_uri, dataset, category)
    backbone = prepare_backbone(config, data)

    def features_progress(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(f"features of {category}", done, total)

    features = extract(config, data, backbone, device=device, on_progress=features_progress)
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
        "metrics": last[0].metrics,
        "undefined": last[0].undefined,
    }


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
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Score images.

    Args:
        model_dir: A trained model with its backbone.
        inputs: Images, folders and glob patterns.
        heatmaps: Folder for an overlay per image; None: none.
        device: Where to run.
        on_progress: Called with what is done, images done and images in all.

    Returns:
        Per image: ``path``, ``score`` (logit), ``map_max`` (the highest logit of its anomaly map) and, if asked for,
        ``heatmap``.
    """
    paths = find_images(inputs)
    predictor = Predictor.from_directory(model_dir, device=device)
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
