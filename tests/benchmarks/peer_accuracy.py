"""Our accuracy against anomalib's SuperSimpleNet: trained side by side, unsupervised, and scored by the same code.

``python -m tests.benchmarks.peer_accuracy --data SHARDS --weights FILE --out DIR``: for every seed, both sides start
from the same weights and take as many steps on the same images, at the same sigma and otherwise at the settings that
both have by default (Perlin threshold 0.2, learning rates and their schedule), in float32. What a side's final network
says of the test images is kept per seed, so that an interrupted comparison goes on where it was when started again.

With ``--draws shared`` both sides also get the same images in the same order, the same Perlin masks and the same noise,
ours, and neither trains the biases in front of batch norms: their gradient is nothing but rounding, which AdamW makes
steps of. What differs then is the implementation, and the few images of a test split can tell a small loss. With
``own``, each draws its own, and many runs would be needed for the same certainty.

Intervals resample images and seeds: of the test images, defective and normal ones apart, both sides get the same; a
seed brings the runs of both sides. How much runs differ is known from few seeds only, and so underestimated.

Shape suffixes: N images, S seeds, R resamples, T thresholds, H and W height and width of an image.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage

from ssn.backbone import Backbone
from ssn.config import NUMERICS_VERSION, Config, DataConfig, EvalConfig, ModelConfig, SynthesisConfig, TrainConfig
from ssn.data.reader import SearchData, open_search_data, open_test_data
from ssn.data.sampling import epoch_draws
from ssn.engine import Trainer
from ssn.errors import SSNError
from ssn.evaluation import evaluate_samples
from ssn.features import extract, load_image_batches, prepare_backbone
from ssn.metrics import image_metrics, pixel_metrics, resampled_image_metrics, stratified_counts
from ssn.model import SuperSimpleNet, map_size
from ssn.predictor import Predictor
from ssn.streaming import feature_sizes
from ssn.synthesis import feature_noise, perlin_masks
from tests.benchmarks.measure import describe_machine
from tests.benchmarks.our_side import VARIANT

SideName = Literal["ours", "anomalib"]
SIDES: tuple[SideName, ...] = ("ours", "anomalib")
METRICS = ("image_auroc", "image_ap", "pixel_auroc", "aupro")
BIASES_BEFORE_NORMS = ("adaptor.bias", "seg_conv.bias", "cls_conv.bias")
"""Of our heads in anomalib's default variant, whose classification head does not see the adaptor."""
MARGIN = 0.01
"""The loss that is to be excluded: one point."""
_RESAMPLES_AT_A_TIME = 50


@dataclass(frozen=True)
class Outcome:
    """What a trained network says of the test images."""

    ids: tuple[str, ...]
    labels_N: np.ndarray
    scores_N: np.ndarray
    maps_NHW: np.ndarray
    masks_NHW: np.ndarray
    """Bool; what is defective, of images of which that is known."""
    known_N: np.ndarray
    """Bool; false for defective images without a mask."""

    def metrics(self, fpr_limit: float) -> dict[str, float]:
        """:data:`METRICS`."""
        pixels = pixel_metrics(self.maps_NHW[self.known_N], self.masks_NHW[self.known_N], fpr_limit=fpr_limit)
        values = image_metrics(self.scores_N, self.labels_N).values | pixels.values
        return {name: values[name] for name in METRICS}


@dataclass(frozen=True)
class Difference:
    """Of the two sides in one metric: ours less theirs."""

    mean: float
    low: float
    high: float

    @property
    def excludes_loss(self) -> bool:
        """Whether the interval lies above a loss of :data:`MARGIN`."""
        return self.low > -MARGIN


