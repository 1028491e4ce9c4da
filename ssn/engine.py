"""Training and validation of one model on the features of a frozen backbone.

The loop knows nothing of Ray: it is handed a ``report`` callable and, to resume, a checkpoint folder. Whoever calls it
decides where reports go and which checkpoints are kept.

Shape suffixes: B images of a batch, V = 2B views, H/W map size, N noisy positions, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ssn.bundle import CALIBRATION_PREFIX, OPTIMIZER_PREFIX, head_tensors
from ssn.checkpoint import load_checkpoint, save_checkpoint
from ssn.config import Config, Size
from ssn.data.reader import CategoryInfo
from ssn.data.sampling import Draws, epoch_draws, official_draws, supervised_subset
from ssn.distributed import ALONE, Workers
from ssn.errors import SSNError
from ssn.features import CategoryFeatures, SplitFeatures, num_flips, num_images
from ssn.losses import total_loss
from ssn.metrics import Metrics, image_metrics, pixel_metrics
from ssn.model import FoldedHeads, Noise, SuperSimpleNet, check_compiler, image_map
from ssn.synthesis import feature_noise, merge_masks, perlin_masks

TRAINED_ON = "trained_on"
"""Key in a checkpoint's meta data of :meth:`Trainer.trained_on`; those of earlier releases lack it."""

_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EpochReport:
    """What an epoch led to."""

    epoch: int
    """Epochs done, from 1."""
    metrics: dict[str, float]
    """``train_loss``; ``val_loss`` and ``val_<metric>`` if the validation split was looked at; ``lr_heads``;
    ``epoch_duration_s``, of which ``train_duration_s`` was training; ``duration_s`` since the run began, interruptions
    left out."""
    undefined: dict[str, str] = field(default_factory=dict)
    """What cannot be computed of the validation split, and why."""


class Report(Protocol):
    """Takes each epoch's report and a way to write a checkpoint, :meth:`Trainer.save`, which it may call or not."""

    def __call__(self, report: EpochReport, save: Callable[..., None], /) -> None: ...


@dataclass(frozen=True)
class Supervision:
    """Which defective images a run trains on, and with what (JIMS 2025).

    Without any the run is unsupervised, with labels alone weakly, with the masks of the whole pool fully supervised;
    in between, its supervision is mixed.
    """

    used: np.ndarray
    """Indices into the pool: images used with their masks."""
    weak: np.ndarray
    """Indices into the pool: images used with their label alone."""
    num_available: int
    """Images whose masks ratio 1 would use."""

    @property
    def drawn(self) -> np.ndarray:
        """Indices into the pool of all images used, increasing."""
        return np.union1d(self.used, self.weak)

    @property
    def supervised(self) -> bool:
        """Whether any real defect is used (clipped gradients, no stop-gradient, flips)."""
        return len(self.used) + len(self.weak) > 0


def choose_supervision(config: Config, pool: SplitFeatures) -> Supervision:
    """Apply ``train.supervision_ratio``, ``train.label_seed`` and ``train.weak_labels`` to the pool (ICPR 2024, section
    4.3; JIMS 2025)."""
    train = config.train
    used = supervised_subset(
        pool.defect_types, pool.has_mask_N.tolist(), pool.ids, train.supervision_ratio, train.label_seed
    )
    left = np.setdiff1d(np.arange(len(pool.ids)), used)
    return Supervision(
        used=used,
        weak=left if train.weak_labels == "use" else left[:0],
        num_available=int(pool.has_mask_N.sum()),
    )


def missing_labels(config: Config, info: CategoryInfo) -> str | None:
    """One line for the user where a configuration asks for labels that the category has none of; None: it has them."""
    pool, train = info.counts["pool"], config.train
    if train.weak_labels == "use" and pool.defective == 0:
        return f"{info.category}: the pool has no defective images, so train.weak_labels=use adds none"
    if train.supervision_ratio > 0 and pool.masks == 0:
        return f"{info.category}: the pool has no masks, so train.supervision_ratio is taken as 0"
    return None


class _AdamW(torch.optim.AdamW):
    """PyTorch's, without the wrappers that keep ``torch.compile`` out of it and import it for that: 4 s of
    every process in which something is trained. What they wrap is left as it is."""

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__  # type: ignore[attr-defined]
    load_state_dict = torch.optim.Optimizer.load_state_dict.__wrapped__  # type: ignore[attr-defined]
    step = torch.no_grad()(torch.optim.AdamW.step.__wrapped__)  # type: ignore[attr-defined]


