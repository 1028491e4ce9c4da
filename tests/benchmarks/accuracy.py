"""What speed costs in accuracy, on real images: the plain formulation against the fast one and its lower precisions.

Trains the same configuration with several seeds in each way and prints a Markdown table of metrics on the test split:
mean and standard deviation over the seeds, and in brackets the mean difference to ``fp32`` with the same seed. It needs
the images and weights that the project does not ship (``$SSN_SHARED``, or ``../shared``).

* ``fp32``: the product's formulation, features kept as fp32.
* ``oracle``: the papers' formulation (``tests/oracle.py``) in training and validation, features kept as fp32.
* ``fp16 cache``, ``bf16 cache``: as ``fp32``, features kept in half precision; the first is the default.
* ``bf16 noise``, ``bf16``: as ``fp16 cache``, with ``train.noise_precision=bf16``, and ``train.precision=bf16`` too.

Each run is in ``--out`` as soon as it ends, and is not run again.

    python -m tests.benchmarks.accuracy --epochs 9 --seeds 3 --out accuracy.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ssn.backbone import Backbone
from ssn.config import Config, DataConfig, ModelConfig, SynthesisConfig, TrainConfig, digest, flatten
from ssn.data.ingest import ingest
from ssn.data.manifest import load_manifest
from ssn.data.reader import SearchData, open_search_data, open_test_data
from ssn.engine import fit
from ssn.evaluation import evaluate_samples
from ssn.features import CategoryFeatures, extract, prepare_backbone
from ssn.model import FoldedHeads, Noise, SuperSimpleNet
from ssn.predictor import Predictor
from tests import oracle
from tests.benchmarks.measure import describe_machine

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "weights/resnet18.tv_in1k.layer1-3.safetensors"
REFERENCE = "fp32"
WAYS: dict[str, dict[str, dict[str, str]]] = {
    REFERENCE: {"data": {"feature_dtype": "fp32"}},
    "oracle": {"data": {"feature_dtype": "fp32"}},
    "fp16 cache": {"data": {"feature_dtype": "fp16"}},
    "bf16 cache": {"data": {"feature_dtype": "bf16"}},
    "bf16 noise": {"data": {"feature_dtype": "fp16"}, "train": {"noise_precision": "bf16"}},
    "bf16": {"data": {"feature_dtype": "fp16"}, "train": {"noise_precision": "bf16", "precision": "bf16"}},
}
METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")


def open_images(shared: Path, category: str, folder: str) -> SearchData:
    """Ingest a category of the MVTec AD images in ``shared`` into ``folder``."""
    ingest(load_manifest("mvtec_ad"), shared / "data" / "mvtec_ad", folder, [category])
    return open_search_data(folder, "mvtec_ad", category)


@contextlib.contextmanager
def plain_formulation() -> Iterator[None]:
    """The network computes as the papers write it."""

    def forward_train(
        net: SuperSimpleNet, features_BhwC: Sequence[Tensor], noise: Noise, *, stop_grad: bool, **how: Any
    ) -> tuple[Tensor, Tensor]:
        return oracle.forward_train(net, features_BhwC, noise, stop_grad=stop_grad)

    @torch.no_grad()
    def score(net: SuperSimpleNet, features_BhwC: Sequence[Tensor], folded: FoldedHeads) -> tuple[Tensor, Tensor]:
        return oracle.forward_eval(net, features_BhwC)

    with (
        mock.patch.object(SuperSimpleNet, "forward_train", forward_train),
        mock.patch.object(SuperSimpleNet, "score", score),
    ):
        yield


def run(way: str, config: Config, features: CategoryFeatures, backbone: Backbone, folder: str) -> dict[str, Any]:
    """Train and score on the test split; its metrics, and the seconds of training."""
    start = time.perf_counter()
    with plain_formulation() if way == "oracle" else contextlib.nullcontext():
        net = fit(config, features, report=lambda report, save: None).net
    duration_s = time.perf_counter() - start
    test = open_test_data(folder, features.info.dataset, features.info.category)
    metrics = evaluate_samples(Predictor(net, backbone, config), test.stream()).metrics
    return {"duration_s": duration_s, **{name: metrics.values[name] for name in METRICS if name in metrics.values}}


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Ways side by side, a metric a row."""
    ways = [way for way in WAYS if results.get(way)]
    lines = ["| metric | " + " | ".join(ways) + " |", "|:---|" + "---:|" * len(ways)]
    for name in (name for name in METRICS if name in results[REFERENCE][0]):
        values = {way: np.array([run[name] for run in results[way]]) for way in ways}
        cells = [
            f"{values[way].mean():.4f} ± {values[way].std(ddof=min(1, len(values[way]) - 1)):.4f}"
            + (f" ({(values[way] - values[REFERENCE]).mean():+.4f})" if way != REFERENCE else "")
            for way in ways
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--category", default="toothbrush", help="of MVTec AD")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--draws", type=int, default=72, help="images per epoch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=1.0, help="share of the labelled defects whose masks are used")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--sigma", type=float, default=0.015, help="synthesis.noise_sigma; the paper's suits WRN50")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them, in commas; fp32 is always run")
    parser.add_argument("--out", type=Path, default=Path("build/accuracy.json"), help="runs that are done")
    arguments = parser.parse_args()
    ways = [way for way in WAYS if way == REFERENCE or way in arguments.ways.split(",")]
    shared = Path(os.environ.get("SSN_SHARED", ROOT.parent / "shared"))
    config = Config(
        model=ModelConfig(backbone="resnet18", weights=str(shared / WEIGHTS)),
        data=DataConfig(image_size=(arguments.size, arguments.size)),
        synthesis=SynthesisConfig(noise_sigma=arguments.sigma),
        train=TrainConfig(
            epochs=arguments.epochs,
            batch_size=8,
            draws_per_epoch=arguments.draws,
            lr_adaptor=5e-4,
            lr_heads=1e-3,
            supervision_ratio=arguments.ratio,
        ),
    )
    done: dict[str, dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="shards-") as folder:
        data = open_images(shared, arguments.category, folder)
        backbone = prepare_backbone(config, data)

        @functools.cache
        def features_as(dtype: str) -> CategoryFeatures:
            stored = replace(config, data=replace(config.data, feature_dtype=dtype))  # type: ignore[arg-type]
            return extract(stored, data, backbone)

        for seed in range(arguments.seeds):
            for way in ways:
                changes = WAYS[way]
                settings = replace(
                    config,
                    data=replace(config.data, **changes["data"]),  # type: ignore[arg-type]
                    train=replace(config.train, train_seed=seed, **changes.get("train", {})),  # type: ignore[arg-type]
                )
                key = digest({"way": way, "category": arguments.category, "config": flatten(settings)})
                if key not in done:
                    features = features_as(settings.data.feature_dtype)
                    done[key] = run(way, settings, features, backbone, folder)
                    arguments.out.parent.mkdir(parents=True, exist_ok=True)
                    partial = arguments.out.with_suffix(".part")
                    partial.write_text(json.dumps(done, indent=1))
                    partial.replace(arguments.out)
                results[way].append(done[key])
                print(f"seed {seed}, {way}: " + json.dumps(done[key]), file=sys.stderr, flush=True)
    machine = describe_machine(torch.get_num_threads())
    print(
        f"{arguments.category}, ResNet18 (ImageNet), {arguments.size} x {arguments.size}, {arguments.epochs} epochs of "
        f"{arguments.draws} images, supervision_ratio {arguments.ratio:g}, noise_sigma {arguments.sigma:g}, "
        f"seeds 0-{arguments.seeds - 1}; " + ", ".join(f"{name} {value}" for name, value in machine.items()) + "\n"
    )
    print("\n".join(table(results)), flush=True)


if __name__ == "__main__":
    main()