class PixelStatistics:
    """What pixel AUROC and AUPRO of resampled images need of each image, so that no resample counts pixels again.

    Every curve's points are sums over images, at thresholds that are scores of defective pixels. Exact, with ties.
    """

    def __init__(self, maps_NHW: np.ndarray, masks_NHW: np.ndarray) -> None:
        ascending_T = np.unique(maps_NHW[masks_NHW])
        shape = (len(maps_NHW), len(ascending_T))
        self._false, self._false_above, self._true, self._overlap = (np.zeros(shape) for _ in range(4))
        self._regions_N = np.zeros(len(maps_NHW))
        for i, (map_HW, mask_HW) in enumerate(zip(maps_NHW, masks_NHW, strict=True)):
            normals = np.sort(map_HW[~mask_HW])
            self._false[i] = len(normals) - np.searchsorted(normals, ascending_T, side="left")[::-1]
            self._false_above[i] = len(normals) - np.searchsorted(normals, ascending_T, side="right")[::-1]
            regions_HW, self._regions_N[i] = ndimage.label(mask_HW, structure=np.ones((3, 3)))
            region = regions_HW[mask_HW]
            place = len(ascending_T) - 1 - np.searchsorted(ascending_T, map_HW[mask_HW])
            self._true[i] = np.bincount(place, minlength=shape[1]).cumsum()
            self._overlap[i] = np.bincount(place, 1 / np.bincount(region)[region], shape[1]).cumsum()
        self._normals_N = np.count_nonzero(~masks_NHW, axis=(1, 2))

    def resampled(self, count_RN: np.ndarray, fpr_limit: float) -> dict[str, np.ndarray]:
        """``pixel_auroc`` and ``aupro``, each ``[R]``, of resamples that count each image so many times."""
        found: dict[str, list[np.ndarray]] = {"pixel_auroc": [], "aupro": []}
        for start in range(0, len(count_RN), _RESAMPLES_AT_A_TIME):
            count = count_RN[start : start + _RESAMPLES_AT_A_TIME].astype(float)
            normals = (count @ self._normals_N)[:, None]
            above, at = count @ self._false_above / normals, count @ self._false / normals
            true = count @ self._true
            found["pixel_auroc"].append(_area(above, at, true / true[:, -1:], 1.0))
            overlap = count @ self._overlap / (count @ self._regions_N)[:, None]
            found["aupro"].append(_area(above, at, overlap, fpr_limit))
        return {name: np.concatenate(parts) for name, parts in found.items()}


def _area(above_RT: np.ndarray, at_RT: np.ndarray, share_RT: np.ndarray, limit: float) -> np.ndarray:
    """Area up to ``limit``, over it, under curves that climb from share to share between ``above`` and ``at``."""
    before_RT = np.roll(share_RT, 1, axis=1)
    before_RT[:, 0] = 0
    width = at_RT - above_RT
    inside = np.clip(limit - above_RT, 0, width)
    climbed = np.divide(inside, width, out=np.zeros_like(width), where=width > 0) * (share_RT - before_RT)
    climbing = (inside * (before_RT + climbed / 2)).sum(axis=1)
    following = np.append(above_RT[:, 1:], np.ones((len(at_RT), 1)), axis=1)
    level = (np.clip(limit - at_RT, 0, following - at_RT) * share_RT).sum(axis=1)
    area: np.ndarray = (climbing + level) / limit
    return area