class Trainer:
    """Network, optimiser and data of one run.

    Args:
        config: Settings; the backbone's must be those that ``features`` were computed with.
        features: Of one category.
        device: Where the heads train.
        workers: Those who train this network together, each with a trainer of its own and the same arguments.
    """

    def __init__(
        self,
        config: Config,
        features: CategoryFeatures,
        *,
        device: torch.device | str = "cpu",
        workers: Workers = ALONE,
    ) -> None:
        self.config = config.resolved()
        self.features = features
        self.workers = workers
        self.device = torch.device(device)
        if len(features.pool.ids) < num_images(self.config, features.info, "pool"):
            raise RuntimeError("the features lack pool images without masks; make them with train.weak_labels=use")
        if features.pool.num_flips < num_flips(self.config, "pool"):
            raise RuntimeError("the features lack flipped pool images; make them with train.flip_defects=true")
        self.supervision = choose_supervision(self.config, features.pool)
        self._drawn = self.supervision.drawn
        self._is_weak = np.isin(np.arange(len(features.pool.ids)), self.supervision.weak)
        train = self.config.train
        if train.compile:
            check_compiler(self.device)
        self.net = SuperSimpleNet(features.channels, self.config.model, generator_seed=train.train_seed).to(self.device)
        adaptor, heads = self.net.parameter_groups()
        self.optimizer: torch.optim.Optimizer = _AdamW(
            [
                {"params": adaptor, "lr": train.lr_adaptor, "weight_decay": train.weight_decay_adaptor},
                {"params": heads, "lr": train.lr_heads, "weight_decay": train.weight_decay_heads},
            ],
            fused=self.device.type == "cuda",
        )
        self.epochs_done = 0
        self.duration_s = 0.0
        # an image's part of its random numbers' key: its content, so that neither order nor company matters
        self._sample_keys = {
            split: np.array([int(i[:15], 16) for i in getattr(features, split).ids], np.int64)
            for split in ("train", "pool")
        }

    def run_epoch(self) -> float:
        """Train one epoch; returns the mean loss over its draws.

        Raises:
            SSNError: the loss is not finite.
        """
        train, epoch = self.config.train, self.epochs_done
        factor = learning_rate_factor(epoch, train.epochs, train.lr_gamma)
        for group, base in zip(self.optimizer.param_groups, (train.lr_adaptor, train.lr_heads), strict=True):
            group["lr"] = base * factor
        draws = self._draw(epoch)
        self.net.train()
        total, count = 0.0, len(draws.index)
        for start in range(0, count, train.batch_size):
            rows = np.arange(start, min(start + train.batch_size, count))
            total += self._step(draws, rows, epoch) * len(rows)
        self.epochs_done += 1
        mean = total / count
        if not np.isfinite(mean):
            raise SSNError(
                f"the training loss became {mean} in epoch {epoch + 1} "
                f"(noise_sigma {self.config.synthesis.noise_sigma}); lower the learning rates or the noise"
            )
        return mean

    def _draw(self, epoch: int) -> Draws:
        train, num_normal = self.config.train, len(self.features.train.ids)
        flips = num_flips(self.config, "pool")
        if train.sampling == "official":
            return official_draws(num_normal, len(self._drawn), num_flips=flips, seed=train.train_seed, epoch=epoch)
        return epoch_draws(
            num_normal,
            self.supervision.num_available,
            len(self._drawn),
            num_flips=flips,
            draws_per_epoch=train.draws_per_epoch,
            seed=train.train_seed,
            epoch=epoch,
        )

    def _step(self, draws: Draws, batch_rows: np.ndarray, epoch: int) -> float:
        """Train on a batch, of which this worker computes its slice; returns the loss of the whole."""
        train, synthesis, rows = self.config.train, self.config.synthesis, self.workers.slice(batch_rows)
        features_BhwC, truth_BHW, weak_B, sample_B = self._gather(draws, rows)
        # also where its mask marks no position of the smaller map
        defect_V = torch.from_numpy(draws.is_defect[rows]).to(self.device).repeat(2)
        views = len(rows)
        keys = np.empty((2 * views, 5), np.int64)
        keys[:, 0], keys[:, 1] = train.train_seed, epoch
        keys[:, 2], keys[:, 3] = np.tile(sample_B, 2), np.tile(draws.occurrence[rows], 2)
        keys[:views, 4], keys[views:, 4] = 0, 1
        synthetic_VHW = perlin_masks(
            keys,
            (truth_BHW.shape[1], truth_BHW.shape[2]),
            threshold=synthesis.perlin_threshold,
            rescale_empty=bool(synthesis.perlin_rescale_empty),
            device=self.device,
        )
        # where a weakly labelled image is defective, nobody knows: it gets no noise, says nothing about its positions,
        # and is defective; batch norms see it as any other
        weak_V11 = weak_B.repeat(2)[:, None, None]
        synthetic_VHW &= ~weak_V11
        noisy_VHW, mask_VHW = merge_masks(truth_BHW, synthetic_VHW)
        noise = Noise(
            rows_NC=feature_noise(keys, noisy_VHW, sum(self.features.channels), synthesis.noise_sigma),
            index_N=noisy_VHW.flatten().nonzero().squeeze(1),
        )
        supervised = self.supervision.supervised
        map_VHW, score_V = self.net.forward_train(
            [f.to(_DTYPE[train.precision]) for f in features_BhwC],
            noise,
            stop_grad=not supervised,
            noise_dtype=_DTYPE[train.noise_precision],
            workers=self.workers,
            compiled=train.compile,
        )
        loss = total_loss(
            map_VHW,
            score_V,
            mask_VHW,
            mask_VHW.flatten(1).any(1) | defect_V,
            truncation=train.truncation,
            gamma=train.focal_gamma,
            weight_BHW=~weak_V11 if self._is_weak.any() else None,
            all_reduce=self.workers.add_shares,
        ).total
        self.net.zero_grad(set_to_none=True)
        loss.backward()
        self.workers.add(*(p.grad for p in self.net.parameters() if p.grad is not None))
        if supervised:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), train.grad_clip_norm)
        self.optimizer.step()
        return float(loss.detach())

    def _gather(self, draws: Draws, rows: np.ndarray) -> tuple[list[Tensor], Tensor, Tensor, np.ndarray]:
        """Features, ground truth at map size, whether an image is weakly labelled (its ground truth is then empty,
        whatever its mask) and sample keys of a batch, in the order of the draws."""
        train, pool = self.features.train, self.features.pool
        defect_B = draws.is_defect[rows]
        image_B = draws.index[rows].copy()
        image_B[defect_B] = self._drawn[image_B[defect_B]]
        view_B = np.where(defect_B, image_B * pool.num_flips + draws.flip[rows], image_B * train.num_flips)

        normal_at, defect_at = np.flatnonzero(~defect_B), np.flatnonzero(defect_B)
        drawn = [(split, at) for split, at in ((train, normal_at), (pool, defect_at)) if len(at)]
        parts = [
            [*split.gather(view_B[at], self.device), torch.from_numpy(split.masks_VHW[view_B[at]]).to(self.device)]
            for split, at in drawn
        ]
        if not drawn:  # a batch of fewer images than workers: none of an image, for the shapes
            none_of_it = [m[:0] for m in train.gather(np.zeros(1, np.int64), self.device)]
            drawn = [(train, normal_at)]
            parts = [[*none_of_it, torch.from_numpy(train.masks_VHW[:0]).to(self.device)]]
        *maps, truth_BHW = _interleave(parts, [at for _, at in drawn])
        is_weak_B = np.zeros(len(rows), bool)
        is_weak_B[defect_B] = self._is_weak[image_B[defect_B]]
        weak_B = torch.from_numpy(is_weak_B).to(self.device)
        keys_B = np.empty(len(rows), np.int64)
        keys_B[~defect_B] = self._sample_keys["train"][image_B[~defect_B]]
        keys_B[defect_B] = self._sample_keys["pool"][image_B[defect_B]]
        return [m.float() for m in maps], truth_BHW & ~weak_B[:, None, None], weak_B, keys_B

    def validate(self, *, pixel: bool) -> tuple[float | None, Metrics]:
        """Loss and metrics on the validation split; None and no metrics where a published split has none.

        Workers score a slice each; the first computes what all of them return.

        Args:
            pixel: Whether to compute the pixel metrics too; they sort every pixel.

        Raises:
            SSNError: the split is empty, though the data's protocol provides for one.
        """
        split = self.features.validation
        if not split.ids and self.features.info.protocol == "official":
            names = [*image_metrics((), ()).undefined, *(pixel_metrics((), None).undefined if pixel else ())]
            return None, Metrics(undefined=dict.fromkeys(names, "the published split has no validation images"))
        if not split.ids:
            raise SSNError(f"{self.features.info.category} has an empty validation split; ingest more images")
        map_NHW, score_N = self._score_validation()
        return self.workers.compute_once(lambda: self._judge(map_NHW, score_N, pixel=pixel))

    def _score_validation(self) -> tuple[Tensor, Tensor]:
        """Maps and scores of the whole split, of which this worker computes its slice."""
        split = self.features.validation
        self.net.eval()
        folded: FoldedHeads | None = None
        maps, scores = [], []
        views = self.workers.slice(np.arange(len(split.ids)) * split.num_flips)
        for start in range(0, len(views), self.config.eval.batch_size):
            part = views[start : start + self.config.eval.batch_size]
            batch = [m.float() for m in split.gather(part, self.device)]
            folded = folded or self.net.fold(batch)
            map_BHW, score_B = self.net.score(batch, folded)
            maps.append(map_BHW)
            scores.append(score_B)
        if not maps:  # fewer images than workers
            maps.append(torch.zeros(0, *split.masks_VHW.shape[1:], device=self.device))
            scores.append(torch.zeros(0, device=self.device))
        return self.workers.gather(torch.cat(maps)), self.workers.gather(torch.cat(scores))

    def _judge(self, map_NHW: Tensor, score_N: Tensor, *, pixel: bool) -> tuple[float, Metrics]:
        split, train = self.features.validation, self.config.train
        # a defective image without a mask says nothing about its positions
        known = torch.from_numpy((split.labels_N == 0) | split.has_mask_N).to(self.device)
        loss = total_loss(
            map_NHW,
            score_N,
            torch.tensor(split.masks_VHW, device=self.device),  # a copy: features that are shared are read-only
            torch.tensor(split.labels_N, device=self.device),
            truncation=train.truncation,
            gamma=train.focal_gamma,
            weight_BHW=known.view(-1, 1, 1),
        ).total
        metrics = image_metrics(score_N.cpu().numpy(), split.labels_N)
        if pixel:
            at_eval_size = [
                evaluation_maps(part[None], self.config.data.image_size, self.config.eval.size)[0].cpu().numpy()
                for part in map_NHW[known]
            ]
            masks = split.eval_masks_N[known.cpu().numpy()] if split.has_mask_N.any() else None
            pixels = pixel_metrics(np.stack(at_eval_size), masks, fpr_limit=self.config.eval.aupro_fpr_limit)
            metrics = Metrics(metrics.values | pixels.values, metrics.undefined | pixels.undefined)
        return float(loss), metrics

    def save(self, directory: Path, *, resumable: bool = True) -> None:
        """Write the heads, a calibrated backbone's statistics and, if ``resumable``, the optimiser's state."""
        tensors = dict(self.net.state_dict())
        tensors |= {
            f"{CALIBRATION_PREFIX}{name}": torch.from_numpy(value)
            for name, value in self.features.backbone_calibration.items()
        }
        if resumable:
            for index, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"{OPTIMIZER_PREFIX}{index}.{name}": value for name, value in state.items()}
        info = self.features.info
        save_checkpoint(
            directory,
            tensors=tensors,
            config=self.config,
            meta={
                "dataset": info.dataset,
                "category": info.category,
                "search_fingerprint": info.search_fingerprint,
                "split_seed": info.split_seed,
                "backbone_digest": self.features.backbone_digest,
                "channels": list(self.features.channels),
                "epochs_done": self.epochs_done,
                "duration_s": self.duration_s,
                "masks_used": len(self.supervision.used),
                "weak_labels_used": len(self.supervision.weak),
                TRAINED_ON: self.trained_on(),
            },
        )

    def trained_on(self) -> list[str]:
        """Ids, sorted, of the images that the run trains on: normal ones, and defective ones with or without a mask."""
        pool = self.features.pool.ids
        return sorted({*self.features.train.ids, *(pool[index] for index in self._drawn)})

    def restore(self, directory: Path) -> None:
        """Continue from what :meth:`save` wrote.

        Raises:
            SSNError: it is not a checkpoint of this run.
        """
        checkpoint = load_checkpoint(directory)
        if checkpoint.config != self.config or checkpoint.meta["backbone_digest"] != self.features.backbone_digest:
            raise SSNError(f"checkpoint {directory} belongs to another configuration or backbone; start afresh")
        self.net.load_state_dict(head_tensors(checkpoint))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.tensors.items():
            if name.startswith(OPTIMIZER_PREFIX):
                index, _, key = name.removeprefix(OPTIMIZER_PREFIX).partition(".")
                state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.epochs_done = int(checkpoint.meta["epochs_done"])
        self.duration_s = float(checkpoint.meta["duration_s"])


