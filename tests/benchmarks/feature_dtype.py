"""What storing backbone features in half precision costs in accuracy, on real images.

Trains the same configuration on features kept as fp32, fp16 and bf16, with several seeds each, and prints a Markdown
table of validation metrics: mean and standard deviation over the seeds, and in brackets the mean difference to fp32
with the same seed. It needs the images and weights that the project does not ship (``$SSN_SHARED``, or ``../shared``).

    python -m tests.benchmarks.feature_dtype --epochs 9 --seeds 3
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ssn.config import Config, DataConfig, ModelConfig, TrainConfig
from ssn.data.ingest import ingest
from ssn.data.manifest import load_manifest
from ssn.data.reader import SearchData, open_search_data
from ssn.engine import EpochReport, fit
from ssn.features import CategoryFeatures, extract, prepare_backbone

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "weights/resnet18.tv_in1k.layer1-3.safetensors"
DTYPES = ("fp32", "fp16", "bf16")
METRICS = ("val_loss", "val_image_auroc", "val_image_ap", "val_pixel_auroc", "val_pixel_ap", "val_aupro")


def open_images(shared: Path, category: str, folder: str) -> SearchData:
    """Ingest a category of the MVTec AD images in ``shared`` into ``folder``."""
    ingest(load_manifest("mvtec_ad"), shared / "data" / "mvtec_ad", folder, [category])
    return open_search_data(folder, "mvtec_ad", category)


def validate(config: Config, features: CategoryFeatures) -> dict[str, float]:
    """Metrics of the last epoch."""
    last: dict[str, float] = {}

    def report(epoch: EpochReport, save: Callable[..., None]) -> None:
        last.update(epoch.metrics)

    fit(config, features, report=report)
    return {name: last[name] for name in METRICS if name in last}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--category", default="toothbrush", help="of MVTec AD")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--draws", type=int, default=72, help="images per epoch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=1.0, help="share of the labelled defects whose masks are used")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    arguments = parser.parse_args()
    shared = Path(os.environ.get("SSN_SHARED", ROOT.parent / "shared"))
    config = Config(
        model=ModelConfig(backbone="resnet18", weights=str(shared / WEIGHTS)),
        data=DataConfig(image_size=(arguments.size, arguments.size)),
        train=TrainConfig(
            epochs=arguments.epochs,
            batch_size=8,
            draws_per_epoch=arguments.draws,
            lr_adaptor=5e-4,
            lr_heads=1e-3,
            supervision_ratio=arguments.ratio,
        ),
    )
    results: dict[str, list[dict[str, float]]] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="shards-") as folder:
        data = open_images(shared, arguments.category, folder)
        backbone = prepare_backbone(config, data)
        for dtype in DTYPES:
            stored = replace(config, data=replace(config.data, feature_dtype=dtype))
            features = extract(stored, data, backbone)
            sizes[dtype] = features.num_bytes
            results[dtype] = [
                validate(replace(stored, train=replace(stored.train, train_seed=seed)), features)
                for seed in range(arguments.seeds)
            ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()
    print(
        f"{arguments.category}, ResNet18 (ImageNet), {arguments.size} x {arguments.size}, {arguments.epochs} epochs of "
        f"{arguments.draws} images, supervision_ratio {arguments.ratio:g}, seeds 0-{arguments.seeds - 1}; "
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"commit {commit or 'unknown'}\n"
    )
    print("| metric | " + " | ".join(f"{dtype} ({sizes[dtype] / 1e6:.0f} MB)" for dtype in DTYPES) + " |")
    print("|:---|" + "---:|" * len(DTYPES))
    for name in (name for name in METRICS if name in results["fp32"][0]):
        values = {dtype: np.array([run[name] for run in results[dtype]]) for dtype in DTYPES}
        cells = [
            f"{values[dtype].mean():.4f} ± {values[dtype].std(ddof=min(1, arguments.seeds - 1)):.4f}"
            + (f" ({(values[dtype] - values['fp32']).mean():+.4f})" if dtype != "fp32" else "")
            for dtype in DTYPES
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