def paired_differences(
    ours: Sequence[Outcome],
    theirs: Sequence[Outcome],
    *,
    fpr_limit: float,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Mean difference over seeds and its percentile interval over resampled images and seeds, by metric.

    Args:
        ours: By seed.
        theirs: By the same seeds, of the same images.
        fpr_limit: Of AUPRO.
        level: Share of the resamples inside the interval.
        resamples: How many.
        seed: Of the resamples.

    Raises:
        ValueError: the two do not pair.
    """
    first = ours[0]
    if len(ours) != len(theirs) or any(outcome.ids != first.ids for outcome in (*ours, *theirs)):
        raise ValueError("the two sides must have the same seeds and the same images")
    rng = np.random.default_rng(seed)
    count_RN = stratified_counts(first.labels_N, resamples, rng)
    seed_RS = rng.multinomial(len(ours), np.full(len(ours), 1 / len(ours)), size=resamples) / len(ours)

    def resampled(outcome: Outcome) -> np.ndarray:
        of_images = resampled_image_metrics(outcome.scores_N, outcome.labels_N, count_RN)
        known = outcome.known_N
        of_pixels = PixelStatistics(outcome.maps_NHW[known], outcome.masks_NHW[known])
        values = of_images | of_pixels.resampled(count_RN[:, known], fpr_limit)
        return np.stack([values[name] for name in METRICS])

    differences_SMR = [resampled(own) - resampled(their) for own, their in zip(ours, theirs, strict=True)]
    resampled_MR = np.einsum("smr,rs->mr", np.stack(differences_SMR), seed_RS)
    means = [(own.metrics(fpr_limit), their.metrics(fpr_limit)) for own, their in zip(ours, theirs, strict=True)]
    bounds = ((1 - level) / 2, (1 + level) / 2)
    found = {}
    for name, values_R in zip(METRICS, resampled_MR, strict=True):
        low, high = np.quantile(values_R, bounds)
        found[name] = Difference(
            statistics.fmean(own[name] - their[name] for own, their in means), float(low), float(high)
        )
    return found


# --- training ---


@dataclass(frozen=True)
class Options:
    """What the command line decides."""

    data: str
    dataset: str
    category: str
    backbone: str
    weights: str
    size: int
    """Side of the images, pixels."""
    epochs: int
    batch: int
    sigma: float
    draws: Literal["shared", "own"]

    def config(self, num_images: int, seed: int) -> Config:
        """Our settings: the defaults, but for anomalib's variant, precision and length of an epoch."""
        return Config(
            model=ModelConfig(variant=VARIANT, backbone=self.backbone, weights=self.weights),
            data=DataConfig(image_size=(self.size, self.size), feature_dtype="fp32"),
            eval=EvalConfig(size=(self.size, self.size)),
            synthesis=SynthesisConfig(noise_sigma=self.sigma, perlin_threshold=0.2),
            train=TrainConfig(epochs=self.epochs, batch_size=self.batch, draws_per_epoch=num_images, train_seed=seed),
        )


class Comparison:
    """One category with its backbone, which both sides share."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.data: SearchData = open_search_data(options.data, options.dataset, options.category)
        self.num_images = self.data.info.counts["train"].normal
        self.backbone: Backbone = prepare_backbone(self.config(0), self.data)

    @property
    def held(self) -> tuple[str, ...]:
        """Parameters that neither side trains."""
        return BIASES_BEFORE_NORMS if self.options.draws == "shared" else ()

    def config(self, seed: int) -> Config:
        return self.options.config(self.num_images, seed)

    def settings(self) -> dict[str, Any]:
        """What an outcome depends on, besides side and seed."""
        return {
            "dataset": self.options.dataset,
            "category": self.options.category,
            "search_fingerprint": self.data.info.search_fingerprint,
            "test_fingerprint": self.data.info.test_fingerprint,
            "backbone": self.options.backbone,
            "weights_digest": self.backbone.digest,
            "size": self.options.size,
            "epochs": self.options.epochs,
            "batch": self.options.batch,
            "sigma": self.options.sigma,
            "draws": self.options.draws,
            "numerics_version": NUMERICS_VERSION,
            "anomalib": metadata.version("anomalib"),
        }

    def run(self, side: SideName, seed: int) -> Outcome:
        """Train a side and score the test split."""
        net = self._train_ours(seed) if side == "ours" else self._train_anomalib(seed)
        predictor = Predictor(net, self.backbone, self.config(seed))
        test = open_test_data(self.options.data, self.options.dataset, self.options.category)
        found = evaluate_samples(predictor, test.stream())
        has_mask = np.array([mask is not None for mask in found.masks])
        empty = np.zeros(found.maps.shape[1:], bool)
        return Outcome(
            ids=found.ids,
            labels_N=found.labels,
            scores_N=found.scores,
            maps_NHW=found.maps,
            masks_NHW=np.stack([empty if mask is None else mask for mask in found.masks]),
            known_N=(found.labels == 0) | has_mask,
        )

    def _train_ours(self, seed: int) -> SuperSimpleNet:
        config = self.config(seed)
        trainer = Trainer(config, extract(config, self.data, self.backbone))
        for name in self.held:
            trainer.net.get_parameter(name).requires_grad_(False)
        for _ in self._epochs("ours", seed):
            say(f"loss {trainer.run_epoch():.4f}")
        return trainer.net

    def _train_anomalib(self, seed: int) -> SuperSimpleNet:
        from tests.benchmarks.anomalib_side import AnomalibSide  # half a minute

        config = self.config(seed)
        net = SuperSimpleNet(self.backbone.channels, config.model, generator_seed=seed)
        peer = AnomalibSide(
            config.model,
            threshold=config.synthesis.perlin_threshold,
            backbone_state=self.backbone.net.state_dict(),
            heads_state=net.state_dict(),
            epochs=config.train.epochs,
            noise_sigma=config.synthesis.noise_sigma,
        )
        peer.hold(self.held)
        loaded = list(load_image_batches(self.data.stream("train"), config))
        images = torch.cat([x_BCHW for _, x_BCHW in loaded])
        sample_keys = np.array([int(sample.id[:15], 16) for batch, _ in loaded for sample in batch], np.int64)
        torch.manual_seed(seed)
        for epoch in self._epochs("anomalib", seed):
            if self.options.draws == "own":
                loss = peer.run_epoch(images, config.train.batch_size)
            else:
                loss = peer.run_batches(self._shared_batches(config, images, sample_keys, epoch - 1))
            say(f"loss {loss:.4f}")
        net.load_state_dict(peer.heads_state())
        return net

    def _shared_batches(
        self, config: Config, images_NCHW: torch.Tensor, sample_key_N: np.ndarray, epoch: int
    ) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
        """Images, noise and masks of an epoch (from 0), as ``ssn.engine`` draws them without defective images."""
        train, synthesis = config.resolved().train, config.resolved().synthesis
        draws = epoch_draws(
            len(images_NCHW),
            0,
            0,
            num_flips=1,
            draws_per_epoch=train.draws_per_epoch,
            seed=train.train_seed,
            epoch=epoch,
        )
        map_HW = map_size([size for _, size in feature_sizes(config, self.backbone, "cpu")])
        for start in range(0, len(draws.index), train.batch_size):
            image_B = draws.index[start : start + train.batch_size]
            keys = np.empty((2 * len(image_B), 5), np.int64)
            keys[:, 0], keys[:, 1], keys[:, 2] = train.train_seed, epoch, np.tile(sample_key_N[image_B], 2)
            keys[:, 3] = np.tile(draws.occurrence[start : start + train.batch_size], 2)
            keys[:, 4] = np.repeat([0, 1], len(image_B))
            perlin_VHW = perlin_masks(
                keys,
                map_HW,
                threshold=synthesis.perlin_threshold,
                rescale_empty=bool(synthesis.perlin_rescale_empty),
                device="cpu",
            )
            noise_VHWC = torch.zeros(*perlin_VHW.shape, sum(self.backbone.channels))
            noise_VHWC[perlin_VHW] = feature_noise(keys, perlin_VHW, noise_VHWC.shape[3], synthesis.noise_sigma)
            yield images_NCHW[image_B], (noise_VHWC.permute(0, 3, 1, 2), perlin_VHW[:, None].float())

    def _epochs(self, side: SideName, seed: int) -> Iterator[int]:
        """Counts epochs, with a line for each."""
        start = time.perf_counter()
        for epoch in range(1, self.options.epochs + 1):
            say(f"{side}, seed {seed}: epoch {epoch} of {self.options.epochs}, ", end="")
            yield epoch
        say(f"{side}, seed {seed}: trained in {time.perf_counter() - start:.0f} s")


# --- what is kept ---


def write_outcome(path: Path, outcome: Outcome, settings: Mapping[str, Any]) -> None:
    """Keep an outcome; a reader sees the whole file or none."""
    partial = path.with_name(f"partial-{path.name}")
    with partial.open("wb") as file:
        np.savez_compressed(
            file,
            settings=json.dumps(settings, sort_keys=True),
            ids=np.array(outcome.ids),
            labels=outcome.labels_N,
            scores=outcome.scores_N,
            maps=outcome.maps_NHW,
            masks=outcome.masks_NHW,
            known=outcome.known_N,
        )
    os.replace(partial, path)


def read_outcome(path: Path, settings: Mapping[str, Any]) -> Outcome:
    """Read what :func:`write_outcome` wrote.

    Raises:
        SSNError: under other settings.
    """
    with np.load(path) as content:
        kept = json.loads(str(content["settings"]))
        other = [name for name in settings if kept.get(name) != settings[name]]
        if other:
            raise SSNError(
                f"{path} was made with {other[0]} {kept.get(other[0])}, not {settings[other[0]]}; "
                "choose another --out, or remove it"
            )
        return Outcome(
            ids=tuple(content["ids"].tolist()),
            labels_N=content["labels"],
            scores_N=content["scores"],
            maps_NHW=content["maps"],
            masks_NHW=content["masks"],
            known_N=content["known"],
        )


def to_markdown(result: Mapping[str, Any]) -> str:
    """A table in points, and what its intervals exclude."""
    settings, counts = result["settings"], result["counts"]
    lines = [
        f"{settings['dataset']}/{settings['category']}, {settings['backbone']}, {settings['size']} x {settings['size']}"
        f" pixels, unsupervised: {counts['train']} training images, epochs {settings['epochs']}, batch "
        f"{settings['batch']}, sigma {settings['sigma']:g}, {settings['draws']} draws, seeds {len(result['seeds'])}; "
        f"test images: {counts['normal']} normal, {counts['defective']} defective; anomalib {settings['anomalib']}.",
        "In points; mean ± standard deviation over seeds; the interval is of the difference, over images and seeds.",
        "",
        "| metric | ours | anomalib | difference | 95 % interval | excludes a loss of more than 1 |",
        "|:---|---:|---:|---:|:---|:---|",
    ]
    for name, row in result["metrics"].items():
        sides = [_mean_and_std(row[side]["values"]) for side in SIDES]
        interval = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
        verdict = "yes" if row["excludes_loss"] else "no"
        lines.append(f"| {name} | {' | '.join(sides)} | {100 * row['difference']:+.1f} | {interval} | {verdict} |")
    return "\n".join(lines) + "\n"


def _mean_and_std(values: Sequence[float]) -> str:
    std = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{std}"


def summarise(
    outcomes: Mapping[SideName, Sequence[Outcome]], *, fpr_limit: float, resamples: int
) -> dict[str, dict[str, Any]]:
    """By metric: both sides' values by seed and their means, and the difference of the means with its interval."""
    differences = paired_differences(outcomes["ours"], outcomes["anomalib"], fpr_limit=fpr_limit, resamples=resamples)
    values = {side: [outcome.metrics(fpr_limit) for outcome in outcomes[side]] for side in SIDES}
    table: dict[str, dict[str, Any]] = {}
    for name, difference in differences.items():
        table[name] = {
            "difference": difference.mean,
            "low": difference.low,
            "high": difference.high,
            "excludes_loss": difference.excludes_loss,
        }
        for side in SIDES:
            of_seeds = [found[name] for found in values[side]]
            table[name][side] = {"mean": statistics.fmean(of_seeds), "values": of_seeds}
    return table


def say(text: str, end: str = "\n") -> None:
    print(text, file=sys.stderr, flush=True, end=end)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="shards")
    parser.add_argument("--dataset", default="mvtec_ad")
    parser.add_argument("--category", default="toothbrush")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", required=True, help="model.weights")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--epochs", type=int, default=15, help="15: half an hour with ResNet18 on two cores")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sigma", type=float, default=0.015, help="of the noise; the paper's suits WideResNet50")
    parser.add_argument("--draws", choices=("shared", "own"), default="shared", help="images' order, masks and noise")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="folder of the outcomes and of results.json and .md")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("anomalib") is None:
        parser.error("anomalib is not installed; pip install -e '.[bench]'")
    warnings.simplefilter("ignore")  # other people's deprecations; the test suite makes ours errors
    torch.set_num_threads(arguments.threads)
    names = ("data", "dataset", "category", "backbone", "weights", "size", "epochs", "batch", "sigma", "draws")
    comparison = Comparison(Options(**{name: getattr(arguments, name) for name in names}))
    settings = comparison.settings()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    outcomes: dict[SideName, list[Outcome]] = {side: [] for side in SIDES}
    for seed in range(arguments.seeds):
        for side in SIDES:
            file = out / f"{side}-seed{seed}.npz"
            if not file.exists():
                write_outcome(file, comparison.run(side, seed), settings)
            outcomes[side].append(read_outcome(file, settings))
    first = outcomes["ours"][0]
    fpr_limit = comparison.config(0).eval.aupro_fpr_limit
    result = {
        "stamp": describe_machine(arguments.threads),
        "settings": settings,
        "seeds": list(range(arguments.seeds)),
        "counts": {
            "train": comparison.num_images,
            "normal": int((first.labels_N == 0).sum()),
            "defective": int((first.labels_N > 0).sum()),
        },
        "metrics": summarise(outcomes, fpr_limit=fpr_limit, resamples=arguments.resamples),
    }
    (out / "results.json").write_text(json.dumps(result, indent=1))
    table = to_markdown(result)
    (out / "results.md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    try:
        main()
    except SSNError as error:
        sys.exit(f"error: {error}")