def _interleave(parts: Sequence[list[Tensor]], places: Sequence[np.ndarray]) -> list[Tensor]:
    """Put parts of a batch, each a list of tensors with a row per element of its ``places``, where they belong."""
    if len(parts) == 1:
        return parts[0]
    count = sum(map(len, places))
    whole = [part.new_empty(count, *part.shape[1:]) for part in parts[0]]
    for part, place in zip(parts, places, strict=True):
        for target, rows in zip(whole, part, strict=True):
            target.index_copy_(0, torch.from_numpy(place).to(rows.device), rows)
    return whole


def learning_rate_factor(epoch: int, epochs: int, gamma: float) -> float:
    """Factor on both learning rates in ``epoch`` (from 0): gamma after 80 % of the epochs, its square after 90 %."""
    return gamma ** sum(epoch >= milestone for milestone in (int(0.8 * epochs), int(0.9 * epochs)))


def evaluation_maps(map_BHW: Tensor, image_size: Size, eval_size: Size) -> Tensor:
    """Map logits at the size that pixel metrics are computed at, smoothed at image size as in inference."""
    full = image_map(map_BHW, image_size)
    if eval_size == image_size:
        return full
    return torch.nn.functional.interpolate(full[:, None], size=eval_size, mode="bilinear", align_corners=False)[:, 0]


def fit(
    config: Config,
    features: CategoryFeatures,
    *,
    report: Report,
    resume_from: Path | None = None,
    pixel_epochs: Collection[int] = (),
    device: torch.device | str = "cpu",
    workers: Workers = ALONE,
) -> Trainer:
    """Train for ``train.epochs``; the last epoch's network is the result, never the best one's.

    Args:
        config: Settings.
        features: Of one category.
        report: Called after every epoch.
        resume_from: A folder that an earlier ``save`` wrote.
        pixel_epochs: Epochs, from 1, after which all metrics are computed, those of pixels too; always after the last.
            ``eval.every_n_epochs`` decides when those of images are.
        device: Where the heads train.
        workers: Those who train together; each calls this, with a ``report`` of its own.

    Raises:
        SSNError: see :class:`Trainer`; also a loss that is not finite.
    """
    trainer = Trainer(config, features, device=device, workers=workers)
    if resume_from is not None:
        trainer.restore(resume_from)
    while trainer.epochs_done < config.train.epochs:
        start = time.perf_counter()
        train_loss = trainer.run_epoch()
        train_s = time.perf_counter() - start
        epoch = trainer.epochs_done
        pixel = epoch in pixel_epochs or epoch == config.train.epochs
        looks = pixel or epoch % config.eval.every_n_epochs == 0
        val_loss, metrics = trainer.validate(pixel=pixel) if looks else (None, Metrics())
        epoch_duration_s = time.perf_counter() - start
        trainer.duration_s += epoch_duration_s
        values = {
            "train_loss": train_loss,
            **({} if val_loss is None else {"val_loss": val_loss}),
            "lr_heads": trainer.optimizer.param_groups[1]["lr"],
            "train_duration_s": train_s,
            "epoch_duration_s": epoch_duration_s,
            "duration_s": trainer.duration_s,
            **{f"val_{name}": value for name, value in metrics.values.items()},
        }
        undefined = {f"val_{name}": reason for name, reason in metrics.undefined.items()}
        report(EpochReport(epoch, values, undefined), trainer.save)
    return trainer
